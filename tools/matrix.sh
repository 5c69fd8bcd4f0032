#!/usr/bin/env bash
# Runs the test suite on the other pair of PyTorch and Triton that MegaSora supports: tools/matrix.sh [pytest arguments]
#
# constraints.txt pins torch 2.13 and triton 3.7, and `make test` runs on these. GPU machines often have torch 2.11 and
# triton 3.6. This script makes an environment with that pair beside .venv, once, and runs pytest in it.
# The CUDA build of torch 2.11 needs 5 GB of disk; a GPU is not needed.
#
#   tools/matrix.sh                                   the whole suite
#   tools/matrix.sh tests/kernels tests/model         some of it
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit
fi
cd "$(dirname "$0")/.."

# triton 3.6's interpreter fails with numpy >= 2.4 ("only 0-dimensional arrays can be converted to Python scalars").
# torch 2.11 requires setuptools < 82.
versions=(torch==2.11.0 triton==3.6.0 numpy==2.3.5 setuptools==81.0.0)
venv=.venv-torch2.11

if [[ ! -e $venv/.installed || setup.py -nt $venv/.installed || constraints.txt -nt $venv/.installed ]]; then
  python=$(command -v python3.11 || command -v python3)
  "$python" tools/install.py --venv "$venv" --replace "${versions[@]}"
  touch "$venv/.installed"
fi
if (($# == 0)); then
  set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
fi
OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest "$@"
