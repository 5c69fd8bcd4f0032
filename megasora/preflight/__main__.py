"""`python -m megasora.preflight`: checks all nodes of a job. slurm/train.sbatch runs one process on each node.

Input: the configuration, and the names of the nodes from Slurm. Output: a table on standard error; on standard output,
from the first node only, the names of the nodes to use, comma-separated. Exit codes: 0; 1 if too few nodes are fit; 2
if the configuration is invalid.

    each node inspects itself --TCPStore--> the first node compares --> fit nodes measure their bandwidth --> verdict

A node that does not answer in time becomes unfit; no step waits for all nodes without a timeout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.config import Config, load
from megasora.errors import CONFIGURATION, CRASH, DONE, MegaSoraError, describe, printable
from megasora.preflight.bandwidth import measure_bandwidth
from megasora.preflight.node import Node, inspect_node
from megasora.preflight.verdict import compare_nodes, flag_slow_nodes, print_table, select_nodes

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ANSWER_SECONDS = 12.0  # for a node to inspect itself
BANDWIDTH_ANSWER_SECONDS = 2.0  # for the bandwidths, after the first node has measured its own
SHARED_FILE_SECONDS = 3.0  # for a file of one node to appear on the others
FAREWELL_SECONDS = 0.5  # for the others to read the end from the store, which ends with the first node's process


def run_preflight(options: argparse.Namespace, config: Config) -> int:
    """Runs on every node; the first one collects the answers. Returns the exit code."""
    start = time.monotonic()
    import torch.distributed as dist

    names, rank = options.nodes, options.node_rank
    store = dist.TCPStore(
        names[0], options.port, is_master=rank == 0, timeout=timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False
    )
    node = inspect_node(names[rank], config, options.processes)
    token = Path(config.run.dir) / f".preflight-{options.port}"
    if rank > 0:
        return follow(store, node, options, token)
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
    try:
        return lead(store, node, options, start)
    finally:
        token.unlink(missing_ok=True)
        with suppress(OSError):
            token.parent.rmdir()  # if it is empty


def follow(store: TCPStore, node: Node, options: argparse.Namespace, token: Path) -> int:
    """Every node but the first: publishes its findings, checks that `token` is visible, measures its bandwidth."""
    rank, timeout = options.node_rank, timedelta(seconds=2 * ANSWER_SECONDS)
    publish(store, "node", rank, vars(node))
    store.wait(["compare"], timeout)
    clock, problems = time.time(), []
    if not wait_for_file(token):
        problems.append(f"run.dir={token.parent} is not shared: what {options.nodes[0]} writes is not seen here")
    publish(store, "shared", rank, {"clock": clock, "problems": problems})
    store.wait(["fit"], timeout)
    fit = json.loads(store.get("fit"))
    if rank in fit:
        publish(store, "bandwidth", rank, try_bandwidth(store, fit.index(rank), len(fit), node))
    store.wait(["done"], timeout)  # the store is on the first node
    return DONE


def lead(store: TCPStore, own: Node, options: argparse.Namespace, start: float) -> int:
    """The first node: collects all findings, compares the nodes, measures the bandwidth of the fit ones, decides."""
    nodes = [own, *map(Node, options.nodes[1:])]
    collect_nodes(store, nodes, start + ANSWER_SECONDS)
    unshared = collect_clocks(store, nodes)
    compare_nodes(nodes)
    all_reduce_rate = collect_bandwidths(store, nodes)
    print_table(nodes, all_reduce_rate, time.monotonic() - start)
    names, reason = select_nodes(nodes, options.required, options.exclude_unfit)
    store.set("done", "")
    time.sleep(FAREWELL_SECONDS)
    if reason:
        print(f"megasora: preflight: {printable(reason)}", file=sys.stderr)
        return CONFIGURATION if unshared and unshared == len(nodes) - 1 else CRASH
    print(",".join(names))
    return DONE


def collect_nodes(store: TCPStore, nodes: list[Node], deadline: float) -> None:
    """Fills in what the other nodes found; a node without an answer gets a problem."""
    for rank, values in collect(store, "node", range(1, len(nodes)), deadline).items():
        vars(nodes[rank]).update(values)
    for node in nodes:
        if not node.versions:
            node.problems.append(f"did not answer within {ANSWER_SECONDS:.0f} s")


def collect_clocks(store: TCPStore, nodes: list[Node]) -> int:
    """Fills in the clocks, and the number of nodes that do not see the run folder, which it returns."""
    answered = [rank for rank, node in enumerate(nodes) if rank > 0 and node.versions]
    now, unshared = time.time(), 0
    store.set("compare", "")
    for rank, values in collect(store, "shared", answered, time.monotonic() + SHARED_FILE_SECONDS + 1.0).items():
        nodes[rank].clock = values["clock"] - now
        nodes[rank].problems += values["problems"]
        unshared += bool(values["problems"])
    return unshared


def collect_bandwidths(store: TCPStore, nodes: list[Node]) -> float:
    """Lets the fit nodes measure their bandwidth and fills it in; returns the GiB/s of an all-reduce, or 0."""
    fit = [rank for rank, node in enumerate(nodes) if not node.problems]
    store.set("fit", json.dumps(fit))
    if fit[:1] != [0] or len(fit) < 2:
        return 0.0
    all_reduce_rate = 0.0
    measured = {0: try_bandwidth(store, 0, len(fit), nodes[0])}
    measured |= collect(store, "bandwidth", fit[1:], time.monotonic() + BANDWIDTH_ANSWER_SECONDS)
    for rank in fit:
        rate, all_reduce_rate, problem = measured.get(rank, (0.0, all_reduce_rate, "no answer"))
        nodes[rank].gib_per_second = rate
        if problem:
            nodes[rank].problems.append(f"cannot communicate with the others: {problem}")
    flag_slow_nodes([nodes[rank] for rank in fit], "gib_per_second", "sends {:.2f} GiB/s, the others {:.2f}")
    return all_reduce_rate


def try_bandwidth(store: TCPStore, rank: int, size: int, node: Node) -> tuple[float, float, str]:
    """(GiB/s with a partner, GiB/s of the all-reduce, the error or "")."""
    try:
        return *measure_bandwidth(store, rank, size, "cuda" if node.gpus else "cpu"), ""
    except RuntimeError as error:
        return 0.0, 0.0, str(error).splitlines()[0]


def publish(store: TCPStore, key: str, rank: int, value: Any) -> None:
    store.set(f"{key}/{rank}", json.dumps(value))


def collect(store: TCPStore, key: str, ranks: Iterable[int], deadline: float) -> dict[int, Any]:
    """{rank: value} of the nodes that published `key` before `deadline`, in time.monotonic()."""
    missing, values = set(ranks), {}
    while missing and time.monotonic() < deadline:
        for rank in sorted(missing):
            if store.check([f"{key}/{rank}"]):
                values[rank] = json.loads(store.get(f"{key}/{rank}"))
        missing -= values.keys()
        time.sleep(0.02)
    return values


def wait_for_file(path: Path) -> bool:
    """Whether a file appears within SHARED_FILE_SECONDS."""
    deadline = time.monotonic() + SHARED_FILE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # refreshes the cache of a network file system
        time.sleep(0.1)
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megasora.preflight", description="Checks all nodes of a job.")
    parser.add_argument("--nodes", type=lambda text: text.split(","), required=True, help="names, in Slurm's order")
    parser.add_argument("--required", type=int, required=True, help="number of nodes that the run uses")
    parser.add_argument("--exclude-unfit", action="store_true", help="leave out unfit nodes, if enough remain")
    parser.add_argument("--processes", type=int, required=True, help="of the run, per node")
    parser.add_argument("--port", type=int, required=True, help="free on the first node")
    parser.add_argument("--node-rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")), help="of this node")
    parser.add_argument("config", metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    name = options.nodes[options.node_rank]
    try:
        return run_preflight(options, load(options.config, options.overrides))
    except MegaSoraError as error:
        print(f"megasora: preflight: {name}: {describe(error)}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # any other error counts against this node
        print(f"megasora: preflight: {name}: {type(error).__name__}: {describe(error)}", file=sys.stderr)
        return CRASH


if __name__ == "__main__":
    sys.exit(main())
