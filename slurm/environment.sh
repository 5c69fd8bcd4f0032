# shellcheck shell=bash
# What the batch scripts have in common; they source it where they were submitted, the folder of the project.

# Your site: modules, network interfaces, another Python, a container. Not in git; slurm/README.md has an example.
container=()
python=$PWD/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)
# shellcheck source=/dev/null
[[ -f slurm/site.sh ]] && source slurm/site.sh

# Python looks for modules where it is installed only: a file named torch.py in the working directory stays a file.
export PYTHONSAFEPATH=1
# Compiled kernels on the node's own disk: thousands of processes that compile into one shared folder trip each other up.
export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/megasora-triton-$UID

on_node() { # a Python module in the container, if there is one
  "${container[@]}" "$python" "$@"
}

say() { echo "[$(date +%FT%T)] $SLURM_JOB_NAME $SLURM_JOB_ID: $*"; }
