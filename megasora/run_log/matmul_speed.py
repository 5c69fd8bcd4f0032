"""FLOP/s of a large bf16 matrix product on a GPU, which MFU is relative to: measured once on a machine, then cached.

The cache is a file per machine and kind of GPU in the user's cache folder, $XDG_CACHE_HOME/megasora or
~/.cache/megasora. It is measured again if the driver or PyTorch have changed, or if the file is damaged. Of the
processes of a node the first measures, with the others waiting, so that they agree and do not measure each other.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasora.errors import MegaSoraError
from megasora.files import write_text_atomic
from megasora.locks import locked

SIZE = 8192  # rows and columns of the matrices
WARMUP_CALLS, WARMUP_SECONDS = 20, 0.5  # at least; the clocks of an idle H100 are up after a third of a second
TIMED_CALLS = 50
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


def matmul_flops_per_s(device: torch.device) -> float | None:
    """From the cache of this machine, or measured on `device`, a GPU, and cached if possible; None if there is not
    enough memory left to measure it."""
    gpu = torch.cuda.get_device_name(device)
    path = cache_folder() / f"matmul-{file_name(socket.gethostname())}-{file_name(gpu)}.json"
    try:
        return cached(path, machine_key(gpu), lambda: measure(device))
    except torch.OutOfMemoryError:
        return None


def cached(path: Path, key: dict[str, Any], measure: Callable[[], float]) -> float:
    """The FLOP/s that the file `path` holds for `key`; else what `measure` returns, which is then written there."""
    speed = read(path, key)
    if speed is not None:
        return speed
    try:
        with locked(path.with_suffix(".lock"), str(path), wait=True):
            speed = read(path, key)  # of a process that had the lock
            if speed is None:
                speed = measure()
                write_text_atomic(path, json.dumps({**key, "flops_per_s": speed}, indent=1) + "\n")
    except (OSError, MegaSoraError):  # no home, a full disk, a file system without locks: each process measures
        pass
    return measure() if speed is None else speed


def read(path: Path, key: dict[str, Any]) -> float | None:
    """None if the file is missing or damaged, or of another key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        speed = float(content.pop("flops_per_s"))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return speed if content == key and math.isfinite(speed) and speed > 0 else None


def machine_key(gpu: str) -> dict[str, Any]:
    """What the speed depends on."""
    try:
        driver = DRIVER_VERSION.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        driver = ""
    return {"gpu": gpu, "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda, "size": SIZE}


def cache_folder() -> Path:
    folder, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if not os.path.isabs(folder):
        folder = os.path.join(home, ".cache") if os.path.isabs(home) else tempfile.gettempdir()
    return Path(folder) / "megasora"


def file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def measure(device: torch.device) -> float:
    """FLOP/s of a product of two SIZE x SIZE matrices of normally distributed values."""
    a = torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(calls: int) -> float:
        start.record()
        for _ in range(calls):
            torch.matmul(a, a, out=product)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    with torch.cuda.device(device):
        return 2 * SIZE**3 / warm_seconds(seconds)


def warm_seconds(seconds: Callable[[int], float]) -> float:
    """Seconds of a call when the clocks are up. `seconds(calls)` runs so many calls and returns their time."""
    warm = 0.0
    while warm < WARMUP_SECONDS:
        warm += seconds(WARMUP_CALLS)
    return seconds(TIMED_CALLS) / TIMED_CALLS
