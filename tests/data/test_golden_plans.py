"""Plans, packs and token drops are exactly those of earlier versions, so a resumed run trains on the same clips."""

import hashlib
import itertools

import numpy as np
import pytest

from megasora.config import TokenDropConfig
from megasora.data.long_clips import place_long_clips
from megasora.data.packing import pack_clips
from megasora.data.packing_plan import Cursor, PackingPlan, assign_packs_to_ranks
from megasora.data.token_drop import draw_positions

FEW = np.array([1 + (7 * i) % 40 for i in range(50)])
MANY = (np.random.PCG64(5).random_raw(6000) % 4096).astype(np.int64) ** 2 // 4096 + 1  # mostly short clips


def hash_of(*arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.asarray(array, "<i8").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("a24b6c8647b76bfb", ([FEW], [1.0], 64, 4, 20, 30, 7)),
        ("e2688880de82672c", ([MANY], [1.0], 4096, 8, 2500, 1000, 0)),
        (
            "db95dd3620ee85ef",
            ([MANY[:3000], FEW * 50, MANY[4000:]], [3.0, 0.5, 1.0], 4096, 16, 1000, 29_000, 2**40 + 1),
        ),
        ("40d2c854aac05664", ([MANY], [1.0], 6000, 4, 1500, 500, 3, TokenDropConfig(start=0.5, end=0.1, epochs=2.0))),
        ("349c16a6be288b90", ([MANY[:700]], [1.0], 16_384, 1, 300, 1, 1)),
    ],
    ids=["few clips", "long tail", "mixture", "token drop", "one pack per step"],
)
def test_steps_and_ranks_of_three_epochs(expected, arguments):
    plan, arrays = PackingPlan(*arguments), []
    for step in itertools.takewhile(lambda step: step.next_cursor.epoch < 3, plan.steps(Cursor())):
        for pack in step.packs:
            arrays += [pack.clips, pack.tokens, pack.cost, pack.epoch]
        cursor = step.next_cursor
        arrays += [cursor.epoch, cursor.window, cursor.pack]
        arrays += [assign_packs_to_ranks(step.costs, max(1, plan.packs_per_step // 2))]
    assert hash_of(*arrays) == expected


@pytest.mark.parametrize(
    ("expected", "capacity", "packs_per_step"),
    [("42a7ff77e619ae34", 4096, 64), ("63481c3f7ca664b3", 10_000, 8), ("7a2b17d38bdbd9b6", 100_000, 16)],
)
def test_packs_of_a_window(expected, capacity, packs_per_step):
    packs = pack_clips(MANY, capacity, packs_per_step)
    assert hash_of(packs.clip_I, packs.cu_packs, *place_long_clips(MANY, capacity, packs_per_step)) == expected


def test_positions_of_kept_tokens():
    positions = [draw_positions(3, epoch, 77, 10, 300, 120 + epoch) for epoch in range(5)]
    assert hash_of(*positions) == "26dd7d51b3aca680"
