"""The clips of a codec training: their order, crops, stacks and padding, and what is decoded."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.config import DataConfig, IngestConfig
from megasora.data.clip_loader import ClipLoader, Crop, padded_size, stack_clips
from megasora.data.clip_writer import write_image, write_video
from megasora.data.decoded_clips import DecodedClips
from megasora.data.media import Media
from megasora.errors import DataError

FACTORS = (4, 8, 8)
IDS = [3, 4, 8, 9, 10]  # of the clips, which are a part of a listing


def numbered_frames(clip: int, size: tuple[int, int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3]: grey levels that say the clip and the frame."""
    levels = 40 * clip + 5 * np.arange(size[0])
    return np.broadcast_to(levels[:, None, None, None], (*size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> list[Media]:
    """Four videos of 12 frames and one image."""
    folder, clips = tmp_path_factory.mktemp("clips"), []
    for clip in range(4):
        clips.append(folder / f"{clip}.mp4")
        write_video(numbered_frames(clip, (12, 16, 24)), 12, clips[-1], codec="libx264rgb", crf="0")
    clips.append(folder / "4.png")
    write_image(numbered_frames(4, (1, 17, 9))[0], clips[-1])
    return [Media(path) for path in clips]


def make_loader(media: list[Media], rank: int = 0, size: int = 1, cursor: int = 0, cache_mib: int = 64, **settings):
    data = DataConfig(clips_per_pack=3, packs_per_step=2, **settings)
    return ClipLoader(DecodedClips(media, IngestConfig(), cache_mib), IDS, data, 7, FACTORS, rank, size, cursor)


def content(batch) -> list[list[tuple]]:
    """What each pack holds, as values that can be compared."""
    return [[(s.sample_ids, s.size, s.frames_BTHWC.numpy().tobytes()) for s in pack] for pack in batch.packs]


def test_steps_depend_on_neither_ranks_threads_cache_nor_stops(media):
    settings = {"crop": [5, 8, 8], "image_fraction": 0.3}
    expected = [content(b) for b in islice(make_loader(media, reader_threads=0, **settings).steps(), 8)]
    assert expected[0] != expected[1]
    by_rank = [
        [content(b) for b in islice(iter(make_loader(media, rank, 2, reader_threads=2, **settings)), 8)]
        for rank in range(2)
    ]
    assert [[a[0], b[0]] for a, b in zip(*by_rank, strict=True)] == expected
    whole = make_loader(media, reader_threads=0, **settings)
    cursor = [batch.next_cursor for batch in islice(whole.steps(), 3)][-1]
    assert cursor == 18
    resumed = make_loader(media, cursor=cursor, cache_mib=0, reader_threads=1, **settings)
    assert [content(b) for b in islice(resumed.steps(), 5)] == expected[3:]


def test_an_epoch_has_each_clip_once_and_the_next_another_order(media):
    loader = make_loader(media, reader_threads=0)
    ids = [i for b in islice(loader.steps(), 5) for pack in b.packs for s in pack for i in s.sample_ids]
    assert Counter(ids) == dict.fromkeys(IDS, 6)
    orders = [tuple(loader.order_of(epoch)) for epoch in range(6)]
    assert all(sorted(order) == list(range(5)) for order in orders) and len(set(orders)) > 3


def test_crops_are_excerpts_of_the_clip_at_all_places(media):
    source = DecodedClips(media, IngestConfig(), 64)
    loader = make_loader(media, reader_threads=0)
    starts, sides = Counter(), Counter()
    for epoch in range(200):
        crop = Crop(loader.draw(epoch, 3), (5, 8, 8), 0.2)
        first, count = crop.frames(12)
        starts[first, count] += 1
        marked = np.zeros((1, 16, 24, 3), np.uint8)
        marked[0, :, :, 0], marked[0, :, :, 1] = np.arange(16)[:, None], np.arange(24)
        cut = crop.sides(marked)
        sides[tuple(cut[0, 0, 0, :2])] += 1
        assert cut.shape == (1, 8, 8, 3)
        np.testing.assert_array_equal(source.read(0, crop.frames), numbered_frames(0, (12, 16, 24))[first:][:count])
    assert {first for first, count in starts if count == 5} == set(range(8))
    images = sum(n for (_, count), n in starts.items() if count == 1)
    assert 20 < images < 60 and len({first for first, count in starts if count == 1}) > 8
    assert {row for row, _ in sides} == set(range(9)) and {column for _, column in sides} == set(range(17))
    assert Crop(None, (5, 8, 8)).frames(12) == (0, 5) and Crop(None, (0, 0, 0)).frames(12) == (0, 12)
    assert Crop(loader.draw(0, 3), (50, 80, 80)).frames(12) == (0, 12)  # a smaller clip is taken whole


def test_clips_of_one_size_are_stacked_and_padded_to_whole_latents_by_repetition():
    clips = [(5, numbered_frames(1, (6, 9, 8))), (6, numbered_frames(2, (1, 8, 8))), (7, numbered_frames(0, (6, 9, 8)))]
    stacks = stack_clips(clips, FACTORS)
    assert [(s.sample_ids, s.size, tuple(s.frames_BTHWC.shape)) for s in stacks] == [
        ([5, 7], (6, 9, 8), (2, 9, 16, 8, 3)), ([6], (1, 8, 8), (1, 1, 8, 8, 3)),
    ]  # fmt: skip
    frames = torch.from_numpy(clips[2][1].copy())
    padded = stacks[0].frames_BTHWC[1]
    assert torch.equal(padded[:6, :9], frames)
    assert torch.equal(padded[6:], padded[5:6].expand(3, -1, -1, -1))
    assert torch.equal(padded[:, 9:], padded[:, 8:9].expand(-1, 7, -1, -1))
    assert padded_size((7, 1, 1), (1, 8, 8)) == (7, 8, 8) and padded_size((9, 8, 16), FACTORS) == (9, 8, 16)


def test_a_video_that_is_not_kept_is_read_from_the_chosen_frames_on(media, monkeypatch):
    from megasora.data import decoded_clips

    source, opened = DecodedClips(media, IngestConfig(), 0), []
    original = decoded_clips.open_clip
    monkeypatch.setattr(decoded_clips, "open_clip", lambda m, limits: opened.append(m) or original(m, limits))
    expected = numbered_frames(2, (12, 16, 24))
    for first, count in ((0, 5), (3, 5), (7, 5), (11, 1)):
        np.testing.assert_array_equal(source.read(2, lambda n, c=(first, count): c), expected[first:][:count])
    assert [m.is_excerpt for m in opened] == [False, True, True, True, True]  # the first time, its length is asked for
    np.testing.assert_array_equal(source.read(2, lambda n: (0, n)), expected)


def test_the_cache_keeps_what_fits(media):
    source = DecodedClips(media, IngestConfig(), 1)
    source.free_bytes = 2 * 12 * 16 * 24 * 3
    for index in (0, 1, 2, 4, 0):
        source.read(index, lambda n: (0, n))
    assert sorted(source.frames) == [0, 1] and source.free_bytes == 0


def test_a_clip_that_cannot_be_decoded_is_named(media, tmp_path):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(Path(media[0].path).read_bytes()[:700])
    loader = make_loader([*media[:4], Media(damaged)], reader_threads=1)
    with pytest.raises(DataError, match=r"damaged\.mp4.*; repair it, or leave it out of data\.clips"):
        for _ in islice(iter(loader), 3):
            pass
