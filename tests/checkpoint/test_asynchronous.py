"""An asynchronous save stops no rank, has the values of the moment it began, and fails on all ranks or on none."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
from saved_runs import OneRank, build_loader, build_saver, names, on_ranks, store_of, weights

from megasora.checkpoint import saver as saver_module
from megasora.checkpoint import store as store_module
from megasora.checkpoint.manifest import read_manifest
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.sharded import RankFile
from megasora.checkpoint.store import CheckpointStore
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.placement import Placement

RANKS = 3
FULL = f"{os.strerror(errno.ENOSPC)}"


def fragments_of(rank, value):
    values = {kind: torch.full((4,), value + rank + i / 4) for i, kind in enumerate(("weights", "ema"))}
    return [Fragment("w", torch.Size((4 * RANKS,)), Placement(), 0, 1, 4 * rank, values)]


def saver_of(store, ranks, asynchronous=True):
    return CheckpointSaver(store, fragments_of(ranks.rank, 0.0), lambda f: (0, 1), ranks, asynchronous)


def fill(saver, value):
    for kind, values in saver.fragments[0].values.items():
        values.fill_(value + saver.ranks.rank + (kind == "ema") / 4)


def step(saver):
    """What the training loop does in a step: one all-reduce for the save under way."""
    busy, failed = saver.ranks.all_reduce_sum(torch.tensor(saver.progress())).tolist()
    saver.advance(busy, failed)


@pytest.fixture
def held(monkeypatch):
    """Ranks whose threads wait with their file until they are released."""
    events = [threading.Event() for _ in range(RANKS)]
    real = RankFile.write

    def write(file, *arguments):
        assert events[int(file.name[-17:-12])].wait(20)
        return real(file, *arguments)

    monkeypatch.setattr(RankFile, "write", write)
    return events


def test_training_goes_on_and_the_checkpoint_has_the_values_of_the_moment_of_the_save(held, tmp_path):
    store = store_of(tmp_path)

    def launch(ranks):
        saver = saver_of(store, ranks)
        fill(saver, 10)
        saver.save(10, {"task": {}})
        seen = []
        for number in range(3):
            fill(saver, -number)
            step(saver)
            seen.append((store.newest(), saver.current is not None))
        held[ranks.rank].set()
        saver.wait()
        return seen, store.newest().name

    for seen, newest in on_ranks(RANKS, launch):
        assert seen == [(None, True)] * 3 and newest == "step-00000010"
    state = [build_values(store, rank) for rank in range(RANKS)]
    assert state == [[10.0 + rank, 10.25 + rank] for rank in range(RANKS)]


def build_values(store, rank):
    from megasora.checkpoint.sharded import ShardedCheckpoint

    (f,) = fragments_of(rank, -1.0)
    ShardedCheckpoint(store.path(10)).load_into([f])
    return [float(values.unique()) for values in f.values.values()]


def test_an_asynchronous_save_is_a_blocking_one_byte_for_byte(tmp_path):
    def launch(ranks):
        for name in ("blocking", "asynchronous"):
            saver = saver_of(store_of(tmp_path / name), ranks, name == "asynchronous")
            fill(saver, 10)
            saver.save(10, {"task": {"cursor": 3}})
            fill(saver, 11)
            saver.wait()

    on_ranks(RANKS, launch)
    files = [
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for folder in (tmp_path / "blocking", tmp_path / "asynchronous")
    ]
    assert len(files[0]) == RANKS + 4 and files[0] == files[1]  # and state, manifest, latest, history


def test_the_next_save_waits_for_the_one_before(held, tmp_path):
    store, order = store_of(tmp_path), []

    def launch(ranks):
        saver = saver_of(store, ranks)
        for number in (10, 20):
            if number == 20:
                threading.Timer(0.05, held[ranks.rank].set).start()
            fill(saver, number)
            saver.save(number, {}, lambda activity: order.append(activity) if ranks.rank == 0 else None)
        saver.wait()

    on_ranks(RANKS, launch)
    assert names(store) == ["latest", "step-00000010", "step-00000020"]
    assert order[0] == "the save after step 10"  # a heartbeat while it waits


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_an_error_of_one_rank_is_raised_on_all_by_the_next_step_and_nothing_is_left(
    asynchronous, rank, tmp_path, monkeypatch
):
    store, real = store_of(tmp_path), RankFile.write

    def fail(file, *arguments):
        if file.name.endswith(f"{rank:05d}.safetensors") and failing:
            raise OSError(errno.ENOSPC, FULL, f"disk-of-rank-{rank}")
        return real(file, *arguments)

    failing: list[bool] = []
    monkeypatch.setattr(RankFile, "write", fail)

    def launch(ranks):
        saver = saver_of(store, ranks, asynchronous)
        saver.save(10, {})
        saver.wait()
        ranks.barrier()
        failing.append(True)
        errors = []
        try:
            saver.save(20, {})
            saver.wait()
        except OSError as error:
            errors.append((error.errno, error.filename))
        assert saver.current is None
        ranks.barrier()
        failing.clear()
        ranks.barrier()
        saver.save(30, {})
        saver.wait()
        return errors

    assert on_ranks(RANKS, launch) == [[(errno.ENOSPC, f"disk-of-rank-{rank}")]] * RANKS
    assert names(store) == ["latest", "step-00000010", "step-00000030"]


def test_an_error_of_the_commit_is_raised_on_all(tmp_path, monkeypatch):
    store, real = store_of(tmp_path), CheckpointStore.commit

    def fail(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "manifest.json")

    monkeypatch.setattr(CheckpointStore, "commit", fail)

    def launch(ranks):
        saver = saver_of(store, ranks)
        saver.save(10, {})
        for _ in range(10_000):  # until a step raises; the threads that write need some time
            time.sleep(0.001)
            step(saver)
        return None

    results = on_ranks(RANKS, launch)
    assert [(type(error), error.errno) for error in results] == [(OSError, errno.EROFS)] * RANKS
    assert names(store) == []
    monkeypatch.setattr(CheckpointStore, "commit", real)


def test_a_failed_rank_ends_the_writing_of_the_others(tmp_path, monkeypatch):
    """A rank that still writes gives up: `count` raises in its thread."""
    store, written = store_of(tmp_path), []
    started, real = threading.Barrier(RANKS, timeout=20), RankFile.write

    def write(file, folder, values, on_written):
        started.wait()
        if file.name.endswith("0.safetensors"):
            raise MegaSoraError("no")
        for _ in range(100_000):
            on_written(1)  # until it is cancelled
            written.append(1)
            threading.Event().wait(0.001)
        return real(file, folder, values)

    monkeypatch.setattr(RankFile, "write", write)

    def launch(ranks):
        saver = saver_of(store, ranks)
        saver.save(10, {})
        saver.wait()

    assert [str(error) for error in on_ranks(RANKS, launch)] == ["no"] * RANKS
    assert names(store) == [] and len(written) < 50_000


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_save_that_the_disk_has_no_room_for_is_refused_before_it_begins(free, tmp_path, monkeypatch):
    store = store_of(tmp_path)

    class Disk:
        f_bavail, f_frsize = free // 4096, 4096

    monkeypatch.setattr(store_module.os, "statvfs", lambda path: Disk)
    saver = build_saver(store)
    saver.shared.total_bytes = 3 << 30
    if free:
        saver.save(10, {})
        assert names(store) == ["latest", "step-00000010"]
        return
    with pytest.raises(OSError, match=r"the checkpoint of step 10 needs 3.22 GB, 0.0 MB are free") as error:
        saver.save(10, {})
    assert error.value.errno == errno.ENOSPC and str(store.folder) in str(error.value)
    assert names(store) == []


def test_the_bytes_that_are_predicted_are_those_of_the_files(tmp_path):
    def launch(ranks):
        saver = saver_of(store_of(tmp_path), ranks, False)
        saver.save(10, {})
        return saver.shared.total_bytes

    (total, *_) = set(on_ranks(RANKS, launch))
    sizes = [size for name, (size, _) in read_manifest(tmp_path / "checkpoints" / "step-00000010").files.items()]
    assert total == sum(sizes) - (tmp_path / "checkpoints" / "step-00000010" / "state.json").stat().st_size


def test_a_thread_that_ends_in_any_way_is_an_error(tmp_path, monkeypatch):
    class Gone(BaseException):
        pass

    def vanish(*arguments):
        raise Gone("vanished")

    monkeypatch.setattr(RankFile, "write", vanish)
    with pytest.raises(MegaSoraError, match="Gone: vanished"):
        build_saver(store_of(tmp_path), OneRank()).save(10, {})


def test_the_copy_in_host_memory_is_reused(tmp_path, monkeypatch):
    made, real = [], saver_module.HostCopy

    def counting(values):
        made.append(1)
        return real(values)

    monkeypatch.setattr(saver_module, "HostCopy", counting)
    store = store_of(tmp_path)
    saver = CheckpointSaver(store, build_saver(store).fragments, lambda f: (0, 1), OneRank(), asynchronous=True)
    for number in (10, 20, 30):
        saver.fragments[0].values["weights"].fill_(number)
        saver.save(number, {})
    saver.wait()
    loader = build_loader(store)
    assert loader.resume("resume")["step"] == 30 and weights(loader) == [30.0] * 3
    assert len(made) == 1
