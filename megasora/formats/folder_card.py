"""README.md of an exported model: what it is, and how to load it and sample from it without MegaSora."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

import torch

from megasora.checkpoint.imported import IMPORTED
from megasora.codec.pretrained_table import FAMILIES
from megasora.config import CodecConfig, parse_size
from megasora.errors import printable
from megasora.formats.source import ExportSource

MAX_NAME = 200  # letters of a path
CARD = Template("""---
library_name: pytorch
pipeline_tag: text-to-video
tags: [megasora, diffusion-transformer, video]
---

# A video diffusion transformer of MegaSora

| | |
|---|---|
| parameters | $parameters |
| size | $depth blocks of width $width with $heads heads, MLP $mlp_hidden |
| dialect | modulation `$modulation`, QK-norm `$qk_norm`, conditioning `$conditioning` |
| weights | $weights, $dtype |
| trained | $trained |
| latents | $codec; $channels channels, a latent is $factors pixels (frames x rows x columns) |
| token | $patch latents |
| captions | $text |

It predicts the velocity `noise - x` of latents `x_t = (1 - t) x + t noise` (flow matching), for clips of any size and
length; an image is a clip of one frame. Frames with timestep 0 are given, so images and videos can be prompts.

## Files

- `config.json`: sizes, codec, text encoder, timesteps
- `model*.safetensors`: the weights, under the names that they have in MegaSora
- `modeling_megasora.py`: the model in plain PyTorch; it needs `torch` and `safetensors`

## Sampling

`torch` and `safetensors` are enough for latents of a caption:

```python
import torch

from modeling_megasora import load_model  # run this in the folder, or put the folder on sys.path

model = load_model(".", torch.float32, "cpu")  # bfloat16 and cuda on a GPU
caption = $caption
noise = torch.randn($channels, $latent_frames, $rows, $columns)  # $frames frames of $height x $image_width pixels
steps, guidance = 50, $guidance

tokens = noise[0].numel() / $patch_numel
shift = max(1.0, $shift * (tokens / $shift_tokens) ** 0.5)  # as in training: more noise for more tokens
times = [1 - i / steps for i in range(steps + 1)]
times = [shift * t / (1 + (shift - 1) * t) for t in times]
x = noise
with torch.no_grad():
    for t, next_t in zip(times, times[1:]):
        with_caption, without = model(x, t, caption, fps=$fps), model(x, t, None, fps=$fps)
        velocity = without + guidance * (with_caption - without)
        x = x + (next_t - t) * velocity  # Euler
```

$text_words

$codec_words

## Training it further

With MegaSora, in a new run: `run.start=init:FOLDER` and the `model`, `data.patch`, `codec` and `text` settings of this
table.
""")


def model_card(source: ExportSource, config: dict[str, Any], kind: str, dtype: torch.dtype) -> str:
    """The text of README.md. `config`: of config.json. `kind`: of the weights, e.g. ema."""
    run, m = source.config, config["model"]
    parameters = sum(shape.numel() for shape in source.sharded.shapes.values())
    height, width = parse_size(run.sample.size, "sample.size")
    ft, fh, fw = config["codec"]["factors"]
    pt, ph, pw = config["patch"]
    return CARD.substitute(
        m,
        parameters=f"{parameters:,}",
        weights="EMA of the weights" if kind.startswith("ema") else "weights as trained",
        dtype=str(dtype).removeprefix("torch."),
        trained=trained(source),
        codec=codec_name(run.codec),
        channels=config["channels"],
        factors=" x ".join(map(str, config["codec"]["factors"])),
        patch=" x ".join(map(str, config["patch"])),
        patch_numel=pt * ph * pw,
        text=text_name(config),
        caption='"a red circle moves right"' if is_bytes(config) else f"torch.zeros(8, {config['text']['dim']})",
        latent_frames=pt * -(-(1 + -(-(run.sample.frames - 1) // ft)) // pt),
        rows=ph * -(-height // (fh * ph)),
        columns=pw * -(-width // (fw * pw)),
        frames=run.sample.frames,
        height=height,
        image_width=width,
        fps=run.sample.fps,
        guidance=run.sample.guidance_scale,
        shift=config["timesteps"]["shift"],
        shift_tokens=config["timesteps"]["shift_tokens"],
        text_words=text_words(config),
        codec_words=codec_words(run.codec),
    )


def trained(source: ExportSource) -> str:
    """Steps, and tokens at most: packs end with padding."""
    if IMPORTED in source.state:
        format_name, _, path = source.state[IMPORTED].partition(", ")
        return f"imported: {format_name}, {shown(path)}"
    data, steps = source.config.data, source.state["step"]
    tokens = steps * data.packs_per_step * data.tokens_per_pack
    return f"{steps:,} steps of {data.packs_per_step} packs of {data.tokens_per_pack:,} tokens: up to {tokens:,} tokens"


def is_bytes(config: dict[str, Any]) -> bool:
    return config["text"]["name"] == "bytes"


def text_name(config: dict[str, Any]) -> str:
    text = config["text"]
    if is_bytes(config):
        return f"UTF-8 bytes, at most {text['max_tokens']} words; no encoder"
    padded = ", padded with zeros to this number" if text["pad"] else ""
    return f"features of `{text['name']}`, {text['dim']} of each token, at most {text['max_tokens']} tokens{padded}"


def text_words(config: dict[str, Any]) -> str:
    """How a caption is given."""
    if is_bytes(config):
        return "A caption is a text; `None` is no caption."
    return (
        "In place of the zeros, give the last hidden states of the text encoder for the tokens of the caption, without "
        "padding, fp32 `[tokens, features]`"
        + (", then padded with zeros" if config["text"]["pad"] else "")
        + ". `None` "
        "is no caption" + ("." if config["model"]["conditioning"] == "full" else "; a negative one may be better.")
    )


def codec_name(codec: CodecConfig) -> str:
    if codec.name == "dct":
        return "`dct` of MegaSora, a fixed transform"
    of = f" of `{shown(codec.path)}`" if codec.path else ""
    return f"`{FAMILIES[codec.name].class_name}` of diffusers{of}" if codec.name in FAMILIES else f"`{codec.name}`{of}"


def codec_words(codec: CodecConfig) -> str:
    """How latents become frames."""
    settings = [f"codec.name={codec.name}"]
    settings += [f"codec.factors={codec.factors}", f"codec.channels={codec.channels}"] if codec.name == "dct" else []
    settings += [] if codec.name == "dct" else ["codec.path=FOLDER"]
    arguments = ", ".join(f'"{setting}"' for setting in settings)
    return f"""Latents become frames with MegaSora:

```python
from megasora.codec import build_codec
from megasora.config import load

settings = load(None, [{arguments}])
frames = build_codec(settings.codec).decode(x)  # [frames, 3, height, width], in -1 .. 1
```"""


def shown(path: str) -> str:
    """A hub name, or the last part of a path, for Markdown."""
    name = Path(path).name if Path(path).is_absolute() or path.count("/") > 1 else path
    return printable(name, MAX_NAME).translate(str.maketrans("`|<>", "'   "))
