"""`python -m megasora.preflight`: is every node of a job fit to train? slurm/train.sbatch runs it once on each.

In: the configuration, and Slurm's word on who we are. Out: a table on standard error, and on standard output, from the
first node alone, the names of the nodes to use, comma-separated. A node is left out or refused by name, with what is
wrong with it. Ends with 0; 1 where too few nodes are fit; 2 where the configuration is at fault.

    each node looks at itself --store--> the first node compares --> those that passed talk to each other --> verdict

A node that does not answer in time is one of the findings: nothing here waits for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.config import Config, load
from megasora.errors import CONFIGURATION, CRASH, DONE, MegaSoraError
from megasora.observe.doctor import ESSENTIAL, version_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import TCPStore

ANSWER_SECONDS = 12.0  # in which a node has told what it found
TALK_SECONDS = 5.0  # in which the nodes have exchanged their tensors
CLOCK_SECONDS = 2.0
SHARED_FILE_SECONDS = 3.0  # in which what one node writes is seen by the others
LEAST_DISK_MIB = 1024  # of the run folder's disk, and of the node's own
LEAST_SHARED_MIB = 32  # of /dev/shm, for each process
SLOW = 0.5  # a node or a GPU below this fraction of the others' median is named
SHARDS_READ, SHARD_BYTES = 16, 1 << 16
TALK_BYTES, TALK_REPEATS = 4 << 20, 10


@dataclass
class Node:
    """What is known of one node; `problems` is empty where it is fit."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    gpu_tflops: float = 0.0  # of the slowest
    disk_mib: int = 0
    local_mib: int = 0
    shared_mib: int = 0
    clock: float = 0.0  # seconds ahead of the first node
    gib_per_second: float = 0.0
    problems: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- what a node finds out alone


def look(name: str, config: Config, processes: int) -> Node:
    node = Node(name)
    node.versions = {"python": platform.python_version(), "megasora": sources()}
    for package in ESSENTIAL:
        found = version_of(package)
        node.versions[package] = found or "missing"
        if not found:
            node.problems.append(f"{package} is missing")
    look_at_disks(node, config, processes)
    node.problems += unreadable_shards(config)
    look_at_gpus(node, config, processes)
    return node


def sources() -> str:
    """A hash of the package's files: a node with another copy of the code trains another model."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*root.rglob("*.py"), *(root / "kernels").glob("*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def look_at_disks(node: Node, config: Config, processes: int) -> None:
    run, local, shared = Path(config.run.dir), Path(tempfile.gettempdir()), Path("/dev/shm")
    above = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    for key, folder, least in (
        ("disk_mib", above, LEAST_DISK_MIB),
        ("local_mib", local, LEAST_DISK_MIB),
        ("shared_mib", shared, LEAST_SHARED_MIB * processes),
    ):
        free = shutil.disk_usage(folder).free >> 20 if folder.is_dir() else 0
        setattr(node, key, free)
        if free < least:
            node.problems.append(f"{folder} has {free} MiB free, {least} are needed")
        elif not os.access(folder, os.W_OK):
            node.problems.append(f"{folder} cannot be written to")


def unreadable_shards(config: Config) -> list[str]:
    """Some shards of each folder, opened and read."""
    problems = []
    for name in [config.data.shards] if config.data.shards else config.data.mixture:
        if "://" in name:
            continue
        tars = sorted(Path(name).glob("*.tar"))
        if not tars:
            problems.append(f"no shard in {name}")
        for path in tars[:: max(1, len(tars) // SHARDS_READ)]:
            try:
                with open(path, "rb") as file:
                    file.read(SHARD_BYTES)
            except OSError as error:
                problems.append(f"{path} cannot be read: {error.strerror}")
                break
    return problems


def look_at_gpus(node: Node, config: Config, processes: int) -> None:
    import torch

    if config.run.device == "cpu" or not torch.cuda.is_available():
        if config.run.device == "cuda":
            node.problems.append("torch sees no GPU")
        return
    rates = []
    for number in range(torch.cuda.device_count()):
        node.gpus.append(torch.cuda.get_device_name(number))
        try:
            rates.append(product_rate(number))
        except RuntimeError as error:
            node.problems.append(f"GPU {number} fails: {str(error).splitlines()[0]}")
    node.gpu_tflops = min(rates, default=0.0)
    if len(node.gpus) < processes:
        node.problems.append(f"{len(node.gpus)} GPUs, {processes} are needed")


def product_rate(number: int, size: int = 4096, repeats: int = 8) -> float:
    """TFLOP/s of a bf16 matrix product on GPU `number`; raises RuntimeError where it is wrong."""
    import torch

    ones = torch.ones(size, size, device=f"cuda:{number}", dtype=torch.bfloat16)
    product = ones @ ones
    torch.cuda.synchronize(number)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(ones, ones, out=product)
    torch.cuda.synchronize(number)
    seconds = time.perf_counter() - start
    if not bool((product == size).all()):
        raise RuntimeError("a matrix product came out wrong")
    return 2 * size**3 * repeats / seconds / 1e12


# ---------------------------------------------------------------- what the first node makes of it


def compare(nodes: list[Node]) -> None:
    """Adds to `problems` where a node differs from most, or from the first if there is no majority."""
    answered = [node for node in nodes if node.versions]
    for key in answered[0].versions if answered else ():
        usual = Counter(node.versions[key] for node in answered).most_common(1)[0][0]
        for node in answered:
            if node.versions[key] != usual and node.versions[key] != "missing":
                what = "code of megasora" if key == "megasora" else key
                node.problems.append(f"{what} is {node.versions[key]}, elsewhere {usual}")
    usual_clock = statistics.median_low([node.clock for node in answered]) if answered else 0.0
    for node in answered:
        ahead = node.clock - usual_clock
        if abs(ahead) > CLOCK_SECONDS:
            node.problems.append(f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the others")
    name_slow(answered, "gpu_tflops", "its slowest GPU computes {:.0f} TFLOP/s, elsewhere {:.0f}")


def name_slow(nodes: list[Node], key: str, words: str) -> None:
    values = [getattr(node, key) for node in nodes if getattr(node, key)]
    for node in nodes if values else ():
        usual, own = statistics.median(values), getattr(node, key)
        if 0 < own < SLOW * usual:
            node.problems.append(words.format(own, usual))


def judge(nodes: list[Node], need: int, exclude_bad: bool) -> tuple[list[str], str]:
    """(names of the nodes to use, ""), or ([], why not)."""
    fit = [node.name for node in nodes if not node.problems]
    bad = [node for node in nodes if node.problems]
    told = "; ".join(f"{node.name}: {', '.join(node.problems)}" for node in bad)
    if len(fit) < need:
        return [], f"{len(fit)} of {len(nodes)} nodes are fit, {need} are needed; {told}"
    if bad and not exclude_bad:
        return [], f"{told}; submit with --spare {len(bad)} or more to leave such nodes out"
    return fit[:need], ""


def print_table(nodes: list[Node], together: float, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("node", "GPUs", "TFLOP/s", "disk", "own disk", "shared memory", "clock", "GiB/s", "verdict")
    for node in nodes:
        cells = [node.name]
        if node.versions:
            kinds = ", ".join(f"{count} x {name}" for name, count in Counter(node.gpus).items())
            free = (f"{mib / 1024:.1f} GiB" for mib in (node.disk_mib, node.local_mib, node.shared_mib))
            rate = f"{node.gpu_tflops:.0f}" if node.gpu_tflops else "-"
            speed = f"{node.gib_per_second:.2f}" if node.gib_per_second else "-"
            cells += [kinds or "none", rate, *free, f"{node.clock:+.3f} s", speed]
        else:
            cells += ["-"] * 7
        table.add_row(*map(Text, [*cells, "; ".join(node.problems) or "fit"]), style="red" if node.problems else None)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    console.print(table)
    if together:
        console.print(f"all-reduce over the nodes: {together:.2f} GiB/s each")
    console.print(f"preflight: {seconds:.1f} s", highlight=False)


# ---------------------------------------------------------------- what nodes find out together


def talk(store: TCPStore, place: int, size: int, device: str) -> tuple[float, float]:
    """GiB/s of this node with its partners, and of an all-reduce over all."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("talk", store), rank=place, world_size=size,
        timeout=timedelta(seconds=TALK_SECONDS),
    )  # fmt: skip
    data = torch.ones(TALK_BYTES // 4, device=device)
    other = torch.empty_like(data)
    found = []
    for distance in (1, 2):  # two partners: who is slow with both is slow itself
        partner = place ^ distance
        if partner < size:
            found.append(rate(lambda p=partner: exchange(data, other, p), device))
        dist.barrier()
    together = rate(lambda: mean(data), device) if size > 1 else 0.0
    if abs(float(data[0]) - 1) > 1e-5:
        raise RuntimeError("a sum over the nodes came out wrong")
    dist.destroy_process_group()
    return max(found, default=0.0), together


def exchange(data: Tensor, other: Tensor, partner: int) -> None:
    import torch.distributed as dist

    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, data, partner), dist.P2POp(dist.irecv, other, partner)])
    for work in works:
        work.wait()


def mean(data: Tensor) -> None:
    import torch.distributed as dist

    dist.all_reduce(data)
    data /= dist.get_world_size()


def rate(act: Callable[[], object], device: str) -> float:
    """GiB/s at which `act` moves TALK_BYTES, the fastest time, after one call that opens connections."""
    import torch

    times = []
    for _ in range(1 + TALK_REPEATS):
        start = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return TALK_BYTES / min(times[1:]) / (1 << 30)


def wait_for_file(path: Path) -> bool:
    end = time.monotonic() + SHARED_FILE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # asks a network file system afresh
        time.sleep(0.1)
    return True


def run_preflight(options: argparse.Namespace, config: Config) -> int:
    """On every node; the first one leads."""
    start = time.monotonic()
    import torch.distributed as dist

    names, place = options.nodes, options.place
    store = dist.TCPStore(
        names[0], options.port, is_master=place == 0, timeout=timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False
    )
    node = look(names[place], config, options.processes)
    token = Path(config.run.dir) / f".preflight-{options.port}"
    if place == 0:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        try:
            return lead(store, node, options, start)
        finally:
            token.unlink(missing_ok=True)
            with suppress(OSError):
                token.parent.rmdir()  # where nothing was before
    answer(store, "found", place, vars(node))
    patience = timedelta(seconds=2 * ANSWER_SECONDS)
    store.wait(["go"], patience)
    late = {"clock": time.time(), "problems": []}
    if not wait_for_file(token):
        late["problems"].append(f"run.dir={config.run.dir} is not shared: what {names[0]} writes is not seen here")
    answer(store, "late", place, late)
    store.wait(["talkers"], patience)
    talkers = json.loads(store.get("talkers"))
    if place in talkers:
        answer(store, "rate", place, try_to_talk(store, talkers.index(place), len(talkers), node))
    store.wait(["done"], patience)  # the store lives on the first node
    return DONE


def lead(store: TCPStore, own: Node, options: argparse.Namespace, start: float) -> int:
    """The first node: gathers, compares, lets the fit ones talk, and says the verdict."""
    nodes = [own, *map(Node, options.nodes[1:])]
    others = range(1, len(nodes))
    for place, found in answers(store, "found", others, start + ANSWER_SECONDS).items():
        vars(nodes[place]).update(found)
    for node in nodes:
        if not node.versions:
            node.problems.append(f"did not answer within {ANSWER_SECONDS:.0f} s")
    now = time.time()
    store.set("go", "")
    listening = [place for place in others if nodes[place].versions]
    for place, found in answers(store, "late", listening, time.monotonic() + SHARED_FILE_SECONDS + 1.0).items():
        nodes[place].clock = found["clock"] - now
        nodes[place].problems += found["problems"]
    unshared = [node for node in nodes if any(problem.startswith("run.dir=") for problem in node.problems)]
    compare(nodes)
    talkers = [place for place, node in enumerate(nodes) if not node.problems]
    store.set("talkers", json.dumps(talkers))
    together = 0.0
    if talkers[:1] == [0] and len(talkers) > 1:
        rates = {0: try_to_talk(store, 0, len(talkers), own)}
        rates |= answers(store, "rate", talkers[1:], time.monotonic() + 2.0)
        for place in talkers:
            alone, together, problem = rates.get(place, (0.0, together, "no answer"))
            nodes[place].gib_per_second = alone
            if problem:
                nodes[place].problems.append(f"cannot talk to the others: {problem}")
        name_slow([nodes[place] for place in talkers], "gib_per_second", "sends {:.2f} GiB/s, the others {:.2f}")
    print_table(nodes, together, time.monotonic() - start)
    chosen, reason = judge(nodes, options.need, options.exclude_bad)
    store.set("done", "")
    time.sleep(0.5)  # for the others to read it: the store ends with this process
    if reason:
        print(f"megasora: preflight: {reason}", file=sys.stderr)
        return CONFIGURATION if unshared and len(unshared) == len(nodes) - 1 else CRASH
    print(",".join(chosen))
    return DONE


def try_to_talk(store: TCPStore, place: int, size: int, node: Node) -> tuple[float, float, str]:
    try:
        return *talk(store, place, size, "cuda" if node.gpus else "cpu"), ""
    except RuntimeError as error:
        return 0.0, 0.0, str(error).splitlines()[0]


def answer(store: TCPStore, key: str, place: int, value: Any) -> None:
    store.set(f"{key}/{place}", json.dumps(value))


def answers(store: TCPStore, key: str, places: Iterable[int], end: float) -> dict[int, Any]:
    """What nodes have answered to `key` until `end`."""
    missing, found = set(places), {}
    while missing and time.monotonic() < end:
        for place in sorted(missing):
            if store.check([f"{key}/{place}"]):
                found[place] = json.loads(store.get(f"{key}/{place}"))
        missing -= found.keys()
        time.sleep(0.02)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megasora.preflight", description="Is every node of a job fit to train?")
    parser.add_argument(
        "--nodes", type=lambda text: text.split(","), required=True, help="their names, in Slurm's order"
    )
    parser.add_argument("--need", type=int, required=True, help="how many of them the run uses")
    parser.add_argument("--exclude-bad", action="store_true", help="go on without unfit nodes, if enough remain")
    parser.add_argument("--processes", type=int, required=True, help="of the run, on a node")
    parser.add_argument("--port", type=int, required=True, help="free on the first node")
    parser.add_argument("--place", type=int, default=int(os.environ.get("SLURM_PROCID", "0")), help="of this node")
    parser.add_argument("config", metavar="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    name = options.nodes[options.place]
    try:
        return run_preflight(options, load(options.config, options.overrides))
    except MegaSoraError as error:
        print(f"megasora: preflight: {name}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # whatever it is, it is of this node
        print(f"megasora: preflight: {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return CRASH


if __name__ == "__main__":
    sys.exit(main())
