"""Shares of a pack: together they are the pack, and the objective draws the same noise for a share as for the pack."""

import dataclasses
from types import SimpleNamespace

import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import PATCH_DIM, configure, objective_of, random_weight

from megasora.batch import segment_ids
from megasora.build import build_model
from megasora.config import load
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import velocity_error
from megasora.parallel.context_split import split_pack
from megasora.parallel.share import pieces_in_slots, share_length, share_pack, slots_of_tokens

GRIDS = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=8,
)
STEP = 3


def record(sample_id, grid):
    """A clip whose contents depend on its sample id only."""
    draw = torch.Generator().manual_seed(sample_id)
    t, h, w = grid
    patches = torch.randn(t * h * w, PATCH_DIM, generator=draw)
    words = torch.randint(0, 257, (1 + sample_id % 4, 16), generator=draw)
    return Record(
        sample_id, patches, grid, words, (8.0 * h, 8.0 * w, 4.0 * t - 3, 8.0 + sample_id), "a" * (sample_id % 3)
    )


def drop_tokens(record):
    """Two of three of its tokens, as token dropping leaves them."""
    positions = torch.arange(len(record.patches_LP))
    positions = positions[(positions == 0) | (positions % 3 != 1)]
    return dataclasses.replace(record, patches_LP=record.patches_LP[positions], positions_L=positions)


def pack_of(grids, gap):
    records = [record(10 * i + 7, grid) for i, grid in enumerate(grids)]
    records = [drop_tokens(r) if r.sample_id % 20 == 7 else r for r in records]
    return make_batch(records, gap + sum(len(r.patches_LP) for r in records))


def config_for(pack, ring, ulysses, tensor):
    settings = [f"parallel.context={ring * ulysses}", f"parallel.ulysses={ulysses}", f"parallel.tensor={tensor}"]
    return load(None, [*settings, f"data.tokens_per_pack={len(pack.patches_LP)}", "run.seed=5"])


def shares_of(pack, config):
    """The shares of all context ranks."""
    p = config.parallel
    ranks = [(r, u) for r in range(p.context // p.ulysses) for u in range(p.ulysses)]
    return [
        share_pack(pack, config, SimpleNamespace(ring=axis(p.context // p.ulysses, r), ulysses=axis(p.ulysses, u)))
        for r, u in ranks
    ]


def axis(size, rank):
    return SimpleNamespace(size=size, rank=rank)


def pieces(pack, share):
    """(segment of the pack, piece of the share, its tokens in the pack, its tokens in the share) of nonempty pieces."""
    sample_ids = pack.sample_ids_G.tolist()
    for i, sample_id in enumerate(share.sample_ids_G.tolist()):
        g, first, length = sample_ids.index(sample_id), int(share.cu_segments[i]), int(share.cu_segments.diff()[i])
        if length:
            begin, end = pack.cu_segments[g : g + 2].tolist()
            at = begin + int(torch.searchsorted(pack.positions_L[begin:end], share.positions_L[first]))
            assert at + length <= pack.cu_segments[g + 1]
            yield g, i, slice(at, at + length), slice(first, first + length)


def text_of(batch, i):
    return batch.text_SE[batch.cu_text[i] : batch.cu_text[i + 1]]


def timestep_L(batch):
    return batch.timesteps_R[segment_ids(batch.cu_rows, len(batch.patches_LP))]


packs_and_axes = given(GRIDS, st.integers(0, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@packs_and_axes
def test_each_token_of_the_pack_is_in_exactly_one_share(grids, gap, ring, ulysses, tensor):
    pack = pack_of(grids, gap)
    config = config_for(pack, ring, ulysses, tensor)
    shares, seen = shares_of(pack, config), torch.zeros(len(pack.patches_LP), dtype=torch.int64)
    for share in shares:
        assert len(share.patches_LP) == len(share.coords_L3) == share_length(config)
        assert len(share.patches_LP) % tensor == 0
        for g, i, in_pack, in_share in pieces(pack, share):
            seen[in_pack] += 1
            assert torch.equal(share.patches_LP[in_share], pack.patches_LP[in_pack])
            assert torch.equal(share.coords_L3[in_share], pack.coords_L3[in_pack])
            assert torch.equal(share.positions_L[in_share], pack.positions_L[in_pack])
            assert torch.equal(text_of(share, i), text_of(pack, g))
            for name in ("grids_G3", "drop_text_G", "native_size_G4", "timesteps_R"):
                assert torch.equal(getattr(share, name)[i], getattr(pack, name)[g]), name
        padding = slice(share.num_tokens, None)
        assert not share.patches_LP[padding].any() and not share.coords_L3[padding].any()
        assert torch.equal(share.context_split.pieces_Q4, shares[0].context_split.pieces_Q4)
    assert (seen[: pack.num_tokens] == 1).all() and not seen[pack.num_tokens :].any()


@settings(deadline=None, max_examples=60)
@packs_and_axes
def test_a_share_is_noised_bit_for_bit_like_the_pack(grids, gap, ring, ulysses, tensor):
    pack = pack_of(grids, gap)
    config = config_for(pack, ring, ulysses, tensor)
    objective = objective_of(config)
    noised_pack, target, weight = objective.add_noise(pack, STEP)
    summed = 0
    for share in shares_of(pack, config):
        noised, share_target, share_weight = objective.add_noise(share, STEP)
        for g, i, in_pack, in_share in pieces(pack, share):
            assert torch.equal(noised.patches_LP[in_share], noised_pack.patches_LP[in_pack])
            assert torch.equal(share_target[in_share], target[in_pack])
            assert torch.equal(share_weight[in_share], weight[in_pack])
            assert torch.equal(timestep_L(noised)[in_share], timestep_L(noised_pack)[in_pack])
            assert noised.drop_text_G[i] == noised_pack.drop_text_G[g]
            row_L = segment_ids(noised.cu_rows, len(noised.patches_LP))
            assert (noised.row_segment_R[row_L[in_share]] == i).all()
        assert set(noised.cu_segments.tolist()) <= set(noised.cu_rows.tolist())
        summed += int(share_weight.sum())
    assert summed == int(weight.sum())


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 4), st.integers(1, 9))
def test_consecutive_slot_ranges_of_any_length_cover_a_ranks_tokens(grids, ring, length):
    pack = pack_of(grids, 0)
    split = split_pack(pack.cu_segments.diff().tolist(), ring, pack.num_tokens)
    for rank in range(ring):
        ranges = [pieces_in_slots(split, rank, low, low + length) for low in range(0, pack.num_tokens, length)]
        tokens = [(int(g), t) for triple in ranges for g, a, b in zip(*triple, strict=True) for t in range(a, b)]
        pieces_Q4 = split.pieces_Q4[split.pieces_Q4[:, 0] == rank].tolist()
        assert tokens == [(g, t) for _, g, a, b in pieces_Q4 for t in range(a, b)]


def test_a_rank_without_tokens_gives_every_parameter_a_zero_gradient():
    pack = pack_of([(1, 1, 1), (1, 1, 2)], 0)
    config = configure(layouts.layout(8, context=8, depth=1), "block")
    shares = shares_of(pack, dataclasses.replace(config, data=dataclasses.replace(config.data, tokens_per_pack=16)))
    empty = [share for share in shares if not share.num_tokens]
    assert len(empty) == 5
    noised, target, weight = objective_of(config).add_noise(empty[0], STEP)
    assert len(noised.patches_LP) == 2 and not weight.any()
    model = random_model(config)
    loss = velocity_error(model(noised), target, weight)
    loss.squared_error_sum.backward()
    assert float(loss.squared_error_sum.detach()) == loss.tokens == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@settings(deadline=None, max_examples=25)
@packs_and_axes
def test_a_share_of_a_noised_pack_is_the_noised_share(grids, gap, ring, ulysses, tensor):
    pack = pack_of(grids, gap)
    config = config_for(pack, ring, ulysses, tensor)
    objective = objective_of(config)
    noised_pack = objective.add_noise(pack, STEP)[0]
    for share, clean in zip(shares_of(noised_pack, config), shares_of(pack, config), strict=True):
        expected = objective.add_noise(clean, STEP)[0]
        if share.num_tokens == 0:  # its one row is that of an empty piece of the first segment
            assert share.cu_rows.tolist() == share.cu_segments.tolist() == [0, 0]
            assert share.row_segment_R.tolist() == [0] and len(share.timesteps_R) == 1
            continue
        assert torch.equal(share.patches_LP[: share.num_tokens], expected.patches_LP[: share.num_tokens])
        for name in ("cu_rows", "timesteps_R", "row_segment_R", "drop_text_G", "cu_segments"):
            assert torch.equal(getattr(share, name), getattr(expected, name)), name


@settings(deadline=None, max_examples=25)
@packs_and_axes
def test_the_shares_of_all_ranks_gathered_are_the_pack(grids, gap, ring, ulysses, tensor):
    pack = pack_of(grids, gap)
    shares = shares_of(pack, config_for(pack, ring, ulysses, tensor))
    slots, tokens = slots_of_tokens(shares[0].context_split, pack.cu_segments)
    gathered = torch.zeros_like(pack.patches_LP)
    gathered[tokens] = torch.cat([share.patches_LP for share in shares])[slots]
    assert torch.equal(gathered, pack.patches_LP)
    assert sorted(tokens.tolist()) == list(range(pack.num_tokens)) and len(slots.unique()) == pack.num_tokens


# ---------------------------------------------------------------------- padding


CLIPS = {11: (4, 4, 4), 12: (1, 2, 3), 13: (3, 5, 2), 14: (1, 6, 6), 15: (6, 3, 3), 16: (2, 2, 2)}  # sample id: grid


def random_model(config):
    model = build_model(config, PATCH_DIM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
    return model


def losses_and_gradients(model, config, packs, padding=0.0):
    """({sample id: its loss}, gradients of the sum); `padding` is the value of the tokens after the last clip."""
    losses = {}
    model.zero_grad()
    for clips, budget in packs:
        pack = make_batch([record(i, CLIPS[i]) for i in clips], budget)
        noised, target, weight = objective_of(config).add_noise(pack, STEP)
        noised.patches_LP[pack.num_tokens :] = padding
        noised.coords_L3[pack.num_tokens :] = int(padding)
        error = velocity_error(model(noised), target.double(), weight)
        error.squared_error_sum.backward()
        for g, (a, b) in enumerate(zip(pack.cu_segments, pack.cu_segments[1:], strict=False)):
            losses[clips[g]] = float(error.squared_error_L[a:b].sum())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


PACKINGS = {
    "a larger budget": ([([11, 12, 13, 14, 15, 16], 500)], 0.0),
    "other values at padding": ([([11, 12, 13, 14, 15, 16], 260)], 1000.0),
    "another order": ([([16, 14, 12, 15, 13, 11], 246)], 0.0),
    "several packs": ([([14, 11], 128), ([12, 16], 14), ([15, 13], 90)], 0.0),
    "a pack for each clip": ([([clip], 70) for clip in CLIPS], 3.0),
}


@pytest.mark.parametrize("modulation", layouts.MODULATIONS)
def test_a_clips_loss_and_the_gradient_do_not_depend_on_its_pack(modulation):
    config = configure(layouts.layout(1, depth=2), modulation)
    model = random_model(config).double()
    expected, expected_gradients = losses_and_gradients(model, config, [(list(CLIPS), 246)])
    assert min(expected.values()) > 0.1
    for name, (packs, padding) in PACKINGS.items():
        losses, gradients = losses_and_gradients(model, config, packs, padding)
        assert losses == pytest.approx(expected, rel=1e-10), name
        error, worst = layouts.relative_error(gradients, expected_gradients)
        assert error <= 1e-10, (name, worst)
