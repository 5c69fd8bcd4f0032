#!/usr/bin/env bash
# Gathers wheels for a GPU machine that has PyTorch for CUDA but no network: tools/gpu/prepare.sh
#
# In: constraints.txt, and the package index of this machine. Out: .whl/ in the repository's root, which git ignores:
# wheels for CPython 3.12 on Linux x86-64. PyTorch, Triton, numpy and what they require are never gathered: they stay as
# the other machine has them. Copy the working tree with .whl/ there and run `make gpu PYTHON=python3`.
#
#   PYTHON_VERSION=3.12   of the other machine
#   LIMIT_MIB=64          largest size of the working tree and .whl/ together
#   HAS="..."             packages that the other machine has; other requirements of the wheels are an error
set -euo pipefail
if (($#)); then # it takes no arguments
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
folder=.whl

# What training, ingest and sampling import and a plain PyTorch image lacks. DeepSpeed is published as source only.
wheels=(hjson pydantic pydantic-core annotated-types typing-inspection webdataset braceexpand omegaconf av zlib-ng blake3)
sources=(deepspeed)
has=${HAS:-torch triton numpy packaging psutil tqdm typing-extensions pyyaml pillow einops msgpack ninja py-cpuinfo \
  fsspec rich safetensors matplotlib pytest pytest-timeout pytest-xdist hypothesis aiohttp transformers}

pinned() { # NAME: NAME==VERSION of constraints.txt
  grep -m1 "^$1==" constraints.txt || { echo "prepare: constraints.txt has no version of $1" >&2; return 1; }
}

# pip matches platform tags exactly: every glibc up to 2.39, and the legacy names.
platforms=()
for ((minor = 39; minor >= 17; minor--)); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
for name in manylinux2014 manylinux2010 manylinux1; do platforms+=(--platform "${name}_x86_64"); done

requirements=()
for name in "${wheels[@]}"; do requirements+=("$(pinned "$name")"); done
for name in "${sources[@]}"; do pinned "$name" >/dev/null; done
rm -rf "$folder"
mkdir "$folder"
echo "==> ${#requirements[@]} wheels for Python $version"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
  "${platforms[@]}" --dest "$folder" "${requirements[@]}"
for name in "${sources[@]}"; do
  echo "==> $name from source"
  DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-binary "$name" --wheel-dir "$folder" "$(pinned "$name")"
done

# shellcheck disable=SC2086  # $has is a list
"$python" "$here/check_wheels.py" "$folder" "$version" "${LIMIT_MIB:-64}" $has
echo "==> ready: copy the working tree with $folder/ to the GPU machine, then: make gpu PYTHON=python3"
