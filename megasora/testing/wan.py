"""A tiny Wan model for tests: diffusers' WanTransformer3DModel in the proportions of Wan 1.3B, with random weights; a
pack of clips; and the outputs of diffusers for each clip. Needs diffusers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import load
from megasora.data.pack import Record, make_batch
from megasora.data.patches import patchify, unpatchify
from megasora.diffusion.flow import build_rows
from megasora.formats.wan import import_wan
from megasora.formats.wan_folder import WanFolder, read_wan
from megasora.formats.wan_layers import parameter_shapes
from megasora.model.dit import VideoDiT
from megasora.model.embed import TIMESTEP_SCALE
from megasora.text.embedders import FeatureEmbedder

if TYPE_CHECKING:
    from diffusers import WanPipeline, WanTransformer3DModel

CHANNELS, PATCH, TEXT_DIM = 16, (1, 2, 2), 20
CLIPS = [  # grid of tokens, words of the caption, clean latent frames at (head, tail), timestep
    ((3, 2, 3), 5, (0, 0), 0.713),
    ((1, 2, 2), 2, (0, 0), 0.25),
    ((4, 3, 2), 7, (1, 0), 0.9),
    ((2, 1, 4), 1, (0, 0), 0.051),
]


@dataclass(frozen=True)
class TinyWan:
    reference: WanTransformer3DModel
    folder: Path  # like that of a pipeline: transformer/ with config.json and several weight files
    settings: list[str]  # key=value of the VideoDiT; text.path is an encoder of the right width, without weights


def make_tiny_wan(folder: Path, depth: int = 2, heads: int = 4, head_dim: int = 24) -> TinyWan:
    """Writes `folder`/wan and `folder`/text; fp32, every weight random."""
    from diffusers import WanTransformer3DModel

    width = heads * head_dim
    reference = WanTransformer3DModel(
        patch_size=PATCH, num_attention_heads=heads, attention_head_dim=head_dim, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, ffn_dim=width * 8960 // 1536, num_layers=depth, rope_max_seq_len=64,
    ).float()  # fmt: skip
    randomise(reference)
    reference.save_pretrained(folder / "wan" / "transformer", max_shard_size="400KB")
    return TinyWan(reference, folder / "wan", settings_for(read_wan(folder / "wan"), folder / "text"))


def make_tiny_pipeline(folder: Path, words: str, shift: float) -> tuple[WanPipeline, Path]:
    """diffusers' pipeline with the transformer of `make_tiny_wan`, and its folder `folder`/wan.

    Its umT5 knows the `words`; `shift`: of the timesteps. All weights are random.
    """
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tiny = make_tiny_wan(folder)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    randomise(vae)
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", *words.split()))}
    sizes = {"vocab_size": len(vocabulary), "d_model": TEXT_DIM, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    parts = {
        "vae": vae,
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).eval(),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    pipeline = diffusers.WanPipeline(**parts, transformer=tiny.reference.eval())
    for name, part in parts.items():
        part.save_pretrained(tiny.folder / name)
    pipeline.save_config(tiny.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, tiny.folder


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Linear layers preserve the scale of their input, norms are near 1, biases and tables are not negligible."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        is_norm = ".norm" in name and name.endswith("weight")
        std = 0.3 if parameter.ndim == 1 or name.endswith("table") else parameter[0].numel() ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + is_norm)


def settings_for(wan: WanFolder, text: Path) -> list[str]:
    """`wan.settings()` with an encoder in the folder `text` that has the right feature width and is never run."""
    return [*wan.settings(), f"text.path={encoder_folder(text, wan.text_dim)}"]


def encoder_folder(folder: Path, text_dim: int) -> Path:
    """A T5 encoder with so many features, without weights: it cannot be run."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    sizes = {"vocab_size": 8, "d_model": text_dim, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **sizes}))
    save_file({}, folder / "model.safetensors")
    return folder


def build_dit(wan: WanFolder, settings: list[str]) -> VideoDiT:
    """Uninitialised, on torch's default device; like build_model, but without loading transformers."""
    m = load(None, settings).model
    return VideoDiT(m, wan.patch_dim, FeatureEmbedder(wan.text_dim, m.width, m.text_depth, m.heads))


def shapes_of(wan: WanFolder) -> dict[str, torch.Size]:
    """Of the parameters of the VideoDiT for these weights."""
    return parameter_shapes(load(None, wan.settings()).model, wan.patch_dim, wan.text_dim)


def write_weights(tiny: TinyWan, out: Path) -> Path:
    """Imports the weights into the file `out`."""
    wan = read_wan(tiny.folder)
    import_wan(wan, shapes_of(wan), out)
    return out


def make_pack(clips: list = CLIPS, padding: int = 3) -> VideoBatch:
    """Clips of different sizes and timesteps, one with a clean first frame, followed by padding."""
    generator = torch.Generator().manual_seed(1)
    records = []
    for index, (grid, words, _, _) in enumerate(clips):
        size = [n * p for n, p in zip(grid, PATCH, strict=True)]
        patches_LP, _ = patchify(torch.randn(CHANNELS, *size, generator=generator), PATCH)
        text_SE = torch.randn(words, TEXT_DIM, generator=generator)
        native = (16.0 * grid[1], 16.0 * grid[2], 4.0 * grid[0] - 3, 16.0)
        records.append(Record(index, patches_LP, grid, text_SE, native, "a caption"))
    batch = make_batch(records, sum(len(r.patches_LP) for r in records) + padding)
    cu_rows, timesteps_R, segment_R = build_rows(
        batch, torch.tensor([t for *_, t in clips]), [clean for _, _, clean, _ in clips]
    )
    return dataclasses.replace(batch, cu_rows=cu_rows, timesteps_R=timesteps_R.float(), row_segment_R=segment_R)


def run_reference(reference: WanTransformer3DModel, batch: VideoBatch) -> list[Tensor]:
    """The outputs of diffusers for each clip of a pack alone: [l, P], tokens and features in VideoDiT's order.

    The timestep is one per clip if it has one row, as for Wan 2.1, else one per token, as for Wan 2.2 TI2V.
    """
    t_L = torch.repeat_interleave(batch.timesteps_R, batch.cu_rows.diff().long()) * TIMESTEP_SCALE
    outs = []
    for i, grid in enumerate(batch.grids_G3.tolist()):
        tokens = slice(*batch.cu_segments[i : i + 2].tolist())
        words = slice(*batch.cu_text[i : i + 2].tolist())
        t = t_L[tokens]
        t = t[:1] if bool((t == t[0]).all()) else t[None]
        latents_CTHW = unpatchify(batch.patches_LP[tokens], tuple(grid), PATCH)
        out = reference(latents_CTHW[None], t, batch.text_SE[words][None], return_dict=False)[0][0]
        outs.append(patchify(out.contiguous(), PATCH)[0])
    return outs
