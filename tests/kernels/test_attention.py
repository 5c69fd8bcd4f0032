"""Attention within segments: every backend against the reference, in float64.

Libraries that need a GPU are replaced by mocks with their signatures and quirks that compute the equations. So these
tests cover the arguments passed to the libraries and the use of their results.
"""

import functools
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from megasora.kernels import attention_choice, attention_padded, attention_varlen
from megasora.kernels.attention import (
    Segments,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
)
from megasora.kernels.attention_choice import (
    BACKENDS,
    MAX_CUDNN_LENGTHS,
    auto_backend,
    candidates,
    choose,
    notice,
    obstacle,
    resolve_attention_backend,
    selection,
)
from megasora.kernels.attention_padded import CPU, CUDNN, EFFICIENT, FLASH, MATH, deterministic_algorithms
from megasora.kernels.attention_varlen import VARLEN, library
from megasora.kernels.merge_partial_attention import merge_partial_attention

# lengths of the segments' queries and keys; the first pack is self-attention
PACKS = {
    "uneven": ([5, 1, 12, 7, 7, 1, 30], None),
    "one segment": ([17], None),
    "all of one token": ([1, 1, 1], None),
    "longer than the tiles of kernels": ([700, 40], None),
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
    """Asserts the preconditions of the kernels."""
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
    """out and lse [N, L]; for queries without keys lse is inf, as in FlashAttention-2, and out undefined (NaN)."""
    check_call(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    out = torch.full_like(q, math.nan)
    lse = q.new_full(q.shape[1::-1], math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, j in ranges_of(cu_q.tolist(), cu_k.tolist()):
        if j.start < j.stop:
            out_g, lse_g = MATH.forward(*(x.transpose(0, 1)[None] for x in (q[i], k[j], v[j])), None)
            out[i], lse[:, i] = out_g[0].transpose(0, 1), lse_g[0]
    return out, lse


def library_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale=None):
    """dq, dk, dv; undefined (NaN) for queries and keys that are in no segment."""
    check_call(q, k, v, cu_q, cu_k, max_q, max_k, scale)
    assert lse.is_contiguous() and lse.shape == q.shape[1::-1] and out.stride(-1) == grad_out.stride(-1) == 1
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    for i, j in ranges_of(cu_q.tolist(), cu_k.tolist()):
        if j.start < j.stop:
            tensors = (x.transpose(0, 1)[None] for x in (grad_out[i], q[i], k[j], v[j], out[i]))
            gradients = MATH.backward(*tensors, lse[:, i][None], None)
            dq[i], dk[j], dv[j] = (x[0].transpose(0, 1) for x in gradients)
    return dq, dk, dv


def copy_to(outputs, results):
    assert all(x.is_contiguous() for x in outputs)
    for x, y in zip(outputs, results, strict=True):
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
        copy_to((dq, dk, dv), library_backward(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale))
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
        copy_to((dq, dk, dv), library_backward(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale))
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
        tensors = dout, q, k, v, out, softmax_lse, *lengths, dq, dk, dv
        return early["_flash_attn_backward"](*tensors, softmax_scale, is_causal, deterministic=deterministic)[-1]

    return locals()


def flash4(calls):
    """flash_attn.cute.interface of flash-attn-4, of which this project passes the arguments named here."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, return_lse=False,
    ):  # fmt: skip
        assert qv is seqused_q is seqused_k is page_table is None and causal is False and return_lse
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *library_forward(q, k, v, *lengths, softmax_scale), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None,
        seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        calls.append(deterministic)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return library_backward(dout, q, k, v, out, lse, *lengths, softmax_scale)

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


def cudnn(calls, lse_dims):
    """The operators of PyTorch for cuDNN; the log-sum-exp has 3 dims in some versions, 4 in others."""

    def check(q, k, v):
        assert q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[2] > 1 and k.shape[2] > 1
        assert all(x.stride(-1) == 1 and s % 8 == 0 for x in (q, k, v) for s in x.stride()[:-1])

    def _scaled_dot_product_cudnn_attention(
        query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
        scale=None,
    ):  # fmt: skip
        check(query, key, value)
        assert attn_bias is scale is None and compute_log_sumexp and dropout_p == 0.0 and is_causal is False
        out, lse = MATH.forward(query, key, value, None)
        empty = torch.empty(0, dtype=torch.int64)
        lengths = query.shape[2], key.shape[2]
        return out, lse if lse_dims == 3 else lse[..., None], None, None, *lengths, empty, empty, None

    def _scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
        max_q, max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        check(query, key, value)
        assert attn_bias is cum_seq_q is cum_seq_k is scale is None and dropout_p == 0.0 and is_causal is False
        assert (max_q, max_k) == (query.shape[2], key.shape[2]) and out.stride(-1) == grad_out.stride(-1) == 1
        assert logsumexp.is_contiguous() and logsumexp.ndim == lse_dims
        calls.append(False)
        return MATH.backward(grad_out, query, key, value, out, logsumexp.reshape(query.shape[:3]), None)

    return locals()


def module_of(functions, **attributes):
    module = ModuleType("mock")
    vars(module).update(attributes, **{name: f for name, f in functions.items() if name.startswith("_")})
    return module


@pytest.fixture
def fresh_caches():
    """Clears the caches of installed libraries before and after a test."""
    caches = library, obstacle, candidates, attention_padded.cudnn_lse_dims
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


VARIANTS = ("sdpa", "math", "flash4", "flash2", "flash3", "flash3 early", "varlen", "cudnn 3", "cudnn 4")


CPU_OPERATORS = [  # of segments of one token, which cuDNN does not take
    f"_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward")
]


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch, fresh_caches):
    """The functions of one backend; `calls`: the `deterministic` argument of each backward call of a library."""
    name, calls = request.param.split()[0], []
    if name.startswith("flash"):
        functions = {"flash4": flash4, "flash2": flash2, "flash3": flash3, "flash3 early": flash3_early}[request.param](
            calls
        )
        monkeypatch.setitem(sys.modules, "flash_attn", module_of({}, __version__="2.8.3.post1"))
        key = {"flash2": attention_varlen.FLASH2, "flash3": attention_varlen.FLASH3, "flash4": attention_varlen.FLASH4}[
            name
        ]
        monkeypatch.setitem(sys.modules, "flash_attn.cute", module_of({}))
        monkeypatch.setitem(sys.modules, key, module_of(functions))
    if name == "varlen":
        monkeypatch.setattr(attention_varlen, "aten", module_of(varlen(calls)))
    if name == "cudnn":
        operators = vars(module_of(cudnn(calls, int(request.param[-1]))))
        operators |= {name: getattr(torch.ops.aten, name) for name in CPU_OPERATORS}
        monkeypatch.setattr(attention_padded, "aten", SimpleNamespace(**operators))
    if name in VARLEN or name == "cudnn":
        monkeypatch.setattr(attention_choice, "obstacle", lambda *_: None)
    return SimpleNamespace(
        name=name,
        calls=calls,
        attention=functools.partial(attention, backend=name),
        forward=functools.partial(attention_forward, backend=name),
        backward=functools.partial(attention_backward, backend=name),
    )


def assert_equals_reference(variant, q, k, v, segments, tolerance=1e-12):
    out, gradients = output_and_gradients(variant.attention, q, k, v, segments)
    expected, expected_gradients = output_and_gradients(reference, q, k, v, segments)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


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
def test_output_and_every_gradient_equal_the_reference(variant, lengths, padding):
    assert_equals_reference(variant, *make(*lengths, padding=padding))


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_log_sum_exp_equals_the_reference(variant, lengths):
    q, k, v, segments = make(*lengths, padding=2)
    _, lse = variant.forward(q, k, v, segments)
    torch.testing.assert_close(lse, attention_reference(q, k, v, segments)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [CPU, MATH], ids=["cpu", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_each_bucket_kernel_gives_the_output_and_every_gradient(kernel, masked):
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
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad_out), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_error_is_the_rounding_of_the_dtype(variant, dtype, tolerance):
    q, k, v, segments = make([5, 1, 12, 7, 30], padding=3)
    narrow = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    out, gradients = output_and_gradients(variant.attention, *narrow, segments)
    expected, expected_gradients = output_and_gradients(reference, *wide, segments)
    for x, expected_gradient in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), expected_gradient, rtol=tolerance, atol=tolerance)
    assert variant.forward(*narrow, segments)[1].dtype == torch.float32


@pytest.mark.parametrize(
    "columns",
    [([12, 0, 6], [8, 5, 0], [3, 20, 0], [6, 10, 3], 20), ([10, 0], [10, 10], [0, 15], [15, 15], 20)],
    ids=["with gaps", "swapped"],
)
def test_segments_may_be_anywhere_and_in_any_order(variant, columns):
    assert_equals_reference(variant, *make_inputs(20, 30), ranges(*columns))


def test_gradients_of_keys_of_several_segments_add_up(variant):
    q, k, v = make_inputs(20, 12)
    assert_equals_reference(variant, q, k, v, ranges([0, 5, 9], [5, 4, 11], [0, 0, 2], [4, 4, 10], 20))


def test_no_segment_at_all_gives_zeros(variant):
    q, k, v = make_inputs(4, 3)
    no_segments = Segments.from_ranges(*[torch.zeros(0, dtype=torch.int64)] * 4, 4, "cpu")
    out, lse = variant.forward(q, k, v, no_segments)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert all((x == 0).all() for x in variant.backward(out, q, k, v, out, lse, no_segments))


def test_a_rank_without_tokens_gets_an_empty_result(variant):
    q, k, v = make_inputs(0, 0)
    out, gradients = output_and_gradients(variant.attention, q, k, v, ranges([0], [0], [0], [0], 0))
    assert out.shape == (0, 3, 8) and all(x.shape == (0, 3, 8) for x in gradients)


@pytest.mark.parametrize("lengths", [[13], [6, 7], [2, 11]], ids=str)
def test_the_memory_layout_of_the_inputs_does_not_matter(variant, lengths):
    *inputs, segments = make(lengths)
    strided = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    packed = torch.stack([x.detach() for x in inputs], 1).unbind(1)
    expected, expected_gradients = output_and_gradients(variant.attention, *inputs, segments)
    for tensors in (strided, [x.requires_grad_() for x in packed]):
        out, gradients = output_and_gradients(variant.attention, *tensors, segments)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-13, atol=1e-13)
    ones = torch.autograd.grad(variant.attention(*inputs, segments).sum(), inputs)  # a gradient with strides of 0
    torch.testing.assert_close(
        ones, torch.autograd.grad(reference(*inputs, segments).sum(), inputs), rtol=1e-12, atol=1e-12
    )


def test_attention_to_shards_of_the_keys_merges_to_attention_to_all(variant):
    q, k, v = make_inputs(9, 30)
    all_keys = variant.forward(q, k, v, ranges([0], [9], [0], [30], 9))
    parts = [variant.forward(q, k, v, ranges([0], [9], [a], [b - a], 9)) for a, b in [(0, 3), (3, 19), (19, 30)]]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_partial_attention(out, lse, *part)
    torch.testing.assert_close((out, lse), all_keys, rtol=1e-13, atol=1e-13)


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
    assert (out.double() - expected).norm() < 2 * (alone.double() - expected).norm()  # 1.6 on some CPUs


def test_gradients_of_shards_of_the_keys_add_up_to_those_of_all(variant):
    q, k, v = make_inputs(9, 30)
    all_keys, grad_out = ranges([0], [9], [0], [30], 9), normal(9, 3, 8, seed=7)
    out, lse = variant.forward(q, k, v, all_keys)
    expected = variant.backward(grad_out, q, k, v, out, lse, all_keys)
    lse = lse.contiguous()  # any memory layout is accepted
    parts = [
        variant.backward(grad_out, q, k, v, out, lse, ranges([0], [9], [a], [b - a], 9))
        for a, b in [(0, 3), (3, 19), (19, 30)]
    ]
    for i, expected_gradient in enumerate(expected):
        torch.testing.assert_close(sum(part[i] for part in parts), expected_gradient, rtol=1e-13, atol=1e-13)


def test_a_second_call_reuses_the_saved_output(monkeypatch):
    q, k, v, segments = make([5, 9], padding=1)
    out, expected = output_and_gradients(attention, q, k, v, segments)
    saved_output = []
    first = attention(q, k, v, segments, saved_output)
    monkeypatch.setattr("megasora.kernels.attention.attention_forward", None)
    for _ in range(2):
        replayed, gradients = output_and_gradients(lambda *args: attention(*args, saved_output), q, k, v, segments)
        assert torch.equal(replayed, out) and all(map(torch.equal, gradients, expected))
    assert first.requires_grad and not any(x.requires_grad for x in saved_output)


def test_activation_recompute_reuses_the_saved_output(monkeypatch):
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


def test_padding_gives_zeros_and_gets_no_gradient(variant):
    q, k, v, segments = make([5, 1, 12], padding=7)
    out, gradients = output_and_gradients(variant.attention, q, k, v, segments)
    assert (out[18:] == 0).all() and (out[:18] != 0).all()
    for gradient in gradients:
        assert (gradient[18:] == 0).all()


def test_tokens_with_an_empty_caption_get_zeros_and_no_gradient(variant):
    q, k, v, segments = make([4, 9, 6], [3, 0, 2])
    out, (q_gradient, _, _) = output_and_gradients(variant.attention, q, k, v, segments)
    assert (out[4:13] == 0).all() and (q_gradient[4:13] == 0).all()
    assert (out[:4] != 0).all() and (out[13:] != 0).all()


def test_a_pack_without_any_key_gives_zeros(variant):
    q, k, v, segments = make([4, 3], [0, 0], padding=2)
    assert (variant.attention(q, k, v, segments) == 0).all() and (reference(q, k, v, segments) == 0).all()


def test_segments_do_not_attend_to_each_other(variant):
    q, k, v, segments = make([5, 6, 5])
    before = variant.attention(q, k, v, segments)
    with torch.no_grad():
        for x in (q, k, v):
            x[5:11] += 1.0
    after = variant.attention(q, k, v, segments)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[11:], after[11:])
    assert not torch.isclose(before[5:11], after[5:11]).any()


def test_a_segment_of_one_token_returns_its_value(variant):
    q, k, v, segments = make([1, 4, 1])
    out = variant.attention(q, k, v, segments)
    torch.testing.assert_close(out[[0, 5]], v[[0, 5]], rtol=1e-14, atol=1e-14)


def test_shapes_that_do_not_match_raise():
    q, k, v, segments = make([5, 3])
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k[:, :2], v[:, :2], segments)
    with pytest.raises(ValueError, match="equal N and K"):
        attention(q, k, v[:-1], segments)
    with pytest.raises(ValueError, match="same dtype"):
        attention(q, k.float(), v, segments)
    with pytest.raises(ValueError, match="q has 7 tokens, its segments 8 queries"):
        attention(q[:-1], k, v, segments)
    with pytest.raises(ValueError, match="k has 7 tokens, its segments end at 8"):
        attention(q, k[:-1], v[:-1], segments)
    with pytest.raises(ValueError, match=r"lse \(3, 8\) must be \(8, 3\)"):
        attention_backward(q, q, k, v, q, torch.zeros(3, 8, dtype=q.dtype), segments)
    meta = torch.empty(8, 3, 8, dtype=q.dtype, device="meta")
    with pytest.raises(ValueError, match="q on cpu, k on meta, v on meta"):
        attention(q, meta, meta, segments)


H100, A100, B200 = (9, 0), (8, 0), (10, 0)


@pytest.fixture
def machine(monkeypatch, fresh_caches):
    """machine(capability, flash2=version or None, flash3=bool, flash4=bool, cudnn=version or None): mocks a GPU of 132
    multiprocessors and its libraries."""

    def mock(capability, flash2=None, flash3=False, flash4=False, cudnn=None):
        for name in ("flash_attn.cute", attention_varlen.FLASH4):
            monkeypatch.setitem(sys.modules, name, ModuleType("mock") if flash4 else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(attention_choice, "num_processors", lambda device: 132)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("mock") if flash3 else None)
        mocked_module = module_of({}, __version__=flash2) if flash2 else None
        package = mocked_module or (
            ModuleType("mock") if flash4 else None
        )  # flash-attn-4 is a part of the same package
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", mocked_module)

    return mock


def queries_on(device, dtype=torch.bfloat16, head_dim=128, heads=12):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(4, heads, head_dim))


ALL = {"flash4": True, "flash3": True, "flash2": "2.8.3", "cudnn": 91900}


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "deterministic", "any_order"),
    [
        (H100, ALL, torch.bfloat16, 128, "flash4", "flash4"),
        (H100, ALL, torch.bfloat16, 192, "flash3", "flash3"),
        (H100, ALL, torch.bfloat16, 256, "flash2", "flash3"),  # flash-attn 3 has no deterministic backward of it
        (H100, ALL, torch.bfloat16, 264, "sdpa", "sdpa"),
        (H100, ALL, torch.float32, 64, "sdpa", "sdpa"),
        (H100, ALL, torch.bfloat16, 60, "math", "math"),
        (H100, ALL, torch.float64, 64, "math", "math"),
        (H100, {"cudnn": 91900}, torch.bfloat16, 128, "varlen", "cudnn"),
        (H100, {"cudnn": 90000}, torch.bfloat16, 128, "varlen", "varlen"),
        (H100, {"cudnn": 91900}, torch.bfloat16, 256, "varlen", "varlen"),
        (H100, {"flash2": "2.8.3", "cudnn": 91900}, torch.float16, 64, "flash2", "cudnn"),
        (H100, {"flash2": "2.6.3"}, torch.bfloat16, 128, "varlen", "varlen"),
        (B200, ALL, torch.bfloat16, 128, "flash4", "flash4"),
        (B200, {**ALL, "flash4": False}, torch.bfloat16, 128, "flash2", "cudnn"),
        (B200, {"flash3": True}, torch.bfloat16, 128, "varlen", "varlen"),
        (A100, ALL, torch.bfloat16, 128, "flash2", "flash2"),
        (A100, {"flash4": True, "cudnn": 91900}, torch.bfloat16, 128, "varlen", "varlen"),
        ((12, 0), ALL, torch.bfloat16, 128, "flash2", "flash2"),
        ((7, 5), ALL, torch.float16, 128, "math", "math"),
    ],
)
def test_auto_takes_the_fastest_that_supports_chip_dtype_head_dim_and_order(
    machine, capability, installed, dtype, head_dim, deterministic, any_order
):
    machine(capability, **installed)
    q = queries_on("cuda:0", dtype, head_dim)
    assert (auto_backend(q), auto_backend(q, deterministic=False)) == (deterministic, any_order)


def pack_of(lengths, text=None):
    keys = [text] * len(lengths) if text else lengths
    return Segments.from_cu_seqlens(cumulative(lengths), cumulative(keys), sum(lengths), "cpu")


@pytest.mark.parametrize(
    ("installed", "segments", "heads", "deterministic", "expected"),
    [
        (ALL, pack_of([36_864], text=20), 12, True, "flash2"),  # 12 programs for 132 multiprocessors
        (ALL, pack_of([36_864], text=20), 12, False, "flash2"),
        (ALL, pack_of([36_864], text=512), 40, True, "flash4"),
        (ALL, pack_of([4_608] * 8, text=20), 12, True, "flash4"),
        ({"cudnn": 91900}, pack_of([36_864], text=20), 12, False, "varlen"),
        ({"cudnn": 91900}, pack_of([36_864]), 12, False, "cudnn"),
        ({"cudnn": 91900}, pack_of([36_864]), 12, True, "varlen"),
        ({"cudnn": 91900}, pack_of([29_184] + [128] * 60), 12, False, "cudnn"),
        ({"cudnn": 91900}, pack_of([1000 + 8 * i for i in range(MAX_CUDNN_LENGTHS + 1)]), 12, False, "varlen"),
        ({}, pack_of([0, 0]), 12, False, "varlen"),
    ],
)
def test_auto_considers_the_lengths_of_the_pack(machine, installed, segments, heads, deterministic, expected):
    machine(H100, **installed)
    q = queries_on("cuda:0", heads=heads)
    assert resolve_attention_backend("auto", q, segments, deterministic) == expected
    assert auto_backend(q, segments, deterministic) == expected  # from the first choice
    assert resolve_attention_backend("varlen", q, segments, deterministic) == "varlen"


def test_few_keys_never_lead_to_attention_with_padding():
    assert choose(("flash4", "sdpa", "math"), pack_of([8], text=2), 1, 132) == "flash4"


@pytest.mark.parametrize(
    ("capability", "installed", "properties", "deterministic", "parts"),
    [
        (H100, {"flash4": True}, {}, True, []),
        (H100, {"flash3": True}, {}, True, []),
        (A100, {}, {}, True, []),
        (H100, {}, {"head_dim": 256}, True, []),
        (H100, {}, {}, True, ["FlashAttention-2 (varlen)", "pip install --pre flash-attn-4"]),
        (H100, {"cudnn": 91900}, {}, True, ["FlashAttention-2 (varlen)", "pip install --pre flash-attn-4"]),
        (H100, {"cudnn": 91900}, {}, False, ["cuDNN for packs of up to 4", "pip install --pre flash-attn-4"]),
        (H100, ALL, {"dtype": torch.float32}, True, ["memory-efficient", "torch.float32; use run.dtype=bfloat16"]),
        (H100, ALL, {"head_dim": 320}, True, ["memory-efficient", "up to 256, not 320; change model.heads"]),
        (
            H100,
            ALL,
            {"head_dim": 60},
            True,
            ["plain matrix products", "60 must be a multiple of 8; change model.heads"],
        ),
        ((7, 5), {}, {"dtype": torch.float16}, True, ["plain matrix products", "compute capability 8.0"]),
    ],
)
def test_a_slow_choice_of_auto_is_reported_with_the_remedy(
    machine, capability, installed, properties, deterministic, parts
):
    machine(capability, **installed)
    q = queries_on("cuda:0", **properties)
    text = notice(q.device, q.dtype, q.shape[-1], deterministic)
    assert bool(text) == bool(parts) and all(part in text for part in parts), text
    assert notice(torch.device("cpu"), q.dtype, q.shape[-1], deterministic) == ""
    queries = q.device, q.dtype, q.shape[-1], deterministic
    assert selection("auto", *queries) == (auto_backend(q, deterministic=deterministic), text)
    assert selection("math", *queries) == ("math", "")


def test_auto_is_sdpa_on_cpus_and_math_on_other_devices(fresh_caches):
    assert resolve_attention_backend("auto", torch.empty(1, 1, 60, dtype=torch.float64)) == "sdpa"
    assert resolve_attention_backend("auto", torch.empty(1, 1, 64, device="meta")) == "math"


@pytest.mark.parametrize(
    ("backend", "properties", "message"),
    [
        ("flash", {}, f"backend='flash' must be auto or one of {', '.join(BACKENDS)}"),
        ("varlen", {"device": "cpu"}, "no kernel for device cpu; use 'sdpa' or 'auto'"),
        ("sdpa", {"device": "meta"}, "no kernel for device meta; use 'math' or 'auto'"),
        ("varlen", {"dtype": torch.float32}, "it takes bfloat16 and float16, not torch.float32; use 'sdpa'"),
        ("sdpa", {"dtype": torch.float64}, "it takes no float64; use 'math'"),
        ("varlen", {"head_dim": 100}, "head dim 100 must be a multiple of 8; use 'math'"),
        ("varlen", {"head_dim": 320}, "it takes head dims up to 256, not 320; use 'sdpa'"),
        ("flash3", {"head_dim": 256}, "up to 192 with a deterministic backward pass, not 256; use 'varlen'"),
        ("flash4", {"head_dim": 256}, "it takes head dims up to 128, not 256; use 'varlen'"),
        ("cudnn", {}, "its backward pass has no fixed order of sums; it needs model.deterministic=false; use 'varlen'"),
        ("flash3", {}, "flash_attn_interface cannot be imported .*; use 'varlen'"),
        ("flash2", {}, "flash_attn is 2.5.8, it needs 2.7 or newer; use 'varlen'"),
        ("flash3", {"capability": A100}, r"it needs compute capability 9, cuda:0 has 8.0; use 'varlen'"),
        ("sdpa", {"capability": (7, 5)}, r"it needs compute capability 8.0, cuda:0 has 7.5; use 'math'"),
    ],
)
def test_an_unsupported_backend_raises_with_the_reason_and_an_alternative(machine, backend, properties, message):
    machine(properties.get("capability", H100), flash2="2.5.8")
    q = queries_on(
        properties.get("device", "cuda:0"), properties.get("dtype", torch.bfloat16), properties.get("head_dim", 64)
    )
    with pytest.raises(ValueError, match=message):
        resolve_attention_backend(backend, q)
    with pytest.raises(ValueError, match=message):
        selection(backend, q.device, q.dtype, q.shape[-1])


def test_a_broken_library_counts_as_missing(monkeypatch, fresh_caches):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "flash_attn_interface":
                raise OSError("undefined symbol")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert library("flash_attn_interface") == "flash_attn_interface cannot be imported (undefined symbol)"


@pytest.mark.parametrize("deterministic", [True, False])
def test_libraries_receive_the_deterministic_flag(variant, deterministic):
    q, k, v, segments = make([5, 9], padding=1)
    variant.attention(q, k, v, segments, deterministic=deterministic).sum().backward()
    assert variant.calls == ([deterministic] if variant.name in VARLEN else [False, False] * (variant.name == "cudnn"))


def test_deterministic_algorithms_restores_the_settings():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    for enabled, inside in ((True, (True, False, False)), (False, None)):
        for previous in ((False, False), (True, True)):
            torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
            try:
                with pytest.raises(RuntimeError, match="within"), deterministic_algorithms(enabled):
                    assert settings() == (inside or (*previous, True))
                    raise RuntimeError("within")
                assert settings() == (*previous, True)
            finally:
                torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT, CUDNN], ids=["flash", "efficient", "cudnn"])
def test_gpu_kernels_match_the_signatures_of_this_pytorch(kernel):
    q, k, v = (torch.empty(2, 3, m, 8, dtype=torch.bfloat16, device="meta") for m in (7, 11, 11))
    out, lse = kernel.forward(q, k, v, None)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    gradients = kernel.backward(out, q, k, v, out, lse, None)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_varlen_matches_the_signatures_of_this_pytorch(monkeypatch):
    monkeypatch.setattr(attention_choice, "obstacle", lambda *_: None)
    q, k, v = (torch.empty(m, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for m in (20, 30, 30))
    segments = Segments.from_ranges(*map(torch.tensor, ([12, 6], [8, 5], [3, 9], [6, 3])), 20, "meta")
    out, lse = attention_forward(q, k, v, segments, "varlen")
    assert out.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32
    gradients = torch.autograd.grad(attention(q, k, v, segments, backend="varlen").sum(), (q, k, v))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_meta_tensors_give_shapes():
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
    """Inputs and segments on a GPU, and the same in float64 on the CPU: gaps, one long and many short segments, queries
    without keys, keys in two segments, padding."""
    backend, dtype = request.param
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    reason = obstacle(backend, torch.device("cuda", 0), dtype, 64, backend != "cudnn")
    if reason is not None:
        pytest.skip(reason)
    columns = (
        [10, *range(1500, 2300, 40), 2400],
        [1400, *[33] * 20, 90],
        [0, *range(1500, 2300, 40), 20],
        [1400] + [36] * 20,
    )
    columns[3].append(0)
    columns[2][5], columns[3][5] = 1490, 90  # overlaps the keys of other segments
    columns = [torch.tensor(x) for x in columns]
    inputs = [x.detach().to("cuda", dtype) for x in make_inputs(2600, 2400, heads=4, head_dim=64)]
    segments = Segments.from_ranges(*columns, 2600, "cuda")
    expected = [x.cpu().double().requires_grad_() for x in inputs], Segments.from_ranges(*columns, 2600, "cpu")
    return backend, [x.requires_grad_() for x in inputs], segments, expected


GPU_CASES = [(name, torch.bfloat16) for name in BACKENDS] + [("sdpa", torch.float32)]


def each_on_gpu(cases):
    ids = [f"{name} {dtype}".replace("torch.", "") for name, dtype in cases]
    return pytest.mark.parametrize("on_gpu", cases, indirect=True, ids=ids)


@pytest.mark.gpu
@each_on_gpu(GPU_CASES)
def test_output_and_every_gradient_on_a_gpu(on_gpu):
    backend, inputs, segments, (wide, wide_segments) = on_gpu
    deterministic, grad_out = backend != "cudnn", normal(2600, 4, 64, seed=9)
    out = attention(*inputs, segments, backend=backend, deterministic=deterministic)
    expected, expected_lse = attention_reference(*wide, wide_segments)
    actual = out, *torch.autograd.grad(out, inputs, grad_out.to(out))
    for x, expected_tensor in zip(actual, (expected, *torch.autograd.grad(expected, wide, grad_out)), strict=True):
        assert (x.cpu().double() - expected_tensor).norm() < 1e-2 * expected_tensor.norm()
        assert (x[2400:] == 0).all()
    _, lse = attention_forward(*inputs, segments, backend, deterministic)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@each_on_gpu([case for case in GPU_CASES if case[0] != "cudnn"])
def test_gradients_on_a_gpu_repeat_bit_by_bit(on_gpu):
    backend, inputs, segments, _ = on_gpu
    out, lse = attention_forward(*inputs, segments, backend)
    first, *others = (attention_backward(out, *inputs, out, lse, segments, backend) for _ in range(4))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
