"""The data benchmark in tiny settings: its counts are those computed by hand."""

import json
import os

import numpy as np
import pytest
import torch

from benchmarks import buckets, data
from megasora.build import patch_dim
from megasora.config import load
from megasora.data.packing_plan import PackingPlan
from megasora.data.shard_reader import ShardSplit
from megasora.model.flops import pack_flops
from megasora.testing.mixes import heavy_grids, heavy_mix

TINY = [
    "--trials", "1", "--load-clips", "30", "--plan-clips", "3000", "--tokens-per-pack", "8192", "--ranks", "4",
    "--bucket-clips", "2000", "--steps", "1", "--tokens", "512", "--videos", "1", "9", "48", "64",
]  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    data.main([*TINY, "--out", str(folder / "data.json"), "--folder", str(folder)])
    assert os.listdir(folder) == ["data.json"]  # temporary files are removed
    return json.loads((folder / "data.json").read_text())


# ---- buckets


def test_a_clip_is_padded_or_cropped_to_the_next_bucket_and_a_too_large_bucket_is_the_clip_itself():
    grids = np.array([[1, 16, 24], [3, 17, 23], [9, 5, 8], [7, 30, 30]])
    up = buckets.bucket_of(grids, 6300, up=True)
    assert up.tolist() == [[1, 16, 24], [4, 24, 24], [16, 8, 8], [7, 30, 30]]  # 8 x 32 x 32 tokens are too many
    down = buckets.bucket_of(grids, 6300, up=False)
    assert down.tolist() == [[1, 16, 24], [2, 16, 16], [8, 8, 8], [4, 24, 24]]


def test_batches_have_as_many_clips_of_a_bucket_as_fit_and_only_their_own_tokens_are_useful():
    grids = np.array([[3, 15, 16]] * 5 + [[4, 16, 16]] * 2 + [[1, 16, 16]])
    up = buckets.bucket_batches(grids, 2048, up=True, seed=0)
    assert (
        sorted((len(b.grids_G3), b.computed) for b in up) == [(2, 2048)] * 3
    )  # 7 clips of 1,024; one of 256 fills no batch
    assert sum(b.useful for b in up) in (4 * 720 + 2 * 1024, 5 * 720 + 1024)
    down = buckets.bucket_batches(grids[:5], 1024, up=False, seed=0)
    assert [(b.grids_G3.tolist(), b.useful, b.computed) for b in down] == [([[2, 8, 16]] * 4, 1024, 1024)]


def test_padding_of_a_pack_is_counted_as_computed():
    config = load(None, ["data.tokens_per_pack=100"])
    full = buckets.Batch(np.array([[1, 5, 10]]), 50, 50)
    flops = buckets.flops_of(full, config)
    assert flops == pack_flops(config.model, patch_dim(config), torch.tensor([0, 50]), torch.tensor([0, 8]))
    assert buckets.flops_of(buckets.Batch(full.grids_G3, 50, 100), config) == 2 * flops


def test_a_single_rank_never_waits_and_useful_tokens_are_the_computed_ones_without_padding():
    config = load(None, ["data.tokens_per_pack=4096"])
    packs, pad, crop = buckets.count_arithmetic(config, 500, 2000, 1)
    assert [r.max_over_mean for r in (packs, pad, crop)] == [1, 1, 1]
    assert packs.packs_over_this == 1 and packs.useful_fraction > 0.99
    assert crop.useful_fraction == 1 and crop.seen_fraction < 1 == packs.seen_fraction == pad.seen_fraction
    clips = heavy_grids(4096, 2000, 0)
    up = buckets.bucket_of(clips, 4096, up=True)
    assert pad.useful_fraction == pytest.approx(clips.prod(1).sum() / up.prod(1).sum(), rel=0.1)


# ---- loader


def test_every_variant_of_loading_reads_the_same_clips(tmp_path):
    results, about = data.measure_loader(tmp_path, 20, 16_384, [0, 2], 1)
    shards = ShardSplit.open(tmp_path / "shards", "train")
    assert about["clips"] == len(shards) == 20 and about["tokens"] == heavy_mix(16_384, 20, 0).sum()
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    assert about["bytes"] == sum(p.stat().st_size for p in tars)
    assert data.read_raw(tars, 20, True).bytes == about["bytes"]
    assert data.run_webdataset(tars).clips == 20
    variants = {r.variant: r for r in results}
    assert {
        data.RAW,
        data.CHECKED,
        data.WEBDATASET,
        "loader, 0 threads",
        "loader, 2 threads",
        data.COLD,
    } <= variants.keys()
    assert variants[data.RAW].of_raw == [1.0] and variants[data.WEBDATASET].of_webdataset == [1.0]
    for r in results:
        assert r.clips_per_second[0] > 0 and r.gb_per_second[0] > 0


def test_the_bytes_of_the_loader_are_those_of_the_records_it_has_read(tmp_path):
    grids = np.array([[1, 16, 16]] * 32)  # 4 packs of 2,048 tokens: two steps, all clips
    data.write_shards(tmp_path, grids, 48, 1)
    config = load(None, [f"data.shards={tmp_path}", "data.tokens_per_pack=2048", "data.packs_per_step=2"])
    for threads in (0, 3):
        amount = data.run_loader(config, threads)
        size = ShardSplit.open(tmp_path, "train").index.rows["record"]["size"].sum()
        assert (amount.clips, amount.bytes) == (32, size)


# ---- plan


def test_planning_counts_the_packs_of_an_epoch():
    tokens, window = heavy_mix(8192, 3000, 0), load(None, []).data.packing_window
    planning = data.measure_plan(8192, 3000, 4, [1, 2], 1000)
    packs = len(PackingPlan([tokens], [1.0], 8192, 4, window, 1000, 0).window_at(0, 0, 0).packs)
    assert (planning.packs, planning.windows) == (packs, 1)
    assert planning.padding == 1 - tokens.sum() / (packs * 8192)
    steps = list(data.step_costs(PackingPlan([tokens], [1.0], 8192, 4, window, 1000, 0)))
    assert len(steps) == packs // 4 - (packs % 4 == 0)
    assert planning.worst_over_mean["1"] == max(costs.max() / costs.mean() for costs in steps)  # one pack per rank


def test_the_imbalance_is_the_most_expensive_rank_over_the_mean():
    assert data.rank_imbalance(np.array([4, 4, 4, 4]), 2) == 1
    assert data.rank_imbalance(np.array([9, 3]), 2) == 1.5


# ---- the record


def test_the_record_has_every_part(record):
    assert {"date", "commit", "cpu", "cores", "load_average", "loader", "plan", "training", "ingest"} <= record.keys()
    assert record["loader"]["clips"] == 30
    assert [r["tokens_per_pack"] for r in record["plan"]["results"]] == [8192]
    arithmetic = record["training"]["arithmetic"]
    assert [(r["variant"], r["ranks"]) for r in arithmetic] == [
        (w, n) for n in (1, 4) for w in ("packs", "pad", "crop")
    ]
    assert [r["variant"] for r in record["training"]["seconds"]] == ["packs", "pad", "crop"]
    assert all(len(r["tokens_per_second"]) == 2 for r in record["training"]["seconds"])
    variants = record["ingest"]["results"]
    assert [r["variant"] for r in variants] == ["PyAV, decoded", "PyAV, decoded to RGB", "ingest"]
    assert record["ingest"]["frames"] == 9 and variants[2]["ingest_over_this"] == [1.0]


def test_videos_have_the_requested_number_of_frames(tmp_path):
    data.write_videos(tmp_path / "videos", 2, 5, 32, 48)
    assert data.decode_videos(tmp_path / "videos", to_rgb=True) == 10
    assert data.ingest_videos(tmp_path / "videos", tmp_path / "shards") == 10
