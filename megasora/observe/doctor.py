"""`megasora doctor`: checks packages, devices and disks of this machine, and names a remedy for each problem.

Input: the machine and the installed packages; nothing is changed. Output: a table; exit code 1 if something essential
for training or sampling is missing, else 0. Versions are read from package metadata, so broken and slow packages are
reported too; only torch, av and the attention kernels (on a GPU with flash-attn) are imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megasora.parallel.launcher import resolve_problem

GIB = 1 << 30
MIN_MEMORY_GIB = 6.0  # peak of the demo
MIN_DISK_GIB = 10.0
MIN_SHARED_MEMORY_GIB = 1.0
MIN_OPEN_FILES = 4096
HEAD_DIM = 128  # for which attention backends are checked

ESSENTIAL = ("torch", "deepspeed", "webdataset", "omegaconf", "triton", "av", "numpy", "pillow", "safetensors")
OPTIONAL = {  # distribution -> remedy if it is missing
    "transformers": "only the T5 and CLIP text encoders need it: pip install transformers",
    "flash-attn": "",  # optional, as flash-attn-4: `attention_backends` reports them
    "flash-attn-4": "",
}


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy`: empty if nothing is wrong. `missing`: something essential is missing."""

    section: str
    name: str
    value: str
    remedy: str = ""
    missing: bool = False


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_or_error(name: str) -> tuple[ModuleType | None, str]:
    """(module, "") or (None, the error): a broken binary package may raise other errors than ImportError."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def versions() -> list[Finding]:
    import megasora

    too_old = sys.version_info < (3, 11)
    findings = [
        Finding("version", "python", platform.python_version(), "python >= 3.11 is needed" if too_old else "", too_old),
        Finding("version", "megasora", megasora.__version__),
    ]
    for name in ESSENTIAL:
        version = version_of(name)
        remedy = "" if version else f"run `make install`, or: pip install {name}"
        findings.append(Finding("version", name, version or "missing", remedy, missing=not version))
    for name, remedy in OPTIONAL.items():
        version = version_of(name)
        findings.append(Finding("version", name, version or "not installed", "" if version else remedy))
    return findings


def memory_bytes() -> int:
    """Memory of the machine, or the limit of this container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return physical if text == "max" else min(physical, int(text))


def devices(torch: ModuleType) -> list[Finding]:
    """CPU cores, memory, threads and GPUs."""
    return [*cpu_devices(), *gpu_devices(torch)]


def cpu_devices() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = memory_bytes() / GIB
    memory_remedy = f"the demo takes up to {MIN_MEMORY_GIB:.0f} GiB: close other programs"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    too_many_threads = threads.isdigit() and int(threads) > cores
    threads_remedy = f"more threads than {cores} cores are slow: unset OMP_NUM_THREADS"
    return [
        Finding("device", "CPU cores", str(cores)),
        Finding("device", "memory", f"{memory:.1f} GiB", memory_remedy if memory < MIN_MEMORY_GIB else ""),
        Finding("device", "OMP_NUM_THREADS", threads or "not set", threads_remedy if too_many_threads else ""),
    ]


def gpu_devices(torch: ModuleType) -> list[Finding]:
    """One finding per kind of GPU, or why there is none."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
            remedy = f"torch {torch.__version__} does not see the driver's GPU: install the torch build for that driver"
            return [Finding("device", "GPU", "not usable", remedy)]
        remedy = "training runs in float32 over gloo, which is slow: use it for small models and debugging"
        return [Finding("device", "GPU", "none", remedy)]
    findings = []
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter((card.name, card.total_memory, (card.major, card.minor)) for card in cards)
    for (name, memory, capability), count in kinds.items():
        remedy = "no bfloat16 in hardware: train with run.dtype=float32" if capability < (8, 0) else ""
        findings.append(Finding("device", "GPU", f"{count} x {name}, {memory / GIB:.0f} GiB", remedy))
    return findings


def attention_backends(torch: ModuleType) -> list[Finding]:
    """Backends of attention that can be used here, with what `model.attention_backend=auto` takes of them, and how to
    get a faster one.

    Checked for bfloat16 on a GPU, float32 on a CPU, HEAD_DIM, and one long clip.
    """
    choice, error = import_or_error("megasora.kernels.attention_choice")
    if choice is None:
        return [Finding("attention", "backends", "do not import", error)]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    queries = torch.device(device), dtype, HEAD_DIM
    auto, auto_in_any_order = (choice.candidates(*queries, deterministic)[0] for deterministic in (True, False))
    findings = []
    for name in choice.BACKENDS:
        ordered, any_order = (choice.obstacle(name, *queries, deterministic) for deterministic in (True, False))
        value = f"not usable: {any_order}" if any_order else "usable"
        if ordered and not any_order:
            value += " with model.deterministic=false"
        if name in (auto, auto_in_any_order):
            value += ", taken by auto" + ("" if name == auto else " then")
        remedy = choice.notice(*queries) if name == auto else ""
        # varlen has the same requirements as flash2, except the package
        is_broken = name == "flash2" and any_order and not choice.obstacle("varlen", *queries)
        if is_broken and version_of("flash-attn"):
            remedy = "build flash-attn for this torch: pip install --no-build-isolation flash-attn"
        findings.append(Finding("attention", name, value, remedy))
    return findings


def triton(torch: ModuleType) -> list[Finding]:
    if version_of("triton") is None:
        return [Finding("kernels", "Triton", "missing", "run `make install`, or: pip install triton")]
    if not torch.cuda.is_available():
        return [Finding("kernels", "Triton", "interpreter only (TRITON_INTERPRET=1), in float32")]
    python_h = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler and python_h.is_file():
        return [Finding("kernels", "Triton", "compiles for the GPU")]
    requirement = "a C compiler" if not compiler else f"{python_h}"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    remedy = f"Triton needs {requirement} to launch a kernel: apt-get install gcc {python}-dev"
    return [Finding("kernels", "Triton", "cannot compile", remedy)]


def host_name() -> list[Finding]:
    """The name of this machine: torchrun and gloo look up its address, and a lookup that fails takes minutes."""
    name = socket.gethostname()
    problem = resolve_problem(name)
    if not problem:
        return [Finding("communication", "host name", name)]
    remedy = f"add it to /etc/hosts: 127.0.1.1 {name}; or start with torchrun --local-addr 127.0.0.1, on one machine"
    return [Finding("communication", "host name", f"{name} does not resolve: {problem}", remedy)]


def communication(torch: ModuleType) -> list[Finding]:
    distributed = torch.distributed
    if not distributed.is_available():
        remedy = "this torch is built without torch.distributed: install another build"
        return [Finding("communication", "backend", "none", remedy, missing=True)]
    if torch.cuda.is_available():
        if distributed.is_nccl_available():
            return [Finding("communication", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))]
        return [
            Finding("communication", "NCCL", "missing", "this torch is built without NCCL: install another build", True)
        ]
    if distributed.is_gloo_available():
        return [Finding("communication", "gloo", "found")]
    return [
        Finding("communication", "gloo", "missing", "this torch is built without gloo: install another build", True)
    ]


def video() -> list[Finding]:
    av, error = import_or_error("av")
    if av is None:
        return [Finding("video", "H.264 encoder", "none", f"av does not import ({error}): pip install av", True)]
    try:
        av.codec.Codec("libx264", "w")
    except ValueError:
        remedy = (
            "this av is built without libx264; the wheels have it: pip install --only-binary av --force-reinstall av"
        )
        return [Finding("video", "H.264 encoder", "none", remedy, missing=True)]
    return [Finding("video", "H.264 encoder", "libx264")]


def storage(folder: Path = Path(), shared_memory: Path = Path("/dev/shm")) -> list[Finding]:
    free = shutil.disk_usage(folder).free / GIB
    remedy = "put run.dir and data.shards on a larger disk: a checkpoint takes 16 bytes per parameter"
    findings = [Finding("storage", "free disk here", f"{free:.1f} GiB", remedy if free < MIN_DISK_GIB else "")]

    shared = shutil.disk_usage(shared_memory).total / GIB if shared_memory.is_dir() else 0.0
    remedy = "processes of a node exchange data through it; in a container: docker run --shm-size=8g, or --ipc=host"
    remedy = remedy if shared < MIN_SHARED_MEMORY_GIB else ""
    findings.append(Finding("storage", str(shared_memory), f"{shared:.1f} GiB", remedy))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    remedy = f"shards and processes need many: ulimit -n {limit}" if not unlimited and soft < MIN_OPEN_FILES else ""
    findings.append(Finding("storage", "open files", "unlimited" if unlimited else str(soft), remedy))
    return findings


def examine() -> list[Finding]:
    """All findings, in the order of the table."""
    findings = versions()
    torch, error = import_or_error("torch")
    if torch is None:
        findings.append(Finding("device", "torch", "does not import", f"{error}; run `make install`", missing=True))
    else:
        for check in (devices, attention_backends, triton, communication):
            findings += check(torch)
    return findings + host_name() + video() + storage()


def run_doctor() -> int:
    """Prints the findings; returns 1 if something essential is missing, else 0."""
    from rich.console import Console

    findings = examine()
    console = Console(width=None if sys.stdout.isatty() else 160)  # piped: wide enough that no row wraps
    console.print(build_table(findings))
    missing = [finding.name for finding in findings if finding.missing]
    if missing:
        console.print(f"cannot train or sample here: {', '.join(missing)} missing, see the remedy above", style="red")
        return 1
    remarks = [finding.name for finding in findings if finding.remedy]
    console.print(f"ready, with remarks on: {', '.join(remarks)}" if remarks else "ready", style="green")
    return 0


def build_table(findings: list[Finding]):
    """A table for rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "found", "slow or missing -> remedy", title="megasora doctor", title_justify="left")
    previous = ""
    for finding in findings:
        is_first = finding.section != previous
        if is_first and previous:
            table.add_section()
        style = "red" if finding.missing else "yellow" if finding.remedy else None
        cells = (finding.section if is_first else "", finding.name, finding.value, finding.remedy)
        table.add_row(*map(Text, cells), style=style)  # Text: no part of a message is parsed as markup
        previous = finding.section
    return table
