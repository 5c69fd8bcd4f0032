"""A tolerant run ends at the step at which one clip too many turned out to be damaged, on any ranks, after any stop."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import lines, train, train_arguments

from megasora.data.shard_reader import ShardSplit
from megasora.testing.spawn import run_ranks

DAMAGED = (7, 23, 41)  # numbers of clips, of sixty


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


def test_the_clip_that_is_one_too_many_ends_all_ranks_at_the_same_step(damaged, tiny, tmp_path):
    def arguments(run, fraction):
        arguments = train_arguments(tmp_path / run, damaged, tiny)
        return [*arguments, "run.steps=40", f"data.max_damaged_fraction={fraction}"]

    assert run_ranks(train, 1, arguments("all", 0.05)) == [None]  # three of sixty are allowed
    told, met, ends_at = lines(tmp_path / "all", "damaged.jsonl"), set(), {}
    for line in told:
        met.add(line["sample_id"])
        ends_at.setdefault(len(met), line["step"])
    assert len(met) == 3 and len(told) > 6  # each again in later epochs
    assert ends_at[2] < ends_at[3]

    (alone,) = run_ranks(train, 1, arguments("alone", 0.04))
    words = r"DataError: 3 damaged clips are more than data.max_damaged_fraction=0.04 of 60 clips; "
    words += r"the last: .*: byte \d+: "
    assert re.match(words, alone)
    assert len(lines(tmp_path / "alone")) == ends_at[3] - 1

    stopped = run_ranks(train, 2, arguments("two", 0.04), ends_at[3] - 1)
    assert all(end.startswith(f"StopRequested: saved after step {ends_at[3] - 1};") for end in stopped)
    saved = tmp_path / "two" / "checkpoints" / f"step-{ends_at[3] - 1:08d}" / "state.json"
    assert len(json.loads(saved.read_text())["task"]["damaged"]) == 2
    assert run_ranks(train, 2, arguments("two", 0.04)) == [alone, alone]
    assert len(lines(tmp_path / "two")) == ends_at[3] - 1
