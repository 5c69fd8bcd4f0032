"""Carries out a fault: waits for its moment in a running launch and disturbs it, or damages the files of a checkpoint.

Moments are read from the run folder: the lines of launches.jsonl and metrics.jsonl and the folders of checkpoints.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fault_launch import ForkedRanks, Torchrun
from fault_plan import Damage, Fault

from megasora.errors import CRASH, HANG, STOPPED

POLL_SECONDS = 0.005
FULL_DISK_BYTES = 4096  # as on a full disk no file grows beyond this size

Running = Torchrun | ForkedRanks
NO_EXIT = None  # exit.json is absent: nobody could write it


class Progress:
    """What a launch has done since this object was made, from the files of its run."""

    def __init__(self, run: Path):
        self.run = run
        self.first_launches, self.first_lines = self.launches(), self.lines()
        self.first_saved = self.saved()

    def launches(self) -> int:
        return count_lines(self.run / "launches.jsonl")

    def lines(self) -> int:
        return count_lines(self.run / "metrics.jsonl")

    def saved(self) -> set[str]:
        return {path.name for path in (self.run / "checkpoints").glob("step-*")}

    def steps(self) -> int:
        return self.lines() - self.first_lines

    def reached(self, fault: Fault) -> bool:
        """Whether the moment of a fault has come."""
        if fault.moment == "start":
            return self.launches() > self.first_launches
        if self.steps() < fault.after:
            self.first_saved |= self.saved()
            return False
        if fault.moment == "save":
            return any((self.run / "checkpoints").glob(".step-*.part"))
        return fault.moment == "step" or bool(self.saved() - self.first_saved)


def count_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for(running: Running, reached: Callable[[], bool], deadline: float) -> bool:
    """Waits until `reached()`; False if the launch ends before. Raises TimeoutError at `deadline`."""
    while running.poll() is None:
        if reached():
            return True
        if time.monotonic() > deadline:
            raise TimeoutError("the launch has not come to the moment of its fault")
        time.sleep(POLL_SECONDS)
    return False


# ---------------------------------------------------------------- faults of a running launch

Undo = Callable[[], object]  # called once the launch has ended
Act = Callable[[Running, Fault, Path], Undo | None]  # the path: the run folder


def to_launcher(number: int) -> Act:
    return lambda running, fault, run: running.signal_launcher(number)


def to_rank(number: int) -> Act:
    return lambda running, fault, run: with_pid(running, fault, lambda pid: os.kill(pid, number))


def limit_files(running: Running, fault: Fault, run: Path) -> None:
    """Writes of one rank beyond FULL_DISK_BYTES of any file fail from now on, with EFBIG."""
    limit = (FULL_DISK_BYTES, FULL_DISK_BYTES)
    with_pid(running, fault, lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, limit))


def fill_disk(running: Running, fault: Fault, run: Path) -> Undo:
    """Fills the file system of the run folder, which must be a small one of its own: ENOSPC on all ranks."""
    ballast = run.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast.unlink


def make_read_only(running: Running, fault: Fault, run: Path) -> Undo:
    """Mounts the folder of checkpoints over itself, read-only: EROFS at the next save, on all ranks. Needs root."""
    folder = str(run / "checkpoints")
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    return lambda: subprocess.run(["umount", folder], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def with_pid(running: Running, fault: Fault, act: Callable[[int], object]) -> None:
    pid = running.rank(fault.rank)
    if pid is not None:
        with suppress(ProcessLookupError):  # it has just ended
            act(pid)


KILLED = (NO_EXIT, CRASH)
FAULTS: dict[str, tuple[Act, tuple[int | None, ...]]] = {  # and the codes that may be in exit.json
    "kill_rank": (to_rank(signal.SIGKILL), KILLED),
    "kill_launcher": (to_launcher(signal.SIGKILL), KILLED),
    "term_launcher": (to_launcher(signal.SIGTERM), (STOPPED,)),
    "usr1_launcher": (to_launcher(signal.SIGUSR1), (STOPPED,)),
    "term_rank": (to_rank(signal.SIGTERM), (STOPPED,)),
    "usr1_rank": (to_rank(signal.SIGUSR1), (STOPPED,)),
    "stop_rank": (to_rank(signal.SIGSTOP), (HANG,)),
    "full_disk_rank": (limit_files, (CRASH,)),
    "full_disk": (fill_disk, (NO_EXIT, CRASH)),
    "read_only_disk": (make_read_only, (CRASH,)),
}


# ---------------------------------------------------------------- damage between two launches


def flip(checkpoints: Path, newest: Path, place: float) -> None:
    """Flips one bit of one file."""
    file = file_at(newest, place)
    data = bytearray(file.read_bytes())
    bit = int(place * 1e6) % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(checkpoints: Path, newest: Path, place: float) -> None:
    file = file_at(newest, place)
    os.truncate(file, int(place * file.stat().st_size))


def delete(checkpoints: Path, newest: Path, place: float) -> None:
    file_at(newest, place).unlink()


def file_at(folder: Path, place: float) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return files[int(place * len(files))]


def write_latest(text: str) -> Callable[[Path, Path, float], None]:
    return lambda checkpoints, newest, place: (checkpoints / "latest").write_text(text) and None


def remove_latest(checkpoints: Path, newest: Path, place: float) -> None:
    (checkpoints / "latest").unlink(missing_ok=True)


DAMAGE: dict[str, Callable[[Path, Path, float], None]] = {
    "flip": flip,
    "cut": cut,
    "delete": delete,
    "latest_gone": remove_latest,
    "latest_empty": write_latest(""),
    "latest_dangling": write_latest("step-99999999\n"),
}


def apply_damage(damage: Damage, checkpoints: Path, whole: list[Path]) -> bool:
    """Damages the newest of the `whole` checkpoints, oldest first; False if no other would be left."""
    of_files = not damage.kind.startswith("latest")
    if len(whole) < 1 + of_files:
        return False
    DAMAGE[damage.kind](checkpoints, whole[-1], damage.place)
    return True
