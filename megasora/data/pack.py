"""Records (clips ready for the model) to one pack, and which clips go into which pack.

The plan of an epoch is made from token counts alone: shuffled by (seed, epoch), then packs are filled in that order;
the gap that the next clip in line does not fit is filled by the largest that fits among the `lookahead` clips in line.
Nothing is cut, every clip is in exactly one pack.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megasora.batch import VideoBatch, grid_coords


@dataclass(frozen=True)
class Record:
    """One clip as it is trained on."""

    sample_id: int
    patches_LP: Tensor  # [l, P]
    grid: tuple[int, int, int]  # latent frames, rows, columns of tokens; l is their product
    text_SE: Tensor  # [S_i, E]
    native: tuple[float, float, float, float]  # height, width (pixels), frames, frames a second
    caption: str = ""


def make_batch(records: list[Record], tokens_per_pack: int) -> VideoBatch:
    """One pack, clean: a row a segment at t = 0. Raises ValueError where the clips do not fit."""
    used = sum(len(r.patches_LP) for r in records)
    if used > tokens_per_pack:
        raise ValueError(f"clips of {used} tokens do not fit a pack of {tokens_per_pack}")
    padding = tokens_per_pack - used
    patches = torch.cat([r.patches_LP.float() for r in records])
    coords = torch.cat([grid_coords(r.grid) for r in records])
    cu = torch.tensor([0, *(len(r.patches_LP) for r in records)]).cumsum(0).to(torch.int32)
    return VideoBatch(
        patches_LP=torch.nn.functional.pad(patches, (0, 0, 0, padding)),
        coords_L3=torch.nn.functional.pad(coords, (0, 0, 0, padding)),
        grids_G3=torch.tensor([r.grid for r in records]),
        cu_segments=cu,
        cu_rows=cu,
        timesteps_R=torch.zeros(len(records)),
        row_segment_R=torch.arange(len(records)),
        text_SE=torch.cat([r.text_SE for r in records]),
        cu_text=torch.tensor([0, *(len(r.text_SE) for r in records)]).cumsum(0).to(torch.int32),
        drop_text_G=torch.tensor([not r.caption.strip() for r in records]),
        native_G4=torch.tensor([r.native for r in records], dtype=torch.float32),
        sample_ids_G=torch.tensor([r.sample_id for r in records]),
        starts_G=torch.zeros(len(records), dtype=torch.int64),
    )


def plan_epoch(tokens: np.ndarray, budget: int, lookahead: int, seed: int, epoch: int) -> list[list[int]]:
    """Packs of one epoch: lists of clip numbers (places in `tokens`), each of at most `budget` tokens.

    A pure function of its arguments. `tokens`: int [n], each at most `budget` (checked by the caller, with names).
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(tokens))
    line = deque(int(i) for i in order)
    waiting: list[tuple[int, int]] = []  # (tokens, place in the shuffled order) of the clips in view, sorted
    arrived: deque[tuple[int, int]] = deque()  # the same clips, in order of arrival; taken ones are skipped
    taken = np.zeros(len(order), dtype=bool)
    seen = 0

    def see_more() -> None:
        nonlocal seen
        while line and len(waiting) < lookahead:
            entry = (int(tokens[line.popleft()]), seen)
            seen += 1
            bisect.insort(waiting, entry)
            arrived.append(entry)

    def take(entry: tuple[int, int]) -> int:
        waiting.pop(bisect.bisect_left(waiting, entry))
        taken[entry[1]] = True
        return int(order[entry[1]])

    packs = []
    see_more()
    while waiting:
        pack, room = [], budget
        while waiting:
            while taken[arrived[0][1]]:
                arrived.popleft()
            first = arrived[0]
            if first[0] > room:
                break
            pack.append(take(first))
            room -= first[0]
            see_more()
        while True:  # the gap: the largest clip in view that fits, again and again
            place = bisect.bisect_right(waiting, (room, len(order)))
            if place == 0:
                break
            entry = waiting[place - 1]
            pack.append(take(entry))
            room -= entry[0]
            see_more()
        packs.append(pack)
    return packs
