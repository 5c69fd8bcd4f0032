"""Checkpoints are saved atomically, wherever a save is interrupted, and the newest whole one is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from saved_runs import build_loader, build_saver, flip, names, save, store_of, weights

from megasora.checkpoint.history import HISTORY, History, read_history
from megasora.checkpoint.start import choose_start
from megasora.checkpoint.store import DAMAGED, find_checkpoint, remove_incomplete
from megasora.checkpoint.verify import verify_checkpoint
from megasora.errors import MegaSoraError


def test_a_save_becomes_the_newest_and_latest_names_it(tmp_path):
    store = store_of(tmp_path)
    assert store.newest() is None
    final = save(build_saver(store), 10)
    assert final == store.newest() == tmp_path / "checkpoints" / "step-00000010"
    assert verify_checkpoint(final).step == 10
    assert names(store) == ["latest", "step-00000010"]
    assert (store.folder / "latest").read_text() == "step-00000010\n"
    assert read_history(tmp_path) == History(saved=["step-00000010"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept_and_damaged_ones_do_not_count(keep, tmp_path):
    store = store_of(tmp_path, keep)
    save(build_saver(store), 5)
    store.set_aside(store.path(5), DAMAGED)
    save(build_saver(store), 10, 20, 100, 1000)
    expected = ["step-00000010", "step-00000020", "step-00000100", "step-00001000"][-keep:]
    assert names(store) == ["damaged-step-00000005", "latest", *expected]
    assert read_history(tmp_path).saved == expected


def test_checkpoints_are_ordered_by_their_step(tmp_path):
    store = store_of(tmp_path)
    save(build_saver(store), 99_999_999, 100_000_000)
    assert store.newest().name == "step-100000000"
    assert choose_start(store, "resume").checkpoint == store.newest()


def test_a_step_saved_again_replaces_the_older_save(tmp_path):
    store = store_of(tmp_path)
    save(build_saver(store), 10)
    (store.path(10) / "more").write_text("of the older save")
    save(build_saver(store), 10)
    assert sorted(p.name for p in store.path(10).iterdir()) == ["fragments", "manifest.json", "state.json"]
    assert names(store) == ["latest", "step-00000010"]


def test_files_of_an_interrupted_save_are_not_in_the_next_one(tmp_path):
    store = store_of(tmp_path)
    (store.begin(10) / "partial.pt").write_bytes(b"half")
    save(build_saver(store), 10)
    assert not (store.path(10) / "partial.pt").exists()


def test_incomplete_files_are_removed_and_nothing_else(tmp_path):
    store = store_of(tmp_path)
    save(build_saver(store), 10)
    store.begin(20)
    (store.folder / ".latest.part").write_text("step")
    (store.folder / ".keep").write_text("mine")
    remove_incomplete(store.folder)
    assert names(store) == [".keep", "latest", "step-00000010"]


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(tmp_path):
    store = store_of(tmp_path)
    for expected in ("damaged-step-00000010", "damaged-step-00000010-2", "damaged-step-00000010-3"):
        assert store.set_aside(save(build_saver(store), 10), DAMAGED).name == expected
    assert verify_checkpoint(store.folder / "damaged-step-00000010-2").step == 10  # can still be read by hand


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    pass


POINTS = ("mkdir", "replace", "fsync", "unlink", "rmdir")  # functions of os that change what a save leaves on the disk


def kill_at(monkeypatch, call: int) -> list[str]:
    """From call number `call` of the functions in POINTS on, each raises Killed: the process is gone. Returns the calls
    before it."""
    done: list[str] = []

    def wrap(name: str):
        real = getattr(os, name)

        def call_or_die(*arguments, **options):
            if len(done) >= call:
                done.extend([""] * call)  # what `finally` blocks would call does not happen either
                raise Killed
            done.append(f"{name} {'' if isinstance(arguments[0], int) else Path(arguments[0]).name}")
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call_or_die)

    for name in POINTS:
        wrap(name)
    return done


@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
def test_a_save_killed_at_any_boundary_leaves_the_newest_complete_checkpoint(first, tmp_path, monkeypatch):
    """After the rename the new one counts, before it the one before, or step 0. The resumed run can save again."""
    outcomes = []
    for call in range(200):
        store = store_of(tmp_path / str(call), keep=1)
        if not first:
            save(build_saver(store), 10)
        with monkeypatch.context() as patch:
            done = kill_at(patch, call)
            try:
                save(build_saver(store), 20)
                finished = True
            except (Killed, MegaSoraError):  # the latter if the thread that writes was killed
                finished = False
        renamed = "replace .step-00000020.part" in done
        expected = 20 if renamed else (0 if first else 10)
        loader = build_loader(store)
        state = loader.resume("resume-or-fresh")
        assert (state["step"] if state else 0) == expected, done
        assert weights(loader) == [expected] * 3
        assert not list(store.folder.glob(".*")) and not list(store.folder.glob("damaged*"))
        if expected:
            assert (store.folder / "latest").read_text() == f"step-{expected:08d}\n"
        outcomes.append((expected, finished))
        save(build_saver(store), 30)
        assert build_loader(store).resume("resume-or-fresh")["step"] == 30
        assert names(store) == ["latest", "step-00000030"]
        if finished:
            break
    assert {expected for expected, _ in outcomes} == {0 if first else 10, 20}
    assert len(outcomes) > 20 and outcomes[-1] == (20, True)
    assert any(expected == 20 and not finished for expected, finished in outcomes)


def test_a_save_is_on_the_disk_before_its_name_is_and_its_name_before_latest(tmp_path, monkeypatch):
    store, events = store_of(tmp_path), []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix()))
        real_fsync(handle)

    def replace(source, target):
        events.append(("replace", Path(target).relative_to(tmp_path).as_posix()))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(build_saver(store), 10)
    part = "checkpoints/.step-00000010.part"
    rename = events.index(("replace", "checkpoints/step-00000010"))
    before, after = events[:rename], events[rename + 1 :]
    for name in ("fragments/rank-00000.safetensors", "state.json", "manifest.json"):  # renamed once it is flushed
        flushed = f"{part}/{name.replace(Path(name).name, f'.{Path(name).name}.part')}"
        assert before.index(("fsync", flushed)) < before.index(("replace", f"{part}/{name}"))
    last_file = max(i for i, (_, path) in enumerate(before) if path.endswith(".json"))
    assert before[last_file] == ("replace", f"{part}/manifest.json")
    assert set(before[last_file + 1 :]) == {("fsync", part), ("fsync", f"{part}/fragments")}
    assert after[:2] == [("fsync", "checkpoints"), ("fsync", ".")]
    assert after.index(("replace", "checkpoints/latest")) < after.index(("replace", HISTORY))


# ---------------------------------------------------------------- reading


def test_a_checkpoint_is_found_by_its_own_path_and_as_the_newest_whole_one_of_its_run(tmp_path):
    run, said = tmp_path / "run", []
    store = store_of(run)
    final = save(build_saver(store), 10, 20)
    (store.folder / "latest").write_text("step-00000010\n")  # says nothing
    assert find_checkpoint(store.path(10), said.append) == store.path(10)
    assert find_checkpoint(run, said.append) == final and said == []
    for folder in (tmp_path, tmp_path / "nowhere", final / "fragments"):
        with pytest.raises(MegaSoraError, match=f"{folder} is no checkpoint"):
            find_checkpoint(folder, said.append)
    flip(final / "state.json")
    assert find_checkpoint(run, said.append) == store.path(10)
    problem = f"{final / 'state.json'} is damaged: its digest differs from manifest.json"
    assert said == [f"{problem}; reading step-00000010 instead"]
    assert names(store) == ["latest", "step-00000010", "step-00000020"]  # reading changes nothing
    with pytest.raises(MegaSoraError, match="state.json is damaged: .*; use an earlier checkpoint"):
        find_checkpoint(final, said.append)
    shutil.rmtree(store.path(10) / "fragments")
    with pytest.raises(MegaSoraError, match=f"no checkpoint of {run} is whole: .*state.json is damaged.*is missing"):
        find_checkpoint(run, said.append)


@pytest.mark.parametrize("text", ["", "[]", '{"start": 3, "saved": []}', '{"start": "", "saved": [1]}', "[" * 100_000])
def test_a_damaged_history_is_an_error_with_the_remedy(text, tmp_path):
    store = store_of(tmp_path)
    save(build_saver(store), 10)
    (tmp_path / HISTORY).write_text(text)
    with pytest.raises(MegaSoraError, match="history.json cannot be read: .*; if .* remove this file"):
        choose_start(store, "resume-or-fresh")
    (tmp_path / HISTORY).unlink()  # the remedy
    assert choose_start(store, "resume-or-fresh").checkpoint == store.path(10)
    assert json.loads((store.path(10) / "state.json").read_text())["step"] == 10
