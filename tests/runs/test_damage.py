"""data.max_damaged_fraction ends a run at the same step on any number of ranks, resumed or not."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import read_jsonl, train, train_arguments

from megasora.data.shard_reader import ShardSplit
from megasora.testing.spawn import run_ranks

DAMAGED = (7, 23, 41)  # indices of clips, of 60


@pytest.fixture
def damaged(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    opened = ShardSplit.open(folder, "train")
    for number in DAMAGED:
        offset, size, _ = opened.index[number].members["patches.f16"]
        with open(folder / opened.names[opened.shard_of[number]], "r+b") as tar:
            tar.seek(offset + size // 2)
            byte = tar.read(1)[0]
            tar.seek(offset + size // 2)
            tar.write(bytes([byte ^ 4]))
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
