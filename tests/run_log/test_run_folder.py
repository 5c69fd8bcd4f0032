"""A launch cuts the ledger after a checkpoint was loaded, and moves the files of an old run before it begins anew."""

from __future__ import annotations

import json
import shutil

import pytest
from saved_runs import build_loader, build_saver, save, store_of

from megasora.checkpoint.history import read_history
from megasora.checks import check_run_folder
from megasora.config import load, load_run_config
from megasora.errors import MegaSoraError
from megasora.run_log.ledger import read_ledger
from megasora.run_log.run_log import prepare_run_folder

STEPS = 25


def config_of(run, *settings):
    return load(None, [f"run.dir={run}", "run.steps=100", *settings])


@pytest.fixture
def run(tmp_path):
    """A run of 25 steps with checkpoints of steps 10 and 20."""
    run = tmp_path / "run"
    save(build_saver(store_of(run)), 10, 20)
    prepare_run_folder(config_of(run), 0)
    (run / "ledger").mkdir()
    lines = [json.dumps({"step": step, "sample_ids": [step]}) + "\n" for step in range(1, STEPS + 1)]
    (run / "ledger" / "rank-00000.jsonl").write_text("".join(lines))
    (run / "metrics.jsonl").write_text("".join(lines))
    for name in ("validation.jsonl", "damaged.jsonl", "run.json", "launches.jsonl", "exit.json", "notes.txt"):
        (run / name).write_text(name)
    return run


def launch(run, *settings):
    """The checks, the load and the preparation of a launch; the step that it starts from."""
    config = config_of(run, *settings)
    check_run_folder(config)
    state = build_loader(store_of(run)).resume(config.run.start)
    step = state["step"] if state else 0
    prepare_run_folder(config, step)
    return step


def files_of(run):
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_resume_cuts_the_ledger_to_its_checkpoint_and_keeps_everything_else(run):
    before = files_of(run)
    assert launch(run) == 20
    assert list(read_ledger(run)) == list(range(1, 21))
    after = files_of(run)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"ledger/rank-00000.jsonl"}
    assert launch(run, "run.start=resume:step-00000010") == 10 and list(read_ledger(run)) == list(range(1, 11))


@pytest.mark.parametrize("start", ["resume-or-fresh", "resume", "resume:step-00000020"])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_no_file_changes(start, run):
    shutil.rmtree(run / "checkpoints")
    before = files_of(run)
    with pytest.raises(MegaSoraError, match="has no checkpoint, but the run has saved step-0.*|has no step-00000020"):
        launch(run, f"run.start={start}")
    assert files_of(run) == before


def test_steps_without_checkpoints_and_history_are_of_a_run_that_has_lost_them(run):
    shutil.rmtree(run / "checkpoints")
    (run / "history.json").unlink()
    before = files_of(run)
    with pytest.raises(
        MegaSoraError, match="has no checkpoint, and .*no history.json, but metrics.jsonl has steps; .*fresh"
    ):
        launch(run)
    assert files_of(run) == before
    assert launch(run, "run.start=fresh") == 0


def test_a_run_that_was_killed_before_its_first_save_begins_again(tmp_path):
    assert launch(tmp_path / "run") == 0
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert launch(tmp_path / "run") == 0


@pytest.mark.parametrize("text", ["", "run: {steps: [", "- 1\n"])
def test_a_damaged_configuration_of_a_run_is_named_with_a_remedy(text, run):
    (run / "config.yaml").write_text(text)
    with pytest.raises(MegaSoraError, match="config.yaml .*; restore it, or move it away: ") as caught:
        launch(run)
    assert len(str(caught.value).splitlines()) == 1
    (run / "config.yaml").rename(run / "old.yaml")
    assert launch(run) == 20


def test_a_fresh_run_moves_the_files_of_the_old_one_and_is_resumed_by_its_own_command(run):
    shutil.rmtree(run / "checkpoints")
    old = files_of(run)
    assert launch(run, "run.start=fresh", "model.width=96") == 0  # another configuration
    new = files_of(run)
    moved = {name.removeprefix("previous-1/"): data for name, data in new.items() if name.startswith("previous-1/")}
    stays = {"launches.jsonl", "exit.json", "notes.txt"}
    assert moved == {name: data for name, data in old.items() if name not in {*stays, "history.json"}}
    assert {name for name in new if not name.startswith("previous-1/")} == {*stays, "config.yaml", "history.json"}
    assert read_ledger(run) == {} and load_run_config(run).model.width == 96
    assert launch(run, "run.start=fresh", "model.width=96") == 0  # killed before the first save
    save(build_saver(store_of(run)), 10)
    for start in ("fresh", "resume-or-fresh"):
        assert launch(run, f"run.start={start}", "model.width=96") == 10
    assert read_history(run).start == "fresh" and not (run / "previous-2").exists()


def test_a_run_folder_belongs_to_one_configuration_but_for_how_it_starts(run):
    assert launch(run, "run.start=resume") == 20
    with pytest.raises(MegaSoraError, match="already holds another configuration .model.width: 384 -> 96"):
        launch(run, "model.width=96")
