#!/usr/bin/env bash
# Runs on a GPU what no CPU can show, first what decides most, within a time given: `make gpu` calls it.
#
# In: a Python whose PyTorch sees a GPU (PYTHON), and the wheels of prepare.sh in .whl/ if packages are missing.
# Out, in $OUT (default benchmarks/results/gpu, of a rehearsal runs/gpu-rehearsal), each as soon as it is measured:
# environment.json, stages.jsonl (exit code and seconds of each stage), attention.json, optimizer.json, wan.json,
# wan-any-order.json, small-4k.json and small-12k.json (profiles), kernels.json, float8.json, overlap.json,
# runs.json (speed, and which runs are bitwise equal); raw/: log.txt, metrics and reports of the runs, a sample.
#
#   MINUTES=9      for everything; a stage ends at its own limit or when these are over
#   STAGES="..."   some of: attention checks optimizer wan small kernels bench float8 resume overlap
#   REHEARSE=1     on a CPU: interpreted kernels, everything tiny, each command once; shows that all are right
set -uo pipefail
SECONDS=0
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=${PYTHON:-python3}
export REHEARSE=${REHEARSE:-}
out=${OUT:-$PWD/$([[ -n $REHEARSE ]] && echo runs/gpu-rehearsal || echo benchmarks/results/gpu)}
minutes=${MINUTES:-9}
all="attention checks optimizer wan small kernels bench float8 resume overlap"
stages=${STAGES:-$all}
export PYTHONUNBUFFERED=1
for name in $stages; do
  [[ " $all " == *" $name "* ]] || { echo "gpu: STAGES has no stage $name; it is some of: $all" >&2; exit 2; }
done
[[ $minutes =~ ^[1-9][0-9]?$ ]] || { echo "gpu: MINUTES=$minutes must be a whole number from 1 to 99" >&2; exit 2; }
budget=$((60 * minutes - 10)) # the rest is for packing the results
[[ -n $REHEARSE ]] && budget=3600
if [[ -z $REHEARSE ]] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu: the PyTorch of $python sees no GPU; REHEARSE=1 rehearses on a CPU" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'kill "${clips_job:-}" 2>/dev/null; rm -rf "$work"' EXIT
raw=$out/raw
mkdir -p "$raw" "$work/runs"
: >"$raw/log.txt"
: >"$out/stages.jsonl"
failed=0

# ---------------------------------------------------------------- one stage

stage() { # NAME SECONDS COMMAND...: all output to log.txt, its end to the screen, exit code and time to stages.jsonl
  local name=$1 limit=$2 remaining=$((budget - SECONDS)) begin=$SECONDS code
  shift 2
  if ((remaining < 12)); then
    echo "{\"stage\": \"$name\", \"code\": null, \"seconds\": 0}" >>"$out/stages.jsonl"
    echo "==> $name: skipped, $remaining s remain"
    failed=1
    return 1
  fi
  ((limit > remaining)) && limit=$remaining
  [[ -n $REHEARSE ]] && limit=600 # interpreted kernels, on whatever CPU
  printf '\n==> %s (at %d s, limit %d s)\n' "$name" "$SECONDS" "$limit" | tee -a "$raw/log.txt"
  timeout --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  cat "$work/$name.log" >>"$raw/log.txt"
  tail -n "${LINES_SHOWN:-14}" "$work/$name.log" | cut -c1-200
  echo "{\"stage\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - begin)), \"at\": $begin}" >>"$out/stages.jsonl"
  echo "==> $name: code $code, $((SECONDS - begin)) s"
  ((code == 0)) || failed=1
  return "$code"
}

selected() { [[ " $stages " == *" $1 "* ]]; }

profiled() { # NAME SECONDS FIRST COUNT CONFIG key=value...: a training with a trace of COUNT steps, to NAME.json
  local name=$1 limit=$2 first=$3 count=$4
  shift 4
  LINES_SHOWN=32 stage "$name" "$limit" "$python" "$here/profile_steps.py" "$out/$name.json" "$first" "$count" "$@" \
    "run.dir=$work/runs/$name"
}

trained() { # NAME SECONDS CONFIG key=value...
  local name=$1 limit=$2
  shift 2
  LINES_SHOWN=5 stage "$name" "$limit" "$python" -m megasora.train "$@" "run.dir=$work/runs/$name"
}

# ---------------------------------------------------------------- packages

if compgen -G ".whl/*.whl" >/dev/null && [[ -z $REHEARSE ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
    .whl/*.whl >>"$raw/log.txt" 2>&1 || { tail -5 "$raw/log.txt"; echo "gpu: the wheels in .whl/ cannot be installed" >&2; exit 1; }
  export PYTHONPATH=$work/site:$PWD
else
  export PYTHONPATH=$PWD # for the processes that tests start
fi

# ---------------------------------------------------------------- sizes

mapfile -t checks < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/kernels/' | sort)
if [[ -n $REHEARSE ]]; then
  export TRITON_INTERPRET=1
  device=cpu workers=1 clips=24 val_clips=4 backend=auto # interpreted, a run takes minutes
  kernel_tests=(tests/kernels/test_rows.py)
  checks=(tests/runs/test_gpu.py) # skipped without a GPU
  large_clips=(3 48 32 9)
  small=(run.steps=4 data.packs_per_step=2 model.width=32 model.depth=1 model.heads=2 validation.clips=2
    checkpoint.every=2 run.threads=1)
  tokens=256 small_first=1 small_count=1
  wan=(run.steps=3 data.tokens_per_pack=64 data.packs_per_step=1 model.width=48 model.depth=1 model.heads=4
    validation.clips=1 run.threads=1)
  wan_first=1 wan_count=1 stop_after=2 sample=(--size 16x16 --frames 5 --num-inference-steps 2)
  gpus=1
else
  device=cuda workers=12 clips=300 val_clips=16 backend=triton
  kernel_tests=(tests/kernels --ignore=tests/kernels/test_compiled.py --ignore=tests/kernels/test_large.py)
  large_clips=(14 512 512 145)
  small=(run.steps=60 data.packs_per_step=2 checkpoint.every=1000)
  tokens=4096 small_first=40 small_count=5
  # ten blocks of Wan 2.1 1.3B; a clip of 145 frames of 512x512 is 37 x 32 x 32 tokens
  wan=(run.steps=14 data.tokens_per_pack=37888 data.packs_per_step=1 model.width=1536 model.heads=12 model.depth=10
    model.mlp_ratio=5.8334 model.qk_norm=across_heads model.modulation=shared validation.clips=1)
  wan_first=8 wan_count=3 stop_after=25 sample=(--size 32x32 --frames 17 --num-inference-steps 20)
  gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
fi
small=(configs/dit_b.yaml "data.patch=[1,1,1]" data.shards="$work/shards" "run.device=$device" wandb.mode=disabled
  optim.warmup_steps=20 checkpoint.keep=1 "${small[@]}")
wan=(configs/dit_b.yaml data.shards="$work/large-shards" "run.device=$device" wandb.mode=disabled optim.warmup_steps=5
  checkpoint.every=100000 checkpoint.keep=1 "${wan[@]}")

# ---------------------------------------------------------------- what runs, in the order of its value

command -v nvidia-smi >/dev/null && nvidia-smi >>"$raw/log.txt" 2>&1
LINES_SHOWN=20 stage environment 60 "$python" "$here/report_environment.py" "$out/environment.json"

if selected wan || selected small || selected resume; then
  ( # CPUs render and ingest while the GPU is tested
    "$python" tools/make_clips.py --out "$work/clips" --clips "$clips" --val-clips "$val_clips" --processes 2 &&
      "$python" -m megasora.cli ingest "$work/clips" --out "$work/shards" --config configs/dit_b.yaml "data.patch=[1,1,1]" ingest.workers=2 &&
      "$python" "$here/render_large_clips.py" "$work/large" "${large_clips[@]}" &&
      "$python" -m megasora.cli ingest "$work/large" --out "$work/large-shards" --config configs/dit_b.yaml ingest.workers=2 &&
      "$python" -m megasora.cli shards "$work/large-shards"
    echo $? >"$work/clips.code"
  ) >"$work/clips.log" 2>&1 &
  clips_job=$!
fi

# Attention is half of a step: which backend for which chip, head dim, order of sums and pack.
if selected attention; then
  LINES_SHOWN=60 stage attention 75 "$python" "$here/bench_attention.py" "$out/attention.json"
fi
# Whether it is right: a step without a wait of the host, a run like that of a CPU, sums that repeat.
if selected checks; then
  OMP_NUM_THREADS=1 LINES_SHOWN=12 stage checks 75 "$python" -m pytest "${checks[@]}" -m gpu -q --maxfail=20 --tb=short -rfEs -p no:cacheprovider
fi
if selected optimizer; then
  LINES_SHOWN=16 stage optimizer 40 "$python" -m benchmarks.optimizer_step --out "$out/optimizer.json"
fi
if [[ -n ${clips_job:-} ]]; then
  # shellcheck disable=SC2016  # expanded by the inner shell
  LINES_SHOWN=5 stage clips 100 bash -c 'tail --pid="$1" -f /dev/null; cat "$2/clips.log"; exit "$(cat "$2/clips.code")"' - "$clips_job" "$work"
fi
# A large model: MFU, time by kind of kernel, gaps; then with sums in any order, where other backends can be chosen.
if selected wan; then
  profiled wan 80 "$wan_first" "$wan_count" "${wan[@]}"
  [[ -n $REHEARSE ]] || profiled wan-any-order 60 "$wan_first" "$wan_count" "${wan[@]}" model.deterministic=false
fi
# A small model: whether the GPU waits for the host. The same twice: whether a run repeats bit by bit.
if selected small; then
  profiled small-4k 50 "$small_first" "$small_count" "${small[@]}" data.tokens_per_pack="$tokens" model.kernel_backend="$backend"
  [[ -n $REHEARSE ]] || profiled small-12k 60 "$small_first" "$small_count" "${small[@]}" data.tokens_per_pack=12288 model.kernel_backend="$backend"
  trained repeat 45 "${small[@]}" data.tokens_per_pack="$tokens" model.kernel_backend="$backend"
  [[ -n $REHEARSE ]] || trained torch-kernels 50 "${small[@]}" data.tokens_per_pack="$tokens" model.kernel_backend=torch
fi
if selected kernels; then
  OMP_NUM_THREADS=1 LINES_SHOWN=24 stage kernels 120 "$python" -m pytest "${kernel_tests[@]}" -q -n "$workers" --maxfail=40 --tb=short -rfE -p no:cacheprovider
  OMP_NUM_THREADS=1 LINES_SHOWN=6 stage large-kernels 30 "$python" -m pytest tests/kernels/test_large.py -q --tb=short -rfE -p no:cacheprovider
fi
if selected bench; then
  LINES_SHOWN=50 stage bench 150 "$python" -m benchmarks.kernels --quick --minutes 1.5 --out "$out/kernels.json"
fi
if selected float8; then
  LINES_SHOWN=20 stage float8 45 "$python" -m benchmarks.float8 --out "$out/float8.json"
fi
if selected resume; then
  LINES_SHOWN=6 stage resumed 80 "$python" "$here/stop_and_resume.py" "$work/runs/resumed" "$stop_after" "${small[@]}" data.tokens_per_pack="$tokens" model.kernel_backend="$backend"
  LINES_SHOWN=5 stage sample 40 "$python" -m megasora.cli sample "$work/runs/resumed" --prompt "a red circle moves right" --out "$raw/sample.mp4" "${sample[@]}"
  LINES_SHOWN=5 stage report 30 "$python" -m megasora.cli report "$work/runs/resumed"
fi
if selected overlap && ((gpus > 1)); then
  ranks=$((gpus >= 8 ? 8 : gpus >= 4 ? 4 : 2)) # they divide the heads
  LINES_SHOWN=20 stage overlap 90 "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$here/trace_overlap.py" "$out/overlap.json"
fi
LINES_SHOWN=12 stage summary 20 "$python" "$here/summarize_runs.py" "$work/runs" "$out/runs.json"

(cd "$work" && find runs -type f -not -path '*/checkpoints/*' \
  \( -name '*.jsonl' -o -name '*.json' -o -name '*.log' -o -name '*.yaml' -o -name 'report.html' -o -name '*.sheet.png' \) |
  tar czf "$raw/runs.tar.gz" -T -)
printf '\n==> %d s; results in %s\n' "$SECONDS" "$out"
cat "$out/stages.jsonl"
exit "$failed"
