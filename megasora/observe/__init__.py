"""What shows a run, a dataset or a machine to a person: report, status, inspection of shards, doctor."""
