"""A step of AdamW [Loshchilov & Hutter, arXiv 1711.05101] over flat tensors, with all that is done beside it, in place:

    g   = factor grad                                     clipping; `factor` is computed on the device
    w   = (1 - lr weight_decay) w
    m   = m + (1 - beta1) (g - m)
    v   = beta2 v + (1 - beta2) g^2
    w   = w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)          t = number + 1
    a   = a + weight (w - a)                              for each average a of the weights
    out = w                                               in the dtype of the computation

One pass over memory; apart, the same are five, each of which loads and stores again what the one before it had at hand.
Least traffic per element, with fp32 gradients, one average and a bf16 output: w, m, v and a loaded and stored, grad
loaded, out stored: 38 bytes. `apply`, a flag on the device, decides whether anything is stored: a step that is not
taken, because its gradients are not finite, needs no decision of the host.

`sum_of_squares` is the norm's part: a fixed order of sums, in two levels, so that a norm repeats bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import LaunchConfig, cdiv, check_device, launch_config, resolve_backend

MAX_AVERAGES = 4  # that one step takes along
CHUNK = 1 << 16  # elements that the PyTorch version computes at once: they stay in the cache of a CPU core

# "any" is the default
STEP_LAUNCH = {"any": LaunchConfig(tile_elements=1024, elements_per_thread=4)}  # 16 bytes of fp32 a thread
SQUARES_LAUNCH = {"any": LaunchConfig(tile_elements=2048, elements_per_thread=16)}
TILES_PER_PROGRAM = 16  # of sum_of_squares


class AdamWRule(NamedTuple):
    """The numbers of a step. None of them makes a kernel compile again."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    number: int  # steps so far

    @property
    def step_size(self) -> float:
        """lr / (1 - beta1^t)"""
        return self.lr / (1 - self.beta1 ** (self.number + 1))

    @property
    def root_correction(self) -> float:
        """sqrt(1 - beta2^t)"""
        return math.sqrt(1 - self.beta2 ** (self.number + 1))


class Averages(NamedTuple):
    """Averages of the weights, and the weight that the new weights have in each."""

    tensors: Sequence[Tensor] = ()
    weights: Sequence[float] = ()


NO_AVERAGES = Averages()


def adamw_reference(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, rule: AdamWRule, factor: Tensor | None, averages: Averages,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(w, m, v, *averages, out) after the step, each a new tensor: the equations, in the dtype of `w`."""
    g = grad.to(w.dtype) if factor is None else grad.to(w.dtype) * factor
    m = m + (1 - rule.beta1) * (g - m)
    v = rule.beta2 * v + (1 - rule.beta2) * g * g
    w = (1 - rule.lr * rule.weight_decay) * w - rule.step_size * m / (v.sqrt() / rule.root_correction + rule.eps)
    after = (a + weight * (w - a) for a, weight in zip(averages.tensors, averages.weights, strict=True))
    return w, m, v, *after, w.to(out_dtype)


# ---------------------------------------------------------------------- PyTorch


def step_torch(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, rule: AdamWRule, factor: Tensor | None, averages: Averages,
    out: Tensor | None,
) -> None:  # fmt: skip
    """Chunk by chunk, so that what one operation has stored is in the cache of the next one."""
    number = torch.full((), rule.number + 1, dtype=torch.float32, device=w.device)
    for start in range(0, w.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        g = grad[part].to(w.dtype)
        g = g if factor is None else g * factor
        torch._fused_adamw_(
            [w[part]], [g], [m[part]], [v[part]], [], [number], lr=rule.lr, beta1=rule.beta1, beta2=rule.beta2,
            weight_decay=rule.weight_decay, eps=rule.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        for average, weight in zip(averages.tensors, averages.weights, strict=True):
            average[part].lerp_(w[part], weight)
        if out is not None:
            out[part].copy_(w[part])


def guarded_step_torch(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, rule: AdamWRule, factor: Tensor | None, apply: Tensor | None,
    averages: Averages, out: Tensor | None,
) -> None:  # fmt: skip
    """`step_torch` where `apply` is True. On a GPU nothing waits for the flag: all is computed, and put back."""
    if apply is None or apply.device.type == "cpu":
        if apply is None or apply:
            step_torch(w, m, v, grad, rule, factor, averages, out)
        return
    changed = [x for x in (w, m, v, *averages.tensors, out) if x is not None]
    before = [x.clone() for x in changed]
    step_torch(w, m, v, grad, rule, factor, averages, out)
    for x, old in zip(changed, before, strict=True):
        torch.where(apply, x, old, out=x)


def sum_of_squares_torch(x: Tensor) -> Tensor:
    norms = torch._foreach_norm(list(x.split(CHUNK)), 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


# ---------------------------------------------------------------------- Triton


@triton.jit
def average_tile(average, w, weight, offsets, mask):
    """average <- average + weight (w - average)"""
    old = tl.load(average + offsets, mask=mask)
    tl.store(average + offsets, old + weight * (w - old), mask=mask)


@triton.jit
def step_tile(
    w_N, m_N, v_N, grad_N, out_N, average0_N, average1_N, average2_N, average3_N, factor, offsets, mask,
    decay, step_size, beta1_rest, beta2, beta2_rest, root_correction, eps, weight0, weight1, weight2, weight3,
    HAS_OUT: tl.constexpr, AVERAGES: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad_N + offsets, mask=mask).to(tl.float32) * factor
    m = tl.load(m_N + offsets, mask=mask)
    v = tl.load(v_N + offsets, mask=mask)
    w = tl.load(w_N + offsets, mask=mask)
    m = m + beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * (g * g)
    w = decay * w - step_size * (m / (tl.sqrt_rn(v) / root_correction + eps))
    tl.store(m_N + offsets, m, mask=mask)
    tl.store(v_N + offsets, v, mask=mask)
    tl.store(w_N + offsets, w, mask=mask)
    if HAS_OUT:
        tl.store(out_N + offsets, w.to(out_N.dtype.element_ty), mask=mask)
    if AVERAGES > 0:
        average_tile(average0_N, w, weight0, offsets, mask)
    if AVERAGES > 1:
        average_tile(average1_N, w, weight1, offsets, mask)
    if AVERAGES > 2:
        average_tile(average2_N, w, weight2, offsets, mask)
    if AVERAGES > 3:
        average_tile(average3_N, w, weight3, offsets, mask)


@triton.jit(do_not_specialize=["N"])
def adamw_kernel(
    w_N, m_N, v_N, grad_N, out_N, average0_N, average1_N, average2_N, average3_N, factor_1, apply_1, N,
    decay, step_size, beta1_rest, beta2, beta2_rest, root_correction, eps, weight0, weight1, weight2, weight3,
    HAS_FACTOR: tl.constexpr, HAS_APPLY: tl.constexpr, HAS_OUT: tl.constexpr, AVERAGES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A program has one tile. Only that of the end has a mask: with one, loads of unknown N would not be wide."""
    first = tl.program_id(0).to(tl.int64) * TILE
    offsets = first + tl.arange(0, TILE)
    factor = 1.0
    if HAS_FACTOR:
        factor = tl.load(factor_1)
    is_applied = True
    if HAS_APPLY:
        is_applied = tl.load(apply_1) != 0
    if is_applied:
        if first + TILE <= N:
            step_tile(
                w_N, m_N, v_N, grad_N, out_N, average0_N, average1_N, average2_N, average3_N, factor, offsets, None,
                decay, step_size, beta1_rest, beta2, beta2_rest, root_correction, eps,
                weight0, weight1, weight2, weight3, HAS_OUT, AVERAGES,
            )  # fmt: skip
        else:
            step_tile(
                w_N, m_N, v_N, grad_N, out_N, average0_N, average1_N, average2_N, average3_N, factor, offsets,
                offsets < N, decay, step_size, beta1_rest, beta2, beta2_rest, root_correction, eps,
                weight0, weight1, weight2, weight3, HAS_OUT, AVERAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def sum_of_squares_kernel(x_N, partial_P, N, TILES: tl.constexpr, TILE: tl.constexpr):
    """A program sums TILES tiles; the tree of tl.sum and the order of programs do not depend on the device's load."""
    first = tl.program_id(0).to(tl.int64) * (TILES * TILE)
    total = tl.zeros([TILE], tl.float32)
    if first + TILES * TILE <= N:
        for tile in range(TILES):
            x = tl.load(x_N + first + tile * TILE + tl.arange(0, TILE)).to(tl.float32)
            total += x * x
    else:
        for tile in range(TILES):
            offsets = first + tile * TILE + tl.arange(0, TILE)
            x = tl.load(x_N + offsets, mask=offsets < N, other=0.0).to(tl.float32)
            total += x * x
    tl.store(partial_P + tl.program_id(0), tl.sum(total, 0))


def step_triton(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, rule: AdamWRule, factor: Tensor | None, apply: Tensor | None,
    averages: Averages, out: Tensor | None,
) -> None:  # fmt: skip
    config = launch_config(STEP_LAUNCH, w.device)
    unused = MAX_AVERAGES - len(averages.tensors)
    adamw_kernel[(cdiv(w.numel(), config.tile_elements),)](
        w, m, v, grad, w if out is None else out, *averages.tensors, *[w] * unused,
        w if factor is None else factor, w if apply is None else apply.view(torch.uint8), w.numel(),
        1 - rule.lr * rule.weight_decay, rule.step_size, 1 - rule.beta1, rule.beta2, 1 - rule.beta2,
        rule.root_correction, rule.eps, *averages.weights, *[0.0] * unused,
        HAS_FACTOR=factor is not None, HAS_APPLY=apply is not None, HAS_OUT=out is not None,
        AVERAGES=len(averages.tensors), TILE=config.tile_elements, num_warps=config.num_warps(),
    )  # fmt: skip


def sum_of_squares_triton(x: Tensor) -> Tensor:
    config = launch_config(SQUARES_LAUNCH, x.device)
    programs = cdiv(x.numel(), TILES_PER_PROGRAM * config.tile_elements)
    partial_P = torch.empty(programs, dtype=torch.float32, device=x.device)
    sum_of_squares_kernel[(programs,)](
        x, partial_P, x.numel(), TILES_PER_PROGRAM, config.tile_elements, num_warps=config.num_warps()
    )
    return partial_P.sum(dtype=torch.float64)


# ---------------------------------------------------------------------- public


@torch.no_grad()
def adamw_(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    rule: AdamWRule,
    factor: Tensor | None = None,
    apply: Tensor | None = None,
    averages: Averages = NO_AVERAGES,
    out: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW, in place: changes `w`, `m`, `v`, the averages and `out`.

    w, m, v    [N], fp32, contiguous: weights and the moments of their gradients; fp64 with backend="torch"
    grad       [N], fp32 or bf16; is not changed
    factor     0-dim, fp32: what the gradient is multiplied by; None: 1
    apply      0-dim bool: False leaves all tensors as they are, bit for bit; None: True
    averages   of the weights, each [N] in the dtype of `w`; at most MAX_AVERAGES
    out        [N], fp32 or bf16: gets the new weights; None: nothing does

    ValueError for tensors of other shapes or devices, that are not contiguous, and for more averages.
    """
    tensors = {"m": m, "v": v, "grad": grad, "out": out} | {f"average {i}": a for i, a in enumerate(averages.tensors)}
    for name, x in ({"w": w} | tensors).items():
        if x is not None and (x.shape != w.shape or x.ndim != 1 or not x.is_contiguous()):
            raise ValueError(f"{name} is {list(x.shape)}; all must be [N], contiguous, like w, {list(w.shape)}")
    if len(averages.tensors) > MAX_AVERAGES:
        raise ValueError(f"{len(averages.tensors)} averages; at most {MAX_AVERAGES} can be taken along")
    check_device(w=w, factor=factor, apply=apply, **tensors)
    if not w.numel():
        return
    step = step_triton if resolve_backend(backend, w) == "triton" else guarded_step_torch
    step(w, m, v, grad, rule, factor, apply, averages, out)


@torch.no_grad()
def sum_of_squares(x: Tensor, backend: str = "auto") -> Tensor:
    """The sum of x^2, 0-dim, fp64; x [N], contiguous, fp32 or bf16. In a fixed order, so it repeats bit by bit; in the
    kernel, sums of 2^15 elements are fp32."""
    if not x.numel():
        return torch.zeros((), dtype=torch.float64, device=x.device)
    compute = sum_of_squares_triton if resolve_backend(backend, x) == "triton" else sum_of_squares_torch
    return compute(x)
