"""What a person sees of a run and of the machine: metrics, progress, reports, the doctor."""
