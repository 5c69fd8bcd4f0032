"""Files in blocks with a BLAKE3 digest each: hashed while they are written, verified while any range is read.

    [ block 0: header of a safetensors file | blocks 1 .. n - 1 of 1 MiB, the last one shorter | n digests of 32 bytes ]

The digest of a file is that of its table. So a file is identified by 32 bytes, every byte that is read has been
verified, and a reader of a part reads no more than the blocks around it: with thousands of ranks parts are small, and
larger blocks would be read several times. BLAKE3 is as strong as SHA-256 and takes a third of its time or less, so
hashing is hidden by a disk of 5 GB/s; blocks are independent, so threads share a file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import blake3

from megasora.checkpoint.damage import DamagedCheckpoint

BLOCK_BYTES, DIGEST_BYTES = 1 << 20, 32
PIECE_BYTES = 4 << 20  # written at once
READ_THREADS, BLOCKS_PER_TASK = 2, 4
MIN_SHARED_BLOCKS = 16  # of a range that several threads read
NUM_PIECES = 4  # in memory: one is written while those before it are hashed


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    return blake3.blake3(data).digest()


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of a file are. The content is all but the table."""

    header_bytes: int
    content_bytes: int

    @classmethod
    def of_file(cls, header_bytes: int, file_bytes: int) -> BlockLayout:
        blocks = 1 + -(-(file_bytes - header_bytes - DIGEST_BYTES) // (BLOCK_BYTES + DIGEST_BYTES))
        return cls(header_bytes, file_bytes - DIGEST_BYTES * blocks)

    @property
    def num_blocks(self) -> int:
        return 1 + -(-(self.content_bytes - self.header_bytes) // BLOCK_BYTES)

    @property
    def file_bytes(self) -> int:
        return self.content_bytes + DIGEST_BYTES * self.num_blocks

    def block_at(self, position: int) -> int:
        return 0 if position < self.header_bytes else 1 + (position - self.header_bytes) // BLOCK_BYTES

    def range_of(self, block: int) -> tuple[int, int]:
        """(first byte, one past the last) of a block."""
        if not block:
            return 0, self.header_bytes
        start = self.header_bytes + (block - 1) * BLOCK_BYTES
        return start, min(start + BLOCK_BYTES, self.content_bytes)


class BlockWriter:
    """Writes the content to `file`, an empty one, and hashes it in a thread beside. Use as a context manager; after it,
    `digest`. `header`: block 0. `on_written(bytes)` is called after each write.

    Pieces are written past the page cache (O_DIRECT) where the file system can: the disk then reads them from memory
    itself, so that a save takes little time of the cores that train, and displaces no pages of the training data.
    """

    def __init__(
        self, file: BinaryIO, header: bytes | memoryview, on_written: Callable[[int], None] = lambda size: None
    ):
        self.file, self.header, self.on_written = file, header, on_written
        self.table, self.hasher, self.room, self.is_new_block = bytearray(), blake3.blake3(), len(header), False
        self.pool = ThreadPoolExecutor(1, "hash")
        self.pieces = [memoryview(mmap.mmap(-1, PIECE_BYTES)) for _ in range(NUM_PIECES)]  # aligned to pages
        self.hashed: list[Future | None] = [None] * NUM_PIECES
        self.current, self.filled, self.position = 0, 0, 0
        self.is_direct, self.digest = False, b""

    def __enter__(self) -> BlockWriter:
        self.set_direct(True)
        self.write(self.header)
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.set_direct(False)  # the end of the file is not aligned
            self.write_piece()
        self.pool.shutdown()
        if kind is None:
            for number in range(NUM_PIECES):
                self.wait_for_hash(number)
            if not self.is_new_block:
                self.table += self.hasher.digest()
            self.file.write(self.table)
            self.digest = digest_of(self.table)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            part = view[: PIECE_BYTES - self.filled]
            self.pieces[self.current][self.filled : self.filled + len(part)] = part
            self.filled, view = self.filled + len(part), view[len(part) :]
            if self.filled == PIECE_BYTES:
                self.write_piece()

    def write_piece(self) -> None:
        """Writes what is in the current piece, and waits until the next one has been hashed."""
        piece = self.pieces[self.current][: self.filled]
        self.hashed[self.current] = self.pool.submit(self.hash, piece)
        try:
            self.file.write(piece)
        except OSError as error:
            if not self.is_direct or error.errno != errno.EINVAL:
                raise
            self.set_direct(False)  # the file system takes the flag, but no write
            self.file.write(piece)
        if not self.is_direct:  # the disk begins with it now, not with the fsync at the end
            os.posix_fadvise(self.file.fileno(), self.position, len(piece), os.POSIX_FADV_DONTNEED)
        self.position += len(piece)
        self.on_written(len(piece))
        self.current, self.filled = (self.current + 1) % NUM_PIECES, 0
        self.wait_for_hash(self.current)

    def set_direct(self, is_direct: bool) -> None:
        """Whether writes pass the page cache; not if the file system cannot, e.g. one in memory."""
        flags = fcntl.fcntl(self.file, fcntl.F_GETFL) & ~os.O_DIRECT
        with suppress(OSError):
            fcntl.fcntl(self.file, fcntl.F_SETFL, flags | (os.O_DIRECT if is_direct else 0))
            self.is_direct = is_direct

    def hash(self, piece: memoryview) -> None:
        while piece:
            part, piece = piece[: self.room], piece[self.room :]
            self.hasher.update(part)
            self.room -= len(part)
            self.is_new_block = not self.room
            if self.is_new_block:
                self.table += self.hasher.digest()
                self.hasher, self.room = blake3.blake3(), BLOCK_BYTES

    def wait_for_hash(self, number: int) -> None:
        """Until piece `number` may be overwritten; raises the error of the thread."""
        hashed = self.hashed[number]
        if hashed is not None:
            hashed.result()


class BlockReader:
    """Reads ranges of the content of a file, verified. Raises DamagedCheckpoint for a missing, unreadable or changed
    file. `size` and `digest`: of the whole file. May be used by several threads."""

    def __init__(self, path: Path, size: int, digest: bytes):
        self.path, self.layout = path, BlockLayout(0, 0)
        self.kept: tuple[int, bytes | bytearray] = (-1, b"")  # the last block that was read in part
        self.handle = -1
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            found = os.fstat(self.handle)
            if not stat.S_ISREG(found.st_mode):
                raise DamagedCheckpoint(path, "cannot be read: not a regular file")
            if found.st_size != size:
                raise DamagedCheckpoint(path, f"is damaged: {found.st_size} bytes, {size} expected")
            header_bytes = 8 + int.from_bytes(self.pread(0, 8), "little")
            self.layout = BlockLayout.of_file(header_bytes, size)
            if header_bytes > self.content_bytes:
                raise DamagedCheckpoint(path, f"is damaged: a header of {header_bytes} bytes, the file has {size}")
            self.table = self.pread(self.content_bytes, size - self.content_bytes)
        except OSError as error:
            raise DamagedCheckpoint(path, f"cannot be read: {error.strerror or error}") from None
        if digest_of(self.table) != digest:
            raise DamagedCheckpoint(path, "is damaged: its digests differ from the manifest")

    @property
    def content_bytes(self) -> int:
        return self.layout.content_bytes

    def __del__(self):
        if self.handle >= 0:
            os.close(self.handle)

    def pread(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        self.pread_into(start, memoryview(data))
        return data

    def pread_into(self, start: int, view: memoryview) -> None:
        try:
            while view:
                count = os.preadv(self.handle, [view], start)
                if not count:
                    raise DamagedCheckpoint(self.path, f"was truncated while it was read, at byte {start}")
                view, start = view[count:], start + count
        except OSError as error:
            raise DamagedCheckpoint(self.path, f"cannot be read: {error.strerror or error}") from None

    def read_into(self, start: int, view: memoryview, threads: int = READ_THREADS) -> None:
        """Fills `view` with the bytes from `start` on; several threads share a long range."""
        stop = start + len(view)
        if not 0 <= start <= stop <= self.content_bytes:
            raise DamagedCheckpoint(self.path, f"has {self.content_bytes} bytes of content, not {stop}")
        tasks = []
        for block in range(self.layout.block_at(start), self.layout.block_at(max(start, stop - 1)) + 1):
            first, last = self.layout.range_of(block)
            first, last = max(start, first), min(stop, last)
            tasks.append((block, first, view[first - start : last - start]))
        if len(tasks) < MIN_SHARED_BLOCKS or threads == 1:
            self.read_blocks(tasks)
            return
        parts = [tasks[i : i + BLOCKS_PER_TASK] for i in range(0, len(tasks), BLOCKS_PER_TASK)]
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self.read_blocks, parts):
                pass

    def read_blocks(self, tasks: list[tuple[int, int, memoryview]]) -> None:
        for task in tasks:
            self.read_block(*task)

    def read_block(self, block: int, start: int, view: memoryview) -> None:
        """Fills `view` with bytes of one block from `start` on; the whole block is read and verified."""
        first, stop = self.layout.range_of(block)
        if len(view) == stop - first:
            self.pread_into(first, view)
            self.verify(block, view)
            return
        kept, data = self.kept
        if kept != block:
            data = self.pread(first, stop - first)
            self.verify(block, data)
            self.kept = block, data
        view[:] = data[start - first : start - first + len(view)]

    def verify(self, block: int, data: bytearray | memoryview) -> None:
        if digest_of(data) != self.table[DIGEST_BYTES * block : DIGEST_BYTES * (block + 1)]:
            first, _ = self.layout.range_of(block)
            raise DamagedCheckpoint(
                self.path, f"is damaged: bytes {first} to {first + len(data) - 1} differ from their digest"
            )

    def verify_blocks(self, first: int, stop: int, on_read: Callable[[int], None] = lambda size: None) -> None:
        """Reads and verifies blocks `first .. stop - 1`, as far as there are so many."""
        buffer = memoryview(bytearray(max(BLOCK_BYTES, self.layout.header_bytes)))
        for block in range(first, min(stop, self.layout.num_blocks)):
            start, end = self.layout.range_of(block)
            view = buffer[: end - start]
            self.pread_into(start, view)
            self.verify(block, view)
            on_read(len(view))
