"""Starts the processes of one launch: by torchrun, or forked from a server that has imported the heavy libraries.

`Torchrun` is the command of a user. `ForkedRanks` runs the same `megasora.train.main` on each rank and does what
torchrun does when a process fails or a signal arrives; it saves the imports, about ten seconds of CPU time a launch.
Both append all output to `log` and set TOKEN in the environment of their processes, by which the rest is found.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megasora.testing.spawn import PRELOADED
from megasora.train import main

TOKEN = "MEGASORA_FAULT_RUN"
SHUTDOWN_SECONDS = 10  # between SIGTERM and SIGKILL of the other processes when one has failed
HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # by torchrun, which forwards them


class Torchrun:
    """A launch by torchrun, or of one process without it. `launcher`: process id."""

    def __init__(self, arguments: list[str], processes: int, log: Path, token: str):
        command = [sys.executable, "-m", "megasora.train", *arguments]
        if processes > 1:
            options = ["--standalone", "--nproc-per-node", str(processes), "--signals-to-handle", HANDLED]
            command[2:3] = ["torch.distributed.run", *options, "-m", "megasora.train"]
        own = {"OMP_NUM_THREADS": "1", TOKEN: token, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes, self.launcher = processes, self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def rank(self, rank: int) -> int | None:
        """Process id of a rank; None if it is not there."""
        if self.processes == 1:
            return self.launcher
        try:
            children = Path(f"/proc/{self.launcher}/task/{self.launcher}/children").read_text().split()
        except OSError:
            return None
        return next((int(pid) for pid in children if f"RANK={rank}" in environment_of(int(pid))), None)

    def signal_launcher(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends what is left of the launch; for a launch that does not end by itself."""
        for pid in [self.rank(rank) for rank in range(self.processes)]:
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


class ForkedRanks:
    """A launch whose processes are forked from a server; this object is the launcher, which cannot be killed alone."""

    launcher = None

    def __init__(self, arguments: list[str], processes: int, log: Path, token: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, "fault_launch"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(processes),
               "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True", TOKEN: token,
               "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.ranks = []
        for rank in range(processes):
            environment = {**own, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {TOKEN: token}
            self.ranks.append(context.Process(target=run_rank, args=(arguments, environment, str(log))))
            self.ranks[-1].start()
        self.shutdown_time: float | None = None

    def poll(self) -> int | None:
        """0 if all processes have ended with 0, 1 if one has not; None while one runs."""
        codes = [process.exitcode for process in self.ranks]
        running = [process for process in self.ranks if process.exitcode is None]
        if not running:
            return int(any(codes))
        if any(codes):
            if self.shutdown_time is None:
                self.shutdown_time = time.monotonic()
                for process in running:
                    process.terminate()
            elif time.monotonic() - self.shutdown_time > SHUTDOWN_SECONDS:
                self.kill()
        return None

    def rank(self, rank: int) -> int | None:
        return self.ranks[rank].pid if self.ranks[rank].exitcode is None else None

    def signal_launcher(self, number: int) -> None:
        """Forwards a signal to all processes, as torchrun does."""
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()


def run_rank(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The body of a forked process."""
    os.environ |= environment
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.exit(main(arguments))


def environment_of(pid: int) -> list[str]:
    """The variables with which a process was started, NAME=VALUE; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def processes_of(token: str) -> list[int]:
    """Live processes, zombies excluded, that were started with this token."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and f"{TOKEN}={token}" in environment_of(int(folder.name)):
            found.append(int(folder.name))
    return found
