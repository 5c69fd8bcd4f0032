"""Shards return what was written, report what is damaged or missing, and are plain WebDataset tars."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.data.folder import MAX_OPEN_FILES, LocalFolder, open_folder
from megasora.data.manifest_writer import write_manifest
from megasora.data.pack import Record
from megasora.data.reader_lock import ReaderLock
from megasora.data.shard_format import MANIFEST, Manifest, check_fingerprints, index_bytes, read_manifest
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter, PatchFile
from megasora.data.tar import BLOCK_BYTES, END_OF_ARCHIVE, DamagedTar
from megasora.data.verify import verify
from megasora.errors import DataError, MegaSoraError

CAPTIONS = [
    "a red circle moves right",
    "",
    "赤い丸が右に動く",
    "красный круг " * 8000,
    "دائرة حمراء",
    "👩‍🚀 'quotes' \"both\" \\ and\u2028a line separator",
]
GRIDS = [(1, 2, 3), (3, 2, 2), (2, 1, 1), (1, 1, 1), (4, 3, 1), (1, 2, 2)]
TOKENS = [6, 12, 2, 1, 12, 4]
PATCH_DIM, TEXT_DIM = 5, 4
TAR, INDEX_FILE = "train-000000-000.tar", "train-000000-000.index.npy"


def records() -> list[Record]:
    g = torch.Generator().manual_seed(0)
    made = []
    for i, (caption, grid) in enumerate(zip(CAPTIONS, GRIDS, strict=True)):
        t, h, w = grid
        patches = torch.randn(t * h * w, PATCH_DIM, generator=g)
        native = (8.0 * h, 8.0 * w, float(1 + 4 * (t - 1)), 30_000 / 1001 if t > 1 else 0.0)
        made.append(Record(3 * i, patches, grid, torch.randn(1 + i % 3, TEXT_DIM, generator=g), native, caption))
    return made


def meta_of(record: Record) -> dict:
    return {"source": f"clip {record.sample_id} 🦊 \"'.mp4", "sha256": f"{record.sample_id:064x}"}


def write_block(
    folder: Path, made: list[Record], block=0, max_bytes=1 << 20, features=False, split="train", dtype="f16"
):
    with BlockWriter(folder, block, max_bytes, dtype) as writer:
        for record in made:
            writer.add(split, record, meta_of(record), record.text_SE if features else None)
        return writer.commit({}, {})


def write(folder: Path, made: list[Record], **options) -> Path:
    """Writes records as shards of one block, with a manifest."""
    write_block(folder, made, **options)
    write_manifest(folder, "codec-a", "text-a", [1, 1, 1], 1, {"name": "a"})
    return folder


def count_letters(caption: str) -> torch.Tensor:
    return torch.tensor([[len(caption)]])


# ---------------------------------------------------------------- reading returns what was written


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_records_are_read_with_patches_in_half_precision_and_everything_else_exact(dtype, tmp_path):
    made = records()
    shards = ShardSplit.open(write(tmp_path / "shards", made, dtype=dtype), "train")
    stored = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert len(shards) == len(made)
    for i, record in enumerate(made):
        read = shards.read(i, count_letters)
        assert read.patches_LP.dtype == stored and torch.equal(read.patches_LP, record.patches_LP.to(stored))
        assert (read.sample_id, read.grid, read.native_size) == (record.sample_id, record.grid, record.native_size)
        assert read.caption == record.caption
        assert read.text_SE.tolist() == [[len(record.caption)]]
        entry = shards.index[i]
        assert (entry.sample_id, entry.grid, entry.native_size) == (record.sample_id, record.grid, record.native_size)
        assert set(entry.members) == {"caption.txt", "meta.json", f"patches.{dtype}"}
    assert shards.index.token_counts.tolist() == [entry.num_tokens for entry in shards.index] == TOKENS


def test_meta_has_the_values_of_the_record_and_of_its_writer(tmp_path):
    made, folder = records(), tmp_path / "shards"
    with BlockWriter(folder, 0, 1 << 20) as writer:
        for record in made:
            writer.add("train", record, {**meta_of(record), "scores": {"motion": 0.5}, "start": 1.5})
        writer.commit({}, {})
    write_manifest(folder, "codec-a", "text-a", [1, 1, 1], 1, {})
    meta = ShardSplit.open(folder, "train").read_meta(4)
    assert meta == {
        "sample_id": 12, "source": "clip 12 🦊 \"'.mp4", "sha256": f"{12:064x}", "height": 24.0, "width": 8.0,
        "frames": 13.0, "fps": 30_000 / 1001, "duration": 13 / (30_000 / 1001), "grid": [4, 3, 1],
        "shape": [12, PATCH_DIM], "dtype": "f16", "scores": {"motion": 0.5}, "start": 1.5,
    }  # fmt: skip


def test_stored_text_features_are_read_in_half_precision(tmp_path):
    made = records()
    shards = ShardSplit.open(write(tmp_path / "shards", made, features=True), "train")
    assert shards.manifest.text_dim == TEXT_DIM
    for i, record in enumerate(made):
        read = shards.read(i, None)
        assert torch.equal(read.text_SE, record.text_SE.half().float())
        assert torch.equal(read.patches_LP, record.patches_LP.half())


def test_patches_in_a_file_are_stored_like_those_in_memory(tmp_path):
    made = records()
    for i, record in enumerate(made):
        path = tmp_path / f"{i}.raw"
        path.write_bytes(record.patches_LP.half().numpy().tobytes())
        made[i] = dataclasses.replace(record, patches_LP=PatchFile(path, tuple(record.patches_LP.shape)))
    a, b = write(tmp_path / "files", made), write(tmp_path / "memory", records())
    assert (a / TAR).read_bytes() == (b / TAR).read_bytes()
    assert (a / INDEX_FILE).read_bytes() == (b / INDEX_FILE).read_bytes()


def test_patches_in_a_file_are_not_loaded_into_memory(tmp_path):
    import tracemalloc

    shape = (1 << 16, 512)
    with open(tmp_path / "raw", "wb") as file:
        file.truncate(2 * shape[0] * shape[1])  # 64 MiB
    record = Record(0, PatchFile(tmp_path / "raw", shape), (1, 1, 1 << 16), torch.zeros(1, 1), (8.0, 8.0, 1.0, 0.0))
    tracemalloc.start()
    try:
        write_block(tmp_path / "shards", [record])
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_the_counts_of_the_manifest_are_those_of_the_records(tmp_path):
    manifest = read_manifest(write(tmp_path / "shards", records()))
    counts = dict(manifest.splits["train"])
    tar, index = (tmp_path / "shards" / name for name in (TAR, INDEX_FILE))
    facts = {"clips": 6, "bytes": tar.stat().st_size, "index_crc32": zlib.crc32(index.read_bytes())}
    assert counts.pop("shards") == {TAR: facts}
    assert counts == {
        "clips": 6,
        "images": 3,
        "frames": 1 + 9 + 5 + 1 + 13 + 1,
        "tokens": 6 + 12 + 2 + 1 + 12 + 4,
        "max_tokens": 12,
        "token_histogram": [1, 1, 2, 2],  # 1; 2 to 3; 4 to 7; 8 to 15 tokens
    }
    assert (manifest.patch_dim, manifest.dtype, manifest.codec_settings) == (PATCH_DIM, "f16", {"name": "a"})


def test_tars_are_closed_at_their_size_and_their_number_does_not_change_what_is_read(tmp_path):
    made = records()
    one = ShardSplit.open(write(tmp_path / "one", made), "train")
    many = ShardSplit.open(write(tmp_path / "many", made, max_bytes=6000), "train")
    assert many.names == [f"train-000000-00{i}.tar" for i in range(len(many.names))]
    assert 1 < len(many.names) < len(made)
    assert all((tmp_path / "many" / name).stat().st_size >= 6000 for name in many.names[:-1])
    assert many.index.token_counts.tolist() == one.index.token_counts.tolist() == TOKENS
    for i in range(len(made)):
        a, b = one.read(i, count_letters), many.read(i, count_letters)
        assert torch.equal(a.patches_LP, b.patches_LP) and (a.sample_id, a.caption) == (b.sample_id, b.caption)


def test_the_same_records_make_the_same_bytes(tmp_path):
    a, b = (write(tmp_path / name, records(), max_bytes=6000) for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*")) and len(files) > 6
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files if (a / name).is_file())


def test_webdataset_reads_the_same_tar_in_three_lines(tmp_path):
    import webdataset

    made = records()
    folder = write(tmp_path / "shards", made)
    seen = []
    for clip in webdataset.WebDataset(str(folder / TAR), shardshuffle=False):
        patches = np.frombuffer(clip["patches.f16"], "<f2").reshape(json.loads(clip["meta.json"])["shape"])
        seen.append((clip["__key__"], clip["caption.txt"].decode(), patches))
    assert [(key, caption) for key, caption, _ in seen] == [(f"{r.sample_id:09d}", r.caption) for r in made]
    for (_, _, patches), record in zip(seen, made, strict=True):
        assert np.array_equal(patches, record.patches_LP.half().numpy())


def test_an_index_is_a_plain_numpy_array(tmp_path):
    folder = write(tmp_path / "shards", records())
    table = np.load(folder / INDEX_FILE, allow_pickle=False)
    assert table["sample_id"].tolist() == [0, 3, 6, 9, 12, 15] and table["grid"].tolist() == [list(g) for g in GRIDS]
    data = (folder / TAR).read_bytes()
    for row, caption in zip(table, CAPTIONS, strict=True):
        offset, size, checksum = row["caption"].item()
        assert data[offset : offset + size].decode() == caption and checksum == zlib.crc32(caption.encode())
        offset, size, checksum = row["record"].item()
        assert zlib.crc32(data[offset : offset + size]) == checksum
    assert offset + size + len(END_OF_ARCHIVE) == len(data)


# ---------------------------------------------------------------- folders


def test_folder_names_may_have_spaces_quotes_brackets_and_emoji(tmp_path):
    folder = tmp_path / "my [old] 'shards' 🦊"
    shards = ShardSplit.open(write(folder, records()), "train")
    assert shards.read(2, count_letters).caption == CAPTIONS[2]
    assert list(verify(open_folder(folder))) == []


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_folders_opened_by_fsspec_are_read_like_local_ones_by_ranges(scheme, tmp_path, monkeypatch):
    import fsspec

    folder = write(tmp_path / "my [old] shards", records(), max_bytes=6000, features=True)
    url = f"{scheme}://{folder}"
    if scheme == "memory":
        memory = fsspec.filesystem("memory")
        for path in folder.iterdir():
            if path.is_file():
                memory.pipe_file(str(path), path.read_bytes())
    local, remote = ShardSplit.open(folder, "train"), ShardSplit.open(url, "train")
    ranges, whole = [], remote.folder.system.cat_file

    def cat_file(path, start=None, end=None, **options):
        ranges.append((start, end - start))
        return whole(path, start=start, end=end, **options)

    with monkeypatch.context() as patch:
        patch.setattr(remote.folder.system, "cat_file", cat_file)
        for i in range(len(local)):
            a, b = local.read(i, None), remote.read(i, None)
            assert torch.equal(a.patches_LP, b.patches_LP) and torch.equal(a.text_SE, b.text_SE)
            assert (a.caption, local.read_meta(i)) == (b.caption, remote.read_meta(i))
    rows = local.index.rows
    assert ranges[::2] == [row["record"].item()[:2] for row in rows]  # one range per clip
    assert ranges[1::2] == [row["meta"].item()[:2] for row in rows]
    assert list(verify(open_folder(url))) == []
    with pytest.raises(MegaSoraError, match=f"no {MANIFEST} in {scheme}://.*nowhere"):
        ShardSplit.open(f"{scheme}://{tmp_path}/nowhere", "train")


@pytest.mark.parametrize("address", ["pipe:echo x > hit", "simplecache::file:///x", "nosuchsystem://x"])
def test_commands_chains_and_unknown_systems_are_errors_as_addresses(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MegaSoraError, match="not read|cannot be opened"):
        ShardSplit.open(address, "train")
    assert not list(tmp_path.iterdir())


def test_a_split_can_be_pickled_and_read_by_threads(tmp_path):
    made = records()
    shards = ShardSplit.open(write(tmp_path / "shards", made, max_bytes=6000), "train")
    shards.read(0, count_letters)
    sent = pickle.loads(pickle.dumps(shards))
    with ThreadPoolExecutor(4) as pool:
        for number, read in enumerate(pool.map(lambda i: sent.read(i % 6, count_letters), range(60))):
            assert torch.equal(read.patches_LP, made[number % 6].patches_LP.half())


def test_the_number_of_open_files_is_limited(tmp_path):
    for i in range(2 * MAX_OPEN_FILES):
        (tmp_path / str(i)).write_bytes(b"%d" % i)
    before, folder = len(os.listdir("/proc/self/fd")), LocalFolder(tmp_path)
    for i in range(2 * MAX_OPEN_FILES):
        data = bytearray(10)
        assert bytes(data[: folder.read_into(str(i), 0, [memoryview(data)])]) == b"%d" % i
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_FILES
    del folder
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("flaw", [0, errno.EAGAIN, errno.EOPNOTSUPP])
def test_short_reads_are_continued_to_the_end(flaw, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    whole, calls = os.preadv, []

    def preadv(number, buffers, offset, flags=0):
        calls.append(offset)
        if flags and flaw:
            raise OSError(flaw, "not now")
        short = memoryview(bytearray(min(7, sum(map(len, buffers)))))
        found, done = whole(number, [short], offset), 0
        for buffer in buffers:
            part = short[done : min(found, done + len(buffer))]
            buffer[: len(part)] = part
            done += len(part)
        return found

    monkeypatch.setattr(os, "preadv", preadv)
    for end in (90, 120):  # in the file, and after its end
        pieces = [memoryview(bytearray(n)) for n in (3, 0, 20, 1, end - 10 - 24, 0)]
        found = LocalFolder(tmp_path).read_into("file", 10, pieces)
        assert found == min(end, 100) - 10
        assert b"".join(pieces)[:found] == bytes(range(10, 10 + found)) and len(calls) > 10
        calls.clear()


def test_the_reader_lock_is_released_only_for_bytes_that_are_not_in_the_page_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    real_preadv, num_released = os.preadv, []

    class CountingLock(ReaderLock):
        @contextlib.contextmanager
        def released(self):
            num_released.append(1)
            yield

    folder = LocalFolder(tmp_path, CountingLock())

    def read() -> bytes:
        buffers = [memoryview(bytearray(n)) for n in (30, 60)]
        assert folder.read_into("file", 10, buffers) == 90
        return b"".join(buffers)

    assert read() == bytes(range(10, 100)) and not num_released  # the file was just written

    def preadv(number, buffers, offset, flags=0):  # only the first 40 bytes are cached
        if not flags:
            return real_preadv(number, buffers, offset)
        return real_preadv(number, [buffers[0], buffers[1][:10]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read() == bytes(range(10, 100)) and len(num_released) == 1


# ---------------------------------------------------------------- damage of tars


def flip(path: Path, at: int, bit: int = 1) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ bit]), at)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, at)


HTML = b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>\n"

# name -> (damage(tar, members of clip 3, sample 9), the samples it hits, words of the error)
FAULTS = {
    "header bit flip": (
        lambda tar, e: flip(tar, e["patches.f16"][0] - BLOCK_BYTES + 2),
        [9],
        "the header of patches.f16",
    ),
    "header checksum flip": (
        lambda tar, e: flip(tar, e["meta.json"][0] - BLOCK_BYTES + 150),
        [9],
        "the header of meta.json",
    ),
    "header time flip": (
        lambda tar, e: flip(tar, e["caption.txt"][0] - BLOCK_BYTES + 140),
        [9],
        "the header of caption.txt",
    ),
    "payload bit flip": (lambda tar, e: flip(tar, e["patches.f16"][0] + 3), [9], "patches.f16 .*checksum"),
    "caption bit flip": (lambda tar, e: flip(tar, e["caption.txt"][0] + 100), [9], "caption.txt .*checksum"),
    "padding bit flip": (lambda tar, e: flip(tar, e["patches.f16"][0] + 400), [9], "padding"),
    "cut at a member": (lambda tar, e: os.truncate(tar, e["caption.txt"][0] - BLOCK_BYTES), [9, 12, 15], "cut"),
    "cut in a member": (lambda tar, e: os.truncate(tar, e["patches.f16"][0] + 3), [9, 12, 15], "cut"),
    "hole": (
        lambda tar, e: overwrite(tar, e["meta.json"][0] - BLOCK_BYTES, bytes(1024)),
        [9],
        "the header of meta.json",
    ),
    "empty": (lambda tar, e: tar.write_bytes(b""), [0, 3, 6, 9, 12, 15], "cut"),
    "html": (lambda tar, e: tar.write_bytes(HTML), [0, 3, 6, 9, 12, 15], "cut"),
    "html as long": (
        lambda tar, e: tar.write_bytes((HTML * tar.stat().st_size)[: tar.stat().st_size]),
        [0, 3, 6, 9, 12, 15],
        "the header of caption.txt",
    ),
    "missing": (lambda tar, e: tar.unlink(), [0, 3, 6, 9, 12, 15], "missing"),
}


@pytest.fixture(params=FAULTS)
def fault(request, tmp_path):
    """(folder with one damaged tar, the samples that are hit, words of the error)."""
    folder = write(tmp_path / "shards", records())
    members = ShardSplit.open(folder, "train").index[3].members
    damage, hit, words = FAULTS[request.param]
    damage(folder / TAR, members)
    return folder, hit, words


def test_a_damaged_tar_is_an_error_with_its_name_and_the_byte(fault):
    """Strict: raised when the split is opened if the length is wrong, else when the clip is read."""
    folder, _, words = fault
    with pytest.raises(DamagedTar, match=f"{words}|has .* bytes, it was written with") as error_info:
        shards = ShardSplit.open(folder, "train")
        for i in range(len(shards)):
            shards.read(i, count_letters)
    assert error_info.value.path == str(folder / TAR)
    for word in (
        f"{TAR}: byte {error_info.value.offset}: ",
        "restore it, or remove",
        "blocks/000000.json",
        "ingest again",
    ):
        assert word in str(error_info.value)


@pytest.mark.parametrize("change", [-1, 512, None], ids=["shorter", "longer", "missing"])
def test_a_tar_of_another_length_is_an_error_when_the_split_is_opened(change, tmp_path):
    folder = write(tmp_path / "shards", records())
    size = (folder / TAR).stat().st_size
    if change is None:
        (folder / TAR).unlink()
        words, offset = "the file is missing", 0
    else:
        os.truncate(folder / TAR, size + change)
        words, offset = f"the file has {size + change} bytes, it was written with {size}", size + min(change, 0)
    with pytest.raises(DamagedTar, match=f"{TAR}: byte {offset}: {words}"):
        ShardSplit.open(folder, "train")
    assert len(ShardSplit.open(folder, "train", strict=False)) == len(records())


def test_exactly_the_damaged_clips_cannot_be_read(fault):
    """Tolerant: the others are read, and each error names its sample."""
    folder, hit, words = fault
    shards, damaged_ids = ShardSplit.open(folder, "train", strict=False), []
    for i, record in enumerate(records()):
        try:
            assert torch.equal(shards.read(i, count_letters).patches_LP, record.patches_LP.half())
        except DamagedTar as error:
            damaged_ids.append(error.sample_id)
            assert error.sample_id == record.sample_id and error.path.endswith(TAR)
            assert error.offset >= 0 and words.split()[0] in str(error)
    assert damaged_ids == hit


def test_verify_names_every_damaged_clip(fault):
    folder, hit, _ = fault
    found = list(verify(open_folder(folder)))
    if (folder / TAR).exists():
        assert [f.sample_id for f in found if f.sample_id is not None] == hit
        assert all(f.file == TAR and f.offset is not None for f in found)
    else:
        assert [(f.file, f.sample_id) for f in found] == [(TAR, None)] and "6 clips" in found[0].problem


def test_the_error_for_a_flipped_bit_names_the_file_that_has_it(tmp_path):
    folder = write(tmp_path / "shards", records(), features=True)
    for member, (offset, size, _) in ShardSplit.open(folder, "train").index[2].members.items():
        flip(folder / TAR, offset + size - 1)
        with pytest.raises(DamagedTar, match=f"byte {offset}: {member} .*of sample 6 is damaged") as error_info:
            ShardSplit.open(folder, "train").read(2, None)
        assert (error_info.value.offset, error_info.value.sample_id) == (offset, 6)
        if member == "meta.json":
            with pytest.raises(DamagedTar, match=f"byte {offset}: meta.json of sample 6 is damaged"):
                ShardSplit.open(folder, "train").read_meta(2)
        flip(folder / TAR, offset + size - 1)
    ShardSplit.open(folder, "train").read(2, None)


def test_every_flipped_bit_of_a_tar_is_found(tmp_path):
    folder = write(tmp_path / "shards", records())
    size = (folder / TAR).stat().st_size
    for at in np.random.default_rng(0).integers(0, size, 60).tolist() + [size - 1, 0]:
        flip(folder / TAR, at, bit=1 << at % 8)
        assert len(list(verify(open_folder(folder)))) == 1
        flip(folder / TAR, at, bit=1 << at % 8)
    assert list(verify(open_folder(folder))) == []


def test_verify_reads_every_byte_and_reports_its_progress(tmp_path):
    folder, steps = write(tmp_path / "shards", records(), max_bytes=6000), []
    assert list(verify(open_folder(folder), steps.append)) == []
    assert sum(steps) == sum(path.stat().st_size for path in folder.glob("*.tar"))


# ---------------------------------------------------------------- damage of indices and manifests


@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_index_is_named_with_the_remedy(strict, tmp_path):
    folder = write(tmp_path / "shards", records())
    (folder / INDEX_FILE).unlink()
    with pytest.raises(MegaSoraError, match=f"{INDEX_FILE}: the file is missing; restore it, or remove"):
        ShardSplit.open(folder, "train", strict)
    assert [(f.file, f.problem[:10]) for f in verify(open_folder(folder))] == [(INDEX_FILE, "is missing")]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-152],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: HTML,
        lambda data: data[:300] + bytes([data[300] ^ 4]) + data[301:],
        lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        lambda data: pickle.dumps(["boo"]),
    ],
)
def test_a_changed_index_is_an_error_before_it_is_parsed(change, strict, tmp_path):
    folder = write(tmp_path / "shards", records())
    index = folder / INDEX_FILE
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(MegaSoraError, match=f"{INDEX_FILE} is damaged: its checksum is .*ingest again"):
        ShardSplit.open(folder, "train", strict)
    assert [f.file for f in verify(open_folder(folder))] == [INDEX_FILE]


def test_the_index_of_another_tar_is_an_error(tmp_path):
    folder = write(tmp_path / "shards", records(), max_bytes=6000)
    a, b = sorted(folder.glob("*.index.npy"))[:2]
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    with pytest.raises(MegaSoraError, match=f"{a.name} is damaged: its checksum"):
        ShardSplit.open(folder, "train")


def forge(folder: Path, change) -> None:
    """Replaces the index, and its checksum in the manifest."""
    table = np.load(folder / INDEX_FILE).copy()
    table = change(table)
    data = index_bytes(table) if isinstance(table, np.ndarray) else table
    (folder / INDEX_FILE).write_bytes(data)
    values = json.loads((folder / MANIFEST).read_text())
    values["splits"]["train"]["shards"][TAR]["index_crc32"] = zlib.crc32(data)
    (folder / MANIFEST).write_text(json.dumps(values))


def set_row(name, row, value):
    def change(table):
        table[name][row] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table[:-1], "have 5 clips, .*says 6"),
        (set_row("grid", 0, (1, 2, 4)), "have 39 tokens, .*says 37"),
        (set_row("sample_id", 2, 3), "sample 3 occurs twice"),
        (set_row("sample_id", 2, 30), "sample 9 occurs twice or out of order"),
        (lambda table: pickle.dumps(["boo"]), "is no index of format 2"),
        (lambda table: index_bytes(table)[:-1], "is no index of format 2"),
        (lambda table: index_bytes(np.zeros(3)), "is no index of format 2"),
    ],
)
def test_an_index_that_contradicts_the_manifest_is_an_error(change, words, tmp_path):
    folder = write(tmp_path / "shards", records())
    forge(folder, change)
    with pytest.raises(MegaSoraError, match=words):
        ShardSplit.open(folder, "train")
    assert list(verify(open_folder(folder)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_row("native_size", 1, (16, 16, 9, 24)), "meta.json says fps"),
        (set_row("grid", 1, (3, 4, 1)), "meta.json says grid"),
        (set_row("record", 1, (0, 1, 0)), "belong to no record"),
        (set_row("patches", 1, (0, 2, 0)), "patches"),
    ],
)
def test_verify_compares_the_index_with_the_contents_of_the_tar(change, words, tmp_path):
    folder = write(tmp_path / "shards", records())
    forge(folder, change)
    assert any(words in fault.problem and fault.sample_id == 3 for fault in verify(open_folder(folder)))


@pytest.mark.parametrize(
    ("name", "span"), [("patches", (2560, 60, 0)), ("patches", (8, 120, 0)), ("record", (0, 9, 0))]
)
def test_an_index_whose_patches_do_not_fit_the_clip_is_an_error_when_it_is_read(name, span, tmp_path):
    folder = write(tmp_path / "shards", records())
    forge(folder, set_row(name, 1, span))
    with pytest.raises(MegaSoraError, match="the index says that sample 3 has .* bytes of patches .*ingest again"):
        ShardSplit.open(folder, "train").read(1, count_letters)


def test_the_error_for_a_folder_without_manifest_says_how_to_make_one(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MegaSoraError, match=f"no {MANIFEST} in {folder}; .*megasora ingest"):
            ShardSplit.open(folder, "train")


SPLIT = '{"clips": 0, "images": 0, "frames": 0, "tokens": 0, "max_tokens": 0, "shards": %s}'
WHOLE = (
    '{"codec_fingerprint": "", "text_fingerprint": "", "patch": [], "patch_dim": 4, "splits": {"train": %s}, '
    '"rejected": {}, "format": 2%s}'
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 2, "codec_fingerprint": "a"}', "is damaged"),
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        ("\udcff", "is damaged"),
        (WHOLE % (SPLIT % "{}", ', "dtype": "pkl"'), "is damaged: patches of type 'pkl'"),
        (WHOLE % (SPLIT % '{"../x-000000-000.tar": {}}', ""), "is damaged: .*is no name of a shard"),
        (WHOLE % (SPLIT % '{"/x-000000-000.tar": {}}', ""), "is damaged: .*is no name of a shard"),
        (WHOLE % (SPLIT % '{"train-000000-000.tar": {"clips": 1}}', ""), "is damaged"),
        (WHOLE % ("{}", ""), "is damaged"),
    ],
)
def test_a_damaged_manifest_is_an_error(text, words, tmp_path):
    (tmp_path / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=f"{MANIFEST} {words}.*ingest again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1, "codec": "dct"}', "has format 1, this version reads 2"),
        ('{"format": 3}', "has format 3, this version reads 2"),
        ('{"codec": "dct"}', "has format none, this version reads 2"),
        (WHOLE % (SPLIT % "{}", ', "codec": "", "b": 1'), r"has fields that this version does not know \(b, codec\)"),
    ],
)
def test_a_manifest_of_another_version_is_an_error_and_not_damage(text, words, tmp_path):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(MegaSoraError, match=f"{MANIFEST} {words}; ingest again into another --out") as error_info:
        read_manifest(tmp_path)
    assert not isinstance(error_info.value, DataError)


def test_a_split_without_clips_is_empty(tmp_path):
    assert len(ShardSplit.open(write(tmp_path / "shards", records()), "val")) == 0


@pytest.mark.parametrize(
    ("key", "stored", "expected"),
    [("codec", "codec-a", "codec-b"), ("text", "text-a", "text-b"), ("data.patch", "[1, 1, 1]", "[1, 2, 2]")],
)
def test_shards_made_with_other_settings_are_an_error_with_both_values(key, stored, expected, tmp_path):
    manifest = Manifest("codec-a", "text-a", [1, 1, 1], PATCH_DIM, {}, {})
    run = {"codec": "codec-a", "text": "text-a", "data.patch": [1, 1, 1]}
    check_fingerprints(manifest, tmp_path, *run.values())
    run[key] = json.loads(expected) if expected.startswith("[") else expected
    with pytest.raises(MegaSoraError) as error_info:
        check_fingerprints(manifest, tmp_path, *run.values())
    assert f"made with {key} {stored}, this run has {expected}; ingest again" in str(error_info.value)
