"""On a GPU: a run in bfloat16 follows the CPU's, and attention equals the reference."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import train_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.skipif(not (find_spec("deepspeed") and find_spec("webdataset")), reason="needs DeepSpeed, WebDataset")
def test_a_run_on_a_gpu_follows_that_on_a_cpu(trained, shards, launch, tiny, tmp_path):
    code, output = launch("megasora.train", *train_arguments(tmp_path / "gpu", shards, tiny), "run.device=cuda")
    assert code == 0, output
    cpu, gpu = ((run / "metrics.jsonl").read_text().splitlines() for run in (trained, tmp_path / "gpu"))
    for a, b in zip(map(json.loads, cpu), map(json.loads, gpu), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02), a["step"]
        assert 0 < b["mfu"] < 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("cu", [[0, 256, 512, 768, 1024], [0, 4, 900, 1000, 1013]], ids=["unmasked", "uneven"])
def test_attention_on_a_gpu_equals_the_reference(cu, dtype, tolerance):
    """Errors of the output and each gradient, relative to its largest element, are within the rounding of the dtype."""
    from megasora.kernels.attention import Segments, attention, attention_reference

    generator = torch.Generator().manual_seed(0)
    cu = torch.tensor(cu, dtype=torch.int32)
    rounded = [torch.randn(1024, 4, 64, generator=generator).to(dtype) for _ in range(4)]

    def output_and_gradients(function, device, to_dtype):
        q, k, v, grad = (x.to(device, to_dtype) for x in rounded)
        for x in (q, k, v):
            x.requires_grad_()
        out = function(q, k, v, Segments.from_cu_seqlens(cu, cu, 1024, device))
        out.backward(grad)
        return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    exact = output_and_gradients(lambda *inputs: attention_reference(*inputs)[0], "cpu", torch.float64)
    computed = output_and_gradients(attention, "cuda", dtype)
    for name, expected in exact.items():
        error = (computed[name].cpu().double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name} is relative error {float(error):.1e}"
