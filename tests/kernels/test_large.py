"""Tensors of more than 2^31 elements, for which 32-bit offsets overflow. Needs a GPU."""

import pytest
import torch
from agreement import on_gpu

from megasora.kernels.adaln import adaln_modulate, gated_residual_adaln
from megasora.kernels.gated_add import gated_add
from megasora.kernels.qk_norm_rope3d import qk_norm_rope3d
from megasora.kernels.rms_norm import rms_norm
from megasora.kernels.rope3d import Rope, rope3d
from megasora.kernels.rows import Rows

pytestmark = [*on_gpu]

WIDTH, LAST, EPS = 1024, 64, 1e-6
TOKENS = 2**31 // WIDTH + LAST


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def build_rows(tokens):
    return Rows.from_cu_seqlens(torch.tensor([0, tokens - LAST, tokens]), tokens, "cuda")


def build_rope(coords_L3, head_dim):
    return Rope.build(coords_L3, head_dim, 10_000.0)


def apply_adaln(x, shift, scale):
    return adaln_modulate(x, shift, scale, build_rows(len(x)), EPS)


def apply_gated_add(x, gate):
    return gated_add(x, x, gate, build_rows(len(x)))


def apply_gated_residual(x, gate):
    return gated_residual_adaln(x, x, gate, None, None, build_rows(len(x)), EPS)[1]


CASES = {  # function of tokens [L, D] and vectors of two rows, number of vectors
    "adaln_modulate": (apply_adaln, 2),
    "gated_add": (apply_gated_add, 1),
    "gated_residual_adaln": (apply_gated_residual, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_tokens_equal_those_of_a_small_tensor(case):
    function, count = CASES[case]
    x, vectors = random(TOKENS, WIDTH).requires_grad_(), [random(2, WIDTH) for _ in range(count)]
    out = function(x, *vectors)
    out[-LAST:].sum().backward()
    alone = x.detach()[-LAST:].clone().requires_grad_()
    expected = function(alone, *vectors)
    expected.sum().backward()
    assert torch.equal(out[-LAST:], expected) and torch.equal(x.grad[-LAST:], alone.grad)


def test_the_last_heads_equal_those_of_a_small_tensor():
    tokens, heads, head_dim = 2**31 // (3 * WIDTH) + LAST, 8, 128
    coords_L3 = torch.arange(tokens, device="cuda", dtype=torch.int32)[:, None].expand(-1, 3) // 100
    qkv, weight = random(tokens, 3, heads, head_dim).requires_grad_(), random(head_dim)
    q, k, _ = qk_norm_rope3d(qkv, weight, weight, build_rope(coords_L3, head_dim), EPS)
    (q[-LAST:].sum() + k[-LAST:].sum()).backward()
    alone = qkv.detach()[-LAST:].clone().requires_grad_()
    q_alone, k_alone, _ = qk_norm_rope3d(alone, weight, weight, build_rope(coords_L3[-LAST:], head_dim), EPS)
    (q_alone.sum() + k_alone.sum()).backward()
    assert torch.equal(q[-LAST:], q_alone) and torch.equal(k[-LAST:], k_alone)
    assert torch.equal(qkv.grad[-LAST:], alone.grad)


def test_the_last_vectors_equal_those_of_a_small_tensor():
    x, weight = random(TOKENS, 8, WIDTH // 8), random(WIDTH // 8)
    coords_L3 = torch.arange(TOKENS, device="cuda", dtype=torch.int32)[:, None].expand(-1, 3) // 100
    assert torch.equal(rms_norm(x, weight, EPS)[-LAST:], rms_norm(x[-LAST:], weight, EPS))
    rotated = rope3d(x, build_rope(coords_L3, WIDTH // 8))
    assert torch.equal(rotated[-LAST:], rope3d(x[-LAST:], build_rope(coords_L3[-LAST:], WIDTH // 8)))
