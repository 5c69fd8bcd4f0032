# shellcheck shell=bash
# Settings shared by the batch scripts, which source it from the project's folder, where they were submitted.

# Your site: modules, network interfaces, another Python, a container. Not in git; slurm/README.md has an example.
container=()
python=$PWD/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)
# shellcheck source=/dev/null
[[ -f slurm/site.sh ]] && source slurm/site.sh

# Python does not import modules from the working directory: a file named torch.py there does no harm.
export PYTHONSAFEPATH=1
# Compiled kernels go to the node's own disk: thousands of processes must not write into one shared cache.
export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/megasora-triton-$UID

run_python() { # in the container, if there is one
  "${container[@]}" "$python" "$@"
}

log() { echo "[$(date +%FT%T)] $SLURM_JOB_NAME $SLURM_JOB_ID: $*"; }
