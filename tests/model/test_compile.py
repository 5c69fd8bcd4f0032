"""model.compile: the block under torch.compile equals the eager one, and packs of all sizes share the compiled code."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from megasora.checks import check_compiler
from megasora.config import Config, ModelConfig, ParallelConfig, TextConfig, load
from megasora.data.pack import Record, make_batch
from megasora.errors import MegaSoraError
from megasora.model.block import compile_block
from megasora.model.dit import VideoDiT
from megasora.parallel.layout import check_layout
from megasora.text import build_text_encoder

PATCH_DIM, TOKENS = 6, 64
CLIPS = [((3, 2, 2), "a red circle"), ((1, 3, 2), "an image"), ((2, 2, 3), "two squares"), ((4, 1, 2), "up")]
RANGES = ((0, 4), (0, 2), (1, 4), (2, 4), (1, 3), (0, 4))  # of CLIPS, one pack each


def pack_of(first, last):
    records = []
    for index, (grid, caption) in enumerate(CLIPS[first:last]):
        patches = torch.randn(grid[0] * grid[1] * grid[2], PATCH_DIM, generator=torch.Generator().manual_seed(index))
        text = build_text_encoder(TextConfig()).encode([caption])[0]
        records.append(Record(index, patches, grid, text, (16.0, 16.0, 4.0 * grid[0] - 3, 8.0), caption))
    return make_batch(records, TOKENS)


def make_model(**options):
    config = ModelConfig(width=24, depth=2, heads=2, kernel_backend="torch", **options)
    torch.manual_seed(0)
    model = VideoDiT(config, PATCH_DIM, build_text_encoder(TextConfig()).build_embedder(24, config.text_depth, 2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def pair(compiler, dtype, **options):
    """An eager model and the same with compiled blocks."""
    torch._dynamo.reset()
    eager, compiled = (make_model(compile=c, **options).to(dtype) for c in (False, True))
    for block in compiled.blocks.values():
        compile_block(block, compiler)
    return eager, compiled


def gradients(model, pack):
    model.zero_grad()
    out = model(pack)[: pack.num_tokens]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(eager, compiled, pack, tolerance):
    expected, actual = gradients(eager, pack), gradients(compiled, pack)
    assert expected.keys() == actual.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-6 * largest)
        assert float((actual[name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"modulation": "block"},
        {"modulation": "shared", "qk_norm": "across_heads", "recompute": "keep_attention"},
        {"modulation": "block", "qk_norm": "none", "recompute": "full"},
    ],
    ids=str,
)
def test_all_packs_share_the_compiled_code_and_gradients_are_those_of_the_eager_block(options):
    counter = CompileCounterWithBackend("aot_eager")
    eager, compiled = pair(counter, torch.float64, **options)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    compilations = []
    for first, last in RANGES:
        assert_same_gradients(eager, compiled, pack_of(first, last), 1e-9)
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] < compilations[1]  # sizes that differ become variables
    assert compilations[1:] == [compilations[1]] * (len(RANGES) - 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_generated_code_gives_the_gradients_of_the_eager_block():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        pytest.skip("no C++ compiler")
    eager, compiled = pair("inductor", torch.float64, recompute="full")
    assert_same_gradients(eager, compiled, pack_of(0, 4), 1e-5)
    with torch.no_grad():
        pack = pack_of(1, 3)
        torch.testing.assert_close(compiled(pack), eager(pack), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["model.kernel_backend=auto"], "model.kernel_backend=torch, not auto"),
        (["model.fp8_recipe=tensorwise"], "model.fp8_recipe=tensorwise"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings, expected):
    with pytest.raises(MegaSoraError, match=f"model.compile=true .*{expected}"):
        load(None, ["model.compile=true", "model.kernel_backend=torch", *settings])


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"zero_stage": 3}], ids=str)
def test_layouts_that_do_not_go_with_it_are_refused(parallel):
    options = ModelConfig(compile=True, kernel_backend="torch")
    check_layout(Config(model=options, parallel=ParallelConfig(context=2)), 2)
    with pytest.raises(MegaSoraError, match=f"model.compile=true cannot be .*parallel.{next(iter(parallel))}="):
        check_layout(Config(model=options, parallel=ParallelConfig(**parallel)), 2)


def test_a_missing_cpp_compiler_is_reported_before_the_first_step(monkeypatch):
    def find_none():
        raise RuntimeError("No working C++ compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", find_none)
    with pytest.raises(MegaSoraError, match=r"model.compile=true needs a C\+\+ compiler"):
        check_compiler(Config(model=ModelConfig(compile=True, kernel_backend="torch")))
    check_compiler(Config())
