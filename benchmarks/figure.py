"""Plots the results of benchmarks.kernels: python -m benchmarks.figure benchmarks/results/GPU.json

Top: each operation and width at one number of tokens, forward and backward: fraction of a plain copy's bandwidth, by
variant. Bottom: MFU of a block, by tokens and model.recompute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "triton": "#0072b2", "compile": "#e69f00", "eager": "#8a8a8a", "liger": "#009e73", "quack": "#cc79a7",
    "fp8": "#d55e00", "product": "#56b4e9",
}  # fmt: skip
MARKS = {"triton": "o", "compile": "s", "eager": "^", "liger": "D", "quack": "v"}
BARS = ("triton", "fp8", "compile", "product", "eager")  # of a block
BAR = 0.16
RECOMPUTE = ("none", "keep_attention", "full")


def draw(record: Mapping, path: Path) -> None:
    """Writes a PNG or SVG, by the suffix of `path`. `record`: the content of the JSON file; missing results are left
    empty."""
    lines = operation_lines(record)
    shapes = list(dict.fromkeys(b["shape"] for b in record.get("blocks", [])))
    figure = Figure(figsize=(13, 4.6 + 0.19 * (len(lines) + 4)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[0.19 * (len(lines) + 4) + 0.8, 3.6])
    both = above.subplots(1, 2, sharey=True)
    draw_operations(both, record, lines)
    if lines:
        above.legend(*both[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(COLOURS), fontsize=9)
    for axes, shape in zip(below.subplots(1, max(1, len(shapes)), sharey=True, squeeze=False)[0], shapes, strict=False):
        draw_blocks(axes, record, shape)
    gpu, limits = record["gpu"], record["limits"]
    figure.suptitle(
        f"{gpu['name']}: copy {limits['copy_gb_s']:,.0f} GB/s, matrix product {limits['matmul_tflop_s']:,.0f} TFLOP/s  "
        f"({record['date'][:10]}, commit {(record['commit'] or 'unknown')[:7]})",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def compared_tokens(record: Mapping) -> int | None:
    """Tokens of the packs with the most variants."""
    pairs = [(o["tokens"], o["variant"]) for o in record.get("operations", [])]
    counts = {tokens: len({variant for t, variant in pairs if t == tokens}) for tokens, _ in pairs}
    return max(counts, key=counts.get, default=None)


def operation_lines(record: Mapping) -> list[tuple[str, int]]:
    """Operation and width of each line of the plot, from the top."""
    results = [o for o in record.get("operations", []) if o["tokens"] == compared_tokens(record)]
    names = list(dict.fromkeys(o["operation"] for o in results))
    lines = {(o["operation"], o["width"]) for o in results}
    return sorted(lines, key=lambda line: (names.index(line[0]), line[1]))


def draw_operations(both: tuple[Axes, Axes], record: Mapping, lines: list[tuple[str, int]]) -> None:
    tokens = compared_tokens(record)
    for axes, direction in zip(both, ("forward", "backward"), strict=True):
        points: dict[str, list[tuple[float, int]]] = {variant: [] for variant in COLOURS}
        for o in record.get("operations", []):
            if o["tokens"] == tokens and o["direction"] == direction and o["of_copy"] is not None:
                points[o["variant"]].append((o["of_copy"], lines.index((o["operation"], o["width"]))))
        for variant, coordinates in points.items():
            if coordinates:
                x, y = zip(*coordinates, strict=True)
                axes.scatter(x, y, s=34, color=COLOURS[variant], marker=MARKS[variant], label=variant, zorder=3)
        axes.axvline(1, color="black", linewidth=1)
        names = [name for name, _ in lines]
        for y in range(1, len(lines)):
            if names[y] != names[y - 1]:
                axes.axhline(y - 0.5, color="#cccccc", linewidth=0.8)
        axes.set(
            title=f"{direction}, {tokens or 0:,} tokens, bf16",
            xlabel="least bytes by time, as a fraction of a copy's speed",
            yticks=range(len(lines)),
            yticklabels=[
                f"{name}   {width}" if name not in names[:y] else str(width) for y, (name, width) in enumerate(lines)
            ],
            xlim=(0, 1.15),
            ylim=(max(len(lines), 1) - 0.5, -0.5),
        )
        axes.tick_params(axis="y", labelsize=8, length=0)
        axes.grid(axis="x", color="#e5e5e5")


def draw_blocks(axes: Axes, record: Mapping, shape: str) -> None:
    results = [b for b in record["blocks"] if b["shape"] == shape]
    groups = sorted({(b["tokens"], b["recompute"]) for b in results}, key=lambda g: (g[0], RECOMPUTE.index(g[1])))
    for place, variant in enumerate(BARS):
        measured = [b for b in results if b["variant"] == variant and b["mfu"]]
        bars = [(groups.index((b["tokens"], b["recompute"])), b["mfu"]) for b in measured]
        if bars:
            x, mfu = zip(*bars, strict=True)
            at = [group + (place - len(BARS) // 2) * BAR for group in x]
            drawn = axes.bar(at, mfu, BAR * 0.92, color=COLOURS[variant], label=variant, zorder=3)
            axes.bar_label(drawn, [f"{100 * m:.0f}" for m in mfu], fontsize=7, padding=1)
    for group in range(1, len(groups)):
        if groups[group][0] != groups[group - 1][0]:
            axes.axvline(group - 0.5, color="#cccccc", linewidth=0.8)
    axes.set(
        title=f"{shape} block, forward and backward",
        ylabel="MFU, of the matrix product",
        xticks=range(len(groups)),
        xticklabels=[f"{recompute}\n{tokens / 1024:.0f}K" for tokens, recompute in groups],
        ylim=(0, 1),
    )
    axes.tick_params(axis="x", labelsize=8, length=0)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(loc="upper right", fontsize=8, ncols=len(BARS))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "record", type=Path, help="JSON file of benchmarks.kernels; the plot is written to the same folder"
    )
    path = parser.parse_args(arguments).record
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
