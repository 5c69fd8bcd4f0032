"""Replicated fragments are saved once, spread over the ranks that hold them, in every layout."""

from __future__ import annotations

from collections import defaultdict
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from saved_runs import OneRank, on_ranks, store_of

from benchmarks.checkpoint_fragments import Layout, all_ranks, fragments, load_config, owned_fragments
from benchmarks.checkpoint_scale import build_index
from megasora.checkpoint import sharded
from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.sharded import RankFile, ShardedCheckpoint, read_index, saved_part
from megasora.checkpoint.verify import verify_checkpoint
from megasora.fragment import Fragment
from megasora.placement import WHOLE

SMALL_MODEL = ["model.width=32", "model.depth=2", "model.heads=4", "codec.channels=4", "model.text_depth=0"]
LARGE_MODEL = ["model.width=768", "model.depth=4", "model.heads=12", "codec.channels=16"]


def ranks_of(layout, settings=SMALL_MODEL):
    """Of each rank: (its fragments of the real model, on the meta device, its replicas)."""
    config, ranks = load_config(layout, settings), []
    owned = [owned_fragments(config, layout, pipeline) for pipeline in range(layout.pipeline)]
    for _, pipeline, data, tensor in all_ranks(layout):

        def replicas(f, pipeline=pipeline, tensor=tensor):
            return f.placement.replica(pipeline, layout.pipeline, tensor, layout.tensor)

        ranks.append((fragments(owned[pipeline][data], layout, tensor), replicas))
    return ranks


def parts_of(ranks):
    return [[p for f in held if (p := saved_part(f, *replicas(f))) is not None] for held, replicas in ranks]


def spread_from(elements):
    return mock.patch.object(sharded, "MIN_SPREAD_ELEMENTS", elements)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 300, 1 << 16]),
)
def test_all_ranks_save_the_model_exactly_once_in_any_layout(pipeline_tensor, data, zero_stage, threshold):
    pipeline, tensor = pipeline_tensor
    zero_stage = 1 if pipeline > 1 else zero_stage
    layout = Layout("small", pipeline * tensor * data, tensor, pipeline, zero_stage)
    ranks = ranks_of(layout)
    with spread_from(threshold):
        parts = parts_of(ranks)
    index = build_index([RankFile(rank, saved) for rank, saved in enumerate(parts)])  # raises for gaps and overlaps
    held = {f.name: f.shape for fragments_of_rank, _ in ranks for f in fragments_of_rank}
    assert {name: p.shape for name, p in index.parameters.items()} == held
    saved = sum(p.count for parts_of_rank in parts for p in parts_of_rank)
    assert saved == sum(shape.numel() for shape in held.values())


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 300), st.integers(9, 100))
def test_the_parts_of_a_fragment_are_its_elements_in_order(replicas, start, count, threshold):
    values = {kind: torch.arange(count) + 1000 * i for i, kind in enumerate(("weights", "ema"))}
    whole = Fragment("a", torch.Size((400,)), WHOLE, 0, 1, start, values)
    with spread_from(threshold):
        parts = [p for i in range(replicas) if (p := saved_part(whole, i, replicas)) is not None]
    for kind, expected in values.items():
        assert torch.equal(torch.cat([p.values[kind] for p in parts]), expected)
    assert [p.start for p in parts] == [start + int(p.values["weights"][0]) for p in parts]
    assert len(parts) == (replicas if count >= threshold else 1)


@pytest.mark.parametrize("layout", [Layout("large", 8, 4, 2), Layout("large", 8, 4), Layout("large", 8, 8)])
def test_replicas_of_large_fragments_save_equally_much(layout):
    ranks, saved = ranks_of(layout, LARGE_MODEL), defaultdict(list)
    for rank, ((held, replicas), parts) in enumerate(zip(ranks, parts_of(ranks), strict=True)):
        large = {f.name for f in held if replicas(f)[1] > 1 and f.count >= sharded.MIN_SPREAD_ELEMENTS}
        data = rank // layout.tensor % layout.data_context
        saved[data].append(sum(p.count for p in parts if p.name in large))
    assert sum(map(sum, saved.values())) > 2_000_000
    for counts in saved.values():  # of the ranks that hold the same fragments
        assert max(counts) - min(counts) <= 100  # at most one element of each fragment


def test_what_a_rank_saves_follows_from_names_and_sizes_alone():
    names = ["blocks.0.attention.out.bias", "final_modulation.table", "timestep.mlp.0.bias", "null_text"]
    values = {"weights": torch.zeros(8)}

    def savers(replicas):
        whole = [Fragment(name, torch.Size((8,)), WHOLE, 0, 1, 0, values) for name in names]
        return [[i for i in range(replicas) if saved_part(f, i, replicas)] for f in whole]

    assert savers(4) == [[2], [2], [2], [1]]
    assert [sum(map(len, savers(n))) for n in range(1, 9)] == [4] * 8
    layout = Layout("small", 8, 4)
    headers = [[RankFile(rank, parts).header for rank, parts in enumerate(parts_of(ranks_of(layout)))] for _ in (1, 2)]
    assert headers[0] == headers[1]


# ---- written by ranks that are threads


def with_values(held):
    """The same fragments with values that follow from the place in the full parameter and the kind."""
    result = []
    for f in held:
        size = f.tensor_size if f.placement.shard_dim is not None else 1
        full = torch.arange(f.shape.numel(), dtype=torch.float32).view(f.shape) + len(f.name)
        local = f.placement.local(full, f.tensor_rank, size).reshape(-1)[f.start : f.start + f.count]
        values = {kind: local * (i + 1) for i, kind in enumerate(f.values)}
        result.append(Fragment(f.name, f.shape, f.placement, f.tensor_rank, f.tensor_size, f.start, values))
    return result


LAYOUT = Layout("small", 8, 2, 2)


def save_with(store, asynchronous):
    """Saves the small model on 8 ranks; all values change as soon as `save` has returned."""
    ranks = ranks_of(LAYOUT)

    def launch(rank):
        held, replicas = ranks[rank.rank]
        held = with_values(held)
        saver = CheckpointSaver(store, held, replicas, rank, asynchronous)
        saver.save(1, {"task": {"position": 3}})
        for f in held:
            for values in f.values.values():
                values.fill_(-1)
        saver.wait()
        return held

    with spread_from(64):
        return on_ranks(LAYOUT.world, launch)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_asynchronous_and_blocking_saves_have_the_same_bytes_and_load_on_all_ranks(tmp_path):
    stores = [store_of(tmp_path / name) for name in ("blocking", "asynchronous")]
    results = [save_with(store, flag) for store, flag in zip(stores, (False, True), strict=True)]
    first, second = (content(store.path(1)) for store in stores)
    assert len(first) == LAYOUT.world + 2 and first == second

    checkpoint = ShardedCheckpoint(stores[1].path(1))
    for held in results[1]:
        checkpoint.load_into(held)
        for f, expected in zip(held, with_values(held), strict=True):
            assert all(torch.equal(f.values[kind], expected.values[kind]) for kind in f.values), f.name


def test_a_rank_with_nothing_to_save_writes_a_valid_empty_file(tmp_path):
    store = store_of(tmp_path / "run")

    def launch(rank):
        value = torch.full((5,), 7.0)
        fragment = Fragment("a", torch.Size((5,)), WHOLE, 0, 1, 0, {"weights": value})
        CheckpointSaver(store, [fragment], lambda _: (rank.rank, 3), rank).save(1, {"task": {}})
        value.zero_()
        CheckpointLoader(store, [fragment], rank).resume("resume")
        return value.tolist()

    assert on_ranks(3, launch) == [[7.0] * 5] * 3
    files = sorted((store.path(1) / "fragments").iterdir())
    keys = [set(load_file(path)) for path in files]
    assert sorted(map(len, keys)) == [1, 1, 2] and set.union(*keys) == {"digests", "weights/a"}
    index = read_index(store.path(1), verify_checkpoint(store.path(1)))
    assert len(index.files) == 3 and list(index.parameters) == ["a"]
    alone = Fragment("a", torch.Size((5,)), WHOLE, 0, 1, 0, {"weights": torch.zeros(5)})
    CheckpointLoader(store, [alone], OneRank()).resume("resume")
    assert alone.values["weights"].tolist() == [7.0] * 5
