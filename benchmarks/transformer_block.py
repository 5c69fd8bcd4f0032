"""One transformer block on a GPU, forward and backward: its model FLOPs utilisation (MFU).

The block is the model's own (megasora/model/block.py), in bf16 and in the shapes of Wan: one clip over the whole pack,
a caption of 512 tokens. MFU is the FLOPs of megasora/model/flops.py (three times the forward pass, no recompute)
divided by the time and by the FLOP/s of a large matrix product in the same run. The variants:

    triton     model.kernel_backend=triton
    eager      model.kernel_backend=torch: the same maths in PyTorch
    fp8        as triton, with model.fp8_recipe=rowwise
    compile    torch.compile of a block whose kernels are replaced by their references in plain PyTorch
    product    model.compile=true, which compiles a block with the operations of eager

each with every model.recompute: none keeps all activations, keep_attention the input and self-attention's output, full
the input alone. Attention is the same in all variants. The block's inputs are computed by the rest of the model, once
per pack, and are not timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.gpu import CudaTimer, run_trials
from megasora.batch import VideoBatch
from megasora.build import build_model, patch_dim
from megasora.config import CodecConfig, Config, ModelConfig, RunConfig
from megasora.data.pack import Record, make_batch
from megasora.kernels.adaln import adaln_modulate_reference, gated_residual_adaln_reference
from megasora.kernels.gated_add import gated_add_reference
from megasora.kernels.gelu import gelu_reference
from megasora.kernels.linear import Float8Products, Linear
from megasora.kernels.qk_norm_rope3d import qk_norm_rope3d_reference
from megasora.kernels.rms_norm import rms_norm_reference
from megasora.model import attention as model_attention
from megasora.model import block as model_block
from megasora.model.block import BlockInputs, compile_block, run_block
from megasora.model.flops import pack_flops
from megasora.testing.operations import Angles

SHAPES = {  # width, heads, MLP width
    "Wan-14B": (5120, 40, 13_824),
    "Wan-1.3B": (1536, 12, 8_960),
}
GRIDS = {8_192: (8, 32, 32), 36_864: (36, 32, 32), 73_728: (72, 32, 32)}  # tokens: frames, rows, columns of them
WORDS = 512
RECOMPUTE = ("none", "keep_attention", "full")
KERNELS = {"triton": "triton", "eager": "torch", "fp8": "triton", "compile": "torch", "product": "torch"}
ALTERNATING = (("triton", "eager", "fp8"), ("compile", "product"))
FP8_RECIPE = "rowwise"
REFERENCES: list[tuple[ModuleType | type, str, Callable]] = [  # (module or class, what it calls, reference)
    (model_block, "adaln_modulate", lambda *x, backend, **options: adaln_modulate_reference(*x, **options)),
    (model_block, "gated_residual_adaln", lambda *x, backend, **options: gated_residual_adaln_reference(*x, **options)),
    (model_block, "gated_add", lambda *x, backend: gated_add_reference(*x)),
    (model_block.MLP, "forward", lambda self, x: self.down(gelu_reference(*self.up(x)))),
    (model_attention, "rms_norm", lambda x, weight, eps, *part, backend: rms_norm_reference(x, weight, eps)),
    (model_attention, "qk_norm_rope3d", lambda *x: qk_norm_rope3d_reference(*x[:6])),  # then backend, bias (None)
]


@dataclass(frozen=True)
class Case:
    shape: str
    tokens: int
    recompute: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.tokens} tokens, recompute {self.recompute}"


@dataclass(frozen=True)
class BlockResult:
    shape: str
    tokens: int
    recompute: str
    variant: str
    flops: float  # forward and backward
    ms: float | None  # both passes, median; None: see error
    forward_ms: float | None
    tflop_s: float | None
    mfu: float | None  # of the matrix product's speed
    retained_gib: float | None  # by the forward pass for the backward pass
    error: str | None = None


def block_cases(quick: bool) -> Iterator[Case]:
    """All cases, the most important first."""
    long = (36_864,) if quick else (36_864, 73_728, 8_192)
    for shape in ("Wan-14B",) if quick else SHAPES:
        for tokens in long:
            for recompute in RECOMPUTE[:1] if quick else RECOMPUTE:
                yield Case(shape, tokens, recompute)


def config_of(case: Case, kernels: str, depth: int = 1) -> Config:
    width, heads, hidden = SHAPES[case.shape]
    model = ModelConfig(
        width=width, depth=depth, heads=heads, mlp_ratio=hidden / width, modulation="shared", qk_norm="across_heads",
        text_depth=0, recompute=case.recompute, kernel_backend=kernels,
    )  # fmt: skip
    return Config(run=RunConfig(dtype="bfloat16"), codec=CodecConfig(channels=64), model=model)


def one_clip(config: Config, tokens: int) -> VideoBatch:
    draw = torch.Generator().manual_seed(0)
    patches_LP = torch.randn(tokens, patch_dim(config), generator=draw)
    words = torch.randint(0, 257, (WORDS, 16), generator=draw)
    record = Record(0, patches_LP, GRIDS[tokens], words, (512.0, 512.0, 4.0 * GRIDS[tokens][0], 24.0), "a caption")
    return make_batch([record], tokens)


def block_flops(case: Case) -> int:
    """FLOPs of one block, forward and backward: the difference between a model of two blocks and a model of one."""
    cu_segments, cu_text = torch.tensor([0, case.tokens]), torch.tensor([0, WORDS])
    deep, shallow = (config_of(case, "torch", depth) for depth in (2, 1))
    deep_flops, shallow_flops = (
        pack_flops(config.model, patch_dim(config), cu_segments, cu_text) for config in (deep, shallow)
    )
    return deep_flops - shallow_flops


Step = Callable[[], Tensor]  # the block's forward pass


def build_block(case: Case, kernels: str, device: str) -> tuple[torch.nn.Module, Tensor, BlockInputs]:
    """A block of the model, hidden states and the block's other inputs; tensors are leaves."""
    config = config_of(case, kernels)
    with torch.device(device):
        model = build_model(config, patch_dim(config)).bfloat16().train()
    draw = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02, generator=draw)
    batch = one_clip(config, case.tokens).to(device)
    with torch.no_grad():
        x_LD, inputs = model.embed_patches(batch), model.block_inputs(batch)
    return model.blocks["0"], as_leaf(x_LD), BlockInputs(*map(as_leaf, inputs))


def as_leaf(x: object) -> object:
    return x.detach().requires_grad_() if isinstance(x, Tensor) else x


def forward_step(block: Callable[..., Tensor], x_LD: Tensor, inputs: BlockInputs, recompute: str) -> Step:
    """A function that runs the block's forward pass as the model does."""
    return lambda: run_block(block, x_LD, inputs, recompute)


@contextmanager
def reference_operations() -> Iterator[None]:
    """Replaces the kernels in the model's blocks by their references, which a compiler can trace."""
    with ExitStack() as stack:
        for owner, name, reference in REFERENCES:
            stack.enter_context(mock.patch.object(owner, name, reference))
        yield


def with_angles(inputs: BlockInputs) -> BlockInputs:
    """Replaces the Rope's complex numbers, which a compiler handles badly, by cosines and sines."""
    return inputs._replace(rope=Angles(inputs.rope.cos.contiguous(), inputs.rope.sin.contiguous()))


def build_trial(step: Step, leaves: list[Tensor], retained: list[float]) -> Callable[[CudaTimer], None]:
    def trial(timer: CudaTimer) -> None:
        before = torch.cuda.memory_allocated()
        out_LD = timer.time("forward", step)
        retained.append((torch.cuda.memory_allocated() - before) / 2**30)
        grad_LD = torch.ones_like(out_LD)
        timer.time("backward", lambda: torch.autograd.grad(out_LD, leaves, grad_LD, allow_unused=True))

    return trial


def apply_variant(variant: str, block: torch.nn.Module, inputs: BlockInputs) -> None:
    """Changes the block in place, where the variant is more than its kernels."""
    if variant == "product":
        _ = inputs.rope.rotation  # as VideoDiT.forward does
        compile_block(block)
    if variant == "fp8":
        for module in block.modules():
            if isinstance(module, Linear):
                module.products = Float8Products(FP8_RECIPE)


def build_variant(case: Case, variant: str, retained: list[float]) -> Callable[[CudaTimer], None]:
    block, x_LD, inputs = build_block(case, KERNELS[variant], "cuda")
    leaves = [x for x in (x_LD, *inputs, *block.parameters()) if isinstance(x, Tensor) and x.requires_grad]
    if variant == "compile":
        step = forward_step(torch.compile(block, dynamic=False), x_LD, with_angles(inputs), case.recompute)
        return reference_operations()(build_trial(step, leaves, retained))
    apply_variant(variant, block, inputs)
    return build_trial(forward_step(block, x_LD, inputs, case.recompute), leaves, retained)


def measure_block(case: Case, matmul_tflop_s: float, timer: CudaTimer) -> Iterator[BlockResult]:
    torch._dynamo.reset()
    flops = float(block_flops(case))
    for variants in ALTERNATING:
        retained = {variant: [] for variant in variants}
        trials = {variant: build_variant(case, variant, retained[variant]) for variant in variants}
        for variant, times in run_trials(trials, timer, warm_up=1).items():
            measured = None, None, None, None, None
            if times.error is None:
                ms = sum(times.medians.values())
                tflop_s = flops / ms / 1e9
                measured = ms, times.medians["forward"], tflop_s, tflop_s / matmul_tflop_s, retained[variant][-1]
            yield BlockResult(*dataclasses.astuple(case), variant, flops, *measured, times.error)
        del trials
        torch.cuda.empty_cache()


def block_table(results: list[BlockResult]) -> Table:
    table = Table(
        title="a block, forward and backward, bf16: MFU (ms, GiB retained), relative to the matrix product of this run"
    )
    for name in ("shape", "tokens", "recompute", *KERNELS, "compile / triton, time"):
        table.add_column(name, justify="left" if name in ("shape", "recompute") else "right")
    for shape, tokens, recompute in dict.fromkeys((r.shape, r.tokens, r.recompute) for r in results):
        rows = {r.variant: r for r in results if (r.shape, r.tokens, r.recompute) == (shape, tokens, recompute)}
        cells = [
            f"{r.mfu:.1%} ({r.ms:.1f}, {r.retained_gib:.1f})" if r is not None and r.mfu is not None else "-"
            for r in map(rows.get, KERNELS)
        ]
        pair = [getattr(rows.get(variant), "ms", None) for variant in ("compile", "triton")]
        table.add_row(shape, f"{tokens:,}", recompute, *cells, "-" if None in pair else f"{pair[0] / pair[1]:.2f}")
    return table
