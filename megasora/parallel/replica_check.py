"""Debug check (`run.debug_parallel`): tensors that are replicated over ranks must be equal there, bit by bit.

Packs are replicated on all ranks that share them, a parameter on all ranks that hold a copy of it. Ranks exchange
hashes, not tensors. A difference raises MegaSoraError on all ranks, with the tensor's name and the ranks that differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.errors import MegaSoraError
from megasora.parallel.collectives import all_gather_async, wait
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.world import World
from megasora.placement import Placement

MAX_SHOWN = 4  # differences named in an error; of the others it gives the number


def check_packs(packs: list[VideoBatch], axes: tuple[Axis, ...], world: World, step: int) -> None:
    """Raises MegaSoraError unless `packs` are equal on all ranks of each of `axes`.

    Clean packs are replicated over tensor, context and pipeline; a rank's shares over tensor and pipeline. `step`
    counts from 0. All ranks must call it.
    """
    hashes = {
        f"pack {i}'s {field.name}": hash_of(value)
        for i, pack in enumerate(packs)
        for field in dataclasses.fields(pack)
        if isinstance(value := getattr(pack, field.name), Tensor)
    }
    raise_if_different([line for axis in axes for line in differing_hashes(hashes, axis, world)], world, step)


def check_replicas(
    parameters: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    mesh: Mesh,
    world: World,
    step: int,
    partitioned: bool = False,
) -> None:
    """Raises MegaSoraError unless all copies of each parameter are equal.

    Copies are on all ranks of data x context, on tensor ranks if the placement does not shard the parameter, and on
    pipeline ranks if it is on every stage. `partitioned`: data x context ranks have partitions instead of copies
    (ZeRO-3). `step` counts from 0. All ranks must call it.
    """
    hashes = {name: hash_of(p) for name, p in parameters.items()}
    copies = {
        mesh.data_context: [] if partitioned else list(hashes),
        mesh.tensor: [name for name in hashes if placements[name].shard_dim is None],
        mesh.pipeline: [name for name in hashes if "pipeline" in placements[name].partial_axes],
    }
    differences = []
    for axis, names in copies.items():
        differences += differing_hashes({f"parameter {name}": hashes[name] for name in names}, axis, world)
    raise_if_different(differences, world, step)


def hash_of(tensor: Tensor) -> int:
    """A signed 64-bit hash of the tensor's bytes and dtype."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(content, digest_size=8, salt=f"{tensor.dtype}"[-16:].encode())
    return int.from_bytes(digest.digest(), "big", signed=True)


def differing_hashes(hashes: Mapping[str, int], axis: Axis, world: World) -> list[str]:
    """One sentence for each name whose hash differs between ranks of the axis; these must have the same names."""
    if not axis.is_split or not hashes:
        return []
    local = torch.tensor([list(hashes.values())], device=world.device)
    all_ranks = wait(all_gather_async(local, axis)).cpu()  # [size, n]
    differs = (all_ranks != all_ranks[0]).any(0).tolist()
    return [
        f"{name} differs on the {axis.name} axis: {ranks_by_hash(all_ranks[:, i].tolist(), axis)}"
        for i, name in enumerate(hashes)
        if differs[i]
    ]


def ranks_by_hash(hashes: list[int], axis: Axis) -> str:
    """The global ranks of an axis grouped by their hashes, e.g. "ranks 0, 1, 3 from rank 2"."""
    groups: dict[int, list[int]] = {}
    for peer, value in enumerate(hashes):
        groups.setdefault(value, []).append(axis.global_rank(peer))
    return " from ".join(f"{'ranks' if len(g) > 1 else 'rank'} {', '.join(map(str, g))}" for g in groups.values())


def raise_if_different(differences: list[str], world: World, step: int) -> None:
    """Raises the same MegaSoraError on all ranks if any rank passes a difference. `step` counts from 0."""
    if not int(world.all_reduce_sum(torch.tensor(len(differences)))):
        return
    by_rank = world.gather_objects(differences) or []  # None but on the main rank
    distinct = sorted({line for lines in by_rank for line in lines})
    more = [f"and {len(distinct) - MAX_SHOWN} more"] if len(distinct) > MAX_SHOWN else []
    shown = world.broadcast_object([*distinct[:MAX_SHOWN], *more])
    raise MegaSoraError(
        f"step {step + 1}: {'; '.join(shown)}; replicated tensors must be equal bit by bit: look for an input or a "
        "random number that depends on the rank"
    )
