"""Damaged clips are counted once each, over ranks, epochs and stops, against the fraction that is allowed."""

from __future__ import annotations

import json

from megasora.data.tar import DamagedTar
from megasora.observe.damage import DamagedClips


def test_clips_are_counted_not_encounters(tmp_path):
    damage = DamagedClips(tmp_path, 0.1, 30)
    assert damage.add([]) is None
    assert damage.add([(1, "a"), (2, "b"), (1, "a")]) is None
    assert damage.add([(1, "a"), (2, "b"), (3, "c")]) is None  # three of thirty are allowed
    resumed = DamagedClips(tmp_path, 0.1, 30, damage.sample_ids)
    for one in (damage, resumed):
        said = one.add([(2, "b"), (7, "tar: byte 9: gone")])
        assert said == (
            "4 damaged clips are more than data.max_bad_fraction=0.1 of 30 clips; the last: tar: byte 9: gone; mend "
            "the shards, or allow more"
        )


def test_each_encounter_is_a_line(tmp_path):
    damage = DamagedClips(tmp_path, 0.1, 30)
    damage.note(3, [])
    assert not list(tmp_path.iterdir())
    damage.note(4, [DamagedTar("a.tar", 512, "torn", 17), DamagedTar("b.tar", 0, "missing", 5)])
    damage.note(5, [DamagedTar("a.tar", 512, "torn", 17)])
    lines = [json.loads(line) for line in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample_id"]) for line in lines] == [(4, 17), (4, 5), (5, 17)]
    assert lines[0] == {
        "step": 4, "shard": "a.tar", "offset": 512, "sample_id": 17, "what": "a.tar: byte 512: torn"
    }  # fmt: skip
