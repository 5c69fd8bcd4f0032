"""Clips to shards to packs."""
