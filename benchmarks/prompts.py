"""Every kind of prompt on a run that was trained on rendered clips: python -m benchmarks.prompts RUN --out FILE.json

    python -m benchmarks.prompts runs/demo --out benchmarks/results/prompts.json --sheets runs/results
    python -m benchmarks.prompts runs/demo --compare runs/compute-1 runs/compute-4 --out ... --sheets ...

Samples `--count` prompts of each kind (`prompts_of_text.py`, `prompts_of_video.py`), reads colour, motion and path
back from the pixels, and prints a table. `--compare`: also validation loss and accuracy of runs with less compute, and
one contact sheet of all of them side by side. Contact sheets of every experiment go into the folder `--sheets`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import prompts_of_text, prompts_of_video
from benchmarks.prompt_bench import Bench, Result
from benchmarks.prompts_of_text import accuracy, sample_captions
from benchmarks.record import environment, write_record
from megasora.data.clip_writer import write_image
from megasora.sampling.sampler import Sampler
from megasora.sampling.sheet import contact_sheet
from megasora.testing.prompt_figures import Figure, table

EXPERIMENTS: dict[str, Callable[[Bench], Result]] = {
    function.__name__: function
    for function in (
        prompts_of_text.guidance,
        prompts_of_text.image,
        prompts_of_text.last_image,
        prompts_of_video.extend,
        prompts_of_video.prepend,
        prompts_of_video.connect,
        prompts_of_video.loop,
        prompts_of_video.edit,
        prompts_of_video.masked_edit,
        prompts_of_text.unseen_size,
        prompts_of_video.long,
        prompts_of_video.shots,
        prompts_of_text.solvers,
    )
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of megasora.train on rendered clips")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="runs with less compute, the least first")
    parser.add_argument("--only", nargs="*", choices=list(EXPERIMENTS), help="these experiments (default: all)")
    parser.add_argument("--count", type=int, default=48, help="prompts of each kind, a multiple of 16 (default 48)")
    parser.add_argument("--settings", nargs="*", default=[], help="of the section sample, e.g. num_inference_steps=10")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    parser.add_argument("--sheets", type=Path, help="folder of the contact sheets")
    options = parser.parse_args(arguments)

    settings = {key: json.loads(value) for key, _, value in (text.partition("=") for text in options.settings)}
    head, bench = environment(), Bench(Sampler.from_run(options.run), options.count, settings)
    head |= {"run": options.run.name, "step": bench.sampler.step, "count": options.count, "settings": settings}
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    scaling: list[dict[str, object]] = []

    def save() -> None:
        if options.out:
            body = {"seconds": seconds, "figures": [figure.row() for figure in figures], "scaling": scaling}
            write_record(options.out, head, body)

    for name in EXPERIMENTS if options.only is None else options.only:
        start = time.monotonic()
        result = EXPERIMENTS[name](bench)
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"\n{name}, {seconds[name]:.0f} s\n\n{table(result.figures)}", flush=True)
        figures += result.figures
        save_sheet(options.sheets, name, contact_sheet(result.rows, frames=12) if result.rows else None)
        save()
    if options.compare:
        start = time.monotonic()
        scaling += compare([*options.compare, options.run], bench, options.sheets)
        seconds["compare"] = round(time.monotonic() - start, 1)
        save()


def compare(runs: list[Path], like: Bench, sheets: Path | None) -> list[dict[str, object]]:
    """Steps, validation loss and accuracy of each run; a contact sheet with the same prompts of each side by side."""
    rows, columns = [], []
    for run in runs:
        bench = dataclasses.replace(like, sampler=Sampler.from_run(run))
        sampled = sample_captions(bench, 2)
        right = accuracy(run.name, sampled)
        loss = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])["loss"]
        rows.append({"run": run.name, "steps": bench.sampler.step, "validation_loss": loss, **right.row()})
        steps = f"{bench.sampler.step:,} steps"
        columns.append(contact_sheet([(f"{steps}: {text}", video) for text, _, video in sampled[:12]], frames=5))
    print("\n| run | steps | validation loss | colour and direction |\n|---|---|---|---|")
    for row in rows:
        right = f"{row['value']:.2f} ± {row['error']:.2f}"
        print(f"| {row['run']} | {row['steps']:,} | {row['validation_loss']:.4f} | {right} |")
    save_sheet(sheets, "compute", side_by_side(columns))
    return rows


def side_by_side(images: list[np.ndarray]) -> np.ndarray:
    """One image of several, uint8 [H, W, 3], with black below the lower ones."""
    height = max(len(image) for image in images)
    return np.concatenate([np.pad(i, ((0, height - len(i)), (0, 8), (0, 0))) for i in images], axis=1)


def save_sheet(folder: Path | None, name: str, image: np.ndarray | None) -> None:
    if folder is not None and image is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_image(image, folder / f"{name}.png", json.dumps({"ai_generated": True, "by": "MegaSora"}))


if __name__ == "__main__":
    main()
