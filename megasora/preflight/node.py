"""What a node checks on itself: packages, disks, shards and GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from megasora.config import Config
from megasora.observe.doctor import ESSENTIAL, version_of
from megasora.parallel.launcher import resolve_problem
from megasora.run_log.code_version import source_hash

MIN_DISK_MIB = 1024  # free, on the run folder's disk and on the node's own
MIN_SHARED_MIB_PER_PROCESS = 32  # free in /dev/shm
SHARDS_READ, SHARD_BYTES = 16, 1 << 16


@dataclass
class Node:
    """What is known of one node. It is fit if `problems` is empty; it has answered if `versions` is not."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    gpu_tflop_per_s: float = 0.0  # TFLOP/s of the slowest GPU
    disk_mib: int = 0
    local_mib: int = 0
    shared_mib: int = 0
    clock: float = 0.0  # seconds ahead of the first node
    gib_per_second: float = 0.0
    problems: list[str] = field(default_factory=list)


def inspect_node(name: str, config: Config, processes: int) -> Node:
    """Checks this node for a run with `processes` processes per node."""
    node = Node(name, versions={"python": platform.python_version(), "megasora": source_hash()})
    for package in ESSENTIAL:
        version = version_of(package)
        node.versions[package] = version or "missing"
        if not version:
            node.problems.append(f"{package} is missing")
    host = socket.gethostname()
    if problem := resolve_problem(host):
        node.problems.append(f"its own name {host} does not resolve: {problem}; add it to /etc/hosts")
    check_disks(node, config, processes)
    node.problems += unreadable_shards(config)
    check_gpus(node, config, processes)
    return node


def check_disks(node: Node, config: Config, processes: int) -> None:
    """Free space on the run folder's disk, on the node's own disk and in /dev/shm."""
    run_dir = Path(config.run.dir).absolute()
    for key, folder, required in (
        ("disk_mib", next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir()), MIN_DISK_MIB),
        ("local_mib", Path(tempfile.gettempdir()), MIN_DISK_MIB),
        ("shared_mib", Path("/dev/shm"), MIN_SHARED_MIB_PER_PROCESS * processes),
    ):
        free = shutil.disk_usage(folder).free >> 20 if folder.is_dir() else 0
        setattr(node, key, free)
        if free < required:
            node.problems.append(f"{folder} has {free} MiB free, {required} are needed")
        elif not os.access(folder, os.W_OK):
            node.problems.append(f"{folder} cannot be written to")


def unreadable_shards(config: Config) -> list[str]:
    """Problems with shards: opens and reads the beginning of some shards of each local folder."""
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


def check_gpus(node: Node, config: Config, processes: int) -> None:
    """Number of GPUs, and a matrix product on each."""
    import torch

    if config.run.device == "cpu" or not torch.cuda.is_available():
        if config.run.device == "cuda":
            node.problems.append("torch sees no GPU")
        return
    tflop_per_s = []
    for gpu in range(torch.cuda.device_count()):
        node.gpus.append(torch.cuda.get_device_name(gpu))
        try:
            tflop_per_s.append(measure_matmul_tflop_per_s(gpu))
        except RuntimeError as error:
            node.problems.append(f"GPU {gpu} fails: {str(error).splitlines()[0]}")
    node.gpu_tflop_per_s = min(tflop_per_s, default=0.0)
    if len(node.gpus) < processes:
        node.problems.append(f"{len(node.gpus)} GPUs, {processes} are needed")


def measure_matmul_tflop_per_s(gpu: int, size: int = 4096, repeats: int = 8) -> float:
    """TFLOP/s of a bf16 matrix product on a GPU. Raises RuntimeError if the product is wrong."""
    import torch

    ones = torch.ones(size, size, device=f"cuda:{gpu}", dtype=torch.bfloat16)
    product = ones @ ones
    torch.cuda.synchronize(gpu)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(ones, ones, out=product)
    torch.cuda.synchronize(gpu)
    seconds = time.perf_counter() - start
    if not bool((product == size).all()):
        raise RuntimeError("a matrix product is wrong")
    return 2 * size**3 * repeats / seconds / 1e12
