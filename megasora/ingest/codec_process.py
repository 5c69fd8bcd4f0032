"""A codec process of an ingest: holds the network of a learned codec and encodes the clips of several decode workers.

    a worker's frames --Unix socket--> codec.encode_frames --> its latents

Each worker has a socket and a thread here. The network computes for one clip at a time; while a thread waits for
frames, another computes. So a clip has the same latents whatever else is encoded. It reads no file of a clip: those are
decoded by workers, whose crash ends their connection and no more. An error of the network is the answer to the worker
whose clip it was.
"""

from __future__ import annotations

import json
import math
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from megasora.config import CodecConfig
from megasora.errors import MegaSoraError
from megasora.ingest.child_process import die_with_parent
from megasora.ingest.codec_messages import DROP, LAST, FramesMessage, receive_frames, send_error, send_latents
from megasora.ingest.library_warnings import print_line, python_warnings_to

if TYPE_CHECKING:
    from megasora.codec import Codec

# Clips whose values of earlier frames are kept at once, each in the memory of one chunk: while the frames of one are
# decoded, the other is encoded.
CLIPS_AT_ONCE = 2
CHECK_SECONDS = 5.0  # between two checks of the time that a step of the network takes
MAX_SETTINGS = 1 << 20  # bytes
SETTINGS_FD = 0


def codec_process_settings(codec: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """The first message that a codec process reads, as JSON values."""
    return {"codec": codec, "timeout_seconds": timeout_seconds, "parent": os.getpid()}


class ClipDropped(Exception):
    """The worker has given up the clip."""


class ComputeTurn:
    """A lock whose holder computes. `seconds`: for how long it has done so; 0 if there is none."""

    def __init__(self) -> None:
        self.lock, self.since = threading.Lock(), math.inf

    def __enter__(self) -> None:
        self.lock.acquire()
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = math.inf
        self.lock.release()

    @contextmanager
    def given_to_others(self) -> Iterator[None]:
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def seconds(self) -> float:
        return max(0.0, time.monotonic() - self.since)


class CodecServer:
    """Encodes the clips of all workers."""

    def __init__(self, codec: Codec):
        self.codec, self.turn, self.slots = codec, ComputeTurn(), threading.Semaphore(CLIPS_AT_ONCE)

    def run(self, control: socket.socket, timeout_seconds: float) -> None:
        """Serves the sockets that come through `control` until it ends.

        Raises MegaSoraError if the network computes for more than `timeout_seconds` without asking for frames.
        """
        while True:
            if select.select([control], [], [], min(CHECK_SECONDS, timeout_seconds))[0]:
                data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
                if not data:
                    return
                connection = socket.socket(fileno=descriptors[0])
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()
            if self.turn.seconds > timeout_seconds:
                limit = f"ingest.decode_timeout_seconds={timeout_seconds:g}"
                raise MegaSoraError(f"the codec took more than {limit} for one chunk of frames; raise it")

    def serve(self, connection: socket.socket) -> None:
        """Encodes the clips of one worker until it ends."""
        import torch

        with connection, torch.inference_mode(), suppress(ConnectionError):
            while True:
                first = receive_frames(connection)
                try:
                    with self.slots:
                        latents = self.encode_clip(connection, first)
                except ClipDropped:
                    continue
                except ConnectionError:
                    raise
                except Exception as error:
                    send_error(connection, describe_failure(error))
                    return
                send_latents(connection, latents)

    def encode_clip(self, connection: socket.socket, first: FramesMessage) -> list[np.ndarray]:
        """The latents [h, w, C] of a clip that are not sent yet; `first`: its first message."""
        latents: list[np.ndarray] = []

        def frames() -> Iterator[np.ndarray]:
            message = first
            while True:
                yield from message.frames
                if message.kind == LAST:
                    return
                with self.turn.given_to_others():
                    send_latents(connection, latents)
                    latents.clear()
                    message = receive_frames(connection)
                if message.kind == DROP:
                    raise ClipDropped

        with self.turn:
            for latent in self.codec.encode_frames(frames()):
                latents.append(latent)  # not extend: `frames` clears the list meanwhile
        return latents


def describe_failure(error: BaseException) -> str:
    """What an error of the network means, on one line."""
    import torch

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MegaSoraError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        remedy = "lower codec.chunk_frames, codec.tile or ingest.codec_processes"
        return f"the codec needs more memory than there is: {text[:200]}; {remedy}"
    return f"the codec failed: {type(error).__name__}: {text[:300]}"


def main() -> None:
    """Reads settings, then sockets of workers, from the socket that is standard input; writes `ready` or `error` to
    standard output, as lines of JSON."""
    output = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print must not be read as a message
    control = socket.socket(fileno=os.dup(SETTINGS_FD))
    settings = json.loads(control.recv(MAX_SETTINGS))
    die_with_parent(settings["parent"])

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    with python_warnings_to(print_line):
        try:
            codec = build_frozen_codec(CodecConfig(**settings["codec"]))
            send({"fingerprint": codec.fingerprint, "factors": list(codec.factors), "channels": codec.channels})
            CodecServer(codec).run(control, settings["timeout_seconds"])
        except (MegaSoraError, OSError) as error:
            send({"error": str(error)})
    sys.stderr.flush()
    os._exit(0)  # does not wait for a thread that computes


def build_frozen_codec(config: CodecConfig) -> Codec:
    """The codec, with convolutions whose sums have a fixed order."""
    import torch

    from megasora.codec import build_codec

    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return build_codec(config)
