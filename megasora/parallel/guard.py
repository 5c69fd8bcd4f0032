"""The debug guard: what must be the same on several ranks is the same, bit by bit.

Packs are the same on all ranks that share them; a parameter is the same on all ranks that hold a copy. Hashes travel,
not tensors; a difference is told with its name and the ranks, on every rank, and ends the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.errors import MegaSoraError
from megasora.parallel.collectives import finish, start_gather
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.world import World
from megasora.placement import Placement

SHOWN = 4  # differences that an error tells one by one


def check_packs(packs: list[VideoBatch], axes: tuple[Axis, ...], world: World, step: int) -> None:
    """`packs` must be equal over each of `axes`: clean packs over tensor, context, pipeline; shares without context."""
    names, hashes = [], []
    for number, pack in enumerate(packs):
        for field in dataclasses.fields(pack):
            value = getattr(pack, field.name)
            if isinstance(value, Tensor):
                names.append(f"pack {number}'s {field.name}")
                hashes.append(hash_of(value))
    refuse([d for axis in axes for d in differences(names, hashes, axis, world)], world, step)


def check_replicas(
    parameters: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    mesh: Mesh,
    world: World,
    step: int,
    sliced: bool = False,
) -> None:
    """Every copy of a parameter must be equal: over data and context all, over tensor and pipeline those whole there.

    `sliced`: data and context have a slice of each parameter instead of a copy (ZeRO-3).
    """
    hashes = {name: hash_of(p) for name, p in parameters.items()}
    whole = [name for name in parameters if placements[name].cut is None]
    everywhere = [name for name in parameters if "pipeline" in placements[name].summed]
    found = []
    for axis, names in (
        (mesh.zero, [] if sliced else list(parameters)),
        (mesh.tensor, whole),
        (mesh.pipeline, everywhere),
    ):
        found += differences([f"parameter {n}" for n in names], [hashes[n] for n in names], axis, world)
    refuse(found, world, step)


def hash_of(tensor: Tensor) -> int:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(content, digest_size=8, salt=f"{tensor.dtype}"[-16:].encode())
    return int.from_bytes(digest.digest(), "big", signed=True)


def differences(names: list[str], hashes: list[int], axis: Axis, world: World) -> list[str]:
    """One line for each name whose hash is not the same on all ranks of the axis."""
    if not axis.is_split or not names:
        return []
    mine = torch.tensor([hashes], device=world.device)
    everyone = finish(start_gather(mine, axis)).cpu()  # [size, n]
    lines = []
    for i in (everyone != everyone[0]).any(0).nonzero().flatten().tolist():
        groups: dict[int, list[int]] = {}
        for peer, value in enumerate(everyone[:, i].tolist()):
            groups.setdefault(value, []).append(axis.global_rank(peer))
        told = " from ".join(f"{'ranks' if len(g) > 1 else 'rank'} {', '.join(map(str, g))}" for g in groups.values())
        lines.append(f"{names[i]} differs on the {axis.name} axis: {told}")
    return lines


def refuse(lines: list[str], world: World, step: int) -> None:
    """Raises the same error on all ranks where any has found a difference."""
    if not int(world.sum(torch.tensor(len(lines)))):
        return
    found = world.gather(lines)
    first = sorted({line for rank in found for line in rank}) if found is not None else []
    more = [f"and {len(first) - SHOWN} more"] if len(first) > SHOWN else []
    shown = world.from_main([*first[:SHOWN], *more])
    raise MegaSoraError(
        f"step {step}: {'; '.join(shown)}; what ranks share must be equal bit by bit: look for an input or a random "
        "number that depends on the rank"
    )
