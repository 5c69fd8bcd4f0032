"""What tests and demonstrations share: procedural clips, comparisons, process spawning."""
