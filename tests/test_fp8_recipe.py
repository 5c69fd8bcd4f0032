"""model.fp8_recipe: which linears it is of, and where it is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import train_arguments

from megasora.build import build_model
from megasora.checks import check_fp8
from megasora.cli import main
from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.kernels.linear import PLAIN, Float8Products
from megasora.parallelize import apply_fp8

UNSPLIT = SimpleNamespace(is_split=False)


def test_the_linears_on_tokens_of_the_blocks_have_fp8_products_and_no_others():
    config = load(None, ["model.width=32", "model.heads=2", "model.depth=2"])
    with torch.device("meta"):
        model = build_model(config, 8)
    apply_fp8(model, "rowwise", SimpleNamespace(tensor=UNSPLIT, context=UNSPLIT), "torch")
    found = {n for n, m in model.named_modules() if getattr(m, "products", PLAIN) is not PLAIN}
    names = ("attention.qkv", "attention.out", "cross.q", "cross.out", "mlp.up", "mlp.down")
    assert found == {f"blocks.{i}.{name}" for i in range(2) for name in names}
    products = model.get_submodule("blocks.1.mlp.up").products
    assert isinstance(products, Float8Products) and products.per_row and products.backend == "torch"


@pytest.mark.parametrize("recipe, capability, settings, words", [
    ("rowwise", (9, 0), (), None),
    ("tensorwise", (8, 9), (), None),
    ("rowwise", (8, 9), (), "model.fp8_recipe=rowwise: this GPU has compute capability 8.9, .* need 9.0; use model"),
    ("tensorwise", (8, 0), (), "model.fp8_recipe=tensorwise: this GPU has compute capability 8.0, .* need 8.9; use"),
    ("rowwise", (9, 0), ("run.dtype=float32",), "run.dtype=float32 is set, .*use run.dtype=bfloat16 or model"),
    ("rowwise", (8, 0), ("run.device=cpu",), None),
    ("none", (7, 0), (), None),
])  # fmt: skip
def test_a_gpu_without_the_products_is_refused_and_a_cpu_emulates(monkeypatch, recipe, capability, settings, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = load(None, [f"model.fp8_recipe={recipe}", *settings])
    if words is None:
        check_fp8(config)
    else:
        with pytest.raises(MegaSoraError, match=words):
            check_fp8(config)


def test_a_recipe_that_does_not_exist_exits_with_2_and_the_names_of_those_that_do(tmp_path, capsys):
    assert main(["train", "configs/dit_b.yaml", f"run.dir={tmp_path / 'run'}", "model.fp8_recipe=row"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("model.fp8_recipe=row", "tensorwise", "rowwise_with_gw_hp", "none"))


@pytest.mark.slow
def test_a_run_with_fp8_says_that_it_is_emulated_learns_and_resumes_bit_for_bit(shards, tiny, tmp_path, launch):
    common = [*train_arguments(tmp_path / "run", shards, tiny)[:1], f"data.shards={shards}", *tiny, "run.steps=6"]
    common += ["model.fp8_recipe=tensorwise", "run.dtype=bfloat16", "checkpoint.every=3", "checkpoint.keep=9"]
    code, output = launch("megasora.train", *common, f"run.dir={tmp_path / 'run'}", "validation.every=6")
    assert code == 0 and "model.fp8_recipe=tensorwise is emulated on a CPU" in output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    again = [f"run.dir={tmp_path / 'run'}", "run.start=resume:step-00000003", "validation.every=6"]
    assert launch("megasora.train", *common, *again)[0] == 0
    resumed = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert resumed[-3:] == losses[3:]
