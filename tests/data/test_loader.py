"""The loader's order is a pure function of (seed, epoch, cursor): ranks share it out, a resume goes on in it."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from megasora.config import DataConfig
from megasora.data.loader import PackLoader
from megasora.data.pack import Record
from megasora.data.shards import Entry, Manifest, Shards
from megasora.errors import MegaSoraError

CLIPS, BUDGET, STEPS = 50, 64, 40
CONFIG = DataConfig(tokens_per_pack=BUDGET, packs_per_step=4, lookahead=8, prefetch=2)


class Memory(Shards):
    """Shards without files: clip i has id 100 + i and holds its own number everywhere."""

    def read(self, number: int, encode) -> Record:
        entry = self.entries[number]
        patches = torch.full((entry.tokens, 2), float(number))
        return Record(entry.sample_id, patches, entry.grid, encode("ab"), entry.native, "ab")

    def meta(self, number: int) -> dict:
        return {"source": f"clip-{number}.mp4"}


def make_shards(lengths: list[int], split: str = "train") -> Memory:
    entries = [Entry(100 + i, (1, 1, n), (8.0, 8.0 * n, 1.0, 0.0), {}) for i, n in enumerate(lengths)]
    manifest = Manifest("codec", "text", [1, 1, 1], 2, {}, {})
    return Memory(Path("shards"), split, manifest, entries, [0] * len(entries), ["train-000000.tar"])


def encode(caption: str) -> torch.Tensor:
    return torch.zeros(1, 16, dtype=torch.int64)


def make_loader(shards=None, config=CONFIG, seed=7, rank=0, ranks=1, cursor=None, encode=encode) -> PackLoader:
    lengths = [1 + (7 * i) % 40 for i in range(CLIPS)]
    return PackLoader(make_shards(lengths) if shards is None else shards, config, seed, encode, rank, ranks, cursor)


def ids(step) -> list[list[int]]:
    """Sample ids of each pack of a step on one rank."""
    return [batch.sample_ids_G.tolist() for batch in step.packs]


def first(loader: PackLoader, count: int) -> list:
    return list(itertools.islice(loader.steps(), count))


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_together_read_what_one_rank_reads(ranks):
    alone = first(make_loader(), STEPS)
    shares = [first(make_loader(rank=r, ranks=ranks), STEPS) for r in range(ranks)]
    for step, *parts in zip(alone, *shares, strict=True):
        woven = [ids(parts[i % ranks])[i // ranks] for i in range(CONFIG.packs_per_step)]
        assert woven == ids(step)
        for part in parts:
            assert (part.real_tokens, part.after) == (step.real_tokens, step.after)
        assert step.real_tokens == sum(batch.num_tokens for batch in step.packs)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 17, 39])  # within an epoch, at its end, over its end
def test_a_resume_at_any_step_continues_the_uninterrupted_sequence(stop):
    whole = first(make_loader(), STEPS)
    resumed = first(make_loader(cursor=whole[stop - 1].after), STEPS - stop)
    assert [ids(step) for step in resumed] == [ids(step) for step in whole[stop:]]
    assert [step.after for step in resumed] == [step.after for step in whole[stop:]]


def test_a_resume_on_another_number_of_ranks_continues_the_same_sequence():
    whole = first(make_loader(), STEPS)
    shares = [first(make_loader(rank=r, ranks=2, cursor=whole[9].after), 5) for r in range(2)]
    for step, even, odd in zip(whole[10:15], *shares, strict=True):
        assert ids(step)[0::2] == ids(even) and ids(step)[1::2] == ids(odd)


def test_an_epoch_holds_every_clip_once_and_the_next_has_another_order():
    loader = make_loader()
    per_epoch = [len(loader.plan(epoch)) for epoch in range(3)]
    packs = [pack for step in first(loader, STEPS) for pack in ids(step)]
    epochs = []
    for length in per_epoch:
        epochs.append(list(itertools.chain(*packs[:length])))
        packs = packs[length:]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100, 100 + CLIPS))
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_is_another_order_and_the_same_seed_the_same():
    orders = [[ids(step) for step in first(make_loader(seed=seed), 4)] for seed in (7, 8, 7)]
    assert orders[0] == orders[2] != orders[1]


def test_what_is_read_ahead_is_what_is_read_when_asked():
    steps = make_loader().__iter__()
    ahead = [ids(next(steps)) for _ in range(STEPS)]
    steps.close()
    assert ahead == [ids(step) for step in first(make_loader(), STEPS)]


def test_a_pack_holds_the_clips_that_its_sample_ids_name():
    for step in first(make_loader(), 5):
        for batch in step.packs:
            assert len(batch.patches_LP) == BUDGET
            for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
                segment = batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]]
                assert len(segment) and bool((segment == sample_id - 100).all())
            assert not batch.patches_LP[batch.num_tokens :].any()


def loader_threads() -> int:
    return Counter(thread.name for thread in threading.enumerate())["pack-loader"]


def test_an_error_of_the_reading_thread_is_raised_where_the_packs_are_used():
    calls = itertools.count()

    def fail_later(caption: str) -> torch.Tensor:
        if next(calls) >= 60:
            raise MegaSoraError("tar 3 is damaged")
        return encode(caption)

    good = 0
    with pytest.raises(MegaSoraError, match="tar 3 is damaged"):
        for _ in make_loader(encode=fail_later):
            good += 1
    assert 1 <= good < STEPS
    assert loader_threads() == 0


def test_leaving_the_iterator_ends_its_thread():
    for leave_after in (0, 1, 5):
        steps = iter(make_loader())
        for _ in range(leave_after):
            next(steps)
        assert loader_threads() == (leave_after > 0)  # a generator starts when it is first asked
        steps.close()
        assert loader_threads() == 0


def test_no_more_steps_are_read_ahead_than_asked_for():
    read = []
    loader = make_loader(encode=lambda caption: (read.append(1), encode(caption))[1])
    steps = iter(loader)
    next(steps)
    most = 1 + CONFIG.prefetch + 1  # taken, queued, and the one in the hands of the thread
    clips = sum(len(pack) for step in first(make_loader(), most) for pack in ids(step))
    deadline = time.monotonic() + 10
    while len(read) < clips and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # in which it would read on
    assert len(read) == clips
    steps.close()


def test_a_clip_longer_than_a_pack_is_refused_with_its_name_and_the_numbers():
    with pytest.raises(MegaSoraError) as refusal:
        make_loader(make_shards([3, 65, 64]))
    for word in ("data.tokens_per_pack=64", "65 tokens", "sample 101", "clip-1.mp4", "raise it"):
        assert word in str(refusal.value)
    assert len(first(make_loader(make_shards([3, 64])), 1)) == 1  # a clip as long as a pack is not too long


def test_an_empty_split_is_refused_by_its_name():
    with pytest.raises(MegaSoraError, match="data.shards=shards has no clip in its val split"):
        make_loader(make_shards([], "val"))


def test_packs_that_cannot_be_shared_out_evenly_are_refused():
    with pytest.raises(MegaSoraError, match="data.packs_per_step=4 must be a multiple of the 3"):
        make_loader(ranks=3)


def test_the_cursor_moves_by_the_packs_of_a_step_through_the_epochs():
    steps = first(make_loader(), STEPS)
    before = [(0, 0)] + [(step.after.epoch, step.after.pack) for step in steps]
    packs = [epoch_start(epoch) + pack for epoch, pack in before]
    assert packs == [CONFIG.packs_per_step * i for i in range(STEPS + 1)]


def epoch_start(epoch: int) -> int:
    """Packs of the epochs before this one."""
    loader = make_loader()
    return sum(len(loader.plan(e)) for e in range(epoch))


def test_a_rank_gets_its_share_of_each_of_its_packs():
    lengths = [1 + (7 * i) % 40 for i in range(CLIPS)]
    marked = PackLoader(make_shards(lengths), CONFIG, 7, encode, share=lambda pack: ("share of", ids_of(pack)))
    for step, plain in zip(first(marked, 5), first(make_loader(), 5), strict=True):
        assert ids(step) == ids(plain) and step.shares == [("share of", pack) for pack in ids(step)]
        assert plain.shares == plain.packs


def ids_of(pack) -> list[int]:
    return pack.sample_ids_G.tolist()
