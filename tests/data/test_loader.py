"""What a step trains on is a pure function of (seed, step): not of ranks, threads, stops, or kills."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config import DataConfig, TokenDropConfig
from megasora.data.shard_writer import BlockWriter, write_manifest
from megasora.data.loader import PLACEHOLDER_ID, PackLoader
from megasora.data.mixture import Mixture, open_mixture
from megasora.data.pack import Record, make_batch
from megasora.data.packing_plan import Cursor, PackingPlan, assign_packs_to_ranks
from megasora.data.shard_format import Entry, Index, Manifest
from megasora.data.shard_reader import ShardSplit
from megasora.data.tar import DamagedTar
from megasora.errors import DataError, MegaSoraError

CLIPS, BUDGET, STEPS = 50, 64, 40
CONFIG = DataConfig(tokens_per_pack=BUDGET, packs_per_step=4, packing_window=20, prefetch_steps=2, reader_threads=0)
LENGTHS = [1 + (7 * i) % 40 for i in range(CLIPS)]


class Memory(Shards):
    """Shards without files: clip i has id 100 + i and holds its own number everywhere."""

    damaged: frozenset[int] = frozenset()

    def read(self, number: int, encode, out_LP=None) -> Record:
        entry = self.index[number]
        if number in self.damaged:
            raise DamagedTar("shards/train-000000-000.tar", 512 * number, "the record is damaged", entry.sample_id)
        patches = torch.empty(entry.num_tokens, 2, dtype=self.dtype) if out_LP is None else out_LP
        patches.fill_(number)
        return Record(entry.sample_id, patches, entry.grid, encode("ab"), entry.native_size, "ab")


def make_clips(lengths=tuple(LENGTHS), damaged=(), kind=Memory) -> Mixture:
    entries = Index.from_entries([Entry(100 + i, (1, 1, n), (8.0, 8.0 * n, 1.0, 0.0), {}) for i, n in enumerate(lengths)])
    manifest = Manifest("codec", "text", [1, 1, 1], 2, {}, {})
    shards = kind(Path("shards"), "train", manifest, entries, [0] * len(entries), ["train-000000-000.tar"])
    shards.damaged = frozenset(damaged)
    return Mixture([shards], [1.0], BUDGET, False)


def encode(caption: str) -> torch.Tensor:
    return torch.zeros(1, 16, dtype=torch.int64)


def make_loader(clips=None, rank=0, ranks=1, cursor=None, encode=encode, seed=7, **changes) -> PackLoader:
    config = dataclasses.replace(CONFIG, **changes)
    return PackLoader(clips or make_clips(), config, seed, encode, 30, rank, ranks, cursor)


def ids(step) -> list[list[int]]:
    """Sample ids of each pack of a step on one rank."""
    return [batch.sample_ids_G.tolist() for batch in step.packs]


def first(loader: PackLoader, count: int) -> list:
    return list(itertools.islice(loader.steps(), count))


def ledger(steps_of_ranks: list[list]) -> list[list[list[int]]]:
    """Of each step the packs of all ranks, in no order."""
    return [sorted(pack for step in steps for pack in ids(step)) for steps in zip(*steps_of_ranks, strict=True)]


# ---- exactly once


def test_which_tokens_are_kept_depends_on_the_clip_and_the_epoch_alone():
    drop, kept = TokenDropConfig(start=0.5, end=0.2, epochs=3.0), {}
    alone = first(make_loader(token_drop=drop), STEPS)
    shares = [step for rank in range(2) for step in first(make_loader(rank=rank, ranks=2, token_drop=drop), STEPS)]
    for steps in (alone, shares, first(make_loader(token_drop=drop, packing_window=20, reader_threads=4), STEPS)):
        found = Counter()
        for step in steps:
            for batch in step.packs:
                assert 0 < batch.num_tokens <= BUDGET
                places = batch.positions_L[: batch.num_tokens].split(batch.cu_segments.diff().tolist())
                for sample_id, here in zip(batch.sample_ids_G.tolist(), places, strict=True):
                    assert 1 <= len(here) <= np.ceil(0.8 * LENGTHS[sample_id - 100])
                    found[sample_id, tuple(here.tolist())] += 1
        kept.setdefault("first", found)
        assert found == kept["first"]
    long = 100 + LENGTHS.index(max(LENGTHS))
    assert len([places for sample_id, places in kept["first"] if sample_id == long]) > 1  # others in another epoch
    assert alone[0].real_tokens == sum(batch.num_tokens for batch in alone[0].packs)
    whole = sum(LENGTHS[i - 100] for pack in ids(alone[0]) for i in pack)
    assert alone[0].dropped_fraction == 1 - alone[0].real_tokens / whole and 0.3 < alone[0].dropped_fraction < 0.5


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_together_read_what_one_rank_reads(ranks):
    alone = first(make_loader(), STEPS)
    shares = [first(make_loader(rank=r, ranks=ranks), STEPS) for r in range(ranks)]
    assert ledger(shares) == ledger([alone])
    for step, *parts in zip(alone, *shares, strict=True):
        assert {len(part.packs) for part in parts} == {CONFIG.packs_per_step // ranks}
        assert {(part.real_tokens, part.next_cursor) for part in parts} == {(step.real_tokens, step.next_cursor)}
        assert step.real_tokens == sum(batch.num_tokens for batch in step.packs)


@given(
    launches=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([0, 1, 4]), st.integers(1, 5)),
        min_size=1,
        max_size=5,
    ),
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=80),
    packing_window=st.integers(1, 100),
)
@settings(max_examples=25, deadline=None)
def test_no_sequence_of_ranks_threads_and_stops_changes_the_ledger(launches, lengths, packing_window):
    clips, settings = make_clips(lengths), {"packs_per_step": 12, "packing_window": packing_window}
    whole = ledger([first(make_loader(clips, **settings), sum(count for _, _, count in launches))])
    pieces, cursor = [], None
    for ranks, threads, count in launches:
        parts = [
            first(make_loader(clips, rank, ranks, cursor, reader_threads=threads, **settings), count) for rank in range(ranks)
        ]
        assert len({part[-1].next_cursor for part in parts}) == 1
        pieces, cursor = pieces + ledger(parts), parts[0][-1].next_cursor
    assert pieces == whole


def test_a_cursor_survives_json():
    after = first(make_loader(), 17)[-1].next_cursor
    assert Cursor(**json.loads(json.dumps(dataclasses.asdict(after)))) == after != Cursor()


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_what_is_read_ahead_is_what_is_read_when_asked(threads):
    steps = iter(make_loader(reader_threads=threads))
    ahead = [ids(next(steps)) for _ in range(STEPS)]
    steps.close()
    assert ahead == [ids(step) for step in first(make_loader(), STEPS)]


@pytest.mark.parametrize("threads", [0, 4])
def test_a_pack_holds_the_clips_that_its_sample_ids_name(threads):
    for step in first(make_loader(reader_threads=threads), 5):
        for batch in step.packs:
            assert len(batch.patches_LP) == BUDGET
            for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
                segment = batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]]
                assert len(segment) and bool((segment == sample_id - 100).all())
            assert not batch.patches_LP[batch.num_tokens :].any()


def test_a_rank_gets_its_share_of_each_of_its_packs():
    marked = PackLoader(
        make_clips(), CONFIG, 7, encode, 30, share=lambda pack: ("share of", pack.sample_ids_G.tolist())
    )
    for step, plain in zip(first(marked, 5), first(make_loader(), 5), strict=True):
        assert ids(step) == ids(plain) and step.shares == [("share of", pack) for pack in ids(step)]
        assert plain.shares == plain.packs


def test_packs_that_cannot_be_shared_out_evenly_are_refused():
    with pytest.raises(MegaSoraError, match="data.packs_per_step=4 must be a multiple of the 3"):
        make_loader(ranks=3)


# ---- memory


@pytest.mark.parametrize("threads", [0, 4])
def test_a_pack_that_is_held_stays_as_it_is_while_others_are_read(threads):
    steps = list(itertools.islice(make_loader(reader_threads=threads), STEPS))
    for step, again in zip(steps, first(make_loader(), STEPS), strict=True):
        for batch, expected in zip(step.packs, again.packs, strict=True):
            assert_same(batch, expected)


@pytest.mark.parametrize("threads", [0, 4])
def test_packs_that_were_let_go_leave_their_memory_to_others(threads):
    loader, addresses = make_loader(reader_threads=threads), set()
    steps = iter(loader)
    for _ in range(STEPS):
        addresses |= {batch.patches_LP.data_ptr() for batch in next(steps).packs}
    steps.close()
    in_flight = CONFIG.prefetch_steps + 5  # steps: queued, taken, in the hands of the two threads, of the readers
    assert len(addresses) <= in_flight * CONFIG.packs_per_step < STEPS * CONFIG.packs_per_step // 5


def assert_same(batch, expected) -> None:
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
        assert (ours is theirs is None) or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), field.name


# ---- real files, real processes


def write_shards(folder: Path, clips: int, lengths=LENGTHS) -> Path:
    """Small tars of clips whose patches are their number."""
    with BlockWriter(folder, 0, 4096) as writer:
        for i in range(clips):
            n = lengths[i % len(lengths)]
            patches, native = torch.full((n, 2), float(i)), (8.0, 8.0 * n, 1.0, 0.0)
            record = Record(i, patches, (1, 1, n), torch.zeros(1, 1), native, f"clip {i}")
            writer.add("train", record, {"source": f"{i}.png", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "codec", "text", [1, 1, 1], 1, {"name": "none"})
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"token_drop": TokenDropConfig(0.3, 0.3)}, {"tokens_per_pack": 20, "split_long": True}],
    ids=["whole", "dropped", "split"],
)
@pytest.mark.parametrize("dtypes", [["bf16"], ["f16", "bf16"]], ids=["one dtype", "two dtypes"])
def test_a_pack_is_made_of_its_clips_as_they_are_read_one_by_one(settings, dtypes, tmp_path):
    """Read straight into the pack, or by way of memory of their own: the same bits."""
    folders = [str(write_noise(tmp_path / dtype, dtype)) for dtype in dtypes]
    data = {"mixture": folders, "weights": [1.0] * len(folders)}
    config = dataclasses.replace(CONFIG, **data, **settings)
    clips = open_mixture(config, "train")
    loader = PackLoader(clips, config, 7, None, 30)
    seen = set()
    for planned, step in zip(loader.plan.steps(Cursor()), itertools.islice(loader.steps(), 12), strict=False):
        for m, batch in zip(assign_packs_to_ranks(planned.costs, 1)[0], step.packs, strict=True):
            pack, records = planned.packs[m], []
            for number, kept in zip(pack.clips.tolist(), pack.tokens.tolist(), strict=True):
                places = loader.kept_positions(number, kept, pack.epoch)
                record = clips.read(number, None, places)
                records.append(dataclasses.replace(record, patches_LP=record.patches_LP.to(clips.dtype)))
                seen.add((record.sample_id, places is None, clips.tokens_I[number] < np.prod(record.grid)))
            assert_same(batch, make_batch(records, config.tokens_per_pack))
    assert clips.dtype == (torch.float32 if len(dtypes) > 1 else torch.bfloat16)
    assert any(dropped for _, all_kept, _ in seen if (dropped := not all_kept)) == ("token_drop" in settings)
    assert any(part for _, _, part in seen) == ("split_long" in settings)


def write_noise(folder: Path, dtype: str) -> Path:
    draw = torch.Generator().manual_seed(len(dtype))
    with BlockWriter(folder, 0, 4096, dtype) as writer:
        for i in range(40):
            grid = (1 + i % 4, 1 + i % 3, 1 + i % 5)
            patches, text = (
                torch.randn(int(np.prod(grid)), 3, generator=draw),
                torch.randn(1 + i % 3, 4, generator=draw),
            )
            record = Record(i, patches, grid, text, (8.0, 16.0, 5.0, 24.0), "word " * (i % 2))
            writer.add("train", record, {"source": f"{i}.mp4", "sha256": "0" * 64}, text)
        writer.commit({}, {})
    write_manifest(folder, "codec", "text", [1, 1, 1], 1, {"name": "none"})
    return folder


def run_rank(folder: str, out: str, rank: int, ranks: int, threads: int, after: dict, stop: int) -> None:
    """One process of a run: writes what each step trained on, and is killed after `stop` steps, reading ahead."""
    config = dataclasses.replace(CONFIG, shards=folder, packs_per_step=12, reader_threads=threads)
    loader = PackLoader(open_mixture(config, "train"), config, 7, encode, 30, rank, ranks, Cursor(**after))
    with open(out, "w") as file:
        for number, step in enumerate(loader, 1):
            for batch in step.packs:
                for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
                    assert (batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]] == sample_id).all()
            file.write(json.dumps({"packs": ids(step), "after": dataclasses.asdict(step.next_cursor)}) + "\n")
            file.flush()
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)


def run_processes(folder, tmp_path, launches) -> list:
    """The ledger of a run that was launched with (ranks, threads), and killed after so many steps, again and again."""
    fork = multiprocessing.get_context("fork")
    found, after = [], {}
    for number, (ranks, threads, stop) in enumerate(launches):
        outs = [str(tmp_path / f"ledger-{number}-{rank}") for rank in range(ranks)]
        jobs = [
            fork.Process(target=run_rank, args=(str(folder), out, rank, ranks, threads, after, stop))
            for rank, out in enumerate(outs)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
            assert job.exitcode == -signal.SIGKILL
        lines = [[json.loads(line) for line in Path(out).read_text().splitlines()] for out in outs]
        found += [sorted(pack for line in step for pack in line["packs"]) for step in zip(*lines, strict=True)]
        (after,) = {json.dumps(line[-1]["after"]) for line in lines}
        after = json.loads(after)
    return found


def test_processes_that_are_killed_and_launched_in_other_numbers_train_on_the_same(tmp_path):
    folder = write_shards(tmp_path / "shards", 300)
    assert len(list(folder.glob("*.tar"))) > 4
    whole = run_processes(folder, tmp_path, [(1, 0, 24)])
    launches = [(4, 0, 5), (2, 1, 7), (3, 4, 1), (1, 4, 4), (12, 1, 7)]
    assert run_processes(folder, tmp_path, launches) == whole
    seen = np.bincount([i for step in whole for pack in step for i in pack], minlength=300)
    assert seen.sum() > 2 * 300 and seen.max() - seen.min() <= 1


def test_fewer_shards_than_ranks_work(tmp_path):
    folder = write_shards(tmp_path / "shards", 3, [5])
    assert len(list(folder.glob("*.tar"))) < 12
    config = dataclasses.replace(CONFIG, shards=str(folder), packs_per_step=12)
    parts = [first(PackLoader(open_mixture(config, "train"), config, 7, encode, 30, rank, 12), 3) for rank in range(12)]
    seen = np.bincount([i for step in ledger(parts) for pack in step for i in pack])
    assert len(seen) == 3 and seen.max() - seen.min() <= 1


# ---- threads


def loader_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("pack-loader", "clip-reader"))}


def wait_until_no_threads() -> None:
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


@pytest.mark.parametrize("threads", [0, 3])
def test_an_error_of_a_reading_thread_is_raised_where_the_packs_are_used(threads):
    calls = itertools.count()

    def fail_later(caption: str) -> torch.Tensor:
        if next(calls) >= 60:
            raise MegaSoraError("tar 3 is damaged")
        return encode(caption)

    good = 0
    with pytest.raises(MegaSoraError, match="tar 3 is damaged"):
        for _ in make_loader(encode=fail_later, reader_threads=threads):
            good += 1
    assert 1 <= good < STEPS
    wait_until_no_threads()


@pytest.mark.parametrize("threads", [0, 3])
def test_leaving_the_iterator_ends_its_threads(threads):
    for leave_after in (0, 1, 5):
        steps = iter(make_loader(reader_threads=threads))
        for _ in range(leave_after):
            next(steps)
        assert bool(loader_threads()) == (leave_after > 0)  # a generator starts when it is first asked
        steps.close()
        wait_until_no_threads()


@pytest.mark.parametrize(("ranks", "threads", "packs_of_readers"), [(1, 0, 0), (1, 3, 4), (4, 3, 3)])
def test_no_more_steps_are_read_ahead_than_asked_for(ranks, threads, packs_of_readers):
    read = []
    loader = make_loader(ranks=ranks, encode=lambda caption: (read.append(1), encode(caption))[1], reader_threads=threads)
    steps = iter(loader)
    next(steps)
    # taken, queued, in the hands of the thread, and of the readers: a pack for each
    most = 1 + CONFIG.prefetch_steps + 1 + packs_of_readers * ranks // CONFIG.packs_per_step
    clips = sum(len(pack) for step in first(make_loader(ranks=ranks), most) for pack in ids(step))
    deadline = time.monotonic() + 10
    while len(read) < clips and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # in which it would read on
    assert len(read) == clips
    steps.close()


def test_threads_wait_for_data_side_by_side_and_compute_one_at_a_time():
    together, computing, most = threading.Barrier(4), [], []  # nobody has data before four wait

    class Slow(Memory):
        def read(self, number, encode, out_LP=None):
            with waiting:
                together.wait(10)
            return super().read(number, encode, out_LP)

    def compute(caption: str) -> torch.Tensor:
        computing.append(1)
        time.sleep(0.002)
        most.append(len(computing))
        computing.pop()
        return encode(caption)

    steps = make_loader(make_clips([BUDGET // 2] * 64, kind=Slow), encode=compute, reader_threads=4).steps()
    assert len(next(steps).packs) == 4
    assert len(most) >= 8 and max(most) == 1


@pytest.mark.parametrize("threads", [0, 3])
def test_a_read_that_hangs_is_given_up_and_named(threads):
    release, calls = threading.Event(), itertools.count()

    def hang_later(caption: str) -> torch.Tensor:
        if next(calls) == 40:
            release.wait(20)
        return encode(caption)

    start, good = time.monotonic(), 0
    with pytest.raises(DataError) as refusal:
        for _ in make_loader(encode=hang_later, reader_threads=threads, read_timeout_seconds=0.4):
            good += 1
    assert good >= 1 and time.monotonic() - start < 5
    for word in ("shards/train-000000-000.tar", "sample 1", "data.read_timeout_seconds=0.4"):
        assert word in str(refusal.value)
    release.set()
    wait_until_no_threads()


def test_a_step_that_takes_long_is_no_read_that_hangs():
    steps = iter(make_loader(read_timeout_seconds=0.3))
    next(steps)
    time.sleep(0.8)
    assert next(steps).packs
    steps.close()


# ---- damage

BAD = (3, 17, 40)


@pytest.mark.parametrize("threads", [0, 4])
def test_a_damaged_clip_ends_the_run_and_is_named(threads):
    with pytest.raises(DamagedTar, match="train-000000-000.tar: byte 8704: the record is damaged"):
        for _ in make_loader(make_clips(damaged=[17]), reader_threads=threads):
            pass


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tolerant_runs_leave_out_the_damaged_clips_and_nothing_else(ranks, threads):
    settings = {"ranks": ranks, "reader_threads": threads, "max_damaged_fraction": 0.2}
    whole = [first(make_loader(rank=r, ranks=ranks), STEPS) for r in range(ranks)]
    clips = make_clips(damaged=BAD)
    parts = [first(make_loader(clips, rank=r, **settings), STEPS) for r in range(ranks)]
    bad = {100 + i for i in BAD}
    without = [sorted([i for i in pack if i not in bad] or [PLACEHOLDER_ID] for pack in step) for step in ledger(whole)]
    assert ledger(parts) == without
    told = sorted(error.sample_id for part in parts for step in part for error in step.damaged)
    assert told == sorted(i for step in ledger(whole) for pack in step for i in pack if i in bad) and set(told) == bad
    assert {e.offset for part in parts for s in part for e in s.damaged} == {512 * i for i in BAD}
    resumed = [
        first(make_loader(clips, rank=r, cursor=parts[r][16].next_cursor, **settings), STEPS - 17) for r in range(ranks)
    ]
    assert ledger(resumed) == ledger(parts)[17:]
    for a, b in zip(resumed[0], parts[0][17:], strict=True):
        assert [str(e) for e in a.damaged] == [str(e) for e in b.damaged]


def test_the_tokens_of_a_clip_that_was_left_out_are_padding():
    clips = make_clips(damaged=BAD)
    for step in first(make_loader(clips, max_damaged_fraction=0.2), STEPS):
        lost = sum(LENGTHS[error.sample_id - 100] for error in step.damaged)
        empty = sum(pack == [PLACEHOLDER_ID] for pack in ids(step))
        assert sum(batch.num_tokens for batch in step.packs) == step.real_tokens - lost + empty
        assert all(len(batch.patches_LP) == BUDGET for batch in step.packs)


def test_a_pack_of_damaged_clips_alone_keeps_its_shapes():
    clips = make_clips([BUDGET, BUDGET, BUDGET, BUDGET], damaged=[2])
    (step,) = first(make_loader(clips, max_damaged_fraction=0.5), 1)
    (empty,) = [batch for batch in step.packs if batch.sample_ids_G.tolist() == [PLACEHOLDER_ID]]
    assert empty.patches_LP.shape == (BUDGET, 2) and empty.num_tokens == 1 and not empty.patches_LP.any()
    assert empty.drop_text_G.tolist() == [True] and len(empty.text_SE) == 1


def damage(folder: Path, number: int) -> int:
    """Flips a bit of a clip's patches; gives the offset."""
    shards = ShardSplit.open(folder, "train")
    path = folder / shards.names[shards.shard_of[number]]
    offset, size, _ = shards.index[number].members["patches.f16"]
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 4
    path.write_bytes(data)
    return offset


def test_exactly_the_damaged_clips_of_real_tars_are_left_out_with_their_place(tmp_path):
    folder = write_shards(tmp_path / "shards", 60)
    places = {number: damage(folder, number) for number in (5, 33)}
    missing = ShardSplit.open(folder, "train")
    gone = missing.names[missing.shard_of[59]]
    lost = {i for i in range(60) if missing.names[missing.shard_of[i]] == gone} | {5, 33}
    (folder / gone).unlink()
    config = dataclasses.replace(CONFIG, shards=str(folder), max_damaged_fraction=0.9, reader_threads=2)
    with pytest.raises(MegaSoraError, match=gone):
        open_mixture(dataclasses.replace(config, max_damaged_fraction=0.0), "train")
    loader = PackLoader(open_mixture(config, "train"), config, 7, encode, 30)
    steps = list(itertools.takewhile(lambda step: step.next_cursor.epoch < 2, loader.steps()))
    seen = {i for step in steps for pack in ids(step) for i in pack} - {PLACEHOLDER_ID}
    assert seen == set(range(60)) - lost
    for step in steps:
        for batch in step.packs:  # clips behind a damaged one moved up, with their patches
            for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
                segment = batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]]
                assert bool((segment == max(0, sample_id)).all())
            assert not batch.patches_LP[batch.num_tokens :].any()
    told = {error.sample_id: error for step in steps for error in step.damaged}
    assert set(told) == lost and all(told[i].path.startswith(str(folder)) for i in lost)
    assert {i: told[i].offset for i in places} == places


def test_a_plan_is_made_without_reading_a_clip():
    class Unreadable(Memory):
        def read(self, number, encode, out_LP=None):
            raise AssertionError("a clip was read")

    plan = make_loader(make_clips(kind=Unreadable)).plan
    assert isinstance(plan, PackingPlan) and len(next(plan.steps(Cursor())).packs) == 4


# ---- the same clips


def test_a_run_goes_on_only_with_the_clips_that_it_began_with(tmp_path):
    from megasora.config import load
    from megasora.checks import check_same_data

    saved = tmp_path / "run" / "checkpoints" / "step-00000010"
    saved.mkdir(parents=True)
    config = load(None, [f"run.dir={tmp_path / 'run'}"])
    check_same_data(config, make_clips([5]))  # nothing was saved yet
    (saved / "manifest.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"task": {"data": make_clips().identity()}}))
    (saved.parent / "latest").write_text(saved.name)
    check_same_data(config, make_clips())
    with pytest.raises(
        MegaSoraError, match=r"step-00000010 was trained on other clips \(clips: \[50\] -> \[49\]; tokens"
    ):
        check_same_data(config, make_clips(LENGTHS[:-1]))
    with pytest.raises(MegaSoraError, match=r"other clips \(sha256"):
        check_same_data(config, make_clips(LENGTHS[::-1]))
