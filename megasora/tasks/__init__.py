"""Tasks: what a training step computes, one file per kind of model that `megasora.trainer` trains."""
