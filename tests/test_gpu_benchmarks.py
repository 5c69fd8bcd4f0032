"""The GPU benchmarks without a GPU: counts, tables, plots, and the order of trials."""

import json
import math

import pytest
import torch
from torch import Tensor

from benchmarks import figure, gpu, kernels, transformer_block, tune
from benchmarks.kernels import AttentionResult, OperationResult
from benchmarks.transformer_block import BlockResult, Case
from megasora.kernels.launch import LaunchConfig
from megasora.kernels.linear import Float8Products
from megasora.testing.operations import OPERATIONS, Size

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.parametrize("options", [[], ["--tune"], ["--quick"]])
def test_without_a_gpu_it_says_so_and_writes_nothing(options, tmp_path, capsys):
    kernels.main([*options, "--out", str(tmp_path / "results")])
    output = capsys.readouterr().out
    assert "no GPU here" in output and "make gpu" in output and len(output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---- trials


class FakeTimer:
    """A timer on which every pass takes the milliseconds that its function returns."""

    def __init__(self):
        self.ms, self.discarded = {}, 0

    def time(self, name, function):
        self.ms[name] = function()

    def pop_times(self):
        ms, self.ms = self.ms, {}
        return ms

    def discard(self):
        self.discarded += 1
        self.ms = {}


def test_trials_alternate_and_a_failing_variant_does_not_stop_the_others():
    timer, order = FakeTimer(), []

    def variant(name, times, last=None):
        remaining = iter(times)

        def trial(timer):
            order.append(name)
            if last is not None and order.count(name) > last:
                raise torch.cuda.OutOfMemoryError("16 GiB")
            ms = next(remaining)
            timer.time("forward", lambda: ms)
            timer.time("backward", lambda: 2 * ms)

        return trial

    fast, broken, dying = (
        variant("fast", [900, 800, 3, 1, 2]),
        variant("broken", [], last=0),
        variant("dying", [9] * 9, last=3),
    )
    timed = gpu.run_trials({"fast": fast, "broken": broken, "dying": dying}, timer)
    assert order == ["fast", "fast", "broken", "dying", "dying", "fast", "dying", "fast", "dying", "fast"]
    assert timed["fast"].medians == {"forward": 2, "backward": 4}
    assert timed["fast"].error is None
    assert (timed["broken"].error, timed["dying"].error) == ("out of memory", "out of memory")
    assert not timed["dying"].ms and timer.discarded == 2


def test_the_search_uses_the_best_value_of_each_field():
    tried = []

    def score(configs):
        tried.extend(configs)
        return [
            abs(math.log2(x.tile_elements / 4096)) + x.num_stages + (math.inf if x.elements_per_thread == 8 else 1)
            for x in configs
        ]

    best, ratio = tune.search(score, LaunchConfig(tile_elements=2048, elements_per_thread=16, num_stages=3))
    assert best == LaunchConfig(tile_elements=4096, elements_per_thread=16, num_stages=1)
    assert ratio == pytest.approx((4 / 5) * (2 / 4))
    assert len(set(tried)) < 4 * 3 * 4 / 2  # not all combinations


def test_every_tuned_file_has_tables():
    tables = {operation: list(tune.tables(module)) for operation, module in tune.FILES.items()}
    assert all(tables.values()) and set(tables) <= set(OPERATIONS)


# ---- counts


def test_least_bytes_are_those_of_the_docstrings_of_the_kernels():
    size = Size(tokens=64, width=256, head_dim=64, row_tokens=32)
    expected = {  # bytes per element of an activation, forward and backward
        "adaln_modulate": (4, 6), "gated_residual_adaln": (8, 12), "gated_residual_norm": (8, 12),
        "residual_adaln": (8, 8), "gated_add": (6, 6), "gelu": (4, 8), "rope3d": (4, 4),
        "qk_norm_rope3d, per_head": (2 * 4, 2 * 6 + 4), "qk_norm_rope3d, across_heads": (2 * 4, 2 * 6 + 4),  # and v's
        "rms_norm": (4, 6), "merge_partial_attention": (10,), "adamw_step": (38,),
        "sum_of_squares": (4,),
    }  # fmt: skip
    assert expected.keys() == OPERATIONS.keys()
    for name, build in OPERATIONS.items():
        least = build(size, torch.bfloat16, "cpu").least_bytes
        assert tuple(least.values()) == tuple(n * 64 * 256 for n in expected[name]), name


def test_the_one_clip_has_the_flops_of_the_pack():
    for _, lengths, heads in kernels.attention_cases(quick=False):
        whole = round(sum(n * n for n in lengths) ** 0.5)
        pack, one = (kernels.attention_flops(clips, heads, 128)["backward"] for clips in (lengths, [whole]))
        assert pack == pytest.approx(one, rel=1e-3)
    assert kernels.attention_flops([3, 5], 2, 7)["forward"] == 2 * 2 * 2 * 7 * (9 + 25)


def test_flops_of_a_block_equal_the_closed_form():
    d, ff, s, words = 5120, 13_824, 36_864, 512
    linear = 4 * d * d + 2 * d * ff + 2 * d * d + 2 * d * d * words / s
    expected = 3 * s * 2 * (linear + 2 * s * d + 2 * words * d)
    assert transformer_block.block_flops(Case("Wan-14B", s, "none")) == pytest.approx(expected, rel=1e-12)
    for shape, (_, _, hidden) in transformer_block.SHAPES.items():
        model = transformer_block.config_of(Case(shape, 8192, "none"), "torch").model
        assert model.mlp_hidden == hidden
    assert all(math.prod(grid) == tokens for tokens, grid in transformer_block.GRIDS.items())


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setitem(transformer_block.SHAPES, "tiny", (32, 2, 64))
    monkeypatch.setitem(transformer_block.GRIDS, 24, (2, 3, 4))
    monkeypatch.setattr(transformer_block, "WORDS", 5)


def output_and_gradients(kernel: str, recompute: str, change=lambda inputs: inputs) -> list[Tensor]:
    """Of a tiny block in fp32, for its inputs and its weights; unused ones are left out."""
    block, x_LD, inputs = transformer_block.build_block(Case("tiny", 24, recompute), kernel, "cpu")
    block, x_LD = block.float(), x_LD.detach().float().requires_grad_()
    inputs = inputs._make(x.detach().float().requires_grad_() if is_leaf(x) else x for x in inputs)
    leaves = [x for x in (x_LD, *inputs, *block.parameters()) if is_leaf(x)]
    out = transformer_block.forward_step(block, x_LD, change(inputs), recompute)()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [out, *(x for x in gradients if x is not None)]


def is_leaf(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


@no_gpu
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_a_block_does_the_same_however_it_recomputes(kernel):
    expected = output_and_gradients(kernel, "none")
    assert expected[0].abs().max() > 0 and len(expected) > 20
    for recompute in ("keep_attention", "full"):
        found = output_and_gradients(kernel, recompute)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@no_gpu
@pytest.mark.usefixtures("tiny")
def test_all_ways_to_compute_a_block_agree():
    expected = output_and_gradients("torch", "none")
    with transformer_block.reference_operations():
        plain = output_and_gradients("torch", "none", transformer_block.with_angles)
    for found in (plain, output_and_gradients("triton", "none")):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).detach().abs().max() <= 1e-4 * b.detach().abs().max()


@no_gpu
@pytest.mark.usefixtures("tiny")
def test_a_block_written_plainly_calls_no_operation_of_ours(monkeypatch):
    called = []
    for owner, name, _ in transformer_block.REFERENCES:
        monkeypatch.setattr(owner, name, lambda *given, **named: called.append(1))
    with transformer_block.reference_operations():
        output_and_gradients("torch", "none", transformer_block.with_angles)
    assert not called


@no_gpu
@pytest.mark.usefixtures("tiny")
def test_variants_of_a_block_are_what_the_settings_of_a_run_make_of_it(monkeypatch):
    assert sorted(transformer_block.KERNELS) == sorted(sum(transformer_block.ALTERNATING, ()))
    compiled = []
    monkeypatch.setattr(transformer_block, "compile_block", compiled.append)
    for variant in transformer_block.KERNELS:
        block, _, inputs = transformer_block.build_block(Case("tiny", 24, "none"), "torch", "cpu")
        transformer_block.apply_variant(variant, block, inputs)
        in_fp8 = [
            name
            for name, module in block.named_modules()
            if isinstance(getattr(module, "products", None), Float8Products)
        ]
        assert len(in_fp8) == (6 if variant == "fp8" else 0)
        assert (compiled == [block]) == (variant == "product")
        compiled.clear()


def test_launches_are_timed_without_what_the_gpu_does(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: clock[0])

    def synchronize():  # the GPU takes a second for what was launched
        log.append("wait")
        clock[0] += 1.0

    def launch():
        log.append("launch")
        clock[0] += 30e-6

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert kernels.launch_us(launch) == pytest.approx(30)
    assert log == ["launch", *["wait", *["launch"] * kernels.LAUNCHES] * kernels.LAUNCH_TRIALS]


@no_gpu
def test_the_launches_of_both_passes_are_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "launch_us", lambda function: function() and 2.0 or 7.0)
    results = [r for name in ("gelu", "merge_partial_attention") for r in kernels.measure_launches(name, "cpu")]
    assert [(r.variant, r.forward_us, r.backward_us) for r in results] == [
        ("triton", 2.0, 5.0), ("eager", 2.0, 5.0), ("triton", 2.0, None), ("eager", 2.0, None),
    ]  # fmt: skip
    assert text_of(kernels.launch_table(results)) == [
        ["gelu", "2 | 5", "2 | 5"],
        ["merge_partial_attention", *["2 | -"] * 2],
    ]


# ---- what is shown


def made_up_record() -> dict:
    """As benchmarks.kernels writes it, with some of it missing."""
    operations, speed = [], {"triton": 0.95, "compile": 0.7, "eager": 0.2, "liger": 0.5}
    for i, operation in enumerate(kernels.TIMED):
        for j, width in enumerate(kernels.WIDTHS):
            for tokens in (kernels.TOKENS, 4096):
                for variant in ("triton", "eager") if tokens == 4096 else speed:
                    if variant == "liger" and operation != "rms_norm":
                        continue
                    for direction in ("forward", "backward")[: 1 if operation.startswith("merge") else 2]:
                        of_copy = speed[variant] - 0.03 * j - 0.01 * i - 0.1 * (direction == "backward")
                        result = OperationResult(operation, tokens, width, variant, direction, 0.5, 2e3, of_copy, 1e9)
                        operations.append(vars(result))
    failed = OperationResult("rope3d", kernels.TOKENS, 5120, "quack", "both", None, None, None, 1e9, "out of memory")
    results = []
    for case in transformer_block.block_cases(quick=False):
        for variant, mfu in (("triton", 0.56), ("compile", 0.44), ("eager", 0.31)):
            if (case.tokens, variant) == (73_728, "eager"):
                results.append(BlockResult(*vars(case).values(), variant, 1e14, *[None] * 5, error="out of memory"))
            else:
                mfu -= 0.04 * transformer_block.RECOMPUTE.index(case.recompute)
                results.append(BlockResult(*vars(case).values(), variant, 1e14, 200.0, 70.0, 400.0, mfu, 12.0))
    passes = {"forward": 500.0, "backward": 400.0}
    packs = [AttentionResult("heavy tail", 65_536, 40, 128, 17, 20_000, 30_000, passes, passes, dict(passes))]
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789",
        "gpu": {"name": "NVIDIA H100 80GB HBM3"},
        "limits": {"copy_gb_s": 2900.0, "matmul_tflop_s": 720.0},
        "operations": [*operations, vars(failed)],
        "attention": [vars(pack) for pack in packs],
        "blocks": [vars(result) for result in results],
    }


def text_of(table) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_tables_show_the_results():
    record = made_up_record()
    operations = [OperationResult(**o) for o in record["operations"]]
    lines = text_of(kernels.operation_table(kernels.TOKENS, operations))
    assert lines[0][:5] == ["adaln_modulate", "5120", "95% | 85%", "20% | 10%", "70% | 60%"][:2] + lines[0][2:5]
    assert {"95% | 85%", "70% | 60%", "20% | 10%"} <= set(lines[0])
    assert lines[0][-2:] == ["0.500 | 0.500", "1.00 | 1.00"]
    small = text_of(kernels.operation_table(4096, operations))
    assert len(small) == len(kernels.TIMED) * len(kernels.WIDTHS) and small[0][-1] == "- | -"
    table = text_of(transformer_block.block_table([BlockResult(**b) for b in record["blocks"]]))
    assert table[0] == ["Wan-14B", "36,864", "none", "56.0% (200.0, 12.0)", "31.0% (200.0, 12.0)", "-",
                        "44.0% (200.0, 12.0)", "-", "1.00"]  # fmt: skip
    assert [row[4] for row in table if row[1] == "73,728"] == ["-"] * 6
    packs = text_of(kernels.attention_table([AttentionResult(**a) for a in record["attention"]]))
    assert packs[0][-3:-1] == ["500 | 400", "500 | 400"]


@pytest.mark.parametrize("missing", [(), ("operations", "blocks")])
def test_the_plot_shows_the_results_that_exist(missing, tmp_path):
    record = {name: value for name, value in made_up_record().items() if name not in missing}
    figure.draw(record, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.operation_lines(record)) == (0 if missing else len(kernels.TIMED) * len(kernels.WIDTHS))


def test_results_are_written_at_once(tmp_path):
    path = kernels.record_path(tmp_path / "results", "NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    assert kernels.record_path(tmp_path / "mine.json", "any") == tmp_path / "mine.json"
    record = kernels.Record(path, {"date": "today"})
    record.put("limits", {"copy_gb_s": 1.0})
    for number in range(3):
        record.add("operations", {"number": number}, {"number": -number})
        assert len(json.loads(path.read_text())["operations"]) == 2 * number + 2
    assert json.loads(path.read_text()).keys() == {"date", "limits", "operations"}
    kernels.Record(None, {}).add("operations", {})  # nowhere
