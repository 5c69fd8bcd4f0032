"""More than 2^31 numbers in a tensor, which offsets of 32 bits do not reach: on a GPU alone."""

import pytest
import torch
from agreement import on_gpu

from megasora.kernels.adaln_modulate import adaln_modulate
from megasora.kernels.gated_add import gated_add
from megasora.kernels.gated_residual_adaln import gated_residual_adaln
from megasora.kernels.qk_norm_rope3d import qk_norm_rope3d
from megasora.kernels.rms_norm import rms_norm
from megasora.kernels.rope3d import Rope, rope3d
from megasora.kernels.rows import Rows

pytestmark = [*on_gpu]

WIDTH, LAST, EPS = 1024, 64, 1e-6
TOKENS = 2**31 // WIDTH + LAST


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def rows_of(tokens):
    return Rows.from_cu_seqlens(torch.tensor([0, tokens - LAST, tokens]), tokens, "cuda")


def rope_of(coords_L3, head_dim):
    return Rope.build(coords_L3, head_dim, 10_000.0)


def modulated(x, shift, scale):
    return adaln_modulate(x, shift, scale, rows_of(len(x)), EPS)


def gated(x, gate):
    return gated_add(x, x, gate, rows_of(len(x)))


def residual(x, gate):
    return gated_residual_adaln(x, x, gate, None, None, rows_of(len(x)), EPS)[1]


CASES = {  # of tokens [L, D] and vectors of two rows
    "adaln_modulate": (modulated, 2),
    "gated_add": (gated, 1),
    "gated_residual_adaln": (residual, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_tokens_are_what_they_are_alone(case):
    function, count = CASES[case]
    x, vectors = random(TOKENS, WIDTH).requires_grad_(), [random(2, WIDTH) for _ in range(count)]
    out = function(x, *vectors)
    out[-LAST:].sum().backward()
    alone = x.detach()[-LAST:].clone().requires_grad_()
    expected = function(alone, *vectors)
    expected.sum().backward()
    assert torch.equal(out[-LAST:], expected) and torch.equal(x.grad[-LAST:], alone.grad)


def test_the_last_heads_are_what_they_are_alone():
    tokens, heads, head_dim = 2**31 // (3 * WIDTH) + LAST, 8, 128
    coords_L3 = torch.arange(tokens, device="cuda", dtype=torch.int32)[:, None].expand(-1, 3) // 100
    qkv, weight = random(tokens, 3, heads, head_dim).requires_grad_(), random(head_dim)
    q, k, _ = qk_norm_rope3d(qkv, weight, weight, rope_of(coords_L3, head_dim), EPS)
    (q[-LAST:].sum() + k[-LAST:].sum()).backward()
    alone = qkv.detach()[-LAST:].clone().requires_grad_()
    q_alone, k_alone, _ = qk_norm_rope3d(alone, weight, weight, rope_of(coords_L3[-LAST:], head_dim), EPS)
    (q_alone.sum() + k_alone.sum()).backward()
    assert torch.equal(q[-LAST:], q_alone) and torch.equal(k[-LAST:], k_alone)
    assert torch.equal(qkv.grad[-LAST:], alone.grad)


def test_the_last_vectors_are_what_they_are_alone():
    x, weight = random(TOKENS, 8, WIDTH // 8), random(WIDTH // 8)
    coords_L3 = torch.arange(TOKENS, device="cuda", dtype=torch.int32)[:, None].expand(-1, 3) // 100
    assert torch.equal(rms_norm(x, weight, EPS)[-LAST:], rms_norm(x[-LAST:], weight, EPS))
    turned = rope3d(x, rope_of(coords_L3, WIDTH // 8))
    assert torch.equal(turned[-LAST:], rope3d(x[-LAST:], rope_of(coords_L3[-LAST:], WIDTH // 8)))
