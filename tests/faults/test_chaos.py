"""Disturbed runs end as the undisturbed one: the part of `make faults` that is in the suite, in forked processes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time

import pytest
from disturbed_run import Run, make_run, run_and_check
from fault_injection import Progress, wait_for
from fault_launch import ForkedRanks
from fault_oracles import check_run
from fault_plan import CUT, FAULT_DECK, LAYOUTS, MOMENTS, Launch, kills_plan, seeded_plan

from megasora.errors import DONE
from megasora.run_log.launches import read_exit

STEPS = 60


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("faults"), shards, STEPS, every=5, start="fork", hang_seconds=20.0)


def run_of(undisturbed: Run, folder) -> Run:
    return dataclasses.replace(undisturbed, folder=folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_is_disturbed_in_every_way_ends_as_the_undisturbed_one(undisturbed, tmp_path):
    result = run_and_check(run_of(undisturbed, tmp_path), CUT)
    assert result["problems"] == []
    launches = result["launches"]
    assert len(launches) == len(CUT) and all(done["fault"] for done in launches[:-1])
    assert [done["recorded"] for done in launches[1:4]] == [75, 75, 5] and launches[5]["recorded"] == 1
    assert [bool(done["damage"]) for done in launches] == [launch.damage is not None for launch in CUT]
    assert result["bitwise_steps"] >= 10 and result["largest_loss_error"] < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_kills_of_a_random_rank_at_a_random_instant_change_no_bit(undisturbed, tmp_path):
    plan = kills_plan(seed=13, kills=10)
    result = run_and_check(run_of(undisturbed, tmp_path), plan)
    assert result["problems"] == []
    assert result["bitwise_steps"] == STEPS and result["largest_loss_error"] == 0
    assert sum(bool(done["fault"]) for done in result["launches"]) >= 8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_suspended_rank_that_wakes_beside_the_next_launch_changes_nothing_of_it(undisturbed, tmp_path):
    """Its launcher and main process are dead, so that the lock is free; it is in the middle of a step."""
    run = run_of(undisturbed, tmp_path)
    first = ForkedRanks(run.command(run.folder), 2, tmp_path / "first.log", "first")
    deadline, progress = time.monotonic() + 200, Progress(run.folder)
    assert wait_for(first, lambda: progress.steps() >= 7, deadline)
    stale, main = first.rank(1), first.rank(0)
    os.kill(stale, signal.SIGSTOP)
    os.kill(main, signal.SIGKILL)
    second, progress = ForkedRanks(run.command(run.folder), 2, tmp_path / "second.log", "second"), Progress(run.folder)
    assert wait_for(second, lambda: progress.steps() >= 3, deadline)
    assert first.rank(1) == stale
    os.kill(stale, signal.SIGCONT)
    wait_for(second, lambda: first.poll() is not None and False, deadline)
    assert second.poll() == DONE, (tmp_path / "second.log").read_text()
    assert read_exit(run.folder)["code"] == DONE
    wait_for(first, lambda: False, deadline)
    assert read_exit(run.folder)["code"] == DONE
    assert check_run(run.folder, run.reference, STEPS, STEPS) == []


def test_a_changed_loss_a_lost_clip_and_a_file_left_behind_are_found(undisturbed, tmp_path):
    """The oracles can fail: each fault of the files of a finished run is one violation."""

    def problems(spoil) -> list[str]:
        run = tmp_path / spoil.__name__
        shutil.copytree(undisturbed.reference, run)
        spoil(run)
        return check_run(run, undisturbed.reference, STEPS, STEPS)

    def nothing(run):
        pass

    def loss(run):
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text.replace('"loss": 1.', '"loss": 1.0', 1))

    def ledger(run):
        file = run / "ledger" / "rank-00000.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))

    def lock(run):
        (run / ".lock").touch()

    assert problems(nothing) == []
    assert [text.split(" ")[0] for text in problems(loss)] == ["step"]
    assert problems(ledger) == [f"the ledger differs at 1 steps, first at step {STEPS}"]
    assert problems(lock) == ["left behind: .lock"]


def test_a_plan_is_a_function_of_its_seed_and_covers_every_kind():
    plan = seeded_plan(0, 20, 600)
    assert plan == seeded_plan(0, 20, 600) != seeded_plan(1, 20, 600)
    assert len(plan) == 19 and {launch.fault.kind for launch in plan} == set(FAULT_DECK)
    assert all(launch.layout.is_bitwise() for launch in plan[:10]) and sum(bool(launch.damage) for launch in plan) == 9
    settings = {text for launch in plan[10:] for text in launch.layout.settings}
    assert {text for layout in LAYOUTS for text in layout.settings} <= settings
    kills = kills_plan(0, 200)
    assert {launch.fault.moment for launch in kills} == set(MOMENTS)
    assert all(launch == Launch(fault=launch.fault) for launch in kills)
