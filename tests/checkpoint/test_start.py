"""`run.start` decides what a launch starts from; a run folder that has lost its checkpoints is never begun again."""

from __future__ import annotations

import os
import shutil

import pytest
from saved_runs import build_loader, build_saver, flip, names, save, store_of, weights

from megasora.checkpoint.history import HISTORY, History, read_history, write_history
from megasora.checkpoint.start import begins, choose_start, initial_weights_to_read
from megasora.config import load
from megasora.errors import MegaSoraError

DEFAULT = "resume-or-fresh"


@pytest.fixture
def store(tmp_path):
    """Three checkpoints, of steps 10, 20 and 30."""
    store = store_of(tmp_path / "run", keep=3)
    save(build_saver(store), 10, 20, 30)
    return store


def resume(store, start=DEFAULT):
    """(step, weights) after a launch with `run.start=start`, and what it printed is left to capsys."""
    loader = build_loader(store)
    state = loader.resume(start)
    return (state["step"] if state else 0), weights(loader)[0]


def error_of(store, start=DEFAULT):
    """The message of a launch that is refused, which changes nothing."""
    before = sorted(path.relative_to(store.run_dir) for path in store.run_dir.rglob("*"))
    messages = []
    for refused in (lambda: choose_start(store, start), lambda: resume(store, start)):
        with pytest.raises(MegaSoraError) as error:
            refused()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and len(messages[0].splitlines()) == 1
    assert sorted(path.relative_to(store.run_dir) for path in store.run_dir.rglob("*")) == before
    return messages[0]


@pytest.mark.parametrize(
    ("start", "is_valid"),
    {
        DEFAULT: True, "fresh": True, "resume": True, "resume:step-00000010": True, "init:a/b.safetensors": True,
        "": False, "Fresh": False, "resume:10": False, "resume:step-10": False, "resume:../step-00000010": False,
        "init:": False, "fresh:1": False, "init": False,
    }.items(),
)  # fmt: skip
def test_the_setting_has_five_forms(start, is_valid):
    if is_valid:
        assert load(None, [f"run.start={start}"]).run.start == start
    else:
        with pytest.raises(MegaSoraError, match="run.start=.* must be resume-or-fresh, resume, resume:step-XXXXXXXX, "):
            load(None, [f"run.start={start}"])


# ---------------------------------------------------------------- the newest that verifies


@pytest.mark.parametrize(
    "text", ["step-00000030\n", "step-00000010\n", "step-00000099\n", "", "../../x", "\udcff", None]
)
def test_the_newest_checkpoint_counts_whatever_latest_says(text, store, capsys):
    latest = store.folder / "latest"
    latest.unlink()
    if text is not None:
        latest.write_text(text, errors="surrogateescape")
    assert resume(store) == (30, 30)
    said = capsys.readouterr().out
    name = (text or "").strip().replace("\udcff", "\ufffd") or "nothing"
    expected = "" if name == "step-00000030" else f"checkpoints: {latest} names {name}, not step-00000030\n"
    assert said == expected
    assert latest.read_text() == "step-00000030\n"


def test_a_fifo_in_place_of_latest_or_the_history_is_not_waited_for(store, capsys):
    for path in (store.folder / "latest", store.run_dir / HISTORY):
        path.unlink()
        os.mkfifo(path)
    assert store.read_latest() == ""
    assert "history.json cannot be read: [Errno 22] not a regular file" in error_of(store)
    (store.run_dir / HISTORY).unlink()
    assert resume(store) == (30, 30)
    assert (store.folder / "latest").read_text() == "step-00000030\n"


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "fragments/rank-00000.safetensors"])
@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(file, kind, store, capsys):
    path = store.path(30) / file
    {"flipped": flip, "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]), "missing": lambda p: p.unlink()}[kind](
        path
    )
    before = {p.relative_to(store.path(30)): p.read_bytes() for p in store.path(30).rglob("*.*")}
    assert resume(store) == (20, 20)
    aside = store.folder / "damaged-step-00000030"
    assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*.*")} == before
    assert names(store) == ["damaged-step-00000030", "latest", "step-00000010", "step-00000020"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoints: {path} ")
    assert line.endswith("; step-00000030 is now damaged-step-00000030, and the checkpoint before it is used")
    assert resume(store) == (20, 20) and capsys.readouterr().out == ""
    save(build_saver(store), 30)
    assert resume(store) == (30, 30)


def test_all_damaged_ones_are_skipped_and_named(store, capsys):
    flip(store.path(20) / "fragments/rank-00000.safetensors")
    flip(store.path(30) / "state.json")
    assert resume(store) == (10, 10)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[1].split()[0] for line in said] == ["step-00000030", "step-00000020"]


def test_a_run_without_a_whole_checkpoint_is_refused_with_each_problem(store):
    for step in (10, 20, 30):
        flip(store.path(step) / "state.json")
    message = error_of(store)
    assert [f"step-000000{step}/state.json is damaged" in message for step in (10, 20, 30)] == [True] * 3
    assert message.endswith("; restore one from a copy, or start from step 0 with run.start=fresh")
    assert resume(store, "fresh") == (0, 0)  # the remedy
    assert names(store) == [f"damaged-step-000000{step}" for step in (10, 20, 30)] + ["latest"]


def test_a_run_whose_fragments_are_all_damaged_is_refused_then_and_later(store):
    for step in (10, 20, 30):
        flip(store.path(step) / "fragments/rank-00000.safetensors")
    with pytest.raises(MegaSoraError, match="no checkpoint in .* is whole .*set aside as damaged"):
        resume(store)
    assert "set aside as damaged" in error_of(store)
    (store.folder / "damaged-step-00000020").rename(store.path(20))
    flip(store.path(20) / "fragments/rank-00000.safetensors")  # repaired
    assert resume(store) == (20, 20)


# ---------------------------------------------------------------- lost checkpoints


@pytest.mark.parametrize("start", [DEFAULT, "resume"])
@pytest.mark.parametrize("loss", ["folder", "contents", "dangling link"])
def test_a_run_that_has_lost_its_checkpoints_is_refused(loss, start, store):
    shutil.rmtree(store.folder)
    if loss == "contents":
        store.folder.mkdir()  # an empty mount point
    if loss == "dangling link":
        store.folder.symlink_to(store.run_dir / "unmounted")
    message = error_of(store, start)
    assert message == (
        f"{store.folder} has no checkpoint, but the run has saved step-00000010, step-00000020, step-00000030; mount "
        "or restore the folder, or start from step 0 with run.start=fresh"
    )


def test_an_older_folder_of_checkpoints_is_refused_unless_resume_says_so(store, tmp_path, capsys):
    shutil.copytree(store.path(10), tmp_path / "copy")
    save(build_saver(store), 40, 50)
    shutil.rmtree(store.folder)
    shutil.copytree(tmp_path / "copy", store.path(10))  # another folder is mounted there
    message = error_of(store)
    assert "no checkpoint later than step-00000010, but the run has saved step-00000030, step-00000040" in message
    assert message.endswith("resume from step-00000010 with run.start=resume")
    assert resume(store, "resume") == (10, 10)
    assert "step-00000050, which the run has saved, is not in" in capsys.readouterr().out


def test_a_newest_checkpoint_that_is_gone_is_named_and_the_one_before_is_used(store, capsys):
    shutil.rmtree(store.path(30))
    assert resume(store) == (20, 20)
    assert f"step-00000030, which the run has saved, is not in {store.folder}" in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_first_save_begins_again(tmp_path):
    store = store_of(tmp_path)
    write_history(tmp_path, History())  # as the run did before its first step
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert resume(store) == (0, 0)


def test_resume_needs_a_checkpoint(tmp_path):
    store = store_of(tmp_path)
    assert "run.start=resume: " in error_of(store, "resume") and "has no checkpoint" in error_of(store, "resume")
    assert "has no step-00000010; it has none" in error_of(store, "resume:step-00000010")


# ---------------------------------------------------------------- an exact checkpoint


def test_an_exact_checkpoint_is_resumed_once_and_later_ones_are_set_aside(store, capsys):
    start = "resume:step-00000010"
    assert resume(store, start) == (10, 10)
    assert "later checkpoints are now superseded-step-00000020, superseded-step-00000030" in capsys.readouterr().out
    assert names(store) == ["latest", "step-00000010", "superseded-step-00000020", "superseded-step-00000030"]
    assert (store.folder / "latest").read_text() == "step-00000010\n"
    assert resume(store, start) == (10, 10)
    save(build_saver(store), 20)
    for again in (start, DEFAULT, "resume"):  # as a requeued job starts it
        assert resume(store, again) == (20, 20)
    assert f"run.start={start} was done by an earlier launch" in capsys.readouterr().out
    assert "superseded-step-00000030" in names(store)


def test_a_damaged_exact_checkpoint_is_refused_without_another_in_its_place(store):
    flip(store.path(20) / "state.json")
    assert "state.json is damaged" in error_of(store, "resume:step-00000020")
    flip(store.path(10) / "fragments/rank-00000.safetensors")
    with pytest.raises(MegaSoraError, match="run.start=resume:step-00000010: .* is damaged"):
        resume(store, "resume:step-00000010")
    assert names(store) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    message = error_of(store, "resume:step-00000011")
    assert message.endswith("has no step-00000011; it has step-00000010, step-00000020, step-00000030")


# ---------------------------------------------------------------- a new run


@pytest.mark.parametrize("start", ["fresh", "init:weights.safetensors"])
def test_a_new_run_is_refused_beside_checkpoints_and_resumed_by_the_command_that_began_it(start, store, tmp_path):
    assert error_of(store, start) == (
        f"run.start={start}: {store.run_dir} holds a run with checkpoints, the newest step-00000030; choose another "
        "run.dir, or resume it with run.start=resume"
    )
    new = store_of(tmp_path / "new")
    assert begins(new.run_dir, start) and resume(new, start) == (0, 0)
    write_history(new.run_dir, History(start))  # as prepare_run_folder does
    assert resume(new, start) == (0, 0)  # killed before the first save
    save(build_saver(new), 10)
    assert read_history(new.run_dir) == History(start, ["step-00000010"])
    assert not begins(new.run_dir, start) and resume(new, start) == (10, 10)
    shutil.rmtree(new.folder)
    assert error_of(new, start).endswith("mount or restore the folder, or choose another run.dir")


def test_initial_weights_are_read_until_there_is_a_checkpoint(tmp_path):
    store, start = store_of(tmp_path / "run"), "init:~/weights.safetensors"
    assert initial_weights_to_read(store.run_dir, start).name == "weights.safetensors"
    assert initial_weights_to_read(store.run_dir, start).is_absolute()
    write_history(store.run_dir, History(start))
    assert initial_weights_to_read(store.run_dir, start) is not None
    save(build_saver(store), 10)
    assert initial_weights_to_read(store.run_dir, start) is None
    (store.run_dir / HISTORY).unlink()  # another run
    assert initial_weights_to_read(store.run_dir, start) is not None
    for other in (DEFAULT, "fresh", "resume"):
        assert initial_weights_to_read(tmp_path / "new", other) is None
