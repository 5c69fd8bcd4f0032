"""A pool of worker processes that decode; results come in the order of the jobs.

    jobs --> [worker 0: job, job]  [worker 1: job, job] ... --> results, in order

A worker holds the job it runs and the next one, so it does not idle while the parent writes. A worker that crashes,
hangs or exceeds its memory limit costs the clip of its current job, which is rejected with the reason; the worker is
replaced and its next job is given to the replacement. Results are lines of JSON, so nothing that a decoder outputs is
executed. What a worker prints is not shown: it is counted, with the result of the job that it ran. For a learned codec,
each worker is connected to a codec process; the end of one of these ends the ingest.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megasora.errors import MegaSoraError
from megasora.ingest.child_process import describe_exit, exit_code_of, start_process
from megasora.ingest.codec_pool import CodecPool, CodecProcess
from megasora.ingest.library_warnings import END_OF_JOB, MAX_LINE, LibraryWarnings
from megasora.ingest.results import Rejection, Result, from_message

Clip = TypeVar("Clip")
Outcome = tuple[Result, dict[str, list[Any]]]  # of a job, with the details of what libraries printed

START_TIMEOUT_SECONDS = 120  # until a worker is ready
EXIT_TIMEOUT_SECONDS = 10  # between the end of a worker's output and its exit, in which it may dump its memory
JOBS_PER_WORKER = 2
ENVIRONMENT = {  # of a worker: one thread, and an allocator that reuses the memory of frames
    **{name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    **{name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")},
}


@dataclass
class WorkerProcess:
    """A running worker and the jobs that it has not answered yet."""

    process: subprocess.Popen
    jobs: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)  # (index, job); the first one is running
    last_message_time: float = field(default_factory=time.monotonic)  # or the time at which it was given its first job
    waits_since: float | None = None  # for an answer of its codec process: this is no time of the decoder
    codec_index: int = 0  # of its codec process
    ready: bool = False
    printed_start: bool = False  # whether it has printed the end of its start: what is before that is of no clip
    buffer: bytes = b""  # of an incomplete line
    printed: LibraryWarnings = field(default_factory=LibraryWarnings)  # since the end of the last job
    printed_by_job: deque[dict[str, list[Any]]] = field(default_factory=deque)  # of jobs that have ended
    printed_buffer: bytes = b""  # of an incomplete line
    last_printed: str = ""

    def send(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # `poll` notices that the process has ended
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def read_printed(self) -> bool:
        """Counts the lines that the worker has printed so far; False once it can print no more."""
        try:
            while data := os.read(self.process.stderr.fileno(), 1 << 16):
                *lines, rest = (self.printed_buffer + data).split(b"\n")
                self.printed_buffer = rest[:MAX_LINE]
                for line in lines:
                    self.add_printed(line)
        except BlockingIOError:
            return True
        return False

    def add_printed(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if text == END_OF_JOB and not self.printed_start:
            self.printed_start = True
        elif text == END_OF_JOB:
            self.printed_by_job.append(self.printed.details())
            self.printed = LibraryWarnings()
        elif self.printed_start and len(self.printed_by_job) < len(self.jobs):
            self.printed.add(text, job_name(self.jobs[len(self.printed_by_job)][1]))
        self.last_printed = text.strip("\0 \t\r")[:MAX_LINE] or self.last_printed

    def take_printed(self) -> dict[str, list[Any]]:
        """The details of what the job printed whose result is read; the worker ended it before it sent the result."""
        self.read_printed()
        return self.printed_by_job.popleft() if self.printed_by_job else {}


class WorkerPool:
    """`with WorkerPool(...) as pool: for clip, result, printed in pool.run(jobs)`. Jobs and results are those of
    `worker.py`, `printed` is of `LibraryWarnings.details`."""

    def __init__(self, settings: dict[str, Any], num_workers: int, codecs: CodecPool | None = None):
        """`settings`: from `worker_settings`; `codecs`: for a learned codec, entered."""
        self.settings, self.num_workers, self.codecs = settings, num_workers, codecs
        self.timeout_seconds: float = settings["ingest"]["decode_timeout_seconds"]
        self.workers: list[WorkerProcess] = []
        self.selector = selectors.DefaultSelector()
        if codecs:
            codecs.register(self.selector)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self.workers):
            self.stop_worker(worker)
        self.selector.close()

    def run(self, jobs: Iterator[tuple[Clip, dict[str, Any] | Rejection]]) -> Iterator[tuple[Clip, Result, dict]]:
        """Runs the jobs of clips, (clip, job); yields (clip, result, printed) in their order.

        A clip that is rejected already comes with its Rejection instead of a job; a job that cost its worker has a
        Rejection as its result. Raises MegaSoraError if workers cannot start or write.
        """
        numbered = enumerate(jobs)
        clips: deque[Clip] = deque()  # of the jobs whose results are not yielded yet, in order
        outcomes: dict[int, Outcome] = {}
        num_yielded, more = 0, True
        while True:
            while more and len(clips) < 2 * JOBS_PER_WORKER * self.num_workers + 2:
                worker = self.available_worker()
                if worker is None:
                    break
                index, (clip, job) = next(numbered, (None, (None, None)))
                if index is None:
                    more = False
                    break
                clips.append(clip)
                if isinstance(job, Rejection):
                    outcomes[index] = job, {}
                else:
                    self.assign(worker, index, job)
            if num_yielded in outcomes:
                yield clips.popleft(), *outcomes.pop(num_yielded)
                num_yielded += 1
            elif not clips:
                return
            else:
                outcomes.update(self.poll())

    def available_worker(self) -> WorkerProcess | None:
        """The worker with the fewest jobs, or a new one if none is idle and the pool is not full; None if all are
        full."""
        least_busy = min(self.workers, key=lambda worker: len(worker.jobs), default=None)
        if least_busy is not None and not least_busy.jobs:
            return least_busy
        if len(self.workers) < self.num_workers:
            return self.start_worker()
        return least_busy if len(least_busy.jobs) < JOBS_PER_WORKER else None

    def start_worker(self) -> WorkerProcess:
        settings, streams, connection, codec_index = self.settings, {}, None, 0
        if self.codecs:
            connected = [worker.codec_index for worker in self.workers]
            connection, codec_index = self.codecs.connect(connected)
            settings = {**settings, "codec_socket": connection.fileno()}
            streams = {"pass_fds": [connection.fileno()]}
        process = start_process("worker", ENVIRONMENT, stdin=subprocess.PIPE, **streams)
        if connection:
            connection.close()
        worker = WorkerProcess(process, codec_index=codec_index)
        self.workers.append(worker)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        self.selector.register(process.stderr, selectors.EVENT_READ, worker)
        worker.send(settings)
        return worker

    def assign(self, worker: WorkerProcess, index: int, job: dict[str, Any]) -> None:
        if not worker.jobs and worker.ready:
            worker.last_message_time = time.monotonic()
        worker.jobs.append((index, job))
        worker.send(job)

    def poll(self) -> dict[int, Outcome]:
        """Waits for a message, an exit or a timeout; returns the outcomes that are new, by the index of their job."""
        outcomes: dict[int, Outcome] = {}
        busy = [worker for worker in self.workers if worker.jobs]
        deadline = min(self.deadline(worker) for worker in busy)
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for key, _ in self.selector.select(wait):
            worker = key.data
            if isinstance(worker, CodecProcess):
                self.codecs.read(worker, key.fileobj, self.selector)
                continue
            if worker not in self.workers:
                continue
            if key.fileobj is worker.process.stderr:
                if not worker.read_printed():
                    self.selector.unregister(key.fileobj)
                continue
            data = os.read(key.fd, 1 << 16)
            worker.buffer += data
            *lines, worker.buffer = worker.buffer.split(b"\n")
            for line in lines:
                outcomes.update(self.handle_message(worker, json.loads(line)))
            if not data:
                outcomes.update(self.replace_worker(worker, timed_out=False))
        for worker in busy:
            if worker in self.workers and worker.jobs and time.monotonic() > self.deadline(worker):
                outcomes.update(self.replace_worker(worker, timed_out=True))
        return outcomes

    def deadline(self, worker: WorkerProcess) -> float:
        if worker.waits_since is not None:
            return math.inf  # the codec process checks its own time
        return worker.last_message_time + (self.timeout_seconds if worker.ready else START_TIMEOUT_SECONDS)

    def handle_message(self, worker: WorkerProcess, message: dict[str, Any]) -> dict[int, Outcome]:
        now = time.monotonic()
        if "waits" in message:
            if worker.waits_since is not None:
                worker.last_message_time += now - worker.waits_since
            worker.waits_since = now if message["waits"] else None
            return {}
        worker.last_message_time = now
        if "codec_ended" in message:
            self.codecs.raise_why()
        if "error" in message:
            raise MegaSoraError(message["error"])
        if "ready" in message:
            worker.read_printed()
            worker.ready = True
            return {}
        printed = worker.take_printed()
        index, _ = worker.jobs.popleft()
        return {index: (from_message(message), printed)}

    def replace_worker(self, worker: WorkerProcess, timed_out: bool) -> dict[int, Outcome]:
        """Replaces a worker that exited or timed out; returns the rejection of its current job, by index."""
        exit_code = self.stop_worker(worker, 0.0 if timed_out else EXIT_TIMEOUT_SECONDS)
        last_line = f" ({worker.last_printed})" if worker.last_printed else ""
        ended = f"ended with {describe_exit(exit_code)}{last_line}"
        if not worker.ready:
            how = f"was not ready after {START_TIMEOUT_SECONDS} s" if timed_out else f"{ended} before its first clip"
            memory = f"ingest.worker_memory_mib={self.settings['ingest']['worker_memory_mib']}"
            raise MegaSoraError(f"decode worker {how}. Its address space is limited by {memory}")
        if not worker.jobs:
            return {}
        printed = worker.printed.details()
        index, job = worker.jobs.popleft()
        if worker.jobs:
            replacement = self.start_worker()
            for next_index, next_job in worker.jobs:
                self.assign(replacement, next_index, next_job)
        name = job_name(job)
        if timed_out:
            limit = f"ingest.decode_timeout_seconds={self.timeout_seconds:g}"
            reason, message = "timeout", f"{name} took more than {limit} to decode"
        else:
            reason, message = "crash", f"{name} crashed its decoder, which {ended}"
        return {index: (Rejection("decode", reason, message), printed)}

    def stop_worker(self, worker: WorkerProcess, timeout_seconds: float = 0.0) -> int:
        """Removes a worker and returns its exit code; kills it if it has not exited after `timeout_seconds`."""
        self.workers.remove(worker)
        for stream in (worker.process.stdout, worker.process.stderr):
            with suppress(KeyError):  # stderr was closed first
                self.selector.unregister(stream)
        exit_code = exit_code_of(worker.process, timeout_seconds)
        worker.read_printed()
        with suppress(BrokenPipeError):
            worker.process.stdin.close()
        worker.process.stdout.close()
        worker.process.stderr.close()
        return exit_code


def job_name(job: dict[str, Any]) -> str:
    """The file, and the member of a tar, that a job reads."""
    return f"{job['path']}{': ' + job['name'] if job['name'] else ''}"
