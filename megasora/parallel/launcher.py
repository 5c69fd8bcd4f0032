"""What a launcher tells a process in its environment: its rank, the number of processes, where they meet.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process. Without RANK
a process is alone. Nothing here needs torch, so a wrong environment is an error within a second.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from megasora.errors import MegaSoraError

RESOLVE_SECONDS = 5.0  # for a name server to answer
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
REMEDY = (
    "start the processes with torchrun, which sets it; for a single process: "
    "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
)


@dataclass(frozen=True)
class Launcher:
    """One process among those of a launch. `address`, `port`: where they meet; "" and 0 for a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    address: str = ""
    port: int = 0
    is_torchrun: bool = False  # it serves the store at `address`, otherwise process 0 does

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def meeting_point(self) -> str:
        """`address:port`, which two launches that live at the same time do not share; "" for a process alone."""
        if not self.address:
            return ""
        is_local = self.address == "localhost" or self.address.startswith("127.")
        return f"{platform.node() if is_local else self.address}:{self.port}"


def read_launcher(environment: Mapping[str, str]) -> Launcher:
    """This process's place, from its environment. Raises MegaSoraError with the variable, its value and the remedy."""
    numbers = {name: read_number(environment, name) for name in NUMBERS}
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    local_rank, local_size = numbers["LOCAL_RANK"] or 0, numbers["LOCAL_WORLD_SIZE"] or 1
    if rank is None:
        if size not in (None, 1):
            raise MegaSoraError(f"WORLD_SIZE={size} is set in the environment, RANK is not; {REMEDY}")
        return Launcher(local_rank=local_rank)
    if size is None:
        raise MegaSoraError(f"RANK={rank} is set in the environment, WORLD_SIZE is not; {REMEDY}")
    if rank >= size:
        raise MegaSoraError(f"RANK={rank} must be less than WORLD_SIZE={size}; {REMEDY}")
    if numbers["LOCAL_WORLD_SIZE"] is not None and local_rank >= local_size:
        raise MegaSoraError(f"LOCAL_RANK={local_rank} must be less than LOCAL_WORLD_SIZE={local_size}; {REMEDY}")
    if size == 1:
        return Launcher(local_rank=local_rank)
    address, port = environment.get("MASTER_ADDR", ""), numbers["MASTER_PORT"]
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing:
        raise MegaSoraError(
            f"RANK={rank} and WORLD_SIZE={size} are set in the environment, {' and '.join(missing)} not; {REMEDY}"
        )
    is_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launcher(rank, size, local_rank, local_size, address, port or 0, is_torchrun)


def read_number(environment: Mapping[str, str], name: str) -> int | None:
    """The value of a variable, at least 0; None if it is not set."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise MegaSoraError(f"{name}={text[:40]!r} in the environment is no number of 0 or more; {REMEDY}")
    return int(text)


def world_size() -> int:
    """The number of processes that the launcher started, from the environment; needs no process group."""
    return read_number(os.environ, "WORLD_SIZE") or 1


def process_rank() -> int:
    """The rank of this process, from the environment; 0 if that holds no number."""
    try:
        return read_number(os.environ, "RANK") or 0
    except MegaSoraError:
        return 0


def check_meeting_point(launcher: Launcher) -> None:
    """Raises MegaSoraError if the name where the processes meet does not resolve: a connection would retry for
    minutes."""
    if launcher.address and (problem := resolve_problem(launcher.address)):
        raise MegaSoraError(
            f"MASTER_ADDR={launcher.address} does not resolve ({problem}); on one machine add `--local-addr 127.0.0.1` "
            "to torchrun, on several give `--master-addr` or `--rdzv-endpoint` an address that all of them reach, or "
            "add the name to /etc/hosts"
        )


def resolve_problem(name: str, seconds: float = RESOLVE_SECONDS) -> str:
    """Why a host name does not resolve, or "" if it does; "no answer" if it takes longer than `seconds`."""
    answers: list[str] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(name, None)
            answers.append("")
        except (OSError, UnicodeError) as error:
            answers.append(getattr(error, "strerror", None) or str(error))

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer within {seconds:.0f} s"


def die_with_launcher() -> None:
    """Asks the Linux kernel to kill this process as soon as its launcher has ended; does nothing on other systems.

    When torchrun is killed, its processes are not: they would continue to train, and write into the run folder at the
    same time as those of the next launch.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    pr_set_pdeathsig, launcher = 1, os.getppid()
    prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)
