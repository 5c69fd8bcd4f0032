"""Shares of a pack: put together they are the pack, and what is drawn for a share is what is drawn for the pack."""

import dataclasses
from types import SimpleNamespace

import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import PATCH_DIM, configure, objective_of, random_weight

from megasora.batch import owner_of_tokens
from megasora.build import build_model
from megasora.config import load
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import velocity_error
from megasora.parallel.plan import plan_pack
from megasora.parallel.share import pieces_in_slots, share_pack, tokens_per_rank

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
    """A clip whose contents follow from its number alone."""
    draw = torch.Generator().manual_seed(sample_id)
    t, h, w = grid
    patches = torch.randn(t * h * w, PATCH_DIM, generator=draw)
    words = torch.randint(0, 257, (1 + sample_id % 4, 16), generator=draw)
    return Record(
        sample_id, patches, grid, words, (8.0 * h, 8.0 * w, 4.0 * t - 3, 8.0 + sample_id), "a" * (sample_id % 3)
    )


def thinned(record):
    """Two of three of its tokens, as token dropping leaves them."""
    places = torch.arange(len(record.patches_LP))
    places = places[(places == 0) | (places % 3 != 1)]
    return dataclasses.replace(record, patches_LP=record.patches_LP[places], places_L=places)


def pack_of(grids, gap):
    records = [record(10 * number + 7, grid) for number, grid in enumerate(grids)]
    records = [thinned(r) if r.sample_id % 20 == 7 else r for r in records]
    return make_batch(records, gap + sum(len(r.patches_LP) for r in records))


def config_for(pack, ring, ulysses, tensor):
    settings = [f"parallel.context={ring * ulysses}", f"parallel.ulysses={ulysses}", f"parallel.tensor={tensor}"]
    return load(None, [*settings, f"data.tokens_per_pack={len(pack.patches_LP)}", "run.seed=5"])


def shares_of(pack, config):
    """Of all context ranks."""
    p = config.parallel
    ranks = [(r, u) for r in range(p.context // p.ulysses) for u in range(p.ulysses)]
    return [
        share_pack(pack, config, SimpleNamespace(ring=axis(p.context // p.ulysses, r), ulysses=axis(p.ulysses, u)))
        for r, u in ranks
    ]


def axis(size, rank):
    return SimpleNamespace(size=size, rank=rank)


def pieces(pack, share):
    """(segment in the pack, number of the piece, its place in the pack, its place in the share), without empty ones."""
    numbers = pack.sample_ids_G.tolist()
    for i, sample_id in enumerate(share.sample_ids_G.tolist()):
        g, first, length = numbers.index(sample_id), int(share.cu_segments[i]), int(share.cu_segments.diff()[i])
        if length:
            begin, end = pack.cu_segments[g : g + 2].tolist()
            at = begin + int(torch.searchsorted(pack.places_L[begin:end], share.places_L[first]))
            assert at + length <= pack.cu_segments[g + 1]
            yield g, i, slice(at, at + length), slice(first, first + length)


def text_of(batch, i):
    return batch.text_SE[batch.cu_text[i] : batch.cu_text[i + 1]]


def timestep_L(batch):
    return batch.timesteps_R[owner_of_tokens(batch.cu_rows, len(batch.patches_LP))]


packs_and_axes = given(GRIDS, st.integers(0, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@packs_and_axes
def test_shares_are_the_pack_exactly_once(grids, gap, ring, ulysses, tensor):
    pack = pack_of(grids, gap)
    config = config_for(pack, ring, ulysses, tensor)
    shares, seen = shares_of(pack, config), torch.zeros(len(pack.patches_LP), dtype=torch.int64)
    for share in shares:
        assert len(share.patches_LP) == len(share.coords_L3) == tokens_per_rank(config)
        assert len(share.patches_LP) % tensor == 0
        for g, i, there, here in pieces(pack, share):
            seen[there] += 1
            assert torch.equal(share.patches_LP[here], pack.patches_LP[there])
            assert torch.equal(share.coords_L3[here], pack.coords_L3[there])
            assert torch.equal(share.places_L[here], pack.places_L[there])
            assert torch.equal(text_of(share, i), text_of(pack, g))
            for name in ("grids_G3", "drop_text_G", "native_G4", "timesteps_R"):
                assert torch.equal(getattr(share, name)[i], getattr(pack, name)[g]), name
        behind = slice(share.num_tokens, None)
        assert not share.patches_LP[behind].any() and not share.coords_L3[behind].any()
        assert torch.equal(share.plan.pieces_Q4, shares[0].plan.pieces_Q4)
    assert (seen[: pack.num_tokens] == 1).all() and not seen[pack.num_tokens :].any()


@settings(deadline=None, max_examples=60)
@packs_and_axes
def test_what_a_share_draws_is_what_the_pack_draws_bit_for_bit(grids, gap, ring, ulysses, tensor):
    pack = pack_of(grids, gap)
    config = config_for(pack, ring, ulysses, tensor)
    objective = objective_of(config)
    whole, target, weight = objective.corrupt(pack, STEP)
    summed = 0
    for share in shares_of(pack, config):
        noised, share_target, share_weight = objective.corrupt(share, STEP)
        for g, i, there, here in pieces(pack, share):
            assert torch.equal(noised.patches_LP[here], whole.patches_LP[there])
            assert torch.equal(share_target[here], target[there])
            assert torch.equal(share_weight[here], weight[there])
            assert torch.equal(timestep_L(noised)[here], timestep_L(whole)[there])
            assert noised.drop_text_G[i] == whole.drop_text_G[g]
            row_L = owner_of_tokens(noised.cu_rows, len(noised.patches_LP))
            assert (noised.row_segment_R[row_L[here]] == i).all()
        assert set(noised.cu_segments.tolist()) <= set(noised.cu_rows.tolist())
        summed += int(share_weight.sum())
    assert summed == int(weight.sum())


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 4), st.integers(1, 9))
def test_consecutive_ranges_of_slots_are_all_that_a_rank_has_whatever_their_length(grids, ring, length):
    pack = pack_of(grids, 0)
    plan = plan_pack(pack.cu_segments.diff().tolist(), ring, pack.num_tokens)
    for rank in range(ring):
        ranges = [pieces_in_slots(plan, rank, low, low + length) for low in range(0, pack.num_tokens, length)]
        tokens = [(int(g), t) for triple in ranges for g, a, b in zip(*triple, strict=True) for t in range(a, b)]
        mine = plan.pieces_Q4[plan.pieces_Q4[:, 0] == rank].tolist()
        assert tokens == [(g, t) for _, g, a, b in mine for t in range(a, b)]


def test_a_rank_without_a_token_gives_every_parameter_a_gradient_of_zeros():
    pack = pack_of([(1, 1, 1), (1, 1, 2)], 0)
    config = configure(layouts.layout(8, context=8, depth=1), "block")
    shares = shares_of(pack, dataclasses.replace(config, data=dataclasses.replace(config.data, tokens_per_pack=16)))
    empty = [share for share in shares if not share.num_tokens]
    assert len(empty) == 5
    noised, target, weight = objective_of(config).corrupt(empty[0], STEP)
    assert len(noised.patches_LP) == 2 and not weight.any()
    model = random_model(config)
    loss = velocity_error(model(noised), target, weight)
    loss.error.backward()
    assert float(loss.error.detach()) == loss.tokens == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_noised_pack_is_not_shared():
    pack = pack_of([(5, 2, 2)] * 4, 0)
    config = config_for(pack, 2, 1, 1)
    noised, _, _ = objective_of(config).corrupt(pack, STEP)
    assert len(noised.cu_rows) > len(noised.cu_segments)
    with pytest.raises(ValueError, match="clean pack, whose rows are its segments"):
        shares_of(noised, config)


# ---------------------------------------------------------------------- padding


CLIPS = {11: (4, 4, 4), 12: (1, 2, 3), 13: (3, 5, 2), 14: (1, 6, 6), 15: (6, 3, 3), 16: (2, 2, 2)}  # sample id: grid


def random_model(config):
    model = build_model(config, PATCH_DIM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
    return model


def losses(model, config, packs, padding=0.0):
    """Sample id: its loss, and the gradients of the sum of all of them; `padding` stands behind the last clip."""
    found = {}
    model.zero_grad()
    for clips, budget in packs:
        pack = make_batch([record(i, CLIPS[i]) for i in clips], budget)
        noised, target, weight = objective_of(config).corrupt(pack, STEP)
        noised.patches_LP[pack.num_tokens :] = padding
        noised.coords_L3[pack.num_tokens :] = int(padding)
        error = velocity_error(model(noised), target.double(), weight)
        error.error.backward()
        for g, (a, b) in enumerate(zip(pack.cu_segments, pack.cu_segments[1:], strict=False)):
            found[clips[g]] = float(error.error_L[a:b].sum())
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


PACKINGS = {
    "a larger budget": ([([11, 12, 13, 14, 15, 16], 500)], 0.0),
    "what stands at padding": ([([11, 12, 13, 14, 15, 16], 260)], 1000.0),
    "another order": ([([16, 14, 12, 15, 13, 11], 246)], 0.0),
    "several packs": ([([14, 11], 128), ([12, 16], 14), ([15, 13], 90)], 0.0),
    "a pack for each clip": ([([clip], 70) for clip in CLIPS], 3.0),
}


@pytest.mark.parametrize("dialect", layouts.DIALECTS)
def test_the_loss_of_a_clip_and_the_gradient_do_not_depend_on_its_pack(dialect):
    config = configure(layouts.layout(1, depth=2), dialect)
    model = random_model(config).double()
    expected, gradients = losses(model, config, [(list(CLIPS), 246)])
    assert min(expected.values()) > 0.1
    for name, (packs, padding) in PACKINGS.items():
        found, its_gradients = losses(model, config, packs, padding)
        assert found == pytest.approx(expected, rel=1e-10), name
        error, worst = layouts.relative_error(its_gradients, gradients)
        assert error <= 1e-10, (name, worst)
