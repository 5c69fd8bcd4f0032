"""A video diffusion transformer of MegaSora in one file of plain PyTorch: reads the folder that it is in.

    model = load_model("FOLDER", torch.bfloat16, "cuda")
    velocity_CTHW = model(latents_CTHW, t, "a red circle moves right", fps=16)

The model takes one clip, at its own size. Noised latents are x_t = (1 - t) x + t noise, t in [0, 1], and the velocity
is noise - x. README.md has a sampler, and says what latents and captions are.

It needs torch and safetensors. Names of weights are those in MegaSora, so a folder can be trained further there. Shape
letters: C channels, T H W latent grid, L tokens, F latent frames of tokens, S text tokens, E their features, D width,
N heads, K head dim, P features of a patch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

EPS = 1e-6
TIMESTEP_FREQUENCIES, TIMESTEP_SCALE = 256, 1000.0
WORD_BYTES, PAD, MAX_POSITIONS = 16, 256, 512  # of captions as bytes: symbols of a word, that of no byte, positions


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> VideoDiT:
    """The model in `folder`, for inference. Weights are read file by file; ValueError if one is missing or has another
    shape, and for a folder of another format."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "megasora" or config.get("format") != 1:
        raise ValueError(f"{folder / 'config.json'} describes no model of MegaSora of format 1")
    with torch.device("meta"):
        model = VideoDiT(config)
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                value = tensors.get_tensor(name)
                if missing.pop(name, None) != value.shape:
                    raise ValueError(f"{folder / file}: {name} {list(value.shape)} is no weight of this model")
                module, _, parameter = name.rpartition(".")
                weight = nn.Parameter(value.to(device, dtype), requires_grad=False)
                setattr(model.get_submodule(module), parameter, weight)
    if missing:
        raise ValueError(f"{folder} lacks weights, e.g. {min(missing)}")
    return model.eval()


class VideoDiT(nn.Module):
    """Predicts the velocity of the latents of one clip. `config`: of config.json."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        m = config["model"]
        width, shared, full = m["width"], m["modulation"] == "shared", m["conditioning"] == "full"
        self.config, self.patch = config, tuple(config["patch"])
        patch_dim = config["channels"] * math.prod(self.patch)
        self.patch_in = nn.Linear(patch_dim, width)
        self.first_frame = nn.Parameter(torch.zeros(width)) if full else None  # added to the first latent frame
        self.timestep = Embedding(TIMESTEP_FREQUENCIES, width)
        self.native = Embedding(6, width) if full else None
        embedder = BytesEmbedder if config["text"]["name"] == "bytes" else FeatureEmbedder
        self.text = embedder(config["text"]["dim"], width, m["text_depth"], m["heads"])
        self.null_text = nn.Parameter(torch.zeros(width)) if full else None  # the token of no caption
        self.pooled_text = nn.Sequential(nn.LayerNorm(width, eps=EPS), nn.Linear(width, width)) if full else None
        self.shared_modulation = nn.Linear(width, 6 * width) if shared else None
        self.blocks = nn.ModuleDict({str(i): Block(m) for i in range(m["depth"])})
        self.final_modulation = Modulation(width, 2, shared)
        self.patch_out = nn.Linear(width, patch_dim)

    def forward(
        self,
        latents_CTHW: Tensor,
        timesteps: float | Tensor,
        text: str | Tensor | None,
        fps: float = 0.0,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """The velocity [C, T, H, W], at least fp32, on the device of the latents.

        timesteps      one for the clip, or [F]: of each latent frame of tokens, 0 where a frame is given and clean
        text           a caption, if the text encoder is `bytes`; else its features [S, E]; None: no caption
        fps            frames per second; 0 for an image
        size, frames   height and width in pixels, and number of frames; None: those of the latents
        """
        factors = self.config["codec"]["factors"]
        _, t, h, w = latents_CTHW.shape
        size = size or (h * factors[1], w * factors[2])
        frames = frames or 1 + (t - 1) * factors[0]
        patches_LP, grid = patchify(latents_CTHW, self.patch)
        coords_L3 = torch.cartesian_prod(*(torch.arange(n, device=latents_CTHW.device) for n in grid)).view(-1, 3)
        frame_L = coords_L3[:, 0]
        dtype = self.patch_in.weight.dtype
        x_LD = self.patch_in(patches_LP.to(dtype))
        if self.first_frame is not None:
            x_LD = x_LD + (frame_L == 0)[:, None].to(dtype) * self.first_frame
        text_SD = self.embed_text(text, latents_CTHW.device)

        timesteps_F = torch.as_tensor(timesteps, dtype=torch.float32, device=x_LD.device).expand(grid[0])
        cond_FD = self.timestep(sinusoid(timesteps_F * TIMESTEP_SCALE, TIMESTEP_FREQUENCIES).to(dtype))
        if self.native is not None:
            native = torch.tensor([*size, frames, fps], dtype=torch.float32, device=x_LD.device)
            pooled_D = text_SD.to(torch.promote_types(dtype, torch.float32)).mean(0).to(dtype)
            cond_FD = cond_FD + (self.native(native_features(native).to(dtype)) + self.pooled_text(pooled_D))
        shared = None
        if self.shared_modulation is not None:
            shared = self.shared_modulation(F.silu(cond_FD)).unflatten(-1, (6, -1))

        rotation_LK = build_rotation(coords_L3, self.config["model"])
        for block in self.blocks.values():
            x_LD = block(x_LD, cond_FD, shared, frame_L, text_SD, rotation_LK)
        shift_FD, scale_FD = self.final_modulation(cond_FD, cond_FD[:, None])
        out_LP = self.patch_out(modulate(x_LD, shift_FD[frame_L], scale_FD[frame_L]))
        return unpatchify(out_LP.to(torch.promote_types(dtype, torch.float32)), grid, self.patch)

    def embed_text(self, text: str | Tensor | None, device: torch.device) -> Tensor:
        """The tokens of a caption, [S, D]."""
        if text is None and self.null_text is not None:
            return self.null_text[None]
        if text is None:
            text = torch.zeros(1, self.config["text"]["dim"])
        return self.text((encode_bytes(text) if isinstance(text, str) else text).to(device))


class Embedding(nn.Module):
    """Two linear layers with a SiLU between them, of numbers that condition the model."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Modulation(nn.Module):
    """`count` vectors [F, D] of each latent frame: of its own projection, or of the shared one and its own table."""

    def __init__(self, width: int, count: int, shared: bool):
        super().__init__()
        self.count = count
        self.proj = None if shared else nn.Linear(width, count * width)
        self.table = nn.Parameter(torch.zeros(count, width)) if shared else None

    def forward(self, cond_FD: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        if self.proj is not None:
            return self.proj(F.silu(cond_FD)).unflatten(-1, (self.count, -1)).unbind(-2)
        return (shared + self.table).unbind(-2)


class Norm(nn.Module):
    """The weight, and for LayerNorm the bias, of a norm."""

    def __init__(self, size: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_LD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_LD), approximate="tanh"))


class Attention(nn.Module):
    """Self-attention of the tokens of the clip, or with `cross` attention to the tokens of its caption."""

    def __init__(self, m: dict[str, Any], cross: bool):
        super().__init__()
        width, heads, kind = m["width"], m["heads"], m["qk_norm"]
        self.heads, self.per_head = heads, kind == "per_head"
        if cross:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        size = width // heads if self.per_head else width
        self.q_norm, self.k_norm = (None, None) if kind == "none" else (Norm(size), Norm(size))
        self.out = nn.Linear(width, width)

    def forward(self, x_LD: Tensor, text_SD: Tensor | None, rotation_LK: Tensor | None) -> Tensor:
        if text_SD is None:
            q, k, v = self.qkv(x_LD).chunk(3, -1)
        else:
            q, (k, v) = self.q(x_LD), self.kv(text_SD).chunk(2, -1)
        q, k, v = self.split(q, self.q_norm), self.split(k, self.k_norm), self.split(v, None)
        if rotation_LK is not None:
            q, k = rotate(q, rotation_LK), rotate(k, rotation_LK)
        return self.out(attend(q, k, v))

    def split(self, x_LD: Tensor, norm: Norm | None) -> Tensor:
        """[L, D] -> [N, L, K], with an RMSNorm over the features of each head or of all heads."""
        if norm is not None and not self.per_head:
            x_LD = rms_norm(x_LD, norm.weight)
        x_NLK = x_LD.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return rms_norm(x_NLK, norm.weight) if norm is not None and self.per_head else x_NLK


class Block(nn.Module):
    """Self-attention, cross-attention to the caption and MLP; the first and last with shift, scale and gate."""

    def __init__(self, m: dict[str, Any]):
        super().__init__()
        self.modulation = Modulation(m["width"], 6, m["modulation"] == "shared")
        self.attention = Attention(m, cross=False)
        self.cross_norm = Norm(m["width"], bias=True)
        self.cross = Attention(m, cross=True)
        self.mlp = MLP(m["width"], m["mlp_hidden"])

    def forward(
        self,
        x_LD: Tensor,
        cond_FD: Tensor,
        shared: Tensor | None,
        frame_L: Tensor,
        text_SD: Tensor,
        rotation_LK: Tensor,
    ) -> Tensor:
        vectors = (vector_FD[frame_L] for vector_FD in self.modulation(cond_FD, shared))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        x_LD = x_LD + gate_a * self.attention(modulate(x_LD, shift_a, scale_a), None, rotation_LK)
        h_LD = F.layer_norm(x_LD, x_LD.shape[-1:], self.cross_norm.weight, self.cross_norm.bias, EPS)
        x_LD = x_LD + self.cross(h_LD, text_SD, None)
        return x_LD + gate_m * self.mlp(modulate(x_LD, shift_m, scale_m))


class TextBlock(nn.Module):
    """A transformer block over the tokens of a caption."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_SD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x_SD)).unflatten(-1, (3, self.heads, -1))
        x_SD = x_SD + self.out(attend(*(x.transpose(0, 1) for x in qkv.unbind(-3))))
        return x_SD + self.mlp(self.norm_mlp(x_SD))


class BytesEmbedder(nn.Module):
    """Words as symbols, [S, 16], -> [S, D]."""

    def __init__(self, symbols: int, width: int, depth: int, heads: int):
        super().__init__()
        self.symbols = symbols
        self.byte = nn.Embedding(WORD_BYTES * symbols, width)  # one table per position in the word
        self.word = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.place = nn.Embedding(MAX_POSITIONS, width)  # of the word in the caption
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, words_SW: Tensor) -> Tensor:
        device = words_SW.device
        x_SD = self.byte(words_SW + torch.arange(WORD_BYTES, device=device) * self.symbols).sum(1)
        x_SD = self.word(x_SD) + self.place(torch.arange(len(x_SD), device=device).clamp_max(MAX_POSITIONS - 1))
        for block in self.blocks:
            x_SD = block(x_SD)
        return self.norm(x_SD)


class FeatureEmbedder(nn.Module):
    """Features of a pretrained text encoder, [S, E], -> [S, D]."""

    def __init__(self, features: int, width: int, depth: int, heads: int):
        super().__init__()
        self.up, self.down = nn.Linear(features, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()

    def forward(self, text_SE: Tensor) -> Tensor:
        x_SD = self.down(F.gelu(self.up(text_SE.to(self.up.weight.dtype)), approximate="tanh"))
        for block in self.blocks:
            x_SD = block(x_SD)
        return self.norm(x_SD)


def encode_bytes(caption: str) -> Tensor:
    """int64 [S, 16]: the UTF-8 bytes of each word in lower case; longer words are several."""
    words = []
    for word in caption.lower().split():
        data = list(word.encode("utf-8"))
        words += [data[i : i + WORD_BYTES] for i in range(0, len(data), WORD_BYTES)]
    return torch.tensor([word + [PAD] * (WORD_BYTES - len(word)) for word in words or [[]]])


def attend(q_NLK: Tensor, k_NSK: Tensor, v_NSK: Tensor) -> Tensor:
    """[L, D], all heads."""
    out = F.scaled_dot_product_attention(q_NLK[None], k_NSK[None], v_NSK[None])
    return out[0].transpose(0, 1).flatten(-2)


def modulate(x_LD: Tensor, shift_LD: Tensor, scale_LD: Tensor) -> Tensor:
    return F.layer_norm(x_LD, x_LD.shape[-1:], eps=EPS) * (1 + scale_LD) + shift_LD


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def sinusoid(t_F: Tensor, dim: int) -> Tensor:
    """fp32 [F, dim]: cos and sin at frequencies from 1 to 1/10000."""
    frequency = torch.exp(torch.arange(dim // 2, device=t_F.device) * (-math.log(10_000.0) / (dim // 2)))
    angles = t_F[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), -1)


def native_features(size: Tensor) -> Tensor:
    """[6], of height, width, frames and frames per second."""
    height, width, frames, fps = size.clamp_min(1e-3).log2().unbind()
    features = (
        (height - 8) / 4,
        (width - 8) / 4,
        (width - height) / 2,
        frames / 4 - 1,
        (fps - 4) / 2,
        (frames - fps) / 4,
    )
    return torch.stack(features)


def build_rotation(coords_L3: Tensor, m: dict[str, Any]) -> Tensor:
    """complex64 [L, K / 2]: the rotation of pairs of features of a head by the position (t, h, w) of a token."""
    head_dim = m["width"] // m["heads"]
    side = 2 * (head_dim // 6)
    angles = []
    for axis, size in enumerate((head_dim - 2 * side, side, side)):
        j, factor = torch.arange(size // 2, dtype=torch.float64), m["rope_ntk_factor"][axis]
        slowed = factor ** (2 * j / (size - 2)) if size > 2 else torch.full_like(j, factor)
        frequency = (m["rope_base"] ** (-2 * j / max(size, 1)) / slowed).float().to(coords_L3.device)
        angles.append(coords_L3[:, axis, None].float() * frequency)
    angles_LK = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angles_LK), angles_LK)


def rotate(x_NLK: Tensor, rotation_LK: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_NLK.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation_LK).flatten(-2).to(x_NLK.dtype)


def patchify(latents_CTHW: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches [L, P] in the order of time, rows, columns; and how many there are of each."""
    pt, ph, pw = patch
    c, t, h, w = latents_CTHW.shape
    if t % pt or h % ph or w % pw:
        raise ValueError(f"latents {[c, t, h, w]} are no multiples of a patch {list(patch)}; pad them")
    grid = t // pt, h // ph, w // pw
    x = latents_CTHW.reshape(c, grid[0], pt, grid[1], ph, grid[2], pw).permute(1, 3, 5, 0, 2, 4, 6)
    return x.reshape(math.prod(grid), -1), grid


def unpatchify(patches_LP: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    x = patches_LP.view(*grid, -1, *patch).permute(3, 0, 4, 1, 5, 2, 6)
    return x.reshape(x.shape[0], *(n * p for n, p in zip(grid, patch, strict=True)))
