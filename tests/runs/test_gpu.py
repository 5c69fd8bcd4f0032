"""What only a GPU can show: the same run there, in bfloat16, and the same attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import train_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_run_on_a_gpu_follows_the_one_on_the_cpu(trained, shards, launch, tiny, tmp_path):
    code, output = launch("megasora.train", *train_arguments(tmp_path / "gpu", shards, tiny), "run.device=cuda")
    assert code == 0, output
    cpu, gpu = ((run / "metrics.jsonl").read_text().splitlines() for run in (trained, tmp_path / "gpu"))
    for a, b in zip(map(json.loads, cpu), map(json.loads, gpu), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02), a["step"]
        assert 0 < b["mfu"] < 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_attention_on_a_gpu_equals_the_reference(dtype, tolerance):
    from megasora.kernels.attention import Segments, attention, attention_reference

    generator = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, 4, 900, 1000, 1013], dtype=torch.int32)
    q, k, v = (torch.randn(1024, 4, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = attention_reference(q, k, v, Segments.from_cu_seqlens(cu, cu, 1024, "cpu"))
    on_gpu = Segments.from_cu_seqlens(cu, cu, 1024, "cuda")
    out = attention(*(x.to("cuda", dtype) for x in (q, k, v)), on_gpu)
    assert (out.cpu().double() - expected).abs().max() < tolerance
