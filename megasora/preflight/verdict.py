"""What the first node concludes from the answers of all nodes: differences, slow nodes, and the nodes to use."""

from __future__ import annotations

import statistics
import sys
from collections import Counter

from megasora.preflight.node import Node

MAX_CLOCK_SECONDS = 2.0
SLOW_FRACTION = 0.5  # a node is slow below this fraction of the median


def compare_nodes(nodes: list[Node]) -> None:
    """Adds a problem to each node that differs from the majority, or from the first node if there is none."""
    answered = [node for node in nodes if node.versions]
    for key in answered[0].versions if answered else ():
        usual = Counter(node.versions[key] for node in answered).most_common(1)[0][0]
        for node in answered:
            if node.versions[key] != usual and node.versions[key] != "missing":
                what = "code of megasora" if key == "megasora" else key
                node.problems.append(f"{what} is {node.versions[key]}, elsewhere {usual}")
    median_clock = statistics.median_low([node.clock for node in answered]) if answered else 0.0
    for node in answered:
        ahead = node.clock - median_clock
        if abs(ahead) > MAX_CLOCK_SECONDS:
            node.problems.append(f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the others")
    flag_slow_nodes(answered, "gpu_tflop_per_s", "its slowest GPU computes {:.0f} TFLOP/s, elsewhere {:.0f}")


def flag_slow_nodes(nodes: list[Node], key: str, message: str) -> None:
    """Adds `message`, formatted with the own value and the median, to each node whose attribute `key` is low."""
    values = [getattr(node, key) for node in nodes if getattr(node, key)]
    for node in nodes if values else ():
        median, own = statistics.median(values), getattr(node, key)
        if 0 < own < SLOW_FRACTION * median:
            node.problems.append(message.format(own, median))


def select_nodes(nodes: list[Node], required: int, exclude_unfit: bool) -> tuple[list[str], str]:
    """(names of the nodes to use, ""), or ([], the reason why the job cannot start)."""
    fit = [node.name for node in nodes if not node.problems]
    unfit = [node for node in nodes if node.problems]
    problems = "; ".join(f"{node.name}: {', '.join(node.problems)}" for node in unfit)
    if len(fit) < required:
        return [], f"{len(fit)} of {len(nodes)} nodes are fit, {required} are needed; {problems}"
    if unfit and not exclude_unfit:
        return [], f"{problems}; submit with --spare {len(unfit)} or more to leave such nodes out"
    return fit[:required], ""


def print_table(nodes: list[Node], all_reduce_rate: float, seconds: float) -> None:
    """Prints the nodes to standard error. `all_reduce_rate`: GiB/s, 0 if it was not measured."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("node", "GPUs", "TFLOP/s", "disk", "own disk", "shared memory", "clock", "GiB/s", "verdict")
    for node in nodes:
        cells = [node.name]
        if node.versions:
            gpus = ", ".join(f"{count} x {name}" for name, count in Counter(node.gpus).items())
            free = (f"{mib / 1024:.1f} GiB" for mib in (node.disk_mib, node.local_mib, node.shared_mib))
            tflop_per_s = f"{node.gpu_tflop_per_s:.0f}" if node.gpu_tflop_per_s else "-"
            bandwidth = f"{node.gib_per_second:.2f}" if node.gib_per_second else "-"
            cells += [gpus or "none", tflop_per_s, *free, f"{node.clock:+.3f} s", bandwidth]
        else:
            cells += ["-"] * 7
        table.add_row(*map(Text, [*cells, "; ".join(node.problems) or "fit"]), style="red" if node.problems else None)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    console.print(table)
    if all_reduce_rate:
        console.print(f"all-reduce over the nodes: {all_reduce_rate:.2f} GiB/s each")
    console.print(f"preflight: {seconds:.1f} s", highlight=False)
