"""Contact sheets show frames of the video, and the whole prompt."""

from __future__ import annotations

import numpy as np

from megasora.sampling.sheet import GAP, TEXT_HEIGHT, contact_sheet


def test_first_and_last_frame_are_at_the_ends_of_their_row():
    video = np.stack([np.full((8, 12, 3), 10 * i, np.uint8) for i in range(20)])
    sheet = contact_sheet([("a", video), ("b", video[:1])], frames=4, zoom=2)
    tile = slice(TEXT_HEIGHT, TEXT_HEIGHT + 16)
    assert (sheet[tile, GAP : GAP + 24] == 0).all()
    last = GAP + 3 * (24 + GAP)
    assert (sheet[tile, last : last + 24] == 190).all()
    assert sheet.shape[0] == 2 * (TEXT_HEIGHT + 16 + GAP)


def test_a_row_is_at_least_as_wide_as_its_prompt():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    short, long = (
        contact_sheet([(text, image)]).shape[1] for text in ("a", "a prompt much longer than one tile is wide")
    )
    assert short < 60 < 150 < long
