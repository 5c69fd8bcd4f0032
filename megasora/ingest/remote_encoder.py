"""The stream encoder of a worker whose codec is a network: frames go to a codec process, latents come back.

A worker decodes the next frames while the codec process encodes those before. A small clip is one message and one
answer; a long one is in memory a few frames at a time.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megasora.errors import MegaSoraError
from megasora.ingest.codec_messages import DROP, LAST, MORE, receive_latents, send_frames

MESSAGE_BYTES = 16 << 20  # of the frames of a message; one that is larger is sent by itself


class CodecProcessEnded(MegaSoraError):
    """The codec process of this worker has ended. Why, only the process that started it knows."""


class RemoteEncoder:
    """`encode` as in `codec.dct_encoder`, by a codec process."""

    def __init__(self, connection: socket.socket, factors: list[int], waits: Callable[[bool], None]):
        """`waits`: called with True before this worker waits for an answer, and with False after."""
        self.connection, self.factors, self.waits = connection, tuple(factors), waits

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] each -> float32 [H/ph, W/pw, C] each.

        The caller closes the iterator of a clip that it gives up. Raises MegaSoraError for an error of the codec, after
        which this object cannot be used, and CodecProcessEnded.
        """
        unanswered = in_progress = False
        try:
            for kind, batch in batches(frames):
                latents = self.receive() if unanswered else ()
                self.send(kind, batch)
                unanswered, in_progress = True, kind != LAST
                yield from latents
            if unanswered:
                latents, unanswered = self.receive(), False
                yield from latents
        except MegaSoraError:  # of the codec process: frames are those of a video or an image, which raise none
            raise
        except (Exception, GeneratorExit):
            if unanswered:
                self.receive()
            if in_progress:
                self.send(DROP, [])
            raise

    def send(self, kind: int, batch: list[np.ndarray]) -> None:
        try:
            send_frames(self.connection, kind, batch)
        except OSError as error:
            raise CodecProcessEnded(str(error)) from None

    def receive(self) -> np.ndarray:
        self.waits(True)
        try:
            return receive_latents(self.connection)
        except OSError as error:
            raise CodecProcessEnded(str(error)) from None
        except MemoryError:  # part of the answer was not read: this worker ends, which costs its clip
            raise SystemExit("no memory for latents") from None
        finally:
            self.waits(False)


def batches(frames: Iterable[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The messages of a clip: kind and frames of one size."""
    batch: list[np.ndarray] = []
    size = 0
    for frame in frames:
        if batch and (size + frame.nbytes > MESSAGE_BYTES or frame.shape != batch[0].shape):
            yield MORE, batch
            batch, size = [], 0
        batch.append(np.ascontiguousarray(frame))
        size += frame.nbytes
    if batch:
        yield LAST, batch
