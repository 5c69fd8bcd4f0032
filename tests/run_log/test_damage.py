"""Distinct damaged clips are counted, over ranks, epochs and resumes; more than the allowed fraction end the run."""

from __future__ import annotations

import json

import pytest

from megasora.data.tar import DamagedTar
from megasora.errors import DataError
from megasora.run_log.damage import DamagedClips


def test_a_clip_counts_once_however_often_it_is_met(tmp_path):
    damage = DamagedClips(tmp_path, 0.1, 30)
    damage.register([])
    damage.register([(1, "a"), (2, "b"), (1, "a")])
    damage.register([(1, "a"), (2, "b"), (3, "c")])  # three of thirty are allowed
    resumed = DamagedClips(tmp_path, 0.1, 30, damage.sample_ids)
    message = (
        "4 damaged clips are more than data.max_damaged_fraction=0.1 of 30 clips; the last: tar: byte 9: gone; repair "
        "the shards, or allow more"
    )
    for clips in (damage, resumed):
        with pytest.raises(DataError) as error:
            clips.register([(2, "b"), (7, "tar: byte 9: gone")])
        assert str(error.value) == message


def test_each_skipped_clip_of_a_step_is_a_line(tmp_path):
    damage = DamagedClips(tmp_path, 0.1, 30)
    damage.log(3, [])
    assert not list(tmp_path.iterdir())
    damage.log(4, [DamagedTar("a.tar", 512, "torn", 17), DamagedTar("b.tar", 0, "missing", 5)])
    damage.log(5, [DamagedTar("a.tar", 512, "torn", 17)])
    lines = [json.loads(line) for line in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample_id"]) for line in lines] == [(4, 17), (4, 5), (5, 17)]
    assert lines[0] == {
        "step": 4, "shard": "a.tar", "offset": 512, "sample_id": 17, "error": "a.tar: byte 512: torn"
    }  # fmt: skip
