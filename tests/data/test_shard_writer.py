"""Ingest blocks are written atomically: whenever the writer is killed, and whatever other writers do."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megasora.data.folder import open_folder
from megasora.data.manifest_writer import read_block, write_manifest
from megasora.data.pack import Record
from megasora.data.shard_format import MANIFEST, read_manifest
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter, PatchFile
from megasora.data.tar import DamagedTar
from megasora.data.verify import verify
from megasora.errors import MegaSoraError

BLOCKS, PER_BLOCK = 2, 4


def record(sample_id: int, width: int = 3, frames: int = 2) -> Record:
    patches = torch.arange(frames * 2 * width, dtype=torch.float32).view(frames * 2, width) + sample_id
    native = (8.0, 16.0, float(frames), 12.0)
    return Record(sample_id, patches, (frames, 1, 2), torch.zeros(2, 4), native, f"clip {sample_id}")


def meta(sample_id: int) -> dict:
    return {"source": f"{sample_id}.mp4", "sha256": f"{sample_id:064x}"}


def write_block(folder: Path, block: int) -> None:
    """Four clips, one of them for validation and one rejected; one clip per tar."""
    with BlockWriter(folder, block, max_bytes=3000) as writer:
        for sample_id in range(PER_BLOCK * block, PER_BLOCK * (block + 1)):
            if sample_id % PER_BLOCK != 2:
                split = "val" if sample_id % PER_BLOCK == 1 else "train"
                writer.add(split, record(sample_id, frames=1 + sample_id), meta(sample_id))
        writer.commit({"too dark": 1}, {"seen": PER_BLOCK})


def ingest(folder: Path, order=range(BLOCKS)) -> None:
    for block in order:
        if read_block(folder, block) is None:
            write_block(folder, block)
    write_manifest(folder, "codec-a", "text-a", [1, 1, 1], BLOCKS, {"name": "a"})


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    ingest(folder)
    return tree(folder)


# ---------------------------------------------------------------- what is written


def test_blocks_make_tars_of_their_own_and_one_manifest(whole, tmp_path):
    ingest(tmp_path)
    names = {
        f"{s}-{b:06d}-{n:03d}" for b in range(BLOCKS) for s, count in (("train", 2), ("val", 1)) for n in range(count)
    }
    files = {f"{n}.tar" for n in names} | {f"{n}.index.npy" for n in names} | {MANIFEST, "blocks"}
    assert whole.keys() == files | {f"blocks/{b:06d}.json" for b in range(BLOCKS)}
    train, val = (ShardSplit.open(tmp_path, split) for split in ("train", "val"))
    assert train.index.sample_ids.tolist() == [0, 3, 4, 7] and val.index.sample_ids.tolist() == [1, 5]
    manifest = read_manifest(tmp_path)
    assert manifest.rejected == {"too dark": BLOCKS}
    assert manifest.splits["train"]["clips"] == 4 and manifest.splits["val"]["clips"] == 2
    assert manifest.splits["train"]["tokens"] == sum(2 * (1 + i) for i in (0, 3, 4, 7))
    assert list(verify(open_folder(tmp_path))) == []


def test_the_order_in_which_blocks_are_written_changes_nothing(whole, tmp_path):
    ingest(tmp_path, [1, 0])
    assert tree(tmp_path) == whole


def test_a_complete_block_lists_its_contents(tmp_path):
    assert read_block(tmp_path, 1) is None
    write_block(tmp_path, 1)
    info = read_block(tmp_path, 1)
    assert (info.block, info.dtype, info.patch_dim, info.text_dim) == (1, "f16", 3, 0)
    assert (info.first_sample_id, info.last_sample_id) == (4, 7)
    assert (info.rejected, info.details) == ({"too dark": 1}, {"seen": 4})
    assert {split: counts["clips"] for split, counts in info.splits.items()} == {"train": 2, "val": 1}


def test_a_block_of_rejected_clips_alone_is_complete(tmp_path):
    for block in range(2):
        with BlockWriter(tmp_path, block, 4000) as writer:
            if block == 1:
                writer.add("train", record(5), meta(5))
            writer.commit({"no caption": 4}, {})
    assert [read_block(tmp_path, block).is_empty for block in range(2)] == [True, False]
    manifest = write_manifest(tmp_path, "a", "b", [1, 1, 1], 2, {})
    assert manifest.rejected == {"no caption": 8} and manifest.patch_dim == 3
    assert len(ShardSplit.open(tmp_path, "train")) == 1 and len(ShardSplit.open(tmp_path, "val")) == 0


# ---------------------------------------------------------------- kill -9

DISK_OPERATIONS = ("fsync", "replace", "mkdir", "unlink", "rmdir", "open", "ftruncate")


def ingest_killed_at(number: int, late: bool, folder: Path) -> bool:
    """Runs `ingest` in a child that is killed before or after its disk operation `number`. False if it ended first."""
    child = os.fork()
    if child == 0:
        remaining = [number]

        def killing(operation):
            def run(*arguments, **options):
                remaining[0] -= 1
                if remaining[0] == 0 and not late:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return operation(*arguments, **options)
                finally:
                    if remaining[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            return run

        for name in DISK_OPERATIONS:
            setattr(os, name, killing(getattr(os, name)))
        try:
            ingest(folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_kill_at_any_step_leaves_complete_blocks_and_the_next_ingest_writes_only_the_others(late, whole, tmp_path):
    number, completed = 1, set()
    while True:
        folder = tmp_path / str(number)
        if not ingest_killed_at(number, late, folder):
            break
        complete = {}
        for block in range(BLOCKS):
            if read_block(folder, block) is not None:
                names = [name for name in whole if f"-{block:06d}-" in name]
                assert all((folder / name).read_bytes() == whole[name] for name in names)
                complete.update({name: (folder / name).stat().st_ino for name in names})
                completed.add(block)
        if (folder / MANIFEST).exists():
            assert (folder / MANIFEST).read_bytes() == whole[MANIFEST]
        ingest(folder)
        assert tree(folder) == whole  # nothing is lost, no temporary files remain
        assert all(
            (folder / name).stat().st_ino == inode for name, inode in complete.items()
        )  # complete blocks are not rewritten
        number += 1
    assert number > 40 and completed == set(range(BLOCKS))


def test_without_commit_nothing_is_written(tmp_path):
    write_block(tmp_path, 0)
    before = tree(tmp_path)
    with BlockWriter(tmp_path, 1, 4000) as writer:
        writer.add("train", record(9), meta(9))
    with pytest.raises(KeyboardInterrupt), BlockWriter(tmp_path, 1, 1 << 20) as writer:
        writer.add("train", record(9), meta(9))
        raise KeyboardInterrupt
    assert tree(tmp_path) == before and read_block(tmp_path, 1) is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_at_any_step_is_an_error_and_no_files_remain(step, tmp_path, monkeypatch):
    real, number = getattr(os, step), 0
    write_block(tmp_path, 0)
    before = tree(tmp_path)
    while number < 50:
        number, remaining = number + 1, [number + 1]

        def fail(*arguments, remaining=remaining):
            remaining[0] -= 1
            if remaining[0] == 0:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            try:
                write_block(tmp_path, 1)
                break
            except OSError as error:
                assert error.errno == 28
        if read_block(tmp_path, 1) is None:
            assert tree(tmp_path) == before
        else:  # the marker was written, only its flush failed
            (tmp_path / "blocks" / "000001.json").unlink()
    assert 6 < number < 50 and list(tree(tmp_path)) != list(before)


def test_a_disk_that_returns_other_bytes_is_detected_before_the_block_is_complete(tmp_path, monkeypatch):
    real = os.fsync

    def corrupt(handle):
        real(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.endswith(".tar"):
            with open(path, "r+b") as file:
                file.seek(2560 + 3)  # in the patches of the first clip
                file.write(b"\xff")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", corrupt)
        with pytest.raises(MegaSoraError, match="of sample 0 is read back with checksum .*check disk and memory"):
            write_block(tmp_path, 0)
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------- two writers


def test_a_second_writer_of_a_block_is_an_error_with_folder_block_and_holder(tmp_path):
    with BlockWriter(tmp_path, 3, 4000) as writer:
        writer.add("train", record(9), meta(9))
        with pytest.raises(MegaSoraError) as error_info, BlockWriter(tmp_path, 3, 4000):
            pass
        for word in (f"block 3 of {tmp_path}", f"process {os.getpid()} on", "wait for it, or stop it"):
            assert word in str(error_info.value)
        with BlockWriter(tmp_path, 4, 4000) as other:  # another block has its own lock
            other.commit({}, {})
        writer.commit({}, {})
    assert read_block(tmp_path, 3).splits["train"]["clips"] == 1


def test_a_killed_writer_leaves_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        with BlockWriter(tmp_path, 0, 4000) as writer:
            writer.add("train", record(1), meta(1))
            (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(MegaSoraError, match=f"written by process {child} on"), BlockWriter(tmp_path, 0, 4000):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    write_block(tmp_path, 0)
    assert read_block(tmp_path, 0).last_sample_id == 3 and not (tmp_path / ".staging").exists()
    assert not (tmp_path / ".locks").exists()


def test_a_complete_block_is_not_overwritten(tmp_path):
    write_block(tmp_path, 0)
    before = tree(tmp_path)
    with pytest.raises(MegaSoraError, match="block 0 of .* is complete; to write it again, remove .*000000.json"):
        write_block(tmp_path, 0)
    assert tree(tmp_path) == before
    (tmp_path / "blocks" / "000000.json").unlink()
    write_block(tmp_path, 0)
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- inconsistent blocks and records


def test_missing_and_surplus_blocks_are_errors_with_their_numbers(tmp_path):
    write_block(tmp_path, 1)
    with pytest.raises(MegaSoraError, match="2 of 3 blocks are missing: 0, 2; ingest again"):
        write_manifest(tmp_path, "a", "b", [1, 1, 1], 3, {})
    write_block(tmp_path, 0)
    with pytest.raises(MegaSoraError, match="000001.json is beyond the 1 blocks of this ingest; remove it"):
        write_manifest(tmp_path, "a", "b", [1, 1, 1], 1, {})
    assert not (tmp_path / MANIFEST).exists()


def test_blocks_with_different_settings_or_a_common_sample_are_errors_with_their_numbers(tmp_path):
    def block(folder, number, sample_id, dtype="f16", width=3):
        with BlockWriter(folder, number, 4000, dtype) as writer:
            writer.add("train", record(sample_id, width), meta(sample_id))
            writer.commit({}, {})

    for name, options, words in (
        ("dtype", {"dtype": "bf16"}, "dtype is f16 in block 0 and bf16 in block 1"),
        ("width", {"width": 4}, "patch_dim is 3 in block 0 and 4 in block 1"),
        ("twice", {"sample_id": 7}, "blocks 0 and 1 both have sample 7"),
    ):
        block(tmp_path / name, 0, 7)
        block(tmp_path / name, 1, **{"sample_id": 8, **options})
        with pytest.raises(MegaSoraError, match=words):
            write_manifest(tmp_path / name, "a", "b", [1, 1, 1], 2, {})


def test_a_complete_block_with_missing_or_cut_files_is_an_error(tmp_path):
    write_block(tmp_path, 0)
    for name in ("train-000000-001.tar", "train-000000-001.index.npy"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(
            MegaSoraError, match=f"{name}: .*the file is missing.* remove .*000000.json and ingest again"
        ):
            read_block(tmp_path, 0)
        (tmp_path / name).write_bytes(data)
    os.truncate(tmp_path / "val-000000-000.tar", 1000)
    with pytest.raises(DamagedTar, match="val-000000-000.tar: byte 1000: the file has 1000 bytes"):
        read_block(tmp_path, 0)
    (tmp_path / "blocks" / "000000.json").write_text(json.dumps({"block": 0}))
    with pytest.raises(MegaSoraError, match="000000.json is damaged: .*; remove it and ingest again"):
        read_block(tmp_path, 0)


def test_an_inconsistent_record_is_an_error_and_the_block_can_be_continued(tmp_path):
    good, other = record(3), record(9)
    (tmp_path / "raw").write_bytes(b"x" * 10)
    short = Record(9, PatchFile(tmp_path / "raw", (4, 3)), other.grid, other.text_SE, other.native_size, "c")
    nan = Record(9, other.patches_LP * float("nan"), other.grid, other.text_SE, other.native_size, "c")
    large = Record(9, other.patches_LP * 1e5, other.grid, other.text_SE, other.native_size, "c")
    grid = Record(9, other.patches_LP, (1, 1, 2), other.text_SE, other.native_size, "c")
    with BlockWriter(tmp_path, 0, 1 << 20) as writer:
        writer.add("train", good, meta(3))
        for split, bad, facts, words in (
            ("train", record(3), meta(3), "sample_id=3 comes after 3"),
            ("train", record(9, width=4), meta(9), "patches of 4 features in a block of 3"),
            ("train", short, meta(9), "raw has 10 bytes, patches of shape"),
            ("train", nan, meta(9), "patches_LP has values that are not finite in f16"),
            ("train", large, meta(9), "not finite in f16"),
            ("train", grid, meta(9), r"patches of shape \(4, 3\) do not fill a grid of \(1, 1, 2\)"),
            ("test", other, meta(9), "split='test' is none of"),
            ("train", other, {"source": "x"}, "must have source and sha256 .*see sha256"),
            ("train", other, {**meta(9), "fps": 3}, "see fps"),
        ):
            with pytest.raises(ValueError, match=words):
                writer.add(split, bad, facts)
        with pytest.raises(ValueError, match="text_features of 4 features in a block of 0"):
            writer.add("train", other, meta(9), other.text_SE)
        writer.add("train", other, meta(9))
        assert writer.commit({}, {}).splits["train"]["clips"] == 2
    write_manifest(tmp_path, "a", "b", [1, 1, 1], 1, {})
    assert list(verify(open_folder(tmp_path))) == []
