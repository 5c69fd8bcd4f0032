"""Attention without padding: one call per pack, by the variable-length kernels of flash-attn 3 and 2 and of PyTorch.

See attention.py. These kernels take cumulative lengths without gaps: `Varlen` (segments.py) orders the segments by
their queries and turns gaps into segments without keys. The libraries leave the output and gradient of these undefined;
they are set to 0 here. flash-attn is optional and imported on first use.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from megasora.kernels.attention_padded import aligned, deterministic_algorithms, scatter_all
from megasora.kernels.segments import Segments, TokenIndex, Varlen
from megasora.kernels.varlen_calls import Call, Shape, plan_calls

aten = torch.ops.aten


class VarlenKernel(NamedTuple):
    """Forward and backward of a pack: q [Lq, N, K], k, v [n, N, K] of the keys of a Varlen, lse [N, Lq] in fp32.

    forward(q, k, v, varlen) -> out, lse
    backward(grad_out, q, k, v, out, lse, varlen, deterministic) -> dq, dk, dv
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    divided: bool  # whether the backward is divided into several calls, see varlen_calls.py


@functools.cache
def library(name: str) -> ModuleType | str:
    """An optional module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # any of them, if it is built for another PyTorch
        return f"{name} cannot be imported ({error})"


FLASH4 = "flash_attn.cute.interface"
FLASH3 = "flash_attn_interface"
FLASH2 = "flash_attn.flash_attn_interface"


def flash4_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    lengths = {"cu_seqlens_q": varlen.cu_q, "cu_seqlens_k": varlen.cu_k}
    longest = {"max_seqlen_q": varlen.max_q, "max_seqlen_k": varlen.max_k}
    scale = 1 / math.sqrt(q.shape[-1])
    return library(FLASH4)._flash_attn_fwd(q, k, v, **lengths, **longest, softmax_scale=scale, return_lse=True)[:2]


def flash4_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = {"cu_seqlens_q": varlen.cu_q, "cu_seqlens_k": varlen.cu_k}
    longest = {"max_seqlen_q": varlen.max_q, "max_seqlen_k": varlen.max_k}
    scale = 1 / math.sqrt(q.shape[-1])
    return library(FLASH4)._flash_attn_bwd(
        q, k, v, out, grad_out, lse, **lengths, **longest, softmax_scale=scale, deterministic=deterministic
    )[:3]


def flash3_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    # Positional: all versions agree on the order, and the early ones have no defaults.
    no_cache = (None,) * 4  # k_new, v_new, qv, out
    lengths = varlen.cu_q, varlen.cu_k, None, None, None, varlen.max_q, varlen.max_k
    no_pages = (None,) * 9  # nor rotary embedding, nor fp8 scales
    scale, causal = 1 / math.sqrt(q.shape[-1]), False
    return library(FLASH3)._flash_attn_forward(q, k, v, *no_cache, *lengths, *no_pages, scale, causal)[:2]


def flash3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = like_contiguous(q, k, v)
    lengths = varlen.cu_q, varlen.cu_k, None, None, varlen.max_q, varlen.max_k
    scale, causal = 1 / math.sqrt(q.shape[-1]), False
    library(FLASH3)._flash_attn_backward(
        grad_out, q, k, v, out, lse, *lengths, *gradients, scale, causal, deterministic=deterministic
    )
    return gradients


def flash2_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    scale, causal = 1 / math.sqrt(q.shape[-1]), False
    return library(FLASH2)._flash_attn_varlen_forward(q, k, v, *lengths, 0.0, scale, causal)[:2]


def flash2_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = like_contiguous(q, k, v)
    library(FLASH2)._flash_attn_varlen_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        varlen.cu_q,
        varlen.cu_k,
        varlen.max_q,
        varlen.max_k,
        dropout_p=0.0,
        softmax_scale=1 / math.sqrt(q.shape[-1]),
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=deterministic,
    )
    return gradients


def like_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def torch_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    return aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False)[:2]


def torch_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    with deterministic_algorithms(deterministic):
        return aten._flash_attention_backward(grad_out, q, k, v, out, lse, *lengths, 0.0, False, no_dropout, no_dropout)


VARLEN = {
    "flash4": VarlenKernel(flash4_forward, flash4_backward, divided=False),
    "flash3": VarlenKernel(flash3_forward, flash3_backward, divided=False),
    "flash2": VarlenKernel(flash2_forward, flash2_backward, divided=True),
    "varlen": VarlenKernel(torch_forward, torch_backward, divided=True),
}


def varlen_forward(
    kernel: VarlenKernel, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen | None
) -> tuple[Tensor, Tensor]:
    if varlen is None:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    out, lse = kernel.forward(aligned(q), aligned(varlen.keys.gather(k)), aligned(varlen.keys.gather(v)), varlen)
    if varlen.keyless is not None:  # undefined in the libraries
        out.index_fill_(0, varlen.keyless, 0.0)
        lse.index_fill_(1, varlen.keyless, -math.inf)
    return out, lse.T


def varlen_backward(
    kernel: VarlenKernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if segments.varlen is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    calls, sum_dtype = backward_calls(kernel, q, segments, deterministic), k.dtype
    if any(call.varlen.keys.has_duplicates for call in calls):  # gradients of shared keys are summed in fp32
        sum_dtype = torch.promote_types(k.dtype, torch.float32)
    dqs, dks, dvs = [], [], []
    for queries, varlen in calls or (Call(TokenIndex(len(q), 0, None, False), segments.varlen),):
        grad_part, q_part, out_part, lse_part = (queries.gather(x) for x in (grad_out, q, out, lse))
        k_part, v_part = varlen.keys.gather(k), varlen.keys.gather(v)
        inputs = (aligned(x) for x in (grad_part, q_part, k_part, v_part, out_part))
        dq, dk, dv = kernel.backward(*inputs, lse_part.T.contiguous(), varlen, deterministic)
        if varlen.keyless is not None:
            dq.index_fill_(0, varlen.keyless, 0.0)
        dqs.append((queries, dq))
        dks.append((varlen.keys, dk.to(sum_dtype)))
        dvs.append((varlen.keys, dv.to(sum_dtype)))
    dk, dv = (scatter_all(parts, x.to(sum_dtype), 0.0, deterministic).to(x.dtype) for parts, x in ((dks, k), (dvs, v)))
    return scatter_all(dqs, q, 0.0, deterministic), dk, dv


def backward_calls(kernel: VarlenKernel, q: Tensor, segments: Segments, deterministic: bool) -> tuple[Call, ...]:
    """`plan_calls` for queries like `q`, computed once per pack; empty: one call for all segments."""
    if not kernel.divided or q.device.type == "meta":
        return ()
    shape = Shape(q.shape[1], num_processors(q.device), deterministic)
    if shape not in segments.plans:
        segments.plans[shape] = plan_calls(segments, shape)
    return segments.plans[shape]


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, on which stand-ins of the kernels run in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def import_error(name: str) -> str | None:
    """Why the module cannot be imported; None if it can."""
    module = library(name)
    return module if isinstance(module, str) else None


def version_error(name: str, oldest: tuple[int, int]) -> str | None:
    """Why the version of the module is not supported; None if it is."""
    version = library(name).__version__
    is_old = tuple(map(int, version.split(".")[:2])) < oldest
    return f"{name} is {version}, it needs {oldest[0]}.{oldest[1]} or newer" if is_old else None
