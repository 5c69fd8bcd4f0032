"""Speed and memory of the learned codec: python -m benchmarks.codec [--out benchmarks/results/codec.json]

    speed     frames per CPU second that `vae` and `dct` encode of the same clip, in turns
    pieces    a clip encoded and decoded whole, in chunks, and in chunks and tiles: CPU seconds and peak memory, each in
              a process of its own; ratios to the whole
    overlap   how close tiled latents and frames are to those of the whole frame, by codec.tile_overlap
    length    clips of two lengths, encoded in chunks and tiles with the same memory

The network is that of configs/vae_demo.yaml, its weights are random or, with --codec, trained ones. The camera moves
over a texture, so that a clip of any length takes no memory. Memory is the largest resident set of the process (VmHWM),
less what it was before the clip: Python, PyTorch and the weights. One thread; CPU seconds, since other programs slow
these less.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import environment, write_record
from megasora.codec import build_frame_encoder
from megasora.codec.vae.boundary import Boundary
from megasora.codec.vae.folder import find_codec_folder, read_manifest
from megasora.codec.vae.network import VideoVAE, init_weights
from megasora.codec.vae.stream import decode_stream, encode_stream
from megasora.codec.vae.tiles import build_decoder, build_encoder, receptive_field
from megasora.codec.vae.weights import load_network
from megasora.config import CodecConfig, Config, VAEConfig, load

PRESET = Path(__file__).resolve().parents[1] / "configs" / "vae_demo.yaml"
FPS = 24
MIB = 1 << 20
Result = TypeVar("Result")


@dataclass(frozen=True)
class Network:
    """The configuration of the network, and the folder of its weights; without, they are random."""

    codec: CodecConfig
    vae: VAEConfig
    folder: Path | None

    def build(self) -> VideoVAE:
        if self.folder:
            return load_network(self.folder, read_manifest(self.folder))
        model = VideoVAE(self.vae, self.codec.factors, self.codec.channels).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        init_weights(model, lambda name, shape: torch.randn(shape, generator=generator))
        return model


def read_network(preset: Path, folder: Path | None) -> Network:
    config: Config = load(str(preset), [])
    if folder is None:
        return Network(config.codec, config.vae, None)
    folder = find_codec_folder(folder)
    manifest = read_manifest(folder)
    codec = replace(config.codec, factors=list(manifest.factors), channels=manifest.channels)
    return Network(codec, manifest.vae, folder)


def camera(frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] each: views of a texture, along a closed path."""
    draw, reach = np.random.default_rng(0), 64
    world = np.zeros((height + reach, width + reach, 3), np.float32)
    for cell in (64, 16, 4):
        coarse = draw.normal(0, 10 * cell**0.3, (-(-world.shape[0] // cell), -(-world.shape[1] // cell), 3))
        world += np.kron(coarse, np.ones((cell, cell, 1)))[: world.shape[0], : world.shape[1]].astype(np.float32)
    texture = np.clip(128 + world, 0, 255).astype(np.uint8)
    for index in range(frames):
        y, x = (int(reach / 2 * (1 + f(index / 20))) for f in (np.sin, np.cos))
        yield texture[y : y + height, x : x + width]


def encode(network: Network, model: VideoVAE, codec: CodecConfig, frames: Iterator[np.ndarray]) -> Iterator[Tensor]:
    def from_bytes(pixels: Tensor, boundary: Boundary) -> Tensor:
        return model.encode(pixels.float() / 127.5 - 1, boundary)

    coder = build_encoder(from_bytes, network.vae, codec.factors, codec)
    tensors = (torch.from_numpy(frame).permute(2, 0, 1) for frame in frames)
    return encode_stream(coder, tensors, codec.factors[0], codec.chunk_frames)


def decode(network: Network, model: VideoVAE, codec: CodecConfig, latents: Iterator[Tensor]) -> Iterator[Tensor]:
    coder = build_decoder(model.decode, network.vae, codec.factors, codec)
    return decode_stream(coder, latents, codec.factors[0], codec.chunk_frames)


def in_own_process(function: Callable[..., Result], *arguments) -> Result:
    """Its result, computed by a process with one thread: numpy reads these variables when it is imported."""
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- speed


@dataclass(frozen=True)
class Speed:
    codec: str
    frames_per_cpu_second: list[float]  # one number per trial
    dct_over_this: list[float]


def measure_speed(network: Network, frames: int, height: int, width: int, trials: int) -> list[Speed]:
    model, channels = network.build(), network.codec.channels
    clip = list(camera(frames, height, width))
    dcts = {
        f"dct, {n} channels": build_frame_encoder(replace(network.codec, name="dct", channels=n))
        for n in sorted({channels, CodecConfig().channels})
    }
    variants = {name: (lambda encoder=encoder: encoder.encode(clip)) for name, encoder in dcts.items()}
    variants[f"vae, {channels} channels"] = lambda: encode(network, model, network.codec, iter(clip))
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for trial in range(trials + 1):
        for name, run in variants.items():
            start = time.process_time()
            for _ in run():
                pass
            if trial > 0:
                speeds[name].append(frames / (time.process_time() - start))
    reference = speeds[next(iter(variants))]
    return [Speed(name, own, [a / b for a, b in zip(reference, own, strict=True)]) for name, own in speeds.items()]


# ---- pieces and length


@dataclass(frozen=True)
class Piece:
    """One clip in a process of its own."""

    direction: str  # encode | decode
    frames: int
    height: int
    width: int
    tile: list[int]
    tile_overlap: int
    chunk_frames: int
    cpu_seconds: float
    mib_before: float  # resident: Python, PyTorch and weights
    peak_mib: float  # beyond that


def resident_mib(key: str) -> float:
    """`key`: VmRSS, now, or VmHWM, the largest so far."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024 / MIB


def run_piece(network: Network, codec: CodecConfig, direction: str, frames: int, height: int, width: int) -> Piece:
    model = network.build()
    latent_frames = 1 + -(-(frames - 1) // codec.factors[0])
    if direction == "encode":
        results = encode(network, model, codec, camera(frames, height, width))
    else:
        draw, (_, fh, fw) = torch.Generator().manual_seed(0), codec.factors
        shape = (codec.channels, 1, height // fh, width // fw)
        results = decode(network, model, codec, (torch.randn(shape, generator=draw) for _ in range(latent_frames)))
    before, start = resident_mib("VmRSS"), time.process_time()
    count = sum(result.shape[1] for result in results)
    seconds = time.process_time() - start
    if count != (latent_frames if direction == "encode" else 1 + (latent_frames - 1) * codec.factors[0]):
        raise RuntimeError(f"{direction} of {frames} frames returned {count}")
    settings = codec.tile, codec.tile_overlap, codec.chunk_frames
    return Piece(direction, frames, height, width, *settings, seconds, before, resident_mib("VmHWM") - before)


def piece_settings(codec: CodecConfig, frames: int) -> list[CodecConfig]:
    """The whole clip first."""
    whole = replace(codec, tile=[0, 0], chunk_frames=frames)
    chunks = [replace(whole, chunk_frames=n) for n in (16, 8)]
    return [whole, *chunks, *(replace(codec, chunk_frames=n) for n in (16, 8)), replace(codec, tile=[256, 256])]


# ---- overlap


@dataclass(frozen=True)
class Overlap:
    """PSNR against the whole frame, in dB; of latents, the peak is four standard deviations."""

    tile: list[int]
    tile_overlap: int
    latents_db: float
    frames_db: float
    seam_step: float  # step of the error between columns where it is largest, over the mean step of the frame


def decibels(x: Tensor, reference: Tensor, peak: float) -> float:
    return float(10 * torch.log10(peak**2 / (x - reference).square().mean().clamp(min=1e-20)))


def measure_overlap(network: Network, height: int, width: int, overlaps: list[int]) -> list[Overlap]:
    model, results = network.build(), []
    whole = replace(network.codec, tile=[0, 0])
    clip = list(camera(5, height, width))
    latents = torch.cat(list(encode(network, model, whole, iter(clip))), dim=1)
    frames = torch.cat(list(decode(network, model, whole, iter([latents]))), dim=1)
    for overlap in overlaps:
        codec = replace(network.codec, tile=[256, 256], tile_overlap=overlap)
        own_latents = torch.cat(list(encode(network, model, codec, iter(clip))), dim=1)
        own_frames = torch.cat(list(decode(network, model, codec, iter([latents]))), dim=1)
        step = (own_frames - frames).diff(dim=-1).abs().mean((0, 1, 2)).max() / frames.diff(dim=-1).abs().mean()
        peaks = 4 * float(latents.std()), 2.0
        values = decibels(own_latents, latents, peaks[0]), decibels(own_frames, frames, peaks[1])
        results.append(Overlap(codec.tile, overlap, *values, float(step)))
    return results


# ---- tables


def build_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def piece_table(title: str, pieces: list[Piece]) -> Table:
    """The first of each direction is the one that others are compared with."""
    rows = []
    for _, group in itertools.groupby(pieces, key=lambda p: p.direction):
        group = list(group)
        for p in group:
            sizes = "x".join(map(str, p.tile)) if any(p.tile) else "whole"
            rows.append([p.direction, str(p.frames), str(p.chunk_frames), sizes, f"{p.cpu_seconds:.1f}"])
            rows[-1] += [f"{p.cpu_seconds / group[0].cpu_seconds:.2f}", f"{p.peak_mib:,.0f}"]
            rows[-1] += [f"{p.peak_mib / group[0].peak_mib:.2f}"]
    return build_table(title, ["", "frames", "chunk", "tile", "CPU s", "/ first", "peak MiB", "/ first"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--codec", type=Path, help="folder of a trained codec; without, weights are random")
    parser.add_argument("--trials", type=int, default=3, help="how often each codec encodes the clip")
    parser.add_argument("--clip", type=int, nargs=3, default=[33, 720, 1280], metavar=("FRAMES", "H", "W"))
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 16, 32, 64, 96, 128, 168])
    parser.add_argument("--overlap-size", type=int, nargs=2, default=[360, 640], metavar=("H", "W"))
    parser.add_argument("--long", type=int, nargs=2, default=[1080, 1920], metavar=("H", "W"), help="of the long clips")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60], help=f"lengths, at {FPS} frames per s")
    options = parser.parse_args(arguments)

    head, console = environment(), Console(width=120)
    torch.set_num_threads(1)
    network = read_network(PRESET, options.codec)
    field = receptive_field(network.vae, network.codec.factors)
    body: dict[str, object] = {
        "codec": asdict(network.codec), "vae": asdict(network.vae), "receptive_field": asdict(field),
        "weights": str(options.codec) if options.codec else "random",
    }  # fmt: skip

    speeds = in_own_process(measure_speed, network, *options.clip, options.trials)
    rows = [[s.codec, f"{np.median(s.frames_per_cpu_second):.1f}", f"{np.median(s.dct_over_this):.1f}"] for s in speeds]
    size = "{} frames of {}x{}".format(*options.clip)
    console.print(build_table(f"encode {size}", ["", "frames per CPU second", f"{speeds[0].codec} / this"], rows))
    body["speed"] = [asdict(s) for s in speeds]

    pieces = [
        in_own_process(run_piece, network, codec, direction, *options.clip)
        for direction in ("encode", "decode")
        for codec in piece_settings(network.codec, options.clip[0])
    ]
    console.print(piece_table(f"{size}, whole and in pieces", pieces))
    body["pieces"] = [asdict(p) for p in pieces]

    overlaps = measure_overlap(network, *options.overlap_size, options.overlaps)
    rows = [[str(o.tile_overlap), f"{o.latents_db:.1f}", f"{o.frames_db:.1f}", f"{o.seam_step:.2%}"] for o in overlaps]
    title = f"tiles against the whole frame; receptive field {field.encoder} and {field.decoder} pixels"
    console.print(build_table(title, ["overlap", "latents, dB", "frames, dB", "step at the seam / of frame"], rows))
    body["overlap"] = [asdict(o) for o in overlaps]

    height, width = (-(-side // f) * f for side, f in zip(options.long, network.codec.factors[1:], strict=True))
    codec = replace(network.codec, chunk_frames=8)
    lengths = [
        in_own_process(run_piece, network, codec, "encode", round(seconds * FPS), height, width)
        for seconds in options.seconds
    ]
    console.print(piece_table(f"clips of {height}x{width}", lengths))
    body["length"] = [asdict(p) for p in lengths]
    if options.out:
        write_record(options.out, head, body)
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
