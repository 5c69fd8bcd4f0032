"""Packs of clips and small codec networks that every layout of the context axis must train identically, and the
single-process reference. All in float64; the weights are random, so that no zero can hide an error."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora.codec.vae.boundary import ClipBoundary
from megasora.codec.vae.discriminator import Discriminator, discriminator_loss, generator_loss
from megasora.codec.vae.losses import frame_terms, reconstruction_loss
from megasora.codec.vae.network import VideoVAE
from megasora.config import AdversarialConfig, ParallelConfig, ReconstructionConfig, VAEConfig
from megasora.parallel.clip_exchange import gather_stack
from megasora.parallel.mesh import Axis, Mesh, build_mesh
from megasora.parallelize_codec import ContextParallelCodec

CHANNELS, PENALTY = 4, 0.01
VAE = VAEConfig(width=4, patch=2, multipliers=[1, 2], blocks=1, codebook_size=16, fsq_levels=[5, 4, 3, 8])


@dataclass(frozen=True)
class Case:
    """`stacks`: clips, latent frames, latent rows, latent columns of each."""

    ft: int
    stacks: tuple[tuple[int, int, int, int], ...]
    kind: str = "kl"
    time: str = "causal"

    @property
    def factors(self) -> tuple[int, int, int]:
        return (self.ft, 4, 4)

    def sizes(self) -> list[tuple[int, int, int, int]]:
        return [(b, 1 + (t - 1) * self.ft, 4 * h, 4 * w) for b, t, h, w in self.stacks]


PACK = ((2, 4, 3, 1), (3, 1, 2, 3), (1, 2, 2, 2), (1, 5, 4, 1))  # images and short clips between longer ones
CASES = {
    "kl 1x4x4": Case(1, PACK),
    "kl 2x4x4": Case(2, PACK),
    "kl 4x4x4": Case(4, PACK),
    "kl 8x4x4": Case(8, PACK),
    "kl by frame": Case(1, PACK, time="none"),
    "vq": Case(4, PACK, "vq"),
    "fsq": Case(2, PACK, "fsq"),
    "images only": Case(4, ((2, 1, 1, 1), (1, 1, 1, 2))),
    "one latent frame per rank": Case(2, ((1, 4, 4, 1),)),
}
LAYOUTS = {  # (time, rows): cases, besides (2, 2) with all of them
    (2, 1): ["kl 1x4x4", "kl 2x4x4", "kl 4x4x4", "kl 8x4x4"],
    (1, 2): ["kl 4x4x4", "vq"],
    (3, 1): ["kl 2x4x4", "kl 8x4x4", "fsq"],
    (1, 3): ["kl 2x4x4", "images only"],
    (4, 1): ["kl 1x4x4", "kl 4x4x4", "vq", "images only", "one latent frame per rank"],
    (1, 4): ["kl 4x4x4", "kl by frame"],
}


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    stacks = [tuple(draw.randint(1, most) for most in (2, 6, 5, 2)) for _ in range(draw.randint(1, 3))]
    return Case(draw.choice([1, 2, 4]), tuple(stacks), draw.choice(["kl", "kl", "vq", "fsq"]))


def keyed_normal(key: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum((i + 1) * ord(letter) for i, letter in enumerate(key)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def build_networks(case: Case) -> nn.ModuleDict:
    vae = dataclasses.replace(VAE, kind=case.kind, time=case.time)
    discriminator = Discriminator(AdversarialConfig(width=4, layers=2), list(case.factors), case.time)
    networks = nn.ModuleDict({"vae": VideoVAE(vae, list(case.factors), CHANNELS), "discriminator": discriminator})
    for name, tensor in [*networks.double().named_parameters(), *networks.named_buffers()]:
        fan_in = tensor[0].numel() if tensor.ndim > 2 else 1
        tensor.copy_(keyed_normal(name, tensor.shape) * (0.3 if tensor.ndim == 1 else fan_in**-0.5))
        tensor += 1.0 if "norm" in name else 0.0
    return networks


def stacks_of(case: Case) -> list[dict[str, Tensor]]:
    """Frames, noise, targets and weights of the loss of each whole stack."""
    stacks = []
    for index, ((b, t, h, w), size) in enumerate(zip(case.stacks, case.sizes(), strict=True)):
        shape = (size[0], 3, *size[1:])
        tensors = {name: keyed_normal(f"{name} {index}", shape) for name in ("frames", "targets", "weights")}
        tensors["frames"].requires_grad_()
        stacks.append({**tensors, "noise": keyed_normal(f"noise {index}", (b, CHANNELS, t, h, w))})
    return stacks


def loss_of(frames: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss of training, summed over frames, and a random weight of each pixel."""
    return reconstruction_loss(frame_terms(frames, targets), ReconstructionConfig()).sum() + (frames * weights).sum()


def adversarial_loss(discriminator: Discriminator, real: Tensor, fake: Tensor, boundary, whole_rows) -> Tensor:
    """Of the frames of a piece, summed over logits of frames: that of the decoder and that of the discriminator."""
    of_decoder, of_fake, of_real = (whole_rows(discriminator(x, boundary)) for x in (fake, fake.detach(), real))
    return generator_loss(of_decoder).sum() + discriminator_loss(of_real, of_fake).sum()


def codebook_sums(networks: nn.ModuleDict, axis: Axis | None) -> dict[str, Tensor]:
    """The statistics of a codebook over all ranks."""
    if not hasattr(networks.vae.quantizer, "codebook"):
        return {}

    def reduce(op):
        def run(x: Tensor) -> Tensor:
            x = x.clone()
            if axis is not None:
                dist.all_reduce(x, op, group=axis.group)
            return x

        return run

    statistics = networks.vae.quantizer.codebook.take_statistics()
    statistics = statistics.all_reduce(reduce(dist.ReduceOp.MIN), reduce(dist.ReduceOp.SUM))
    return {"statistics " + f.name: getattr(statistics, f.name) for f in dataclasses.fields(statistics)}


def one_process(case: Case) -> dict[str, Tensor]:
    """Every output and gradient of a forward and backward pass of the pack."""
    networks, stacks = build_networks(case), stacks_of(case)
    results, loss = {}, torch.zeros((), dtype=torch.float64)
    for index, stack in enumerate(stacks):
        out = networks.vae(stack["frames"], stack["noise"], ClipBoundary())
        results |= {f"frames {index}": out.frames.detach(), f"latents {index}": out.latents.z.detach()}
        loss = loss + loss_of(out.frames, stack["targets"], stack["weights"]) + PENALTY * out.latents.penalty_sum
        loss = loss + adversarial_loss(
            networks.discriminator, stack["targets"], out.frames, ClipBoundary(), lambda x: x
        )
    loss.backward()
    return {"loss": loss.detach(), **results, **gradients(networks, stacks), **codebook_sums(networks, None)}


def gradients(networks: nn.ModuleDict, stacks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    parameters = {
        f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in networks.named_parameters()
    }
    frames = (stack["frames"] for stack in stacks)
    return parameters | {
        f"gradient of stack {index}": torch.zeros_like(x) if x.grad is None else x.grad
        for index, x in enumerate(frames)
    }


def many_processes(case: Case, mesh: Mesh) -> dict[str, Tensor]:
    """The same on this rank: gathered outputs, and sums of losses and gradients over all ranks."""
    codec = ContextParallelCodec(mesh, case.factors)
    networks, stacks = build_networks(case), stacks_of(case)
    pieces = codec.share_stacks(case.sizes())
    outputs, loss = [], sum(p.sum() * 0 for p in networks.parameters())
    for piece, stack in zip(pieces, stacks, strict=True):
        outputs.append(None)
        if piece is not None:
            frames, noise = piece.take_frames(stack["frames"]), piece.take_latents(stack["noise"])
            outputs[-1] = out = networks.vae(frames, noise, piece.boundary)
            targets, weights = piece.take_targets(stack["targets"]), piece.take_targets(stack["weights"])
            loss = loss + loss_of(piece.whole_rows(out.frames), targets, weights) + PENALTY * out.latents.penalty_sum
            real = piece.take_frames(stack["targets"])
            loss = loss + adversarial_loss(networks.discriminator, real, out.frames, piece.boundary, piece.whole_rows)
    loss.backward()
    summed = {"loss": loss.detach(), **gradients(networks, stacks)}
    for tensor in summed.values():
        dist.all_reduce(tensor, group=mesh.context.group)
    results = {}
    for index, (split, out, stack) in enumerate(zip(codec.split(case.sizes()), outputs, stacks, strict=True)):
        frames, latents = (None, None) if out is None else (out.frames, out.latents.z)
        results[f"frames {index}"] = codec.gather_frames(frames, split, stack["frames"])
        results[f"latents {index}"] = gather_stack(latents, split, mesh.context, stack["noise"])
    return {**summed, **results, **codebook_sums(networks, mesh.context)}


def train_all(
    cases: dict[str, Case], runs: list[tuple[tuple[int, int], str]]
) -> dict[tuple[tuple[int, int], str], dict[str, Tensor]]:
    """Of this rank, for each layout (time, rows) and name of a case in `runs`."""
    meshes = {layout: codec_mesh(*layout) for layout in dict.fromkeys(layout for layout, _ in runs)}
    return {(layout, name): many_processes(cases[name], meshes[layout]) for layout, name in runs}


def codec_mesh(time: int, rows: int) -> Mesh:
    return build_mesh(ParallelConfig(context=time * rows, rows=rows), "cpu")


def largest_error(results: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """(largest max |a - b| / max |b|, its name)."""
    assert results.keys() == expected.keys(), sorted(results.keys() ^ expected.keys())
    worst = (0.0, "")
    for name, b in expected.items():
        a = results[name]
        assert a.shape == b.shape, (name, a.shape, b.shape)
        finite = b.isfinite()
        assert torch.equal(finite, a.isfinite()), f"{name} is not finite in the same places"
        difference, scale = (a - b)[finite].abs(), b[finite].abs()
        if name.startswith("gradient"):
            assert float(scale.max()) > 0, f"{name} is all zero: the comparison would be empty"
        if len(scale):
            worst = max(worst, (float(difference.max() / scale.max().clamp_min(1e-300)), name))
    return worst
