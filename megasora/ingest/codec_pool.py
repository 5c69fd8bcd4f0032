"""The codec processes of an ingest with a learned codec, as the process that starts them sees them.

One per GPU, else one per core, each with one thread. A decode worker gets a socket to that with the fewest workers. A
codec process that ends or reports an error ends the ingest: its message is raised by `read`, when the selector of the
pool has seen its output.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megasora.config import CodecConfig, IngestConfig
from megasora.errors import MegaSoraError
from megasora.ingest.child_process import describe_exit, exit_code_of, start_process
from megasora.ingest.codec_process import codec_process_settings
from megasora.ingest.library_warnings import MAX_LINE

START_TIMEOUT_SECONDS = 600  # until a network is loaded
EXIT_TIMEOUT_SECONDS = 10
# One thread: sums then have the same order on any number of cores (with two, convolutions of large frames give other
# bits). One arena, which reuses the memory of small activations. Large ones are mapped, in large pages, and given back,
# so that clips of many sizes leave no gaps. Without these, a third of the time was zeroing memory.
ENVIRONMENT = {
    **{name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX")},
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass
class CodecProcess:
    """A running codec process."""

    process: subprocess.Popen
    control: socket.socket  # sockets of workers are sent through it
    ready: dict[str, Any] | None = None  # its fingerprint, factors and channels
    buffer: bytes = b""  # of an incomplete message
    printed_buffer: bytes = b""
    last_printed: str = ""


class CodecPool:
    """`with CodecPool(...) as codecs`: returns when all networks are loaded. Raises MegaSoraError."""

    def __init__(
        self,
        codec: CodecConfig,
        limits: IngestConfig,
        fingerprint: str,
        environments: list[dict[str, str]],
        receive: Callable[[str], None] = lambda line: None,
    ):
        """`codec`: from `resolve_codec`; `fingerprint`: its own; `environments`: from `codec_environments`; `receive`:
        called with each line that a codec process prints."""
        self.codec, self.fingerprint, self.environments, self.receive = codec, fingerprint, environments, receive
        self.settings = codec_process_settings(asdict(codec), limits.decode_timeout_seconds)
        self.processes: list[CodecProcess] = []

    def __enter__(self) -> CodecPool:
        try:
            for environment in self.environments:
                self.processes.append(self.start(environment))
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for codec in self.processes:
            codec.process.kill()
        for codec in self.processes:
            codec.process.wait()
            for stream in (codec.control, codec.process.stdout, codec.process.stderr):
                stream.close()
        self.processes = []

    def start(self, environment: dict[str, str]) -> CodecProcess:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = start_process("codec_process", {**ENVIRONMENT, **environment}, stdin=theirs.fileno())
        control.send(json.dumps(self.settings).encode())
        return CodecProcess(process, control)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        with selectors.DefaultSelector() as selector:
            self.register(selector)
            while not all(codec.ready for codec in self.processes):
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events and time.monotonic() > deadline:
                    raise MegaSoraError(f"codec process was not ready after {START_TIMEOUT_SECONDS} s")
                for key, _ in events:
                    self.read(key.data, key.fileobj, selector)
        for codec in self.processes:
            self.check_ready(codec.ready)

    def check_ready(self, ready: dict[str, Any]) -> None:
        """Raises MegaSoraError where the network is not that of the settings."""
        expected = {
            "fingerprint": self.fingerprint, "factors": list(self.codec.factors), "channels": self.codec.channels,
        }  # fmt: skip
        for key, value in expected.items():
            if ready[key] != value:
                where = f"codec.path={self.codec.path}" if self.codec.path else f"codec.name={self.codec.name}"
                raise MegaSoraError(
                    f"{where} was changed while this ingest started: {key} {value} -> {ready[key]}; run it again"
                )

    def register(self, selector: selectors.BaseSelector) -> None:
        """Has `selector` report the output of each codec process, with the CodecProcess as data: for `read`."""
        for codec in self.processes:
            for stream in (codec.process.stdout, codec.process.stderr):
                selector.register(stream, selectors.EVENT_READ, codec)

    def read(self, codec: CodecProcess, stream: Any, selector: selectors.BaseSelector) -> None:
        """Reads what a codec process has written to `stream`. Raises MegaSoraError for an error or its end."""
        if stream is codec.process.stderr:
            if not self.read_printed(codec):
                selector.unregister(stream)
            return
        data = os.read(stream.fileno(), 1 << 16)
        *lines, codec.buffer = (codec.buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                raise MegaSoraError(message["error"])
            codec.ready = message
        if not data:
            self.raise_ended(codec)

    def read_printed(self, codec: CodecProcess) -> bool:
        """Reads the lines printed so far; False once there can be no more."""
        try:
            while data := os.read(codec.process.stderr.fileno(), 1 << 16):
                *lines, codec.printed_buffer = (codec.printed_buffer + data).split(b"\n")
                for line in lines:
                    text = line.decode("utf-8", "replace").strip()
                    codec.last_printed = text[:MAX_LINE] or codec.last_printed
                    self.receive(text)
        except BlockingIOError:
            return True
        return False

    def raise_ended(self, codec: CodecProcess) -> None:
        exit_code = exit_code_of(codec.process, EXIT_TIMEOUT_SECONDS)
        self.read_printed(codec)
        last_line = f" ({codec.last_printed})" if codec.last_printed else ""
        killed = exit_code == -signal.SIGKILL
        remedy = "if memory ran out, lower ingest.codec_processes, codec.chunk_frames or codec.tile; " if killed else ""
        raise MegaSoraError(
            f"a codec process ended with {describe_exit(exit_code)}{last_line}; {remedy}the same command resumes"
        )

    def raise_why(self) -> None:
        """Raises the MegaSoraError of a codec process that has ended or ends now, which a worker has noticed."""
        with selectors.DefaultSelector() as selector:
            for codec in self.processes:
                selector.register(codec.process.stdout, selectors.EVENT_READ, codec)
            for key, _ in selector.select(EXIT_TIMEOUT_SECONDS):
                self.read(key.data, key.fileobj, selector)
        raise MegaSoraError("a codec process closed the socket of a decode worker; run the ingest again")

    def connect(self, connected: list[int]) -> tuple[socket.socket, int]:
        """The worker's end of a new socket, and the index of the codec process at its other end: that which has the
        fewest workers. `connected`: the index of each of the other workers."""
        index = min(range(len(self.processes)), key=connected.count)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.processes[index].control, [b"s"], [theirs.fileno()])
            except OSError:
                ours.close()
                self.raise_why()
        return ours, index


def codec_environments(config: CodecConfig, limits: IngestConfig, num_cores: int) -> list[dict[str, str]]:
    """The environment variables of each codec process: which GPU it uses.

    With `codec.device` auto or cuda, one process per GPU; processes of a torchrun on this machine divide the GPUs.
    Without GPUs, one per core. `ingest.codec_processes` sets another number.
    """
    gpus = [] if config.device == "cpu" else gpus_of_this_process(visible_gpus(), os.environ)
    if not gpus:
        return [{} for _ in range(limits.codec_processes or num_cores)]
    count = limits.codec_processes or len(gpus)
    return [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} for index in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs that PyTorch sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[:count] if names else [str(index) for index in range(count)]


def gpus_of_this_process(gpus: list[str], variables: dict[str, str] | os._Environ[str]) -> list[str]:
    """Those of `gpus` that the process with torchrun's LOCAL_RANK and LOCAL_WORLD_SIZE uses: every
    LOCAL_WORLD_SIZE-th; with fewer GPUs than processes, one, which it shares."""
    rank, size = int(variables.get("LOCAL_RANK", "0")), int(variables.get("LOCAL_WORLD_SIZE", "1"))
    if not gpus:
        return []
    return gpus[rank::size] if size <= len(gpus) else [gpus[rank % len(gpus)]]
