#!/usr/bin/env bash
# Runs on a GPU what no CPU can show, the most valuable first, within nine minutes: `make gpu` calls it.
#
# In: a Python whose PyTorch sees a GPU (PYTHON), and the wheels of prepare.sh in .whl/ if packages are missing.
# Out, in $OUT (default benchmarks/results/gpu, of a rehearsal runs/gpu-rehearsal): stages.jsonl (exit code and seconds
# of each stage), log.txt, attention.json, kernels.json, profile.json, runs.json, runs.tar.gz (metrics, logs, report of
# the runs), sample.mp4 with its contact sheet.
#
#   BUDGET=530     seconds for everything; a stage ends at its own limit or at what remains of the budget
#   STAGES="..."   of: tests attention bench train profile resume (in this order)
#   REHEARSE=1     on a CPU: interpreted kernels, everything tiny; shows that each command and name is right
set -uo pipefail
SECONDS=0
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=${PYTHON:-python3}
export REHEARSE=${REHEARSE:-}
out=${OUT:-$PWD/$([[ -n $REHEARSE ]] && echo runs/gpu-rehearsal || echo benchmarks/results/gpu)}
budget=${BUDGET:-530}
stages=${STAGES:-tests attention bench train profile resume}
export PYTHONUNBUFFERED=1
for name in $stages; do
  [[ " tests attention bench train profile resume " == *" $name "* ]] || { echo "gpu: STAGES has no stage $name" >&2; exit 2; }
done
if [[ -z $REHEARSE ]] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu: the PyTorch of $python sees no GPU; REHEARSE=1 rehearses on a CPU" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'kill "${clips_job:-}" 2>/dev/null; rm -rf "$work"' EXIT
mkdir -p "$out" "$work/runs"
: >"$out/log.txt"
: >"$out/stages.jsonl"
failed=0

# ---------------------------------------------------------------- stages

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
  printf '\n==> %s (at %d s, limit %d s)\n' "$name" "$SECONDS" "$limit" | tee -a "$out/log.txt"
  timeout --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  cat "$work/$name.log" >>"$out/log.txt"
  tail -n "${LINES_SHOWN:-14}" "$work/$name.log" | cut -c1-200
  echo "{\"stage\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - begin)), \"at\": $begin}" >>"$out/stages.jsonl"
  echo "==> $name: code $code, $((SECONDS - begin)) s"
  ((code == 0)) || failed=1
  return "$code"
}

selected() { [[ " $stages " == *" $1 "* ]]; }

# ---------------------------------------------------------------- packages

if compgen -G ".whl/*.whl" >/dev/null && [[ -z $REHEARSE ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
    .whl/*.whl >>"$out/log.txt" 2>&1 || { tail -5 "$out/log.txt"; echo "gpu: the wheels in .whl/ cannot be installed" >&2; exit 1; }
  export PYTHONPATH=$work/site:$PWD
else
  export PYTHONPATH=$PWD # for the processes that tests start
fi

# ---------------------------------------------------------------- sizes

if [[ -n $REHEARSE ]]; then
  export TRITON_INTERPRET=1
  device=cpu workers=1 clips=24 val_clips=4 backend=auto # interpreted, a run takes minutes
  tests=(tests/kernels/test_rows.py)
  tests_alone=(tests/kernels/test_large.py tests/runs/test_gpu.py) # skipped without a GPU
  large_clips=(3 48 32 9)
  small=(run.steps=4 data.tokens_per_pack=256 data.packs_per_step=2 model.width=32 model.depth=1 model.heads=2
    validation.clips=2 checkpoint.every=2 run.threads=1)
  wan=(run.steps=3 data.tokens_per_pack=64 data.packs_per_step=1 model.width=48 model.depth=1 model.heads=4
    validation.clips=1 run.threads=1)
  first_profiled=1 num_profiled=1 stop_after=2 sample=(--size 16x16 --frames 5 --num-inference-steps 2)
  minutes=0.2
else
  device=cuda workers=12 clips=300 val_clips=16 backend=triton
  tests=(tests/kernels --ignore=tests/kernels/test_compiled.py --ignore=tests/kernels/test_large.py)
  tests_alone=(tests/kernels/test_large.py tests/runs/test_gpu.py)
  large_clips=(14 512 512 145)
  small=(run.steps=60 data.tokens_per_pack=4096 data.packs_per_step=2 checkpoint.every=1000)
  # ten blocks of Wan 2.1 1.3B; a clip of 145 frames of 512x512 is 37 x 32 x 32 tokens
  wan=(run.steps=14 data.tokens_per_pack=37888 data.packs_per_step=1 model.width=1536 model.heads=12 model.depth=10
    model.mlp_ratio=5.8334 model.qk_norm=across_heads model.modulation=shared validation.clips=1)
  first_profiled=8 num_profiled=3 stop_after=25 sample=(--size 32x32 --frames 17 --num-inference-steps 20)
  minutes=1.5
fi
small=(configs/dit_b.yaml "data.patch=[1,1,1]" data.shards="$work/shards" "run.device=$device" wandb.mode=disabled
  optim.warmup_steps=20 checkpoint.keep=1 "${small[@]}")
wan=(configs/dit_b.yaml data.shards="$work/large-shards" "run.device=$device" wandb.mode=disabled optim.warmup_steps=5
  checkpoint.every=100000 checkpoint.keep=1 "${wan[@]}")

# ---------------------------------------------------------------- what runs

command -v nvidia-smi >/dev/null && nvidia-smi >>"$out/log.txt" 2>&1
LINES_SHOWN=20 stage environment 60 "$python" "$here/report_environment.py"

if selected train || selected profile || selected resume; then
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

if selected tests; then
  OMP_NUM_THREADS=1 LINES_SHOWN=24 stage tests 140 "$python" -m pytest "${tests[@]}" -q -n "$workers" --maxfail=40 --tb=short -rfE -p no:cacheprovider
  OMP_NUM_THREADS=1 LINES_SHOWN=12 stage tests-alone 60 "$python" -m pytest "${tests_alone[@]}" -q --maxfail=20 --tb=short -rfEs -p no:cacheprovider
fi
if selected attention; then
  LINES_SHOWN=40 stage attention 60 "$python" "$here/bench_attention.py" "$out/attention.json"
fi
if selected bench; then
  LINES_SHOWN=40 stage bench 130 "$python" -m benchmarks.kernels --quick --minutes "$minutes" --out "$work/kernels.json"
  [[ -f $work/kernels.json ]] && cp "$work/kernels.json" "$out/"
fi

if [[ -n ${clips_job:-} ]]; then
  # shellcheck disable=SC2016  # expanded by the inner shell
  LINES_SHOWN=5 stage clips 60 bash -c 'tail --pid="$1" -f /dev/null; cat "$2/clips.log"; exit "$(cat "$2/clips.code")"' - "$clips_job" "$work"
fi
if selected train; then
  for kernels in triton torch; do
    LINES_SHOWN=5 stage "train-$kernels" 70 "$python" -m megasora.train "${small[@]}" "run.dir=$work/runs/$kernels" "model.kernel_backend=${kernels/triton/$backend}"
  done
fi
if selected profile; then
  LINES_SHOWN=32 stage profile 100 "$python" "$here/profile_steps.py" "$out/profile.json" "$first_profiled" "$num_profiled" "${wan[@]}" "run.dir=$work/runs/wan"
fi
if selected resume; then
  LINES_SHOWN=6 stage resume 100 "$python" "$here/stop_and_resume.py" "$work/runs/resumed" "$stop_after" "${small[@]}" "model.kernel_backend=$backend"
  LINES_SHOWN=5 stage sample 40 "$python" -m megasora.cli sample "$work/runs/resumed" --prompt "a red circle moves right" --out "$out/sample.mp4" "${sample[@]}"
  LINES_SHOWN=5 stage report 30 "$python" -m megasora.cli report "$work/runs/resumed"
fi
LINES_SHOWN=12 stage summary 20 "$python" "$here/summarize_runs.py" "$work/runs" "$out/runs.json"

(cd "$work" && find runs -type f -not -path '*/checkpoints/*' \
  \( -name '*.jsonl' -o -name '*.json' -o -name '*.log' -o -name '*.yaml' -o -name 'report.html' -o -name '*.sheet.png' \) |
  tar czf "$out/runs.tar.gz" -T -)
printf '\n==> %d s; results in %s\n' "$SECONDS" "$out"
cat "$out/stages.jsonl"
exit "$failed"
