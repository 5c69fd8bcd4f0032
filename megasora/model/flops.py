"""FLOPs of a pack and number of parameters of a model, in closed form.

A multiply-add counts 2. Matrix products and attention are counted; norms and activations are not (a few per mille), nor
are padding and recompute. This is the numerator of MFU.

    forward = linear terms per token, row, segment and text token
            + depth * 4 D sum(l (l + s))        self- and cross-attention of segments of l tokens with s text tokens
            + text_depth * 4 D sum(s^2)
    training = 3 forward                        each matrix product has two in the backward pass
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasora.config import ModelConfig

TIMESTEP_FREQUENCIES = 256  # input features of the timestep embedding
NATIVE_FEATURES = 6  # input features of the native-size embedding


def pack_flops(
    config: ModelConfig,
    patch_dim: int,
    cu_segments: Tensor,
    cu_text: Tensor,
    num_rows: int | None = None,
    text_dim: int | None = None,
    training: bool = True,
) -> int:
    """FLOPs of one pack: forward and backward if `training`, else forward only.

    `cu_segments`, `cu_text`: int [G + 1], as in VideoBatch. `num_rows`: None for one row per segment. `text_dim`:
    features of a text token from the encoder; None: the width (`bytes`, whose words are sums of embeddings).
    """
    d, ff, depth = config.width, config.mlp_hidden, config.depth
    video, text = cu_segments.diff().tolist(), cu_text.diff().tolist()
    tokens, words, clips = sum(video), sum(text), len(video)
    rows = clips if num_rows is None else num_rows

    per_token = depth * (6 * d * d + 2 * d * d) + depth * 4 * d * d + depth * 4 * d * ff  # self, cross (q, out), MLP
    per_token += 2 * patch_dim * d * 2  # in and out
    per_text_token = depth * 4 * d * d  # keys and values of the cross-attention
    per_text_token += 2 * (text_dim or d) * d + 2 * d * d + config.text_depth * 16 * d * d  # the embedder
    modulations = 1 if config.modulation == "shared" else depth
    final = 0 if config.modulation == "shared" else 4 * d * d
    per_row = modulations * 12 * d * d + final + 2 * (TIMESTEP_FREQUENCIES * d + d * d)
    per_clip = 2 * (NATIVE_FEATURES * d + d * d) + 2 * d * d if has_clip_vector(config) else 0

    pairs = depth * sum(n * (n + s) for n, s in zip(video, text, strict=True))
    pairs += config.text_depth * sum(s * s for s in text)
    forward = tokens * per_token + words * per_text_token + rows * per_row + clips * per_clip + 4 * d * pairs
    return 3 * forward if training else forward


def attention_break_even_tokens(config: ModelConfig, patch_dim: int) -> int:
    """Tokens at which a clip's self-attention costs as much as all else: b / c, if l cost a + b l + c l^2 FLOPs."""
    text = torch.tensor([0, 0])
    one, two, three = (pack_flops(config, patch_dim, torch.tensor([0, l]), text) for l in (1, 2, 3))
    c = (three - 2 * two + one) // 2
    return (two - one - 3 * c) // c


def num_parameters(config: ModelConfig, patch_dim: int) -> int:
    """Number of parameters of a VideoDiT without its text embedder."""
    d, ff = config.width, config.mlp_hidden
    qk_norms = (
        4 * {"per_head": d // config.heads, "across_heads": d, "none": 0}[config.qk_norm]
    )  # q and k, self and cross
    attention = 2 * (4 * d * d + 4 * d) + qk_norms + 2 * d  # self, cross, the norm before cross
    mlp = 2 * d * ff + ff + d
    projection = 6 * d * d + 6 * d
    shared = config.modulation == "shared"
    blocks = config.depth * (attention + mlp + (6 * d if shared else projection))
    timestep = TIMESTEP_FREQUENCIES * d + d * d + 2 * d
    clip = 0
    if has_clip_vector(config):
        clip = NATIVE_FEATURES * d + d * d + 2 * d  # native size
        clip += d + 2 * d + d * d + d + d  # null token, norm and projection of the pooled caption, first frame
    ends = 2 * patch_dim * d + d + patch_dim  # patches in and out
    ends += 2 * d + (0 if shared else 2 * d * d)  # final modulation
    return blocks + (projection if shared else 0) + timestep + clip + ends


def has_clip_vector(config: ModelConfig) -> bool:
    """Whether native size and pooled caption are embedded, and there are a null token and a first-frame vector."""
    return config.conditioning == "full"
