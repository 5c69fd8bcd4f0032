"""A run that is disturbed at every launch, by a seeded plan, must end as the undisturbed run does, untouched by hand.

    PYTHONPATH=tests .venv/bin/python tests/faults/chaos.py --seed 0 --steps 600 --launches 20 --out runs/faults

The same command is launched again until it exits with 0. Before a launch its newest checkpoint may be damaged; while it
runs, a rank or the launcher is killed, stopped or asked to stop, or its disk is full; the layout changes. Prints a line
for each launch, and writes OUT/chaos.json and OUT/chaos.png. Exits with 1 if anything differs from the undisturbed run
or a launch has not behaved as documented; see docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from chaos_picture import draw
from conftest import TINY
from disturbed_run import STARTS, make_run, run_and_check
from fault_plan import REFERENCE, kills_plan, seeded_plan


def make_shards(folder: Path) -> Path:
    """60 training clips and 8 held-out ones."""
    from megasora.config import load
    from megasora.ingest import ingest
    from megasora.testing.clip_files import write_dataset

    if not (folder / "dataset.json").is_file():
        clips = folder.with_name("clips")
        shutil.rmtree(clips, ignore_errors=True)
        write_dataset(clips, 60, 8, seed=1, processes=1, show_progress=False)
        ingest(clips, folder, load(None, TINY))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--kills", type=int, default=0, help="in place of the plan, kill a random rank so many times")
    parser.add_argument("--start", choices=STARTS, default="torchrun", help="fork: without the imports; see docs")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    options = parser.parse_args()
    shards = make_shards(options.out / "shards")
    name = "kills" if options.kills else "chaos"
    every = 3 if options.kills else 10
    steps = max(60, 3 * options.kills) if options.kills else options.steps
    plan = kills_plan(options.seed, options.kills) if options.kills else seeded_plan(
        options.seed, options.launches, options.steps
    )  # fmt: skip
    run = make_run(options.out / f"{name}-{options.seed}-{steps}", shards, steps, every, options.start, 30.0)
    print(f"{name}, seed {options.seed}: {steps} steps, {len(plan)} disturbed launches, {run.folder}", flush=True)
    result = run_and_check(run, plan, lambda outcome: print(outcome, flush=True))
    result = {"seed": options.seed, "start": options.start, "layout": str(REFERENCE), **result}
    file = options.out / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, file.with_suffix(".png"))
    print_summary(result)
    return 1 if result["problems"] else 0


def print_summary(result: dict) -> None:
    print(
        f"{result['steps']} steps in {len(result['launches'])} launches and {result['seconds']:.0f} s, "
        f"{sum(bool(launch['fault']) for launch in result['launches'])} of them disturbed while they ran; bit for bit "
        f"up to step {result['bitwise_steps']}, largest relative error of a loss {result['largest_loss_error']:.1e}; "
        f"slowest first step {result['slowest_first_step_seconds']} s"
    )
    for problem in result["problems"]:
        print(f"WRONG: {problem}")
    print("all oracles hold" if not result["problems"] else f"{len(result['problems'])} violations")


if __name__ == "__main__":
    sys.exit(main())
