"""The benchmarks of checkpoints in tiny settings: records are complete, and what is counted is what ranks have."""

import json

import pytest
from engine_fragments import fragments_of_engine

from benchmarks import checkpoint, checkpoint_rank, checkpoint_scale
from benchmarks.checkpoint_fragments import Layout, fragments, load_config, owned_fragments
from megasora.checkpoint import block_file
from megasora.testing.spawn import run_fake_rank


def recorded(main, tmp_path, *arguments):
    path = tmp_path / "results" / "record.json"
    main([*arguments, "--out", str(path)])
    record = json.loads(path.read_text())
    assert len(record["commit"]) == 40
    return record


@pytest.mark.slow
def test_checkpoint_measures_every_goal_and_the_other_programs(tmp_path):
    record = recorded(checkpoint.main, tmp_path, "--quick", "--folder", str(tmp_path))
    assert len(record["goals"]) == len(checkpoint.GOALS) + len(checkpoint.OTHERS)
    assert all(goal["value"] > 0 for goal in record["goals"])
    bytes_of = {row["program"]: row["num_bytes"] for row in record["others"]}
    assert {name.split(",")[0] for name in bytes_of} == {"MegaSora", "DCP async_save", "DCP save", "DeepSpeed"}
    assert bytes_of["MegaSora"] == 8_000_000 <= bytes_of["DCP save"] < 8_100_000
    assert 7_000_000 <= bytes_of["DeepSpeed, ZeRO 1"] < 7_100_000  # 14 of 16 bytes of a parameter
    assert all(row["stall"] <= row["on_disk"] for row in record["others"])
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_checkpoint_hashes_nothing_in_its_comparison_and_digests_after_it():
    with checkpoint_rank.without_hashing():
        assert block_file.digest_of(b"a") == bytes(32)
    assert block_file.digest_of(b"a") == checkpoint.HASHES["BLAKE3"](b"a") != bytes(32)


@pytest.mark.parametrize(
    ("layout", "rank", "dtype"),
    [
        (Layout("small", 8, 2), 5, "bfloat16"),
        (Layout("small", 8, 2, 2), 7, "float32"),
        (Layout("small", 8, 2, zero_stage=2), 0, "bfloat16"),
        (Layout("small", 8, 2, zero_stage=3), 7, "bfloat16"),
    ],
)
def test_the_fragments_that_are_counted_are_those_of_the_engine(layout, rank, dtype):
    settings = ["model.width=32", "model.depth=2", "model.heads=4", "codec.channels=4", f"run.dtype={dtype}",
                "data.packs_per_step=8"]  # fmt: skip
    config = load_config(layout, settings)
    pipeline, rest = divmod(rank, layout.data_context * layout.tensor)
    data, tensor = divmod(rest, layout.tensor)
    counted = fragments(owned_fragments(config, layout, pipeline)[data], layout, tensor)
    expected = run_fake_rank(fragments_of_engine, rank, layout.world, config)
    assert len(expected) > 3
    assert sorted(place_of(f) for f in counted) == sorted(expected)


def place_of(f):
    return f.name, tuple(f.shape), f.tensor_rank, f.tensor_size, f.start, f.count


def test_checkpoint_scale_counts_what_ranks_save_and_read(tmp_path):
    record = recorded(checkpoint_scale.main, tmp_path, "--quick")
    for row in record["layouts"]:
        written = row["bytes_written_mean"] * row["world"]
        assert row["bytes_written_min"] <= row["bytes_written_mean"] <= row["bytes_written_max"]
        headers = row["header_bytes_mean"] * row["world"]
        tables = 32 * 2 * row["world"]  # of a header and at most one block
        if row["zero_stage"] == 1:  # all ranks are counted
            assert row["state_bytes"] + headers < written <= row["state_bytes"] + headers + 2 * tables
        assert row["gathered_bytes_per_object"] < 300
        assert row["resume"]["same_layout"]["ratio"] >= 1
        assert row["resume"]["header_reads_per_node"] == row["world"]
    assert set(record["commit_seconds"]) == {"16"}
