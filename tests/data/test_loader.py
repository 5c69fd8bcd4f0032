"""What a step trains on is a pure function of (seed, step): ranks, threads, stops and kills do not change it."""

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
from megasora.data.loader import PLACEHOLDER_ID, PackLoader
from megasora.data.manifest_writer import write_manifest
from megasora.data.mixture import Mixture, open_mixture
from megasora.data.pack import Record, make_batch
from megasora.data.packing_plan import Cursor, PackingPlan, assign_packs_to_ranks
from megasora.data.shard_format import Entry, Index, Manifest
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter
from megasora.data.tar import DamagedTar
from megasora.errors import DataError, MegaSoraError

NUM_CLIPS, TOKENS_PER_PACK, STEPS = 50, 64, 40
CONFIG = DataConfig(
    tokens_per_pack=TOKENS_PER_PACK, packs_per_step=4, packing_window=20, prefetch_steps=2, reader_threads=0
)
LENGTHS = [1 + (7 * i) % 40 for i in range(NUM_CLIPS)]


class MemorySplit(ShardSplit):
    """A split without files: clip i has sample id 100 + i, and patches that are all i."""

    damaged: frozenset[int] = frozenset()

    def read(self, i: int, encode_caption, out_LP=None) -> Record:
        entry = self.index[i]
        if i in self.damaged:
            raise DamagedTar("shards/train-000000-000.tar", 512 * i, "the record is damaged", entry.sample_id)
        patches = torch.empty(entry.num_tokens, 2, dtype=self.dtype) if out_LP is None else out_LP
        patches.fill_(i)
        return Record(entry.sample_id, patches, entry.grid, encode_caption("ab"), entry.native_size, "ab")


def make_mixture(lengths=tuple(LENGTHS), damaged=(), kind=MemorySplit) -> Mixture:
    index = Index.from_entries([Entry(100 + i, (1, 1, n), (8.0, 8.0 * n, 1.0, 0.0), {}) for i, n in enumerate(lengths)])
    manifest = Manifest("codec", "text", [1, 1, 1], 2, {}, {})
    split = kind(Path("shards"), "train", manifest, index, [0] * len(index), ["train-000000-000.tar"])
    split.damaged = frozenset(damaged)
    return Mixture([split], [1.0], TOKENS_PER_PACK, False)


def encode(caption: str) -> torch.Tensor:
    return torch.zeros(1, 16, dtype=torch.int64)


def make_loader(mixture=None, data_rank=0, data_size=1, cursor=None, encode=encode, seed=7, **settings) -> PackLoader:
    config = dataclasses.replace(CONFIG, **settings)
    return PackLoader(mixture or make_mixture(), config, seed, encode, 30, data_rank, data_size, cursor)


def ids_of(step) -> list[list[int]]:
    """Sample ids of each pack of a step on one rank."""
    return [batch.sample_ids_G.tolist() for batch in step.packs]


def first_steps(loader: PackLoader, count: int) -> list:
    return list(itertools.islice(loader.steps(), count))


def ledger(steps_of_ranks: list[list]) -> list[list[list[int]]]:
    """For each step, the sample ids of the packs of all ranks, sorted."""
    return [sorted(pack for step in steps for pack in ids_of(step)) for steps in zip(*steps_of_ranks, strict=True)]


# ---- exactly once


def test_which_tokens_are_kept_depends_on_the_clip_and_the_epoch_alone():
    drop, counts_of_first = TokenDropConfig(start=0.5, end=0.2, epochs=3.0), None
    one_rank = first_steps(make_loader(token_drop=drop), STEPS)
    loaders = [make_loader(data_rank=rank, data_size=2, token_drop=drop) for rank in range(2)]
    two_ranks = [step for loader in loaders for step in first_steps(loader, STEPS)]
    threads = first_steps(make_loader(token_drop=drop, reader_threads=4), STEPS)
    for steps in (one_rank, two_ranks, threads):
        counts = Counter()
        for batch in (batch for step in steps for batch in step.packs):
            assert 0 < batch.num_tokens <= TOKENS_PER_PACK
            positions = batch.positions_L[: batch.num_tokens].split(batch.cu_segments.diff().tolist())
            for sample_id, kept in zip(batch.sample_ids_G.tolist(), positions, strict=True):
                assert 1 <= len(kept) <= np.ceil(0.8 * LENGTHS[sample_id - 100])
                counts[sample_id, tuple(kept.tolist())] += 1
        counts_of_first = counts_of_first or counts
        assert counts == counts_of_first
    longest = 100 + LENGTHS.index(max(LENGTHS))
    assert len([kept for sample_id, kept in counts_of_first if sample_id == longest]) > 1  # differs between epochs
    step = one_rank[0]
    assert step.real_tokens == sum(batch.num_tokens for batch in step.packs)
    all_tokens = sum(LENGTHS[i - 100] for pack in ids_of(step) for i in pack)
    assert step.dropped_fraction == 1 - step.real_tokens / all_tokens and 0.3 < step.dropped_fraction < 0.5


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_together_read_what_one_rank_reads(ranks):
    one_rank = first_steps(make_loader(), STEPS)
    by_rank = [first_steps(make_loader(data_rank=r, data_size=ranks), STEPS) for r in range(ranks)]
    assert ledger(by_rank) == ledger([one_rank])
    for step, *of_ranks in zip(one_rank, *by_rank, strict=True):
        assert {len(local.packs) for local in of_ranks} == {CONFIG.packs_per_step // ranks}
        assert {local.real_tokens for local in of_ranks} == {step.real_tokens}
        assert {local.next_cursor for local in of_ranks} == {step.next_cursor}
        assert step.real_tokens == sum(batch.num_tokens for batch in step.packs)


@given(
    launches=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([0, 1, 4]), st.integers(1, 5)),
        min_size=1,
        max_size=5,
    ),
    lengths=st.lists(st.integers(1, TOKENS_PER_PACK), min_size=1, max_size=80),
    packing_window=st.integers(1, 100),
)
@settings(max_examples=25, deadline=None)
def test_no_sequence_of_ranks_threads_and_stops_changes_the_ledger(launches, lengths, packing_window):
    mixture, settings = make_mixture(lengths), {"packs_per_step": 12, "packing_window": packing_window}
    num_steps = sum(count for _, _, count in launches)
    expected = ledger([first_steps(make_loader(mixture, **settings), num_steps)])
    found, cursor = [], None
    for ranks, threads, count in launches:
        by_rank = [
            first_steps(make_loader(mixture, rank, ranks, cursor, reader_threads=threads, **settings), count)
            for rank in range(ranks)
        ]
        assert len({steps[-1].next_cursor for steps in by_rank}) == 1
        found, cursor = found + ledger(by_rank), by_rank[0][-1].next_cursor
    assert found == expected


def test_a_cursor_survives_json():
    cursor = first_steps(make_loader(), 17)[-1].next_cursor
    assert Cursor(**json.loads(json.dumps(dataclasses.asdict(cursor)))) == cursor != Cursor()


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_reading_ahead_gives_the_same_steps_as_reading_on_request(threads):
    steps = iter(make_loader(reader_threads=threads))
    ahead = [ids_of(next(steps)) for _ in range(STEPS)]
    steps.close()
    assert ahead == [ids_of(step) for step in first_steps(make_loader(), STEPS)]


@pytest.mark.parametrize("threads", [0, 4])
def test_a_pack_holds_the_clips_that_its_sample_ids_name(threads):
    for step in first_steps(make_loader(reader_threads=threads), 5):
        for batch in step.packs:
            assert len(batch.patches_LP) == TOKENS_PER_PACK
            for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
                segment = batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]]
                assert len(segment) and bool((segment == sample_id - 100).all())
            assert not batch.patches_LP[batch.num_tokens :].any()


def test_a_step_has_a_share_of_each_of_its_packs():
    with_shares = PackLoader(
        make_mixture(), CONFIG, 7, encode, 30, first_step=3, share=lambda pack, step: (step, pack.sample_ids_G.tolist())
    )
    steps = zip(first_steps(with_shares, 5), first_steps(make_loader(), 5), strict=True)
    for number, (step, plain) in enumerate(steps, 3):
        assert ids_of(step) == ids_of(plain) and step.step == number
        assert step.shares == [(number, pack) for pack in ids_of(step)]
        assert plain.shares == plain.packs


def test_a_number_of_ranks_that_does_not_divide_the_packs_is_an_error():
    with pytest.raises(MegaSoraError, match="data.packs_per_step=4 must be a multiple of the 3"):
        make_loader(data_size=3)


# ---- memory


@pytest.mark.parametrize("threads", [0, 4])
def test_a_referenced_pack_is_not_overwritten_by_later_reads(threads):
    steps = list(itertools.islice(make_loader(reader_threads=threads), STEPS))
    for step, expected_step in zip(steps, first_steps(make_loader(), STEPS), strict=True):
        for batch, expected in zip(step.packs, expected_step.packs, strict=True):
            assert_same(batch, expected)


@pytest.mark.parametrize("threads", [0, 4])
def test_the_memory_of_freed_packs_is_reused(threads):
    loader, addresses = make_loader(reader_threads=threads), set()
    steps = iter(loader)
    for _ in range(STEPS):
        addresses |= {batch.patches_LP.data_ptr() for batch in next(steps).packs}
    steps.close()
    in_flight = CONFIG.prefetch_steps + 5  # steps: queued, taken, held by the two threads and by the readers
    assert len(addresses) <= in_flight * CONFIG.packs_per_step < STEPS * CONFIG.packs_per_step // 5


def assert_same(batch, expected) -> None:
    for field in dataclasses.fields(expected):
        a, b = getattr(batch, field.name), getattr(expected, field.name)
        assert (a is b is None) or (a.dtype == b.dtype and torch.equal(a, b)), field.name


# ---- real files, real processes


def write_shards(folder: Path, clips: int, lengths=LENGTHS) -> Path:
    """Small tars of clips whose patches are all their sample id."""
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
def test_a_pack_has_the_bits_of_its_clips_read_one_by_one(settings, dtypes, tmp_path):
    """Whether clips are read directly into the pack, or copied there."""
    folders = [str(write_noise(tmp_path / dtype, dtype)) for dtype in dtypes]
    data = {"mixture": folders, "mixture_weights": [1.0] * len(folders)}
    config = dataclasses.replace(CONFIG, **data, **settings)
    mixture = open_mixture(config, "train")
    loader = PackLoader(mixture, config, 7, None, 30)
    seen = set()
    for planned, step in zip(loader.plan.steps(Cursor()), itertools.islice(loader.steps(), 12), strict=False):
        for b, batch in zip(assign_packs_to_ranks(planned.costs, 1)[0], step.packs, strict=True):
            pack, records = planned.packs[b], []
            for clip, num_kept in zip(pack.clips.tolist(), pack.tokens.tolist(), strict=True):
                positions = loader.kept_positions(clip, num_kept, pack.epoch)
                record = mixture.read(clip, None, positions)
                records.append(dataclasses.replace(record, patches_LP=record.patches_LP.to(mixture.dtype)))
                is_part = bool(mixture.tokens_I[clip] < np.prod(record.grid))
                seen.add((record.sample_id, positions is not None, is_part))
            assert_same(batch, make_batch(records, config.tokens_per_pack))
    assert mixture.dtype == (torch.float32 if len(dtypes) > 1 else torch.bfloat16)
    assert any(dropped for _, dropped, _ in seen) == ("token_drop" in settings)
    assert any(is_part for _, _, is_part in seen) == ("split_long" in settings)


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


def run_rank(folder: str, out: str, rank: int, ranks: int, threads: int, cursor: dict, stop: int) -> None:
    """One process of a run: logs what each step trained on, kills itself after `stop` steps while it reads ahead."""
    config = dataclasses.replace(CONFIG, shards=folder, packs_per_step=12, reader_threads=threads)
    loader = PackLoader(open_mixture(config, "train"), config, 7, encode, 30, rank, ranks, Cursor(**cursor))
    with open(out, "w") as file:
        for number, step in enumerate(loader, 1):
            for batch in step.packs:
                for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
                    assert (batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]] == sample_id).all()
            file.write(json.dumps({"packs": ids_of(step), "next_cursor": dataclasses.asdict(step.next_cursor)}) + "\n")
            file.flush()
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)


def run_processes(folder, tmp_path, launches) -> list:
    """The ledger of a run that was launched repeatedly, with (ranks, threads, steps until it is killed)."""
    fork = multiprocessing.get_context("fork")
    found, cursor = [], {}
    for number, (ranks, threads, stop) in enumerate(launches):
        outs = [str(tmp_path / f"ledger-{number}-{rank}") for rank in range(ranks)]
        jobs = [
            fork.Process(target=run_rank, args=(str(folder), out, rank, ranks, threads, cursor, stop))
            for rank, out in enumerate(outs)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
            assert job.exitcode == -signal.SIGKILL
        lines = [[json.loads(line) for line in Path(out).read_text().splitlines()] for out in outs]
        found += [sorted(pack for line in step for pack in line["packs"]) for step in zip(*lines, strict=True)]
        (cursor,) = {json.dumps(of_rank[-1]["next_cursor"]) for of_rank in lines}
        cursor = json.loads(cursor)
    return found


def test_killed_runs_resumed_with_other_numbers_of_processes_train_on_the_same_clips(tmp_path):
    folder = write_shards(tmp_path / "shards", 300)
    assert len(list(folder.glob("*.tar"))) > 4
    uninterrupted = run_processes(folder, tmp_path, [(1, 0, 24)])
    launches = [(4, 0, 5), (2, 1, 7), (3, 4, 1), (1, 4, 4), (12, 1, 7)]
    assert run_processes(folder, tmp_path, launches) == uninterrupted
    seen = np.bincount([i for step in uninterrupted for pack in step for i in pack], minlength=300)
    assert seen.sum() > 2 * 300 and seen.max() - seen.min() <= 1


def test_fewer_shards_than_ranks_work(tmp_path):
    folder = write_shards(tmp_path / "shards", 3, [5])
    assert len(list(folder.glob("*.tar"))) < 12
    config = dataclasses.replace(CONFIG, shards=str(folder), packs_per_step=12)
    loaders = [PackLoader(open_mixture(config, "train"), config, 7, encode, 30, rank, 12) for rank in range(12)]
    by_rank = [first_steps(loader, 3) for loader in loaders]
    seen = np.bincount([i for step in ledger(by_rank) for pack in step for i in pack])
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
def test_an_error_of_a_reader_thread_is_raised_in_the_training_loop(threads):
    calls = itertools.count()

    def fail_later(caption: str) -> torch.Tensor:
        if next(calls) >= 60:
            raise MegaSoraError("tar 3 is damaged")
        return encode(caption)

    num_steps = 0
    with pytest.raises(MegaSoraError, match="tar 3 is damaged"):
        for _ in make_loader(encode=fail_later, reader_threads=threads):
            num_steps += 1
    assert 1 <= num_steps < STEPS
    wait_until_no_threads()


@pytest.mark.parametrize("threads", [0, 3])
def test_leaving_the_iterator_ends_its_threads(threads):
    for leave_after in (0, 1, 5):
        steps = iter(make_loader(reader_threads=threads))
        for _ in range(leave_after):
            next(steps)
        assert bool(loader_threads()) == (leave_after > 0)  # a generator starts at its first next()
        steps.close()
        wait_until_no_threads()


@pytest.mark.parametrize(("ranks", "threads", "packs_of_readers"), [(1, 0, 0), (1, 3, 4), (4, 3, 3)])
def test_no_more_steps_are_read_ahead_than_configured(ranks, threads, packs_of_readers):
    read = []
    count_and_encode = lambda caption: (read.append(1), encode(caption))[1]  # noqa: E731
    loader = make_loader(data_size=ranks, encode=count_and_encode, reader_threads=threads)
    steps = iter(loader)
    next(steps)
    # steps: taken, queued, held by the prefetch thread, and one pack for each reader
    most = 1 + CONFIG.prefetch_steps + 1 + packs_of_readers * ranks // CONFIG.packs_per_step
    clips = sum(len(pack) for step in first_steps(make_loader(data_size=ranks), most) for pack in ids_of(step))
    deadline = time.monotonic() + 10
    while len(read) < clips and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # time in which it could read more
    assert len(read) == clips
    steps.close()


def test_reader_threads_overlap_their_io_and_compute_one_at_a_time():
    all_waiting, computing, counts = threading.Barrier(4), [], []  # no thread gets data before four wait

    class SlowSplit(MemorySplit):
        def read(self, i, encode_caption, out_LP=None):
            with mixture.reader_lock.released():
                all_waiting.wait(10)
            return super().read(i, encode_caption, out_LP)

    def compute(caption: str) -> torch.Tensor:
        computing.append(1)
        time.sleep(0.002)
        counts.append(len(computing))
        computing.pop()
        return encode(caption)

    mixture = make_mixture([TOKENS_PER_PACK // 2] * 64, kind=SlowSplit)
    steps = make_loader(mixture, encode=compute, reader_threads=4).steps()
    assert len(next(steps).packs) == 4
    assert len(counts) >= 8 and max(counts) == 1


@pytest.mark.parametrize("threads", [0, 3])
def test_a_read_that_hangs_ends_in_an_error_that_names_the_clip(threads):
    release, calls = threading.Event(), itertools.count()

    def hang_later(caption: str) -> torch.Tensor:
        if next(calls) == 40:
            release.wait(20)
        return encode(caption)

    start, num_steps = time.monotonic(), 0
    with pytest.raises(DataError) as error_info:
        for _ in make_loader(encode=hang_later, reader_threads=threads, read_timeout_seconds=0.4):
            num_steps += 1
    assert num_steps >= 1 and time.monotonic() - start < 5
    for word in ("shards/train-000000-000.tar", "sample 1", "data.read_timeout_seconds=0.4"):
        assert word in str(error_info.value)
    release.set()
    wait_until_no_threads()


def test_a_long_training_step_is_not_taken_for_a_read_that_hangs():
    steps = iter(make_loader(read_timeout_seconds=0.3))
    next(steps)
    time.sleep(0.8)
    assert next(steps).packs
    steps.close()


# ---- damage

DAMAGED = (3, 17, 40)


@pytest.mark.parametrize("threads", [0, 4])
def test_a_damaged_clip_ends_the_run_with_an_error_that_names_it(threads):
    with pytest.raises(DamagedTar, match="train-000000-000.tar: byte 8704: the record is damaged"):
        for _ in make_loader(make_mixture(damaged=[17]), reader_threads=threads):
            pass


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tolerant_runs_leave_out_the_damaged_clips_and_nothing_else(ranks, threads):
    settings = {"data_size": ranks, "reader_threads": threads, "max_damaged_fraction": 0.2}
    undamaged = ledger([first_steps(make_loader(data_rank=r, data_size=ranks), STEPS) for r in range(ranks)])
    mixture, damaged_ids = make_mixture(damaged=DAMAGED), {100 + i for i in DAMAGED}
    by_rank = [first_steps(make_loader(mixture, data_rank=r, **settings), STEPS) for r in range(ranks)]
    expected = [
        sorted([i for i in pack if i not in damaged_ids] or [PLACEHOLDER_ID] for pack in step) for step in undamaged
    ]
    assert ledger(by_rank) == expected
    errors = [error for steps in by_rank for step in steps for error in step.damaged]
    in_packs = sorted(i for step in undamaged for pack in step for i in pack if i in damaged_ids)
    assert sorted(error.sample_id for error in errors) == in_packs and set(in_packs) == damaged_ids
    assert {error.offset for error in errors} == {512 * i for i in DAMAGED}
    resumed = [
        first_steps(make_loader(mixture, data_rank=r, cursor=by_rank[r][16].next_cursor, **settings), STEPS - 17)
        for r in range(ranks)
    ]
    assert ledger(resumed) == ledger(by_rank)[17:]
    for a, b in zip(resumed[0], by_rank[0][17:], strict=True):
        assert [str(e) for e in a.damaged] == [str(e) for e in b.damaged]


def test_the_tokens_of_a_skipped_clip_are_padding():
    for step in first_steps(make_loader(make_mixture(damaged=DAMAGED), max_damaged_fraction=0.2), STEPS):
        skipped = sum(LENGTHS[error.sample_id - 100] for error in step.damaged)
        empty = sum(pack == [PLACEHOLDER_ID] for pack in ids_of(step))
        assert sum(batch.num_tokens for batch in step.packs) == step.real_tokens - skipped + empty
        assert all(len(batch.patches_LP) == TOKENS_PER_PACK for batch in step.packs)


def test_a_pack_whose_clips_are_all_damaged_keeps_its_shapes():
    mixture = make_mixture([TOKENS_PER_PACK, TOKENS_PER_PACK, TOKENS_PER_PACK, TOKENS_PER_PACK], damaged=[2])
    (step,) = first_steps(make_loader(mixture, max_damaged_fraction=0.5), 1)
    (empty,) = [batch for batch in step.packs if batch.sample_ids_G.tolist() == [PLACEHOLDER_ID]]
    assert empty.patches_LP.shape == (TOKENS_PER_PACK, 2) and empty.num_tokens == 1 and not empty.patches_LP.any()
    assert empty.drop_text_G.tolist() == [True] and len(empty.text_SE) == 1


def damage(folder: Path, number: int) -> int:
    """Flips a bit of the patches of clip `number`. Returns their offset in the tar."""
    shards = ShardSplit.open(folder, "train")
    path = folder / shards.names[shards.shard_of[number]]
    offset, size, _ = shards.index[number].members["patches.f16"]
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 4
    path.write_bytes(data)
    return offset


def test_exactly_the_damaged_clips_of_real_tars_are_left_out_with_their_offsets(tmp_path):
    folder = write_shards(tmp_path / "shards", 60)
    offsets = {clip: damage(folder, clip) for clip in (5, 33)}
    split = ShardSplit.open(folder, "train")
    removed = split.names[split.shard_of[59]]
    damaged = {i for i in range(60) if split.names[split.shard_of[i]] == removed} | {5, 33}
    (folder / removed).unlink()
    config = dataclasses.replace(CONFIG, shards=str(folder), max_damaged_fraction=0.9, reader_threads=2)
    with pytest.raises(MegaSoraError, match=removed):
        open_mixture(dataclasses.replace(config, max_damaged_fraction=0.0), "train")
    loader = PackLoader(open_mixture(config, "train"), config, 7, encode, 30)
    steps = list(itertools.takewhile(lambda step: step.next_cursor.epoch < 2, loader.steps()))
    seen = {i for step in steps for pack in ids_of(step) for i in pack} - {PLACEHOLDER_ID}
    assert seen == set(range(60)) - damaged
    for batch in (batch for step in steps for batch in step.packs):  # clips after a damaged one moved up
        for i, sample_id in enumerate(batch.sample_ids_G.tolist()):
            segment = batch.patches_LP[batch.cu_segments[i] : batch.cu_segments[i + 1]]
            assert bool((segment == max(0, sample_id)).all())
        assert not batch.patches_LP[batch.num_tokens :].any()
    errors = {error.sample_id: error for step in steps for error in step.damaged}
    assert set(errors) == damaged and all(errors[i].path.startswith(str(folder)) for i in damaged)
    assert {i: errors[i].offset for i in offsets} == offsets


def test_a_plan_is_made_without_reading_a_clip():
    class UnreadableSplit(MemorySplit):
        def read(self, i, encode_caption, out_LP=None):
            raise AssertionError("a clip was read")

    plan = make_loader(make_mixture(kind=UnreadableSplit)).plan
    assert isinstance(plan, PackingPlan) and len(next(plan.steps(Cursor())).packs) == 4


# ---- the same clips


def test_a_run_resumes_only_with_the_clips_that_it_started_with(tmp_path):
    from megasora.checkpoint.store import CheckpointStore
    from megasora.checks import check_same_data
    from megasora.config import load

    config = load(None, [f"run.dir={tmp_path}"])
    check_same_data(config, make_mixture([5]).identity())  # nothing was saved yet
    store = CheckpointStore(tmp_path / "checkpoints")
    store.begin(10)
    store.commit(10, {"task": {"data": make_mixture().identity()}}, {})
    check_same_data(config, make_mixture().identity())
    with pytest.raises(
        MegaSoraError, match=r"step-00000010 was trained on other clips \(clips: \[50\] -> \[49\]; tokens"
    ):
        check_same_data(config, make_mixture(LENGTHS[:-1]).identity())
    with pytest.raises(MegaSoraError, match=r"other clips \(sha256"):
        check_same_data(config, make_mixture(LENGTHS[::-1]).identity())
    for member, key in (("caption", "captions"), ("text", "captions"), ("patches", "patches")):
        changed = make_mixture()
        changed.datasets[0].index.rows[member]["crc32"][3] ^= 1  # of the same clips, one was captioned or encoded again
        with pytest.raises(MegaSoraError, match=rf"other clips \({key}: \['\w{{8}}'\] -> \['\w{{8}}'\]\); give"):
            check_same_data(config, changed.identity())
