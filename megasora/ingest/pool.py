"""Child processes that decode, and their answers in the order of the jobs.

    jobs --> [worker 0: job, job]  [worker 1: job, job] ... --> answers, in order

A worker has a job and the next one, so it does not wait while the parent writes. One that crashes, hangs or grows
beyond its limits loses the job at hand, with the reason, and is replaced; the job behind it goes to its successor. The
parent reads one line of JSON a job: nothing that a decoder says is executed.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megasora.errors import MegaSoraError

START_SECONDS = 120  # a worker has to be ready by then
CLOSING_SECONDS = 10  # between a worker's last word and its end, where it dumps its memory
DEPTH = 2  # jobs a worker is given ahead
ENVIRONMENT = {  # of a worker: one thread, and frames that reuse memory instead of asking the system for each
    **{name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    **{name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")},
}
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from megasora.ingest.worker import main; main()"


@dataclass
class Child:
    process: subprocess.Popen
    jobs: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)
    heard: float = field(default_factory=time.monotonic)  # when the job at hand began, at the latest
    ready: bool = False
    buffer: bytes = b""

    def send(self, line: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # a dead child is noticed by its silence
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()


class Pool:
    """`with Pool(...) as pool: for answer in pool.run(jobs)`. Jobs and answers as in `worker.py`."""

    def __init__(self, settings: dict[str, Any], workers: int):
        """`settings`: as `worker.settings_of` gives them."""
        self.settings, self.workers = settings, workers
        self.seconds: float = settings["ingest"]["seconds"]
        self.children: list[Child] = []
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for child in list(self.children):
            self.remove(child)
        self.selector.close()

    def run(self, jobs: Iterator[dict[str, Any] | None]) -> Iterator[dict[str, Any] | None]:
        """An answer a job, in order; None is answered by None. A job that cost its worker is answered by the reason."""
        line: Iterator[tuple[int, dict[str, Any] | None]] = enumerate(jobs)
        answers: dict[int, dict[str, Any] | None] = {}
        next_out, next_in, more = 0, 0, True
        while True:
            while more and next_in - next_out < 2 * DEPTH * self.workers + 2:
                free = self.free_child()
                if free is None:
                    break
                number, job = next(line, (None, None))
                if number is None:
                    more = False
                    break
                next_in += 1
                if job is None:
                    answers[number] = None
                else:
                    self.give(free, number, job)
            if next_out in answers:
                yield answers.pop(next_out)
                next_out += 1
            elif next_out == next_in:
                return
            else:
                answers.update(self.listen())

    def free_child(self) -> Child | None:
        """The one with the fewest jobs, a new one while there are fewer than `workers`; None where all have enough."""
        least = min(self.children, key=lambda child: len(child.jobs), default=None)
        if least is not None and not least.jobs:
            return least
        if len(self.children) < self.workers:
            return self.start()
        return least if len(least.jobs) < DEPTH else None

    def start(self) -> Child:
        path = [os.path.abspath(folder) for folder in sys.path]
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
        )
        child = Child(process)
        self.children.append(child)
        self.selector.register(process.stdout, selectors.EVENT_READ, child)
        child.send(self.settings)
        return child

    def give(self, child: Child, number: int, job: dict[str, Any]) -> None:
        if not child.jobs and child.ready:
            child.heard = time.monotonic()
        child.jobs.append((number, job))
        child.send(job)

    def listen(self) -> dict[int, dict[str, Any]]:
        """Waits for at least one answer, crash or time-out."""
        answers: dict[int, dict[str, Any]] = {}
        busy = [child for child in self.children if child.jobs]
        wait = max(0.0, min(self.deadline(child) for child in busy) - time.monotonic())
        for key, _ in self.selector.select(wait):
            child = key.data
            data = os.read(key.fd, 1 << 16)
            child.buffer += data
            *lines, child.buffer = child.buffer.split(b"\n")
            for text in lines:
                answers.update(self.hear(child, json.loads(text)))
            if not data:
                answers.update(self.lose(child, None))
        for child in busy:
            if child in self.children and child.jobs and time.monotonic() > self.deadline(child):
                answers.update(self.lose(child, f"took more than ingest.seconds={self.seconds:g} to decode"))
        return answers

    def deadline(self, child: Child) -> float:
        return child.heard + (self.seconds if child.ready else START_SECONDS)

    def hear(self, child: Child, values: dict[str, Any]) -> dict[int, dict[str, Any]]:
        child.heard = time.monotonic()
        if "error" in values:
            raise MegaSoraError(values["error"])
        if "ready" in values:
            child.ready = True
            return {}
        number, _ = child.jobs.popleft()
        return {number: values}

    def lose(self, child: Child, late: str | None) -> dict[int, dict[str, Any]]:
        """Replaces a child that died or is too late; what became of the job at hand."""
        code = self.remove(child, 0.0 if late else CLOSING_SECONDS)
        if not child.ready:
            how = "was not ready in time" if late else f"ended with {ending(code)} before its first clip"
            raise MegaSoraError(
                f"a process to decode {how}; its last words are above. ingest.memory_mib="
                f"{self.settings['ingest']['memory_mib']} is what it may take"
            )
        if not child.jobs:
            return {}
        number, job = child.jobs.popleft()
        if child.jobs:
            successor = self.start()
            for behind in child.jobs:
                self.give(successor, *behind)
        name = f"{job['path']}{': ' + job['name'] if job['name'] else ''}"
        reason, what = ("time", late) if late else ("crash", f"ended its decoder with {ending(code)}")
        return {number: {"stage": "decode", "reason": reason, "message": f"{name} {what}"}}

    def remove(self, child: Child, patience: float = 0.0) -> int:
        """Its exit code; killed where it has not ended by itself within `patience` seconds."""
        self.children.remove(child)
        self.selector.unregister(child.process.stdout)
        try:
            code = child.process.wait(patience)
        except subprocess.TimeoutExpired:
            child.process.kill()
            code = child.process.wait()
        with suppress(BrokenPipeError):
            child.process.stdin.close()
        child.process.stdout.close()
        return code


def ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
