"""Messages between a decode worker and a codec process, over a Unix socket.

    worker --frames of a clip--> codec process --the latents that are ready--> worker

Each message of frames has one answer, latents or an error, and a worker reads it before it sends the next message, so
neither side waits for the other to read. A worker that gives up a clip sends DROP, which has no answer. A message is a
header and then raw arrays: nothing that a worker sends is executed.
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megasora.errors import MegaSoraError

MORE, LAST, DROP = range(3)  # kinds of messages: more frames follow, the last ones of the clip, the clip is given up
FRAMES = struct.Struct("<4I")  # kind, frames, height, width
LATENTS = struct.Struct("<5I")  # latent frames, height, width, channels, bytes of an error's text
MAX_ERROR = 2000  # bytes


@dataclass(frozen=True)
class FramesMessage:
    """Some frames of a clip."""

    kind: int
    frames: np.ndarray  # uint8 [N, H, W, 3]


def send_frames(connection: socket.socket, kind: int, frames: Sequence[np.ndarray]) -> None:
    """Sends contiguous uint8 frames [H, W, 3], all of one size. Raises OSError."""
    height, width = frames[0].shape[:2] if frames else (0, 0)
    connection.sendall(FRAMES.pack(kind, len(frames), height, width))
    for frame in frames:
        connection.sendall(frame.data.cast("B"))


def receive_frames(connection: socket.socket) -> FramesMessage:
    """Raises ConnectionError where the worker has ended."""
    kind, *size = FRAMES.unpack(receive(connection, FRAMES.size))
    return FramesMessage(kind, receive_array(connection, (*size, 3), np.uint8))


def send_latents(connection: socket.socket, latents: Sequence[np.ndarray]) -> None:
    """Sends float32 latent frames [h, w, C], all of one size. Raises OSError."""
    connection.sendall(LATENTS.pack(len(latents), *(latents[0].shape if latents else (0, 0, 0)), 0))
    for latent in latents:
        connection.sendall(np.ascontiguousarray(latent, np.float32).data.cast("B"))


def send_error(connection: socket.socket, text: str) -> None:
    """Sends why there are no latents. Raises OSError."""
    data = text.encode("utf-8", "backslashreplace")[:MAX_ERROR]
    connection.sendall(LATENTS.pack(0, 0, 0, 0, len(data)) + data)


def receive_latents(connection: socket.socket) -> np.ndarray:
    """float32 [n, h, w, C]. Raises ConnectionError where the codec process has ended, MegaSoraError for its error."""
    *size, length = LATENTS.unpack(receive(connection, LATENTS.size))
    if length:
        raise MegaSoraError(receive(connection, length).decode("utf-8", "replace"))
    return receive_array(connection, tuple(size), np.float32)


def receive_array(connection: socket.socket, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    data = receive(connection, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def receive(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionResetError("the other process has ended")
        view = view[count:]
    return data
