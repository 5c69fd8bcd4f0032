"""`megasora web RUN`: a page in the browser of this machine to sample clips with a run."""
