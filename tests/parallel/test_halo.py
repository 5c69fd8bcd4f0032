"""A halo exchange gives each rank the window of the padded clip around its piece, and returns its gradient."""

import random
from functools import cache
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from megasora.config import ParallelConfig
from megasora.parallel.clip_exchange import rows_to_frames
from megasora.parallel.halo import HaloBoundary
from megasora.parallel.mesh import build_mesh
from megasora.testing.recorded_collectives import RecordedCollectives
from megasora.testing.spawn import run_ranks

# (frames of each time rank, rows of each rows rank, halo frames, border)
CASES = {
    "in time": ([3, 2, 4, 2], [3], 2, 1),
    "in rows": ([3], [2, 1, 3, 2], 2, 1),
    "in both": ([2, 3], [2, 1], 2, 1),
    "frames of several ranks": ([1, 1, 1, 1], [3], 2, 1),
    "more frames than there are": ([1, 1, 1, 1], [2], 7, 0),
    "ranks without frames": ([1, 0, 0, 3], [2], 2, 1),
    "rows of several ranks": ([2], [1, 1, 2, 1], 1, 2),
    "both of several ranks": ([1, 1], [1, 1], 3, 2),
    "ranks without rows": ([2], [2, 0, 1, 0], 1, 1),
    "no frames, as of a network by frame": ([2, 1], [3, 1], 0, 1),
    "nothing": ([2, 1], [3, 1], 0, 0),
}


def random_case(seed):
    draw = random.Random(seed)
    time, rows = draw.choice([(4, 1), (2, 2), (1, 4)])
    sizes = [draw.randint(0, 3) for _ in range(time)], [draw.randint(0, 3) for _ in range(rows)]
    return *sizes, draw.randint(0, 3), draw.randint(0, 2)


CASES |= {f"random {seed}": random_case(seed) for seed in range(30)}


def windows(x, frames_by_rank, rows_by_rank, frames, border):
    """What each rank (time, rows) should get, views of the padded clip."""
    padded = F.pad(x, (border, border, border, border, frames, 0))
    starts = [0, *accumulate(frames_by_rank)], [0, *accumulate(rows_by_rank)]
    return {
        (t, r): padded[:, :, a : a + count + frames, b : b + height + 2 * border]
        for t, (a, count) in enumerate(zip(starts[0], frames_by_rank, strict=False))
        for r, (b, height) in enumerate(zip(starts[1], rows_by_rank, strict=False))
    }


def extend_each(cases):
    """For each case, on this rank: whether the window and the gradient are exact, and bytes counted and recorded."""
    results, meshes = {}, {}
    for name, (frames_by_rank, rows_by_rank, frames, border) in cases.items():
        rows = len(rows_by_rank)
        if rows not in meshes:
            meshes[rows] = build_mesh(ParallelConfig(context=4, rows=rows), "cpu")
        mesh = meshes[rows]
        rank, halo = (mesh.time.rank, mesh.rows.rank), HaloBoundary(mesh.time, mesh.rows)
        generator = torch.Generator().manual_seed(0)
        shape = (2, 3, sum(frames_by_rank), sum(rows_by_rank), 5)
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        whole = whole.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        expected = windows(whole, frames_by_rank, rows_by_rank, frames, border)
        weights = {r: torch.randn(w.shape, generator=generator, dtype=torch.float64) for r, w in expected.items()}
        sum((expected[r] * weights[r]).sum() for r in expected).backward()
        inner = windows(torch.arange(whole.numel()).view(shape), frames_by_rank, rows_by_rank, 0, 0)[rank]
        own = whole.detach().flatten()[inner].requires_grad_()
        with RecordedCollectives() as recorded:
            out = halo.extend(own, frames, border, None)
            sent_forward = halo.bytes_sent
            if out is not own:
                (out * weights[rank]).sum().backward()
            else:
                own.grad = weights[rank].clone()
        results[name] = {
            "window": torch.equal(out, expected[rank]),
            "gradient": torch.allclose(own.grad, whole.grad.flatten()[inner], rtol=1e-13, atol=1e-13),
            "forward": sent_forward, "counted": halo.pop_bytes_sent(),
            "sent": 8 * sum(m.elements for m in recorded.messages if m.op == "send"),
            "received": 8 * sum(m.elements for m in recorded.messages if m.op == "recv"),
            "reset": halo.bytes_sent,
        }  # fmt: skip
    return results


def transpose_rows_and_frames():
    """Whether rows_to_frames gives whole frames and its backward pass is the inverse, with empty ranks."""
    mesh = build_mesh(ParallelConfig(context=4, rows=4), "cpu")
    exact, heights, rank = [], [3, 0, 1, 2], mesh.rows.rank
    for frames in (1, 4, 6):
        whole = torch.randn(2, 3, frames, 6, 5, generator=torch.Generator().manual_seed(frames))
        first, last = sum(heights[:rank]), sum(heights[: rank + 1])
        own = whole[:, :, :, first:last].clone().requires_grad_()
        out = rows_to_frames(own, heights, mesh.rows)
        exact.append(torch.equal(out, whole.tensor_split(4, dim=2)[rank]))
        out.backward(out.detach())
        exact.append(torch.equal(own.grad, own.detach()))
    return exact


def run_all(cases):
    return extend_each(cases), transpose_rows_and_frames()


@cache
def results():
    return run_ranks(run_all, 4, CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_gets_the_window_around_its_piece_and_returns_its_gradient(name):
    for rank, (by_case, _) in enumerate(results()):
        assert by_case[name]["window"] and by_case[name]["gradient"], rank


@pytest.mark.parametrize("name", CASES)
def test_only_what_a_rank_lacks_is_sent_and_the_same_returns(name):
    """The values that the ranks receive are those of the clip that their windows have beyond their pieces."""
    frames_by_rank, rows_by_rank, frames, border = CASES[name]
    by_rank = [by_case[name] for by_case, _ in results()]
    assert all(r["counted"] == r["sent"] and r["reset"] == 0 for r in by_rank)
    assert sum(r["sent"] for r in by_rank) == sum(r["received"] for r in by_rank)
    ones = torch.ones(2, 3, sum(frames_by_rank), sum(rows_by_rank), 5)
    in_windows = sum(int(w.sum()) for w in windows(ones, frames_by_rank, rows_by_rank, frames, border).values())
    lacking = 8 * (in_windows - ones.numel())
    if min(frames_by_rank) >= frames and min(rows_by_rank) >= border:
        assert sum(r["forward"] for r in by_rank) == lacking
    assert sum(r["forward"] for r in by_rank) >= lacking
    assert sum(r["sent"] for r in by_rank) == 2 * sum(r["forward"] for r in by_rank)


def test_rows_are_exchanged_for_frames_and_gradients_return():
    for _, exact in results():
        assert all(exact) and len(exact) == 6
