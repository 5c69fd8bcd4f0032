"""Short prompts with and without expansion, on a run that was trained on rendered clips.

    python -m benchmarks.prompt_expansion RUN [--out benchmarks/results/prompt_expansion.json]

Each evaluation prompt is sampled as its full caption, "a red circle moves right over a plain background", and as two
words, "red right": as they are, and expanded with `sample.expand=template` into a caption of the
run's own captions. A detector reads colour and direction. A quarter of the prompts have a combination of colour,
shape and direction that is held out of training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.prompt_bench import Bench, Result, detect_all
from benchmarks.record import environment, write_record
from megasora.sampling.prompt_expansion import build_expander
from megasora.sampling.sampler import Sampler
from megasora.testing.clips import evaluation_prompts
from megasora.testing.prompt_figures import Figure, share, table

SEEDS = 2
MAX_LOSS = 0.05  # of accuracy, against the full caption

Words = dict[str, str]  # color, shape, direction, background


def prompt_expansion(bench: Bench, run: Path) -> Result:
    """Accuracy of each form of the prompts, and what expanded short prompts lose against full captions."""
    bench.sampler.config.sample.expand = "template"
    expand = build_expander(bench.sampler.config, run)
    forms: dict[str, Callable[[str, Words, int], str]] = {
        "full caption": lambda caption, words, seed: caption,
        "two words": lambda caption, words, seed: f"{words['color']} {words['direction']}",
        "two words, expanded": lambda caption, words, seed: expand(f"{words['color']} {words['direction']}", seed),
        "two words reversed, expanded": lambda caption, words, seed: expand(
            f"{words['direction']} {words['color']}", seed
        ),
    }
    figures = {name: accuracy(bench, name, form) for name, form in forms.items()}
    full, expanded = figures["full caption"], figures["two words, expanded"]
    error = (full.error**2 + expanded.error**2) ** 0.5
    loss = Figure("full caption less two words, expanded", full.value - expanded.value, error, full.count)
    loss = Figure(loss.name, loss.value, loss.error, loss.count, target=("<=", MAX_LOSS))
    return Result([*figures.values(), loss])


def accuracy(bench: Bench, name: str, form: Callable[[str, Words, int], str]) -> Figure:
    """The share of the clips with the colour and the direction of their prompt."""
    prompts = evaluation_prompts(max(16, bench.count // 16 * 16))
    cases = [(i, seed, *prompt) for seed in range(SEEDS) for i, prompt in enumerate(prompts)]
    timelines = [
        bench.sampler.timeline(form(caption, words, len(prompts) * seed + i), seed=seed, sample_id=i)
        for i, seed, caption, words in cases
    ]
    readings = detect_all(bench.sample(timelines))
    expected = [(words["color"], words["direction"]) for *_, words in cases]
    return share(name, [(r.color, r.direction) == e for r, e in zip(readings, expected, strict=True)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of megasora.train on rendered clips")
    parser.add_argument("--count", type=int, default=48, help="prompts, a multiple of 16 (default 48)")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    options = parser.parse_args(arguments)
    head, start = environment(), time.monotonic()
    bench = Bench(Sampler.from_run(options.run), options.count, {})
    result = prompt_expansion(bench, options.run)
    seconds = round(time.monotonic() - start, 1)
    print(f"{table(result.figures)}\n{seconds:.0f} s")
    if options.out:
        head |= {"run": options.run.name, "step": bench.sampler.step, "seconds": seconds}
        write_record(options.out, head, {"figures": [figure.row() for figure in result.figures]})


if __name__ == "__main__":
    main()
