"""Copies of the files of ranks: to another file, or over a channel to another node; verified while they are read.

A file is sent as messages, so that both ends always come to the end of it, whatever fails on either:

    [bytes] piece, [bytes] piece, ..., [0] digest    the file is whole
    ..., [-1]                                        the sender has failed; the receiver removes what it has written

A receiver that fails reads on, and drops the pieces. The first piece is the header, others have a few blocks.
Memory: a few pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megasora.checkpoint.block_file import DIGEST_BYTES, PIECE_BYTES, BlockReader, BlockWriter
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.fragment_file import WrittenFile
from megasora.files import atomic_writer

END, FAILED = 0, -1  # in place of the bytes of a piece
OnCopied = Callable[[int], None]


class Channel(Protocol):
    """`megasora.parallel.channel.Channel` has them."""

    def send(self, data: Tensor) -> None: ...

    def receive(self, count: int, dtype: torch.dtype) -> Tensor: ...


class SenderFailed(Exception):
    """The other end could not send the file; it raises the reason."""


def read_pieces(path: Path, written: WrittenFile) -> Iterator[bytearray]:
    """The content of a file without its table: the header, then pieces of a few blocks. Raises DamagedCheckpoint."""
    reader = BlockReader(path, written.size, bytes.fromhex(written.digest))
    header_bytes, content_bytes = reader.layout.header_bytes, reader.content_bytes
    starts = [0, *range(header_bytes, content_bytes, PIECE_BYTES)]
    for start, stop in zip(starts, [*starts[1:], content_bytes], strict=True):
        piece = bytearray(stop - start)
        reader.read_into(start, memoryview(piece))
        yield piece


def copy_file(path: Path, written: WrittenFile, target: Path, on_copied: OnCopied) -> None:
    """Copies a file atomically. Raises DamagedCheckpoint if it is not what was written, OSError of the target."""
    pieces = read_pieces(path, written)
    with atomic_writer(target) as file, BlockWriter(file, next(pieces), on_copied) as writer:
        for piece in pieces:
            writer.write(piece)


def send_file(channel: Channel, path: Path, written: WrittenFile, on_sent: OnCopied) -> None:
    """Sends a file, and tells the receiver if that fails."""
    try:
        for piece in read_pieces(path, written):
            on_sent(len(piece))
            channel.send(torch.tensor([len(piece)]))
            channel.send(torch.frombuffer(piece, dtype=torch.uint8))
    except BaseException:
        send_failure(channel)
        raise
    channel.send(torch.tensor([END]))
    channel.send(torch.frombuffer(bytearray.fromhex(written.digest), dtype=torch.uint8))


def send_failure(channel: Channel) -> None:
    channel.send(torch.tensor([FAILED]))


class ReceivedPieces:
    """The pieces of the next file of a channel. `digest`: of the file, after the last piece."""

    def __init__(self, channel: Channel):
        self.channel, self.digest, self.at_end = channel, b"", False

    def __iter__(self) -> Iterator[memoryview]:
        """Raises SenderFailed."""
        while not self.at_end:
            size = int(self.channel.receive(1, torch.int64))
            if size > 0:
                yield memoryview(self.channel.receive(size, torch.uint8).numpy())
                continue
            self.at_end = True
            if size == FAILED:
                raise SenderFailed
            self.digest = bytes(self.channel.receive(DIGEST_BYTES, torch.uint8).numpy())

    def drop(self) -> None:
        """Receives what is left, so that the sender does not wait."""
        try:
            for _ in self:
                pass
        except SenderFailed:
            pass


def receive_file(channel: Channel, path: Path, on_received: OnCopied) -> WrittenFile:
    """Writes the next file of a channel atomically. Raises SenderFailed, OSError, or DamagedCheckpoint if its digest
    differs from the sender's."""
    pieces = ReceivedPieces(channel)
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_writer(path) as file:
            received = iter(pieces)
            with BlockWriter(file, next(received, b""), on_received) as writer:
                for piece in received:
                    writer.write(piece)
            size = file.tell()
            if writer.digest != pieces.digest:
                raise DamagedCheckpoint(path, "was damaged on its way from the other node")
    finally:
        pieces.drop()
    return WrittenFile(size, writer.digest.hex())
