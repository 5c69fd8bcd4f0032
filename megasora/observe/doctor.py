"""`megasora doctor`: what this machine has, what is slow or missing on it, and the remedy.

In: the machine and the installed packages; nothing is changed. Out: a table, and the exit code: 0, or 1 where something
is missing without which nothing can be trained or sampled. Versions are read from the packages' metadata, so that a
package that is broken, or slow to import, is still reported; only torch, av and, on a GPU, flash-attn are imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

GIB = 1 << 30
LEAST_MEMORY_GIB = 6.0  # what the demo may take
LEAST_DISK_GIB = 10.0
LEAST_SHARED_MEMORY_GIB = 1.0
LEAST_OPEN_FILES = 4096

ESSENTIAL = ("torch", "deepspeed", "webdataset", "omegaconf", "triton", "av", "numpy", "pillow", "safetensors")
OPTIONAL = {  # name of the distribution: what it is for
    "transformers": "only the T5 and CLIP text encoders need it: pip install transformers",
    "flash-attn": "",  # said by `attention`, which knows whether there is a GPU
}


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy` is empty where all is well; `missing` means that nothing works without it."""

    section: str
    name: str
    found: str
    remedy: str = ""
    missing: bool = False


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_or_error(name: str) -> tuple[ModuleType | None, str]:
    """(module, "") or (None, why it does not import): a broken binary package raises more than ImportError."""
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
        found = version_of(name)
        remedy = "" if found else f"run `make install`, or: pip install {name}"
        findings.append(Finding("version", name, found or "missing", remedy, missing=not found))
    for name, purpose in OPTIONAL.items():
        found = version_of(name)
        findings.append(Finding("version", name, found or "not installed", "" if found else purpose))
    return findings


def memory_bytes() -> int:
    """Memory of the machine, or the limit of the container we run in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return physical if text == "max" else min(physical, int(text))


def devices(torch: ModuleType) -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = memory_bytes() / GIB
    remedy = (
        f"the demo takes up to {LEAST_MEMORY_GIB:.0f} GiB: close other programs" if memory < LEAST_MEMORY_GIB else ""
    )
    findings = [Finding("device", "CPU cores", str(cores)), Finding("device", "memory", f"{memory:.1f} GiB", remedy)]

    threads = os.environ.get("OMP_NUM_THREADS", "")
    crowded = threads.isdigit() and int(threads) > cores
    remedy = f"more threads than the {cores} cores slow each other: unset OMP_NUM_THREADS" if crowded else ""
    findings.append(Finding("device", "OMP_NUM_THREADS", threads or "not set", remedy))

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = Counter((card.name, card.total_memory, (card.major, card.minor)) for card in cards)
        for (name, total, capability), count in kinds.items():
            found = f"{count} x {name}, {total / GIB:.0f} GiB"
            old = capability < (8, 0)
            remedy = "no bfloat16 in hardware: train with run.dtype=float32" if old else ""
            findings.append(Finding("device", "GPU", found, remedy))
    elif Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        remedy = f"torch {torch.__version__} does not see the driver's GPU: install the torch build for that driver"
        findings.append(Finding("device", "GPU", "not usable", remedy))
    else:
        remedy = "training runs in float32 on gloo: right for small models and for debugging, slow for all else"
        findings.append(Finding("device", "GPU", "none", remedy))
    return findings


def attention(torch: ModuleType) -> list[Finding]:
    """Which attention libraries are there. The model computes with SDPA, which every torch has."""
    gpu = torch.cuda.is_available()
    installed = version_of("flash-attn")
    error = import_or_error("flash_attn")[1] if gpu and installed else ""
    found, remedy = (installed or "not installed") + ("" if gpu else ", needs a GPU"), ""
    if error:
        found, remedy = f"{installed}, does not import", f"{error}; build it for this torch: pip install flash-attn"
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return [
        Finding("attention", "torch SDPA", "found, in use"),
        Finding(
            "attention", "torch varlen", ("found" if varlen else "not in this torch") + ("" if gpu else ", needs a GPU")
        ),
        Finding("attention", "flash-attn", found, remedy),
    ]


def triton(torch: ModuleType) -> list[Finding]:
    if version_of("triton") is None:
        return [Finding("kernels", "Triton", "missing", "run `make install`, or: pip install triton")]
    if not torch.cuda.is_available():
        return [Finding("kernels", "Triton", "interpreter (TRITON_INTERPRET=1), in float32")]
    python_h = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler and python_h.is_file():
        return [Finding("kernels", "Triton", "compiles for the GPU")]
    lacking = "a C compiler" if not compiler else f"{python_h}"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    remedy = f"Triton needs {lacking} to start a kernel: apt-get install gcc {python}-dev"
    return [Finding("kernels", "Triton", "cannot compile", remedy)]


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
    remedy = "put run.dir and data.shards on a larger disk: a checkpoint takes 16 bytes a parameter"
    findings = [Finding("storage", "free disk here", f"{free:.1f} GiB", remedy if free < LEAST_DISK_GIB else "")]

    shared = shutil.disk_usage(shared_memory).total / GIB if shared_memory.is_dir() else 0.0
    remedy = "processes of one node exchange data there; in a container: docker run --shm-size=8g, or --ipc=host"
    remedy = remedy if shared < LEAST_SHARED_MEMORY_GIB else ""
    findings.append(Finding("storage", str(shared_memory), f"{shared:.1f} GiB", remedy))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    remedy = f"shards and processes take many: ulimit -n {most}" if not unlimited and soft < LEAST_OPEN_FILES else ""
    findings.append(Finding("storage", "open files", "unlimited" if unlimited else str(soft), remedy))
    return findings


def examine() -> list[Finding]:
    findings = versions()
    torch, error = import_or_error("torch")
    if torch is None:
        findings.append(Finding("device", "torch", "does not import", f"{error}; run `make install`", missing=True))
    else:
        for look in (devices, attention, triton, communication):
            findings += look(torch)
    return findings + video() + storage()


def run_doctor() -> int:
    """Print what was found; 1 where something essential is missing, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = examine()
    table = Table("", "", "found", "slow or missing -> remedy", title="megasora doctor", title_justify="left")
    for index, finding in enumerate(findings):
        first = index == 0 or findings[index - 1].section != finding.section
        if first and index:
            table.add_section()
        style = "red" if finding.missing else "yellow" if finding.remedy else None
        cells = (finding.section if first else "", finding.name, finding.found, finding.remedy)
        table.add_row(*map(Text, cells), style=style)  # Text: nothing in a message is taken for markup
    console = Console(width=None if sys.stdout.isatty() else 160)  # piped: wide enough to be read line by line
    console.print(table)

    missing = [finding.name for finding in findings if finding.missing]
    if missing:
        console.print(f"cannot train or sample here: {', '.join(missing)} missing, see the remedy above", style="red")
        return 1
    remarks = [finding.name for finding in findings if finding.remedy]
    console.print(f"ready, with remarks on: {', '.join(remarks)}" if remarks else "ready", style="green")
    return 0
