"""Attention inside segments: every way of computing it against the plain maths, in float64.

Libraries that need a GPU are stood in for by the same maths under their signatures, quirks included. So what is tested
of them is what is given to them, and what is made of what they return.
"""

import functools
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from megasora.kernels import attention as module
from megasora.kernels import attention_packs
from megasora.kernels.attention import (
    Segments,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    automatic,
    chosen_backend,
    obstacle,
)
from megasora.kernels.attention_buckets import CPU, EFFICIENT, FLASH, PLAIN, fixed_order
from megasora.kernels.attention_packs import library
from megasora.kernels.merge_partial_attention import merge_partial_attention

# lengths of the segments' queries and keys; the first pack is self-attention
PACKS = {
    "uneven": ([5, 1, 12, 7, 7, 1, 30], None),
    "one segment": ([17], None),
    "all of one token": ([1, 1, 1], None),
    "longer than the kernels' tiles": ([700, 40], None),
    "captions": ([4, 9, 1, 6, 5], [3, 2, 7, 1, 2]),
    "an empty caption": ([4, 9, 1, 6], [3, 0, 7, 0]),
}


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(num_q, num_k, heads=3, head_dim=8):
    shapes = (num_q, heads, head_dim), (num_k, heads, head_dim), (num_k, heads, head_dim)
    return tuple(normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))


def make(lengths_q, lengths_k=None, padding=0):
    """(q, k, v, segments) in float64 with `padding` more queries and keys than the segments have."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    num_q, num_k = sum(lengths_q) + padding, sum(lengths_k) + padding
    segments = Segments.from_cu_seqlens(cumulative(lengths_q), cumulative(lengths_k), num_q, "cpu")
    return *make_inputs(num_q, num_k), segments


def ranges(start_q, length_q, start_k, length_k, num_queries):
    return Segments.from_ranges(*map(torch.tensor, (start_q, length_q, start_k, length_k)), num_queries, "cpu")


def reference(q, k, v, segments):
    return attention_reference(q, k, v, segments)[0]


def output_and_gradients(function, q, k, v, segments):
    out = function(q, k, v, segments)
    return out, torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), (q, k, v))


def check_call(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """What the kernels take for granted, or refuse."""
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "last dim must be contiguous"
    assert all(s % 8 == 0 for x in (q, k, v) for s in x.stride()[:-1])
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert len(cu_q) == len(cu_k) and cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q) and cu_k[-1] == len(k)
    assert (cu_q.diff() > 0).all() and (cu_k.diff() >= 0).all()
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() > 0
    assert scale is None or scale == pytest.approx(q.shape[-1] ** -0.5)


def ranges_of(cu_q, cu_k):
    return [(slice(*pair[:2]), slice(*pair[2:])) for pair in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)]


def library_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale=None):
    """out, and lse [N, L]; where a query has no key, lse is inf, as FlashAttention-2 has it, and out anything."""
    check_call(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    out = torch.full_like(q, math.nan)
    lse = q.new_full(q.shape[1::-1], math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, j in ranges_of(cu_q.tolist(), cu_k.tolist()):
        if j.start < j.stop:
            out_g, lse_g = PLAIN.forward(*(x.transpose(0, 1)[None] for x in (q[i], k[j], v[j])), None)
            out[i], lse[:, i] = out_g[0].transpose(0, 1), lse_g[0]
    return out, lse


def library_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale=None):
    """dq, dk, dv; dq of a query without a key is anything, and so is what the segments do not reach of dk and dv."""
    check_call(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    assert lse.is_contiguous() and lse.shape == q.shape[1::-1] and out.stride(-1) == grad_out.stride(-1) == 1
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    for i, j in ranges_of(cu_q.tolist(), cu_k.tolist()):
        if j.start < j.stop:
            given = (x.transpose(0, 1)[None] for x in (grad_out[i], q[i], k[j], v[j], out[i]))
            gradients = PLAIN.backward(*given, lse[:, i][None], None)
            dq[i], dk[j], dv[j] = (x[0].transpose(0, 1) for x in gradients)
    return dq, dk, dv


def fill(given, computed):
    assert all(x.is_contiguous() for x in given)
    for x, y in zip(given, computed, strict=True):
        x.copy_(y)


def flash2(calls):
    """flash_attn.flash_attn_interface of flash-attn 2.7 and 2.8."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and causal is False and window_size_left == window_size_right == -1
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *library_forward(q, k, v, *lengths, softmax_scale), torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == softcap == 0.0 and causal is False and window_size_left == window_size_right == -1
        assert alibi_slopes is None
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        fill((dq, dk, dv), library_backward(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale))
        calls.append(deterministic)
        return torch.empty(0)

    return locals()


def flash3_early(calls):
    """flash_attn_interface of FlashAttention-3 as of flash-attn 2.8.3."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        absent = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
        absent += (rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale)
        assert all(x is None for x in absent) and causal is False and window_size == (-1, -1)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *library_forward(q, k, v, *lengths, softmax_scale), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is sequed_k is None and causal is False and window_size == (-1, -1)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        fill((dq, dk, dv), library_backward(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale))
        calls.append(deterministic)
        return dq, dk, dv, torch.empty(0)

    return locals()


def flash3(calls):
    """The same as of 2026: other names and defaults."""
    early = flash3_early(calls)

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert window_size_left == window_size_right == -1
        cache = k_new, v_new, qv, out_
        lengths = cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k
        pages = page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary
        scales = q_descale, k_descale, v_descale, softmax_scale
        return early["_flash_attn_forward"](q, k, v, *cache, *lengths, *pages, *scales, causal)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert window_size_left == window_size_right == -1
        lengths = cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k
        given = dout, q, k, v, out, softmax_lse, *lengths, dq, dk, dv, softmax_scale, is_causal
        return early["_flash_attn_backward"](*given, deterministic=deterministic)[-1]

    return locals()


def varlen(calls):
    """The operators of torch.nn.attention.varlen."""

    def _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and is_causal is return_debug_mask is False
        lengths = cum_seq_q, cum_seq_k, max_q, max_k
        return *library_forward(query, key, value, *lengths, scale), torch.empty(2), torch.empty(0), torch.empty(0)

    def _flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and is_causal is False
        assert (
            not torch.utils.deterministic.fill_uninitialized_memory or not torch.are_deterministic_algorithms_enabled()
        )
        calls.append(torch.are_deterministic_algorithms_enabled())
        lengths = cum_seq_q, cum_seq_k, max_q, max_k
        return library_backward(grad_out, query, key, value, out, logsumexp, *lengths, scale)

    return locals()


def module_of(functions, **attributes):
    found = ModuleType("stand_in")
    vars(found).update(attributes, **{name: f for name, f in functions.items() if name.startswith("_flash")})
    return found


@pytest.fixture
def forget():
    """Which libraries there are is looked up once; anew for this test, and again after it."""
    caches = library, obstacle, automatic
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


WAYS = ("sdpa", "math", "flash2", "flash3", "flash3 early", "varlen")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch, forget):
    """The functions of one backend; `calls`: whether each backward of a library was to be deterministic."""
    name, calls = request.param.split()[0], []
    if name.startswith("flash"):
        functions = {"flash2": flash2, "flash3": flash3, "flash3 early": flash3_early}[request.param](calls)
        monkeypatch.setitem(sys.modules, "flash_attn", module_of({}, __version__="2.8.3.post1"))
        key = {"flash2": "flash_attn.flash_attn_interface", "flash3": "flash_attn_interface"}[name]
        monkeypatch.setitem(sys.modules, key, module_of(functions))
    if name == "varlen":
        monkeypatch.setattr(attention_packs, "aten", module_of(varlen(calls)))
    if name in module.VARLEN:
        monkeypatch.setattr(module, "obstacle", lambda *given: None)
    return SimpleNamespace(
        name=name,
        calls=calls,
        attention=functools.partial(attention, backend=name),
        forward=functools.partial(attention_forward, backend=name),
        backward=functools.partial(attention_backward, backend=name),
    )


def assert_equals_reference(way, q, k, v, segments, tolerance=1e-12):
    out, gradients = output_and_gradients(way.attention, q, k, v, segments)
    expected, expected_gradients = output_and_gradients(reference, q, k, v, segments)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)


def test_reference_is_attention_under_a_block_diagonal_mask():
    q, k, v, segments = make([4, 9, 1], [3, 2, 7])
    own_q, own_k = (torch.repeat_interleave(torch.arange(3), torch.tensor(n)) for n in ([4, 9, 1], [3, 2, 7]))
    scores = torch.einsum("qnk,snk->nqs", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(own_q[:, None] != own_k[None], -torch.inf)
    out, lse = attention_reference(q, k, v, segments)
    torch.testing.assert_close(out, torch.einsum("nqs,snk->qnk", scores.softmax(-1), v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_output_and_every_gradient_equal_the_reference(way, lengths, padding):
    assert_equals_reference(way, *make(*lengths, padding=padding))


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_log_sum_exp_equals_the_reference(way, lengths):
    q, k, v, segments = make(*lengths, padding=2)
    _, lse = way.forward(q, k, v, segments)
    torch.testing.assert_close(lse, attention_reference(q, k, v, segments)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [CPU, PLAIN], ids=["cpu", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_each_kernel_of_buckets_gives_the_output_and_every_gradient(kernel, masked):
    shapes = (2, 3, 7, 8), (2, 3, 11, 8), (2, 3, 11, 8)
    q, k, v = (normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    real = torch.arange(11) < torch.tensor([[11], [6]])
    bias = torch.zeros(2, 1, 1, 11, dtype=q.dtype).masked_fill(~real[:, None, None], -torch.inf).expand(2, 3, 7, 11)
    bias = bias if masked else None
    scores = q @ k.mT / math.sqrt(8) + (0 if bias is None else bias)
    expected, grad_out = scores.softmax(-1) @ v, normal(2, 3, 7, 8, seed=5)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, bias)
        gradients = kernel.backward(grad_out, q, k, v, out, lse, bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad_out), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_error_is_the_rounding_of_the_dtype(way, dtype, tolerance):
    q, k, v, segments = make([5, 1, 12, 7, 30], padding=3)
    narrow = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    out, gradients = output_and_gradients(way.attention, *narrow, segments)
    expected, expected_gradients = output_and_gradients(reference, *wide, segments)
    for x, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)
    assert way.forward(*narrow, segments)[1].dtype == torch.float32


@pytest.mark.parametrize(
    "given",
    [([12, 0, 6], [8, 5, 0], [3, 20, 0], [6, 10, 3], 20), ([10, 0], [10, 10], [0, 15], [15, 15], 20)],
    ids=["with gaps", "swapped"],
)
def test_segments_may_lie_anywhere_and_in_any_order(way, given):
    assert_equals_reference(way, *make_inputs(20, 30), ranges(*given))


def test_gradients_of_keys_of_several_segments_add_up(way):
    q, k, v = make_inputs(20, 12)
    assert_equals_reference(way, q, k, v, ranges([0, 5, 9], [5, 4, 11], [0, 0, 2], [4, 4, 10], 20))


def test_no_segment_at_all_gives_zeros(way):
    q, k, v = make_inputs(4, 3)
    nowhere = Segments.from_ranges(*[torch.zeros(0, dtype=torch.int64)] * 4, 4, "cpu")
    out, lse = way.forward(q, k, v, nowhere)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert all((x == 0).all() for x in way.backward(out, q, k, v, out, lse, nowhere))


def test_a_rank_without_tokens_gets_an_empty_result(way):
    q, k, v = make_inputs(0, 0)
    out, gradients = output_and_gradients(way.attention, q, k, v, ranges([0], [0], [0], [0], 0))
    assert out.shape == (0, 3, 8) and all(x.shape == (0, 3, 8) for x in gradients)


@pytest.mark.parametrize("lengths", [[13], [6, 7], [2, 11]], ids=str)
def test_the_layout_in_memory_does_not_matter(way, lengths):
    *inputs, segments = make(lengths)
    strided = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    packed = torch.stack([x.detach() for x in inputs], 1).unbind(1)
    expected, expected_gradients = output_and_gradients(way.attention, *inputs, segments)
    for variant in (strided, [x.requires_grad_() for x in packed]):
        out, gradients = output_and_gradients(way.attention, *variant, segments)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-13, atol=1e-13)
    ones = torch.autograd.grad(way.attention(*inputs, segments).sum(), inputs)  # a gradient with strides of 0
    torch.testing.assert_close(
        ones, torch.autograd.grad(reference(*inputs, segments).sum(), inputs), rtol=1e-12, atol=1e-12
    )


def test_parts_of_the_keys_merge_to_the_whole(way):
    q, k, v = make_inputs(9, 30)
    whole = way.forward(q, k, v, ranges([0], [9], [0], [30], 9))
    parts = [way.forward(q, k, v, ranges([0], [9], [a], [b - a], 9)) for a, b in [(0, 3), (3, 19), (19, 30)]]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_partial_attention(out, lse, *part)
    torch.testing.assert_close((out, lse), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("parts", [2, 8, 64])
def test_error_of_merging_in_fp32_does_not_grow_with_the_number_of_parts(parts):
    inputs = [x.detach().float() for x in make_inputs(64, 512)]
    expected, _ = attention_reference(*(x.double() for x in inputs), ranges([0], [64], [0], [512], 64))
    size = 512 // parts
    out, lse = torch.zeros_like(inputs[0]), torch.full((64, 3), -math.inf)
    for start in range(0, 512, size):
        part = attention_forward(*inputs, ranges([0], [64], [start], [size], 64))
        out, lse = merge_partial_attention(out, lse, *part)
    alone, _ = attention_forward(*inputs, ranges([0], [64], [0], [512], 64))
    assert (out.double() - expected).norm() < 1.5 * (alone.double() - expected).norm()


def test_gradients_of_parts_of_the_keys_add_up_to_those_of_the_whole(way):
    q, k, v = make_inputs(9, 30)
    whole, grad_out = ranges([0], [9], [0], [30], 9), normal(9, 3, 8, seed=7)
    out, lse = way.forward(q, k, v, whole)
    expected = way.backward(grad_out, q, k, v, out, lse, whole)
    lse = lse.contiguous()  # it need not lie as this backend leaves it
    parts = [
        way.backward(grad_out, q, k, v, out, lse, ranges([0], [9], [a], [b - a], 9))
        for a, b in [(0, 3), (3, 19), (19, 30)]
    ]
    for i, wanted in enumerate(expected):
        torch.testing.assert_close(sum(part[i] for part in parts), wanted, rtol=1e-13, atol=1e-13)


def test_a_second_run_of_the_same_forward_computes_nothing(monkeypatch):
    q, k, v, segments = make([5, 9], padding=1)
    out, expected = output_and_gradients(attention, q, k, v, segments)
    saved_output = []
    first = attention(q, k, v, segments, saved_output)
    monkeypatch.setattr("megasora.kernels.attention.attention_forward", None)
    for _ in range(2):
        replayed, gradients = output_and_gradients(lambda *args: attention(*args, saved_output), q, k, v, segments)
        assert torch.equal(replayed, out) and all(map(torch.equal, gradients, expected))
    assert first.requires_grad and not any(x.requires_grad for x in saved_output)


def test_recomputed_activations_take_the_attention_from_the_first_run(monkeypatch):
    q, k, v, segments = make([5, 9])
    runs = []
    monkeypatch.setattr(
        "megasora.kernels.attention.attention_forward", lambda *args: runs.append(args) or attention_forward(*args)
    )
    _, expected = output_and_gradients(lambda *args: attention(*args).sin(), q, k, v, segments)
    saved_output = []

    def recomputed(*args):
        return checkpoint(lambda *inner: attention(*inner, saved_output).sin(), *args, use_reentrant=False)

    _, gradients = output_and_gradients(recomputed, q, k, v, segments)
    assert len(runs) == 2 and all(map(torch.equal, gradients, expected))


def test_padding_gives_zeros_and_gets_no_gradient(way):
    q, k, v, segments = make([5, 1, 12], padding=7)
    out, gradients = output_and_gradients(way.attention, q, k, v, segments)
    assert (out[18:] == 0).all() and (out[:18] != 0).all()
    for gradient in gradients:
        assert (gradient[18:] == 0).all()


def test_tokens_with_an_empty_caption_get_zeros_and_no_gradient(way):
    q, k, v, segments = make([4, 9, 6], [3, 0, 2])
    out, (q_gradient, _, _) = output_and_gradients(way.attention, q, k, v, segments)
    assert (out[4:13] == 0).all() and (q_gradient[4:13] == 0).all()
    assert (out[:4] != 0).all() and (out[13:] != 0).all()


def test_a_pack_without_any_key_gives_zeros(way):
    q, k, v, segments = make([4, 3], [0, 0], padding=2)
    assert (way.attention(q, k, v, segments) == 0).all() and (reference(q, k, v, segments) == 0).all()


def test_a_segment_does_not_see_its_neighbours(way):
    q, k, v, segments = make([5, 6, 5])
    before = way.attention(q, k, v, segments)
    with torch.no_grad():
        for x in (q, k, v):
            x[5:11] += 1.0
    after = way.attention(q, k, v, segments)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[11:], after[11:])
    assert not torch.isclose(before[5:11], after[5:11]).any()


def test_a_segment_of_one_token_returns_its_value(way):
    q, k, v, segments = make([1, 4, 1])
    out = way.attention(q, k, v, segments)
    torch.testing.assert_close(out[[0, 5]], v[[0, 5]], rtol=1e-14, atol=1e-14)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, segments = make([5, 3])
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k[:, :2], v[:, :2], segments)
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k, v[:-1], segments)
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.float(), v, segments)
    with pytest.raises(ValueError, match="q has 7 tokens, its segments were made for 8"):
        attention(q[:-1], k, v, segments)
    with pytest.raises(ValueError, match="k has 7 tokens, its segments end at 8"):
        attention(q, k[:-1], v[:-1], segments)
    with pytest.raises(ValueError, match=r"lse is \(3, 8\)"):
        attention_backward(q, q, k, v, q, torch.zeros(3, 8, dtype=q.dtype), segments)
    meta = torch.empty(8, 3, 8, dtype=q.dtype, device="meta")
    with pytest.raises(ValueError, match="q on cpu, k on meta, v on meta"):
        attention(q, meta, meta, segments)


H100, A100, B200 = (9, 0), (8, 0), (10, 0)


@pytest.fixture
def machine(monkeypatch, forget):
    """machine(capability, flash2=version or None, flash3=bool): a GPU, and what is installed."""

    def made(capability, flash2=None, flash3=False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("stand_in") if flash3 else None)
        stand_in = module_of({}, __version__=flash2) if flash2 else None
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in)

    return made


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "expected"),
    [
        (H100, {"flash2": "2.8.3", "flash3": True}, torch.bfloat16, 128, "flash3"),
        (H100, {"flash2": "2.7.0.post2", "flash3": True}, torch.float16, 256, "flash2"),
        (H100, {"flash2": "2.6.3"}, torch.bfloat16, 128, "varlen"),
        (H100, {}, torch.bfloat16, 256, "varlen"),
        (H100, {"flash2": "2.8.3", "flash3": True}, torch.bfloat16, 264, "sdpa"),
        (H100, {"flash2": "2.8.3", "flash3": True}, torch.float32, 64, "sdpa"),
        (H100, {"flash2": "2.8.3", "flash3": True}, torch.bfloat16, 60, "math"),
        (H100, {"flash2": "2.8.3", "flash3": True}, torch.float64, 64, "math"),
        (A100, {"flash2": "2.8.3", "flash3": True}, torch.bfloat16, 128, "flash2"),
        (B200, {"flash3": True}, torch.bfloat16, 128, "varlen"),
        ((7, 5), {"flash2": "2.8.3", "flash3": True}, torch.float16, 128, "math"),
    ],
)
def test_auto_takes_the_fastest_that_can(machine, capability, installed, dtype, head_dim, expected):
    machine(capability, **installed)
    assert automatic(torch.device("cuda", 0), dtype, head_dim) == expected


def test_auto_is_flash_attention_for_cpus_there_and_the_equations_elsewhere(forget):
    assert chosen_backend("auto", torch.empty(1, 1, 60, dtype=torch.float64)) == "sdpa"
    assert chosen_backend("auto", torch.empty(1, 1, 64, device="meta")) == "math"


@pytest.mark.parametrize(
    ("backend", "given", "message"),
    [
        ("flash", {}, "backend='flash' must be auto or one of flash3, flash2, varlen, sdpa, math"),
        ("varlen", {"device": "cpu"}, "no kernel for device cpu; use 'sdpa' or 'auto'"),
        ("sdpa", {"device": "meta"}, "no kernel for device meta; use 'math' or 'auto'"),
        ("varlen", {"dtype": torch.float32}, "it takes bfloat16 and float16, not torch.float32; use 'sdpa'"),
        ("sdpa", {"dtype": torch.float64}, "it takes no float64; use 'math'"),
        ("varlen", {"head_dim": 100}, "head dim 100 must be a multiple of 8; use 'math'"),
        ("varlen", {"head_dim": 320}, "it takes head dims to 256, not 320; use 'sdpa'"),
        ("flash3", {"head_dim": 256}, "it takes head dims to 192, not 256; use 'varlen'"),
        ("flash3", {}, "flash_attn_interface cannot be imported .*; use 'varlen'"),
        ("flash2", {}, "flash_attn is 2.5.8, it needs 2.7 or newer; use 'varlen'"),
        ("flash3", {"capability": A100}, r"it needs compute capability 9, cuda:0 has 8.0; use 'varlen'"),
        ("sdpa", {"capability": (7, 5)}, r"it needs compute capability 8.0, cuda:0 has 7.5; use 'math'"),
    ],
)
def test_a_backend_that_cannot_compute_is_refused_with_the_reason_and_another(machine, backend, given, message):
    machine(given.get("capability", H100), flash2="2.5.8")
    device = torch.device(given.get("device", "cuda:0"))
    q = SimpleNamespace(
        device=device, dtype=given.get("dtype", torch.bfloat16), shape=(4, 2, given.get("head_dim", 64))
    )
    with pytest.raises(ValueError, match=message):
        chosen_backend(backend, q)


def test_a_library_that_is_broken_counts_as_missing(monkeypatch, forget):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "flash_attn_interface":
                raise OSError("undefined symbol")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert library("flash_attn_interface") == "flash_attn_interface cannot be imported (undefined symbol)"


@pytest.mark.parametrize("deterministic", [True, False])
def test_libraries_are_told_to_be_deterministic(way, deterministic):
    q, k, v, segments = make([5, 9], padding=1)
    way.attention(q, k, v, segments, deterministic=deterministic).sum().backward()
    assert way.calls == ([deterministic] if way.name in module.VARLEN else [])


def test_fixed_order_leaves_the_settings_as_they_were():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    for wanted, inside in ((True, (True, False, False)), (False, None)):
        for before in ((False, False), (True, True)):
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            try:
                with pytest.raises(RuntimeError, match="within"), fixed_order(wanted):
                    assert settings() == (inside or (*before, True))
                    raise RuntimeError("within")
                assert settings() == (*before, True)
            finally:
                torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=["flash", "efficient"])
def test_kernels_for_gpus_are_called_by_the_signatures_of_this_pytorch(kernel):
    q, k, v = (torch.empty(2, 3, m, 8, dtype=torch.bfloat16, device="meta") for m in (7, 11, 11))
    out, lse = kernel.forward(q, k, v, None)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    gradients = kernel.backward(out, q, k, v, out, lse, None)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_varlen_is_called_by_the_signatures_of_this_pytorch(monkeypatch):
    monkeypatch.setattr(module, "obstacle", lambda *given: None)
    q, k, v = (torch.empty(m, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for m in (20, 30, 30))
    segments = Segments.from_ranges(*map(torch.tensor, ([12, 6], [8, 5], [3, 9], [6, 3])), 20, "meta")
    out, lse = attention_forward(q, k, v, segments, "varlen")
    assert out.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32
    gradients = torch.autograd.grad(attention(q, k, v, segments, backend="varlen").sum(), (q, k, v))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_tensors_without_numbers_give_shapes():
    q, k, v = (torch.empty(m, 3, 8, device="meta", requires_grad=True) for m in (20, 30, 30))
    segments = Segments.from_ranges(*map(torch.tensor, ([12, 6], [8, 5], [3, 9], [6, 3])), 20, "meta")
    out = attention(q, k, v, segments)
    assert out.shape == q.shape and out.device.type == "meta"
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_code_gives_the_same_and_is_compiled_once_for_all_packs(compiler):
    def block(q, k, v, segments):
        return attention(q.sin(), k * 2, v, segments).cos()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled, compilations = torch.compile(block, backend=counter), []
    for lengths in ([3, 5], [2, 2, 4], [1, 7]):
        *inputs, segments = make(lengths, padding=2)
        out, gradients = output_and_gradients(compiled, *inputs, segments)
        expected, expected_gradients = output_and_gradients(block, *inputs, segments)
        torch.testing.assert_close((out, *gradients), (expected, *expected_gradients), rtol=1e-13, atol=1e-13)
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 3 and compilations[0] > 0


@pytest.fixture
def on_gpu(request):
    """Inputs and segments on a GPU, and the same in float64 on the CPU: gaps, a long and many short segments, queries
    without keys, keys of two segments, padding."""
    backend, dtype = request.param
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    reason = obstacle(backend, torch.device("cuda", 0), dtype, 64)
    if reason is not None:
        pytest.skip(reason)
    given = (
        [10, *range(1500, 2300, 40), 2400],
        [1400, *[33] * 20, 90],
        [0, *range(1500, 2300, 40), 20],
        [1400] + [36] * 20,
    )
    given[3].append(0)
    given[2][5], given[3][5] = 1490, 90  # crosses the keys of others
    given = [torch.tensor(x) for x in given]
    inputs = [x.detach().to("cuda", dtype) for x in make_inputs(2600, 2400, heads=4, head_dim=64)]
    segments = Segments.from_ranges(*given, 2600, "cuda")
    expected = [x.cpu().double().requires_grad_() for x in inputs], Segments.from_ranges(*given, 2600, "cpu")
    return backend, [x.requires_grad_() for x in inputs], segments, expected


each_on_gpu = pytest.mark.parametrize(
    "on_gpu",
    [(name, torch.bfloat16) for name in ("flash3", "flash2", "varlen", "sdpa", "math")] + [("sdpa", torch.float32)],
    indirect=True,
    ids=lambda given: f"{given[0]} {given[1]}".replace("torch.", ""),
)


@pytest.mark.gpu
@each_on_gpu
def test_a_gpu_gives_the_output_and_every_gradient(on_gpu):
    backend, inputs, segments, (wide, wide_segments) = on_gpu
    grad_out = normal(2600, 4, 64, seed=9)
    out = attention(*inputs, segments, backend=backend)
    expected, expected_lse = attention_reference(*wide, wide_segments)
    found = out, *torch.autograd.grad(out, inputs, grad_out.to(out))
    for x, wanted in zip(found, (expected, *torch.autograd.grad(expected, wide, grad_out)), strict=True):
        assert (x.cpu().double() - wanted).norm() < 1e-2 * wanted.norm()
        assert (x[2400:] == 0).all()
    _, lse = attention_forward(*inputs, segments, backend)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@each_on_gpu
def test_gradients_on_a_gpu_have_the_same_bits_at_every_run(on_gpu):
    backend, inputs, segments, _ = on_gpu
    out, lse = attention_forward(*inputs, segments, backend)
    first, *others = (attention_backward(out, *inputs, out, lse, segments, backend) for _ in range(4))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
