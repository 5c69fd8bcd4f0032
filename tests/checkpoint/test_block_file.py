"""A file in blocks has the bytes that were written, in any pieces; every range of it is read verified, or refused."""

from __future__ import annotations

import errno
import os
import random

import pytest
from blake3 import blake3

from megasora.checkpoint import block_file
from megasora.checkpoint.block_file import BLOCK_BYTES, PIECE_BYTES, BlockLayout, BlockReader, BlockWriter
from megasora.checkpoint.damage import DamagedCheckpoint

HEADER = (24).to_bytes(8, "little") + b'{"a": "a header of one"}'
SIZES = [0, 1, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, PIECE_BYTES - len(HEADER), PIECE_BYTES, 2 * PIECE_BYTES + 12_345]


def content(size):
    return random.Random(size).randbytes(size)


def write(path, data, cut=1 << 40):
    """`cut`: bytes that are given to the writer at once."""
    with open(path, "wb") as file:
        with BlockWriter(file, HEADER) as writer:
            for start in range(0, len(data), cut):
                writer.write(data[start : start + cut])
        size = file.tell()
    return size, writer.digest


def expected_file(data):
    blocks = [HEADER, *(data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))]
    table = b"".join(blake3(block).digest() for block in blocks)
    return HEADER + data + table, blake3(table).digest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [1 << 40, 1_000_003])
def test_a_file_is_the_content_and_a_table_of_digests(size, cut, tmp_path):
    data = content(size)
    expected, digest = expected_file(data)
    assert write(tmp_path / "a", data, cut) == (len(expected), digest)
    assert (tmp_path / "a").read_bytes() == expected
    layout = BlockLayout(len(HEADER), len(HEADER) + size)
    assert layout == BlockLayout.of_file(len(HEADER), len(expected)) and layout.file_bytes == len(expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_range_is_read(threads, tmp_path):
    data, draw = content(SIZES[-1]), random.Random(1)
    reader = BlockReader(tmp_path / "a", *write(tmp_path / "a", data))
    whole = HEADER + data
    ends = [0, len(HEADER), len(HEADER) + BLOCK_BYTES, len(whole)]
    for _ in range(60):
        start, stop = sorted(draw.choice([draw.randrange(len(whole) + 1), draw.choice(ends)]) for _ in range(2))
        out = bytearray(stop - start)
        reader.read_into(start, memoryview(out), threads)
        assert out == whole[start:stop]
    with pytest.raises(DamagedCheckpoint, match="bytes of content"):
        reader.read_into(len(whole) - 1, memoryview(bytearray(2)))


def test_a_flipped_bit_is_found_by_a_reader_of_its_block_and_by_no_other(tmp_path):
    data = content(3 * BLOCK_BYTES)
    size, digest = write(tmp_path / "a", data)
    raw = bytearray((tmp_path / "a").read_bytes())
    at = len(HEADER) + BLOCK_BYTES + 77  # in block 2
    raw[at] ^= 4
    (tmp_path / "a").write_bytes(raw)
    reader = BlockReader(tmp_path / "a", size, digest)
    start = len(HEADER)
    for begin, stop in ((0, start), (start, start + BLOCK_BYTES), (start + 2 * BLOCK_BYTES, start + 3 * BLOCK_BYTES)):
        reader.read_into(begin, memoryview(bytearray(stop - begin)))
    for begin in (start + BLOCK_BYTES, at, start + 2 * BLOCK_BYTES - 1):
        with pytest.raises(DamagedCheckpoint, match="differ from their digest"):
            reader.read_into(begin, memoryview(bytearray(1)))
    with pytest.raises(DamagedCheckpoint):
        reader.verify_blocks(0, 99)


@pytest.mark.parametrize("refused", ["the flag", "writes"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(refused, tmp_path, monkeypatch):
    data, real_fcntl, real_open = content(SIZES[-1]), block_file.fcntl.fcntl, open
    if refused == "the flag":

        def no_flag(file, command, *flags):
            if flags and flags[0] & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no")
            return real_fcntl(file, command, *flags)

        monkeypatch.setattr(block_file.fcntl, "fcntl", no_flag)
        assert write(tmp_path / "a", data)[1] == expected_file(data)[1]
    else:
        refusals = []

        class NoDirectWrites:
            def __init__(self, file):
                self.file, self.fileno, self.tell = file, file.fileno, file.tell

            def write(self, piece):
                if real_fcntl(self.file, block_file.fcntl.F_GETFL) & os.O_DIRECT:
                    refusals.append(len(piece))
                    raise OSError(errno.EINVAL, "no")
                self.file.write(piece)

        with real_open(tmp_path / "a", "wb") as file, BlockWriter(NoDirectWrites(file), HEADER) as writer:
            writer.write(data)
        assert writer.digest == expected_file(data)[1] and len(refusals) <= 1
    assert (tmp_path / "a").read_bytes() == expected_file(data)[0]


def test_what_was_given_to_the_writer_may_change_afterwards(tmp_path):
    data = bytearray(content(PIECE_BYTES))
    expected, _ = expected_file(bytes(data) + bytes(data))
    with open(tmp_path / "a", "wb") as file, BlockWriter(file, HEADER) as writer:
        writer.write(data)
        kept, data[:] = bytes(data), bytes(len(data))
        writer.write(kept)
    assert (tmp_path / "a").read_bytes() == expected
