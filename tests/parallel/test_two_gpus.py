"""What one process cannot show of a GPU: over NCCL, Ulysses and products over symmetric memory equal one process.

The same runs over gloo on CPUs, where symmetric memory is not available.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megasora.batch import ContextSplit
from megasora.kernels.attention import attention_reference
from megasora.kernels.segments import Segments
from megasora.parallel import symmetric_memory
from megasora.parallel.collectives import all_gather_async, reduce_scatter_async, wait
from megasora.parallel.context_attention import ContextAttention
from megasora.parallel.mesh import Axis
from megasora.testing.spawn import run_processes

RANKS, HEADS, HEAD_DIM = 2, 24, 64  # 12 heads on a rank, in two groups
LENGTHS = 300, 20, 64  # of clips, on both ranks
BLOCKS = 3  # of attention, one after the other: all-to-alls of several are in flight
DEVICES = [  # backend, dtype, tolerance
    pytest.param("gloo", torch.float64, 1e-12, id="cpu"),
    pytest.param(
        "nccl", torch.bfloat16, 2e-2, id="gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")],
    ),
]  # fmt: skip


def relative_error(x, expected):
    return float((x.double() - expected.double()).norm() / expected.double().norm())


def ulysses_errors(axis, device, dtype):
    """{model.recompute: errors of out, dq, dk, dv of this rank's tokens}."""
    tokens = sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(4)]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    segments = Segments.from_cu_seqlens(cu, cu, tokens, device)

    def results_of(attend, inputs, grad_out):
        leaves = [x.clone().requires_grad_() for x in inputs]
        q, k, v = leaves
        for _ in range(BLOCKS):
            q = attend(q, k, v)
        return [q.detach(), *torch.autograd.grad(q, leaves, grad_out)]

    wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in whole]
    exact = results_of(lambda q, k, v: attention_reference(q, k, v, segments)[0], wide[:3], wide[3])
    own = slice(axis.rank * tokens // RANKS, (axis.rank + 1) * tokens // RANKS)
    context = ContextAttention(Axis("ring", 1, 0, None), axis)
    pieces = torch.tensor([[0, segment, 0, length] for segment, length in enumerate(LENGTHS)])
    share = SimpleNamespace(
        context_split=ContextSplit(1, tokens, pieces), patches_LP=torch.zeros(tokens // RANKS, 1, device=device)
    )
    local = context.segments(share)

    def recomputed(saved_output):
        return lambda q, k, v: checkpoint(context, q, k, v, local, saved_output(), use_reentrant=False)

    ways = {
        "none": lambda q, k, v: context(q, k, v, local),
        "full": recomputed(lambda: None),
        "keep_attention": recomputed(list),
    }
    mine, grad_out = [x[own] for x in whole[:3]], whole[3][own]
    results = {name: results_of(attend, mine, grad_out) for name, attend in ways.items()}
    return {
        name: [relative_error(x, expected[own]) for x, expected in zip(result, exact, strict=True)]
        for name, result in results.items()
    }


def symmetric_memory_errors(axis, device, dtype):
    """(why symmetric memory is not used, errors of both products against collectives); None if it is, [] if not."""
    reason = symmetric_memory.obstacle(axis, device)
    if reason is not None:
        return reason, []
    generator = torch.Generator().manual_seed(axis.rank)
    x, matrix = (torch.randn(size, 256, generator=generator).to(device, dtype) for size in (512, 256))
    full = wait(all_gather_async(x, axis))
    errors = []
    for _ in range(3):  # the workspace is reused
        y, gathered = symmetric_memory.all_gather_matmul(x, matrix, axis)
        summed = symmetric_memory.matmul_reduce_scatter(full, matrix, axis)
        expected = wait(reduce_scatter_async(full.float() @ matrix.float(), axis))
        errors += [relative_error(y, full @ matrix), relative_error(summed, expected)]
        assert torch.equal(gathered, full)
    return None, errors


def errors_on_rank(dtype):
    rank, on_gpu = dist.get_rank(), dist.get_backend() == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    arguments = Axis("ulysses", RANKS, rank, dist.group.WORLD), device, dtype
    return ulysses_errors(*arguments), symmetric_memory_errors(*arguments)


@pytest.mark.parametrize("backend, dtype, tolerance", DEVICES)
def test_two_processes_compute_what_one_does(backend, dtype, tolerance):
    for ulysses, (reason, products) in run_processes(errors_on_rank, [0, 1], RANKS, backend, (dtype,), 120):
        for name, errors in ulysses.items():
            assert max(errors) < tolerance, name
        assert len(ulysses) == 3
        assert max(products, default=0) < tolerance
        if backend == "gloo":
            assert reason == "it needs GPUs, not cpu"
        elif reason is not None:
            pytest.skip(f"Ulysses is right; symmetric memory is not used: {reason}")
