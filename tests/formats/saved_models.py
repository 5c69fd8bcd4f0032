"""VideoDiTs with random weights in checkpoints, for the tests of exported folders."""

from __future__ import annotations

from pathlib import Path

import torch

from megasora.batch import VideoBatch, grid_coords
from megasora.build import patch_dim
from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, read_state
from megasora.config import Config, load
from megasora.data.patches import patchify, unpatchify
from megasora.formats.source import ExportSource
from megasora.model.dit import VideoDiT
from megasora.text.bytes import BytesEncoder
from megasora.text.embedders import FeatureEmbedder

TEXT_DIM = 12
SETTINGS = ["model.width=48", "model.depth=2", "model.heads=2", "codec.channels=6", "codec.factors=[4,8,8]"]
FEATURES = ["text.name=t5", "text.path=some/encoder"]
DIALECTS = {
    "default": [],
    "wan": [
        *FEATURES, "model.modulation=shared", "model.qk_norm=across_heads", "model.text_depth=0",
        "model.conditioning=timestep", "data.patch=[1,2,2]",
    ],
    "shared": [*FEATURES, "model.modulation=shared", "model.qk_norm=none", "model.text_depth=2", "data.patch=[1,1,2]"],
    "other": [
        "model.width=32", "model.qk_norm=across_heads", "model.text_depth=0", "model.rope_base=100",
        "model.rope_ntk_factor=[1.5,2,1]", "model.mlp_ratio=1.7",
    ],
}  # fmt: skip


def build(overrides: list[str]) -> tuple[Config, VideoDiT]:
    """A configuration and its model, whose weights are all random."""
    config = load(None, [*SETTINGS, *overrides])
    m = config.model
    if config.text.name == "bytes":
        text = BytesEncoder(config.text).build_embedder(m.width, m.text_depth, m.heads)
    else:
        text = FeatureEmbedder(TEXT_DIM, m.width, m.text_depth, m.heads)
    model, generator = VideoDiT(m, patch_dim(config), text), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return config, model.eval()


def save(config: Config, model: VideoDiT, run: Path, step: int = 1200) -> ExportSource:
    """The model as the EMA weights of a checkpoint."""
    values = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in values.items()}
    checkpoint = save_full_tensors(
        CheckpointStore(run / "checkpoints"), step, shapes, ("weights", "ema"),
        lambda kind, name: values[name].detach() + (kind == "weights"), {},
    )  # fmt: skip
    return ExportSource(checkpoint, config, read_state(checkpoint), ShardedCheckpoint(checkpoint), "ema")


@torch.no_grad()
def velocity(config: Config, model: VideoDiT, latents_CTHW, timesteps, text, native) -> torch.Tensor:
    """What the model predicts for one clip in a pack; arguments as in a folder's own model."""
    patch = tuple(config.data.patch)
    patches_LP, grid = patchify(latents_CTHW, patch)
    per_frame = len(patches_LP) // grid[0]
    if isinstance(text, str):
        (text_SE,) = BytesEncoder(config.text).encode([text])
    elif text is None:
        text_SE = torch.zeros(3, TEXT_DIM) if config.text.name == "t5" else torch.zeros(3, 16, dtype=torch.int64)
    else:
        text_SE = text
    batch = VideoBatch(
        patches_LP=patches_LP,
        coords_L3=grid_coords(grid),
        positions_L=torch.arange(len(patches_LP)),
        grids_G3=torch.tensor([grid]),
        cu_segments=torch.tensor([0, len(patches_LP)], dtype=torch.int32),
        cu_rows=torch.arange(grid[0] + 1, dtype=torch.int32) * per_frame,
        timesteps_R=torch.as_tensor(timesteps, dtype=torch.float32).expand(grid[0]),
        row_segment_R=torch.zeros(grid[0], dtype=torch.int64),
        text_SE=text_SE,
        cu_text=torch.tensor([0, len(text_SE)], dtype=torch.int32),
        drop_text_G=torch.tensor([text is None]),
        native_size_G4=torch.tensor([native], dtype=torch.float32),
        sample_ids_G=torch.tensor([0]),
    )
    return unpatchify(model(batch), grid, patch)
