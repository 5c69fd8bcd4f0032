"""Learning rate schedule and EMA weights."""
