"""All ranks load the same checkpoint, or all raise; damage that one rank sees is found by all."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from saved_runs import OneRank, build_loader, build_saver, flip, names, on_ranks, save, store_of, weights

from megasora.checkpoint import manifest as manifest_module
from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.store import CheckpointStore
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.placement import Placement

RANKS = 3
FRAGMENTS = "fragments/rank-00000.safetensors"


@pytest.fixture
def folders(tmp_path):
    """A run folder per rank, with the same checkpoints of steps 10 and 20; the ranks believe that it is one."""
    store = store_of(tmp_path / "rank-0")
    save(build_saver(store), 10, 20)
    for rank in range(1, RANKS):
        shutil.copytree(store.run_dir, tmp_path / f"rank-{rank}")
    return [CheckpointStore(tmp_path / f"rank-{rank}" / "checkpoints") for rank in range(RANKS)]


def resume(stores, start="resume-or-fresh", shape_of=lambda rank: torch.Size((3,))):
    """Of each rank: (step, weight) after a launch, or its error."""

    def launch(ranks):
        loader = build_loader(stores[ranks.rank], ranks, shape_of(ranks.rank))
        state = loader.resume(start)
        return (state["step"] if state else 0), weights(loader)[0]

    return on_ranks(RANKS, launch)


def test_all_ranks_save_one_checkpoint_and_load_it(tmp_path):
    store = store_of(tmp_path / "run")

    def launch(ranks):
        value = torch.full((4,), float(ranks.rank))
        fragments = [Fragment(f"w{ranks.rank}", torch.Size((4,)), Placement(), 0, 1, 0, {"weights": value})]
        CheckpointSaver(store, fragments, lambda _: (0, 1), ranks).save(5, {"task": {}})
        value.fill_(-1)
        return CheckpointLoader(store, fragments, ranks).resume("resume")["step"], value.tolist()

    assert on_ranks(RANKS, launch) == [(5, [float(rank)] * 4) for rank in range(RANKS)]


@pytest.mark.parametrize("name", [FRAGMENTS, "state.json", "manifest.json"])
@pytest.mark.parametrize("rank", range(RANKS))
def test_damage_that_only_one_rank_reads_is_set_aside_by_all(rank, name, folders, capsys):
    flip(folders[rank].path(20) / name)
    assert resume(folders) == [(10, 10)] * RANKS
    assert "damaged-step-00000020" in names(folders[0])  # the main process has renamed it
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and f"rank-{rank}/checkpoints/step-00000020/{name} " in said[0]


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_that_sees_other_checkpoints_is_found_with_the_difference(rank, folders):
    shutil.rmtree(folders[rank].path(20))
    odd = 1 if rank == 0 else rank  # the first that differs from process 0
    results = resume(folders)
    assert len({str(error) for error in results}) == 1 and all(type(error) is MegaSoraError for error in results)
    shown = [
        f"step-00000010 (manifest {digest(folders[rank], 10)})",
        f"step-00000010, step-00000020 (manifest {digest(folders[rank - 1], 20)})",
    ]
    seen, main = shown[::-1] if rank == 0 else shown
    assert str(results[0]) == (
        f"process {odd} sees {seen} in {folders[0].folder}, process 0 sees {main}; run.dir must be the same folder on "
        "all machines"
    )


def digest(store, step):
    return manifest_module.read_manifest(store.path(step)).digest[:8]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_folder_is_found(rank, folders):
    shutil.rmtree(folders[rank].folder)
    (folders[rank].run_dir / "history.json").unlink()
    results = resume(folders)
    assert all(isinstance(error, MegaSoraError) and "sees no checkpoint" in str(error) for error in results), results


def test_a_rank_with_another_checkpoint_of_the_same_name_is_found(folders):
    other = build_saver(folders[1])
    other.fragments[0].values["weights"].fill_(7)
    other.save(20, {"task": {}})
    for error in resume(folders):
        assert isinstance(error, MegaSoraError)
        assert f"(manifest {digest(folders[1], 20)}) in" in str(error)
        assert f"process 0 sees step-00000010, step-00000020 (manifest {digest(folders[0], 20)})" in str(error)


def test_a_checkpoint_that_differs_only_before_the_newest_is_found_when_it_is_loaded(folders):
    other = build_saver(folders[1])
    shutil.rmtree(folders[1].path(20))
    other.save(10, {"task": {"of": "another run"}})
    shutil.copytree(folders[0].path(20), folders[1].path(20))
    for error in resume(folders, "resume:step-00000010"):
        assert isinstance(error, MegaSoraError) and "process 1 sees another" in str(error)
    assert names(folders[0]) == ["latest", "step-00000010", "step-00000020"]


def test_a_model_that_does_not_fit_is_an_error_of_all_ranks_and_no_damage(folders):
    results = resume(folders, shape_of=lambda rank: torch.Size((4 if rank == 2 else 3,)))
    assert [type(error) for error in results] == [MegaSoraError] * RANKS
    assert "weights of weight [4] cannot be loaded, the checkpoint has [3]" in str(results[0])
    assert names(folders[0]) == ["latest", "step-00000010", "step-00000020"]


@pytest.mark.parametrize("when", ["opened", "loaded"])
def test_a_disk_error_on_one_rank_is_damage(when, folders, monkeypatch):
    real, reads = os.preadv, []

    def fail(handle, views, start):
        if "rank-1/checkpoints/step-00000020/fragments" in os.readlink(f"/proc/self/fd/{handle}"):
            reads.append(start)
            if when == "opened" or len(reads) > 2:  # the table and the header
                raise OSError(errno.EIO, "Input/output error")
        return real(handle, views, start)

    monkeypatch.setattr(os, "preadv", fail)
    assert resume(folders) == [(10, 10)] * RANKS


def test_ranks_without_a_whole_checkpoint_all_raise(folders):
    for step in (10, 20):
        flip(folders[2].path(step) / FRAGMENTS)
    for error in resume(folders):
        assert isinstance(error, MegaSoraError) and "no checkpoint in" in str(error)


def test_an_error_of_the_main_process_is_raised_on_all_ranks(folders, monkeypatch):
    def fail(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "latest")

    flip(folders[0].path(20) / FRAGMENTS)
    monkeypatch.setattr(CheckpointStore, "set_aside", fail)
    for error in resume(folders):
        assert isinstance(error, OSError) and "Permission denied" in str(error)


def test_fragments_of_different_kinds_are_an_error(tmp_path):
    fragments = [
        Fragment(name, torch.Size((1,)), Placement(), 0, 1, 0, {kind: torch.zeros(1)})
        for name, kind in (("a", "weights"), ("b", "ema"))
    ]
    with pytest.raises(ValueError, match="same kinds of values"):
        CheckpointSaver(store_of(tmp_path), fragments, lambda _: (0, 1), OneRank())


def test_progress_that_was_summed_before_a_save_went_on_is_of_another_stage(tmp_path):
    """Else a reader of older numbers would take a checkpoint for visible whose commit has only begun."""
    store, fragments = store_of(tmp_path / "run"), [fragment_of(torch.zeros(4))]
    saver, stages = CheckpointSaver(store, fragments, lambda _: (0, 1), OneRank(), asynchronous=True), []
    stages.append(saver.stage)
    saver.save(5, {"task": {}})
    saver.current.task.join()
    stages.append(saver.stage)
    saver.advance(0, 0)  # the commit begins
    saver.current.task.join()
    stages.append(saver.stage)
    saver.advance(1, 0)  # nothing changes while a rank is busy
    assert saver.stage == stages[-1]
    saver.advance(0, 0)
    assert len({*stages, saver.stage}) == 4 and saver.current is None and store.newest() == store.path(5)


def fragment_of(values):
    return Fragment("w", values.shape, Placement(), 0, 1, 0, {"weights": values})
