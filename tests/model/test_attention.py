"""Self-attention: the gradients of its weights, of which kernels around the matrices compute some."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from megasora.config import ModelConfig
from megasora.kernels.attention import Segments
from megasora.kernels.rope3d import Rope
from megasora.model.attention import SelfAttention

TOKENS, WIDTH = 5, 12


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("qk_norm", ["per_head", "across_heads", "none"])
def test_gradients_of_all_weights_equal_finite_differences(qk_norm, rotated):
    torch.manual_seed(0)
    attention = SelfAttention(ModelConfig(width=WIDTH, heads=2, qk_norm=qk_norm, attention_backend="math")).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    cu = torch.tensor([0, 3, 5])
    segments = Segments.from_cu_seqlens(cu, cu, TOKENS, "cpu")
    rope = Rope.build(torch.randint(0, 9, (TOKENS, 3)), WIDTH // 2, 100.0) if rotated else None
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    names = [name for name, _ in attention.named_parameters()]
    assert "qkv.bias" in names

    def forward(*tensors):
        return functional_call(attention, dict(zip(names, tensors, strict=True)), (x, segments, rope))

    assert torch.autograd.gradcheck(forward, tuple(attention.parameters()))
