"""Damaged clips are left out and counted alike on any number of ranks, resumed or not; too many end the run."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import full_tensors, read_jsonl, train, train_arguments

from megasora.data.shard_reader import ShardSplit
from megasora.run_log.ledger import read_ledger
from megasora.testing.spawn import run_ranks

DAMAGED = (7, 23, 41)  # indices of clips, of 60


@pytest.fixture
def damaged(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    flip(folder, ShardSplit.open(folder, "train").index.sample_ids[list(DAMAGED)])
    return folder


def test_one_damaged_clip_too_many_ends_all_ranks_at_the_same_step(damaged, tiny, tmp_path):
    def arguments(run, fraction):
        arguments = train_arguments(tmp_path / run, damaged, tiny)
        return [*arguments, "run.steps=40", f"data.max_damaged_fraction={fraction}"]

    assert run_ranks(train, 1, arguments("all", 0.05)) == [None]  # three of sixty are allowed
    logged, met, ends_at = read_jsonl(tmp_path / "all", "damaged.jsonl"), set(), {}
    for line in logged:
        met.add(line["sample_id"])
        ends_at.setdefault(len(met), line["step"])
    assert len(met) == 3 and len(logged) > 6  # each again in later epochs
    assert ends_at[2] < ends_at[3]

    (error,) = run_ranks(train, 1, arguments("alone", 0.04))
    pattern = r"DataError: 3 damaged clips are more than data.max_damaged_fraction=0.04 of 60 clips; "
    pattern += r"the last: .*: byte \d+: "
    assert re.match(pattern, error)
    assert len(read_jsonl(tmp_path / "alone")) == ends_at[3] - 1

    stopped = run_ranks(train, 2, arguments("two", 0.04), ends_at[3] - 1)
    assert all(end.startswith(f"StopRequested: saved after step {ends_at[3] - 1};") for end in stopped)
    saved = tmp_path / "two" / "checkpoints" / f"step-{ends_at[3] - 1:08d}" / "state.json"
    assert len(json.loads(saved.read_text())["task"]["damaged"]) == 2
    assert run_ranks(train, 2, arguments("two", 0.04)) == [error, error]
    assert len(read_jsonl(tmp_path / "two")) == ends_at[3] - 1


# ---------------------------------------------------------------------- steps and packs without clips

STEP, STEPS = 3, 5


def flip(folder, sample_ids):
    """Flips a bit in the patches of clips."""
    opened = ShardSplit.open(folder, "train")
    for number in np.flatnonzero(np.isin(opened.index.sample_ids, sample_ids)).tolist():
        offset, size, _ = opened.index[number].members["patches.f16"]
        with open(folder / opened.shard_name(number), "r+b") as tar:
            tar.seek(offset + size // 2)
            byte = tar.read(1)[0]
            tar.seek(offset + size // 2)
            tar.write(bytes([byte ^ 4]))


def arguments_of(run, shards, tiny, fraction):
    every = [f"run.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9", "validation.every=5", "run.ledger=true"]
    return [*train_arguments(run, shards, tiny), *every, f"data.max_damaged_fraction={fraction}"]


@pytest.fixture(scope="module")
def clips_of_step(shards, tiny, tmp_path_factory):
    """The sample ids of the clips of a step, per data rank of two."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(train, 2, arguments_of(run, shards, tiny, 0)) == [None, None]
    by_rank = [read_jsonl(run, f"ledger/rank-{rank:05d}.jsonl")[STEP - 1]["sample_ids"] for rank in (0, 1)]
    assert all(by_rank)
    return by_rank


def test_a_step_without_clips_is_counted_and_left_out(clips_of_step, shards, tiny, tmp_path):
    damaged = set(sum(clips_of_step, []))
    flip(shutil.copytree(shards, tmp_path / "shards"), sorted(damaged))
    for processes in (1, 2):
        run = tmp_path / f"run{processes}"
        arguments = arguments_of(run, tmp_path / "shards", tiny, 0.9)
        assert run_ranks(train, processes, arguments) == [None] * processes
        line = read_jsonl(run)[STEP - 1]
        assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, "no clips")
        assert [m["loss"] is None for m in read_jsonl(run)].count(True) == 1
        before, after = full_tensors(run, STEP - 1), full_tensors(run, STEP)
        assert not [name for name in before if not torch.equal(before[name], after[name])]
        assert {i for ids in read_ledger(run).values() for i in ids}.isdisjoint(damaged)
        assert {step for step, ids in read_ledger(run).items() if not ids} == {STEP}
        logged = {line["sample_id"] for line in read_jsonl(run, "damaged.jsonl") if line["step"] == STEP}
        assert logged == damaged
    assert read_ledger(tmp_path / "run1") == read_ledger(tmp_path / "run2")
    for one, two in zip(read_jsonl(tmp_path / "run1"), read_jsonl(tmp_path / "run2"), strict=True):
        assert two["loss"] == (one["loss"] and pytest.approx(one["loss"], rel=1e-5))
    message = f"DataError: {len(damaged)} damaged clips are more than data.max_damaged_fraction=0.01 of 60 clips; "
    ends = run_ranks(train, 2, arguments_of(tmp_path / "few", tmp_path / "shards", tiny, 0.01))
    assert ends[0] == ends[1] and ends[0].startswith(message)


def test_a_rank_without_clips_does_not_change_the_mean_over_the_others(clips_of_step, shards, tiny, tmp_path):
    flip(shutil.copytree(shards, tmp_path / "shards"), sorted(set(clips_of_step[1]) - set(clips_of_step[0])))
    for processes in (1, 2):
        arguments = arguments_of(tmp_path / f"run{processes}", tmp_path / "shards", tiny, 0.9)
        assert run_ranks(train, processes, arguments) == [None] * processes
    one, two = read_jsonl(tmp_path / "run1"), read_jsonl(tmp_path / "run2")
    assert [line.get("skipped") for line in two] == [None] * STEPS
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5)
    assert read_jsonl(tmp_path / "run2", "ledger/rank-00001.jsonl")[STEP - 1]["sample_ids"] == []
    assert read_ledger(tmp_path / "run1") == read_ledger(tmp_path / "run2")
