# MegaSora from a fresh clone. Needs python3.11 or newer with its venv module, git and make; no compiler, no GPU.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUNS := runs/demo runs/demo-long
COMPUTE := runs/compute-1 runs/compute-4
PYTHON := $(BIN)/python
SEED := 0
KILLS := 0
MINUTES := 9

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.PHONY: help install demo demo-long test faults bench results gpu checks format clean

help:
	@echo "make install     make .venv and install MegaSora in it, editable (every other target does this first)"
	@echo "make demo        clips -> codec -> shards -> training on 2 processes -> a video -> runs/demo/report.html, in 10 minutes"
	@echo "make demo-long   the same clips, trained longer: runs/demo-long, in 45 minutes"
	@echo "make test        the test suite, one process per core, at most 4; GPU tests skip where there is no GPU"
	@echo "make faults      kills, stops, hangs, damaged files, full disks: docs/faults.md -> runs/faults/, in 15 minutes;"
	@echo "                 KILLS=200 adds 200 kills at random instants, an hour more; SEED=7 takes another plan"
	@echo "make bench       what benchmarks/README.md shows: balance, memory, steps, data, codec -> benchmarks/results/, 25 minutes"
	@echo "make results     every kind of prompt measured on the demo: docs/results.md -> benchmarks/results/prompts.json, in an hour"
	@echo "make gpu         on a machine with a GPU: attention, checks, optimizer, profiles, kernels, float8, resume -> benchmarks/results/gpu/"
	@echo "                 in MINUTES=9, the most valuable first; PYTHON=python3 takes a python that has PyTorch for CUDA, and"
	@echo "                 installs nothing; REHEARSE=1 runs it tiny on a CPU"
	@echo "make checks      ruff: lint and format, nothing is changed"
	@echo "make format      ruff: fix what can be fixed, and format"
	@echo "make clean       remove builds and caches; .venv, data/ and runs/ stay"

install: $(INSTALLED)

# Any python3 starts the script, which looks for the right one and says what to do where there is none.
$(INSTALLED): setup.py constraints.txt
	@python=$$(command -v python3.11 || command -v python3) || \
	  { echo "install: python >= 3.11 is needed; run: apt-get install python3.11 python3.11-venv" >&2; exit 1; }; \
	"$$python" tools/install.py --venv $(VENV)
	@touch $@

# The demo: the six commands of the README. Each makes one file or folder, so that what is complete is not done again;
# to redo from some step on, delete what it made: data/clips, runs/vae, data/shards, runs/demo, runs/demo/sample.mp4,
# runs/demo/report.html. Training that was interrupted resumes from its last checkpoint.

demo: runs/demo/report.html
	@echo "==> done: open runs/demo/report.html"

demo-long: runs/demo-long/report.html
	@echo "==> done: open runs/demo-long/report.html"

# Rendered under another name, so that a folder named data/clips is complete.
data/clips: | $(INSTALLED)
	@echo "==> rendering captioned clips into data/clips"
	@rm -rf data/.clips
	$(BIN)/python tools/make_clips.py --out data/.clips
	@mv data/.clips $@

runs/vae/.trained: configs/vae_demo.yaml | data/clips
	@echo "==> training the codec runs/vae on 2 processes"
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m megasora.train_codec configs/vae_demo.yaml \
	  run.dir=runs/vae data.clips=data/clips
	@touch $@

data/shards/dataset.json: runs/vae/.trained | data/clips
	@echo "==> ingesting data/clips into data/shards"
	$(BIN)/megasora ingest data/clips --out data/shards --config configs/demo.yaml

$(RUNS:=/.trained): runs/%/.trained: data/shards/dataset.json configs/$$(subst -,_,$$*).yaml
	@echo "==> training runs/$* on 2 processes"
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m megasora.train configs/$(subst -,_,$*).yaml \
	  run.dir=runs/$* data.shards=data/shards
	@touch $@

$(RUNS:=/sample.mp4): runs/%/sample.mp4: runs/%/.trained
	@echo "==> sampling runs/$*/sample.mp4"
	$(BIN)/megasora sample runs/$* --prompt "a red circle moves right" --out $@

$(RUNS:=/report.html): runs/%/report.html: runs/%/sample.mp4
	@echo "==> writing runs/$*/report.html"
	$(BIN)/megasora report runs/$*

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

faults: $(INSTALLED)
	@status=0; \
	$(BIN)/python tests/faults/fault_rows.py || status=1; \
	PYTHONPATH=tests $(BIN)/python tests/faults/chaos.py --seed $(SEED) || status=1; \
	if [ $(KILLS) -gt 0 ]; then \
	  PYTHONPATH=tests $(BIN)/python tests/faults/chaos.py --seed $(SEED) --kills $(KILLS) || status=1; \
	fi; \
	exit $$status

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.context_balance --out benchmarks/results/context_balance.json
	$(BIN)/python -m benchmarks.memory --out benchmarks/results/memory.json
	$(BIN)/python -m benchmarks.step --out benchmarks/results/step.json
	$(BIN)/python -m benchmarks.launch_cost --out benchmarks/results/launch_cost.json
	$(BIN)/python -m benchmarks.host_waits --out benchmarks/results/host_waits.json
	$(BIN)/python -m benchmarks.optimizer_step --out benchmarks/results/optimizer_step.json
	$(BIN)/python -m benchmarks.data --out benchmarks/results/data.json
	$(BIN)/python -m benchmarks.codec --out benchmarks/results/codec.json
	$(BIN)/python -m benchmarks.checkpoint --out benchmarks/results/checkpoint.json
	$(BIN)/python -m benchmarks.checkpoint_scale --out benchmarks/results/checkpoint_scale.json
	$(BIN)/python -m benchmarks.initial_weights --out benchmarks/results/initial_weights.json

# The figures of docs/results.md: the demo, and the same with 1/32 and 4/32 of its steps.
results: runs/demo/.trained $(COMPUTE:=/.trained)
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.prompts runs/demo --compare $(COMPUTE) \
	  --out benchmarks/results/prompts.json --sheets runs/results

$(COMPUTE:=/.trained): runs/compute-%/.trained: data/shards/dataset.json configs/demo.yaml
	@echo "==> training runs/compute-$* on 2 processes"
	steps=$$(( (2800 * $* + 16) / 32 )); \
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m megasora.train configs/demo.yaml run.dir=runs/compute-$* \
	  data.shards=data/shards run.steps=$$steps validation.every=$$steps optim.warmup_steps=$$(( steps / 28 ))
	@touch $@

gpu: $(if $(filter $(BIN)/python,$(PYTHON)),$(INSTALLED))
	PYTHON="$(PYTHON)" MINUTES="$(MINUTES)" REHEARSE="$(REHEARSE)" tools/gpu/run.sh

checks: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
