"""The replica check (`run.debug_parallel`): tensors that are replicated over ranks must be equal there, bit by bit.

Packs are replicated on all ranks that share them, a parameter on all ranks that hold a copy of it, its master weights
and moments on the ranks of the tensor and pipeline axes that own the same elements. Hashes are computed on the device
that holds a tensor, and exchanged in its place. Over data x context each master weight has one owner: it is compared
with the weight that its rank computes with, and that one with the copies of the other ranks. A difference raises
ReplicaError on all ranks, with the tensor's name and the ranks that differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.errors import ReplicaError
from megasora.fragment import Fragment
from megasora.parallel.collectives import all_gather_async, wait
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.tensor_hash import tensor_hash
from megasora.parallel.world import World
from megasora.placement import Placement

MAX_SHOWN = 4  # differences named in an error; of the others it gives the number
SAME_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtype by bytes


def check_packs(packs: list[VideoBatch], axes: tuple[Axis, ...], world: World, step: int) -> None:
    """Raises ReplicaError unless `packs` are equal on all ranks of each of `axes`.

    Clean packs are replicated over tensor, context and pipeline; a rank's shares over tensor and pipeline. `step`
    counts from 0. All ranks must call it.
    """
    tensors = {
        f"pack {i}'s {field.name}": value
        for i, pack in enumerate(packs)
        for field in dataclasses.fields(pack)
        if isinstance(value := getattr(pack, field.name), Tensor)
    }
    axes = tuple(axis for axis in axes if axis.is_split)
    hashes = hash_all(tensors if axes else {}, world)
    raise_if_different([line for axis in axes for line in differing_hashes(hashes, axis, world)], world, step)


def check_replicas(
    parameters: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    mesh: Mesh,
    world: World,
    step: int,
    partitioned: bool = False,
    fragments: Sequence[Fragment] = (),
) -> None:
    """Raises ReplicaError unless all copies of each parameter, and of what ranks own of it, are equal.

    Copies are on all ranks of data x context, on tensor ranks if the placement does not shard the parameter, and on
    pipeline ranks if it is on every stage. `partitioned`: data x context ranks have partitions instead of copies
    (ZeRO-3). `fragments`: what this rank owns, with the same placements. `step` counts from 0. All ranks must call it.
    """
    if world.size == 1:
        return
    replicated = {
        mesh.data_context: lambda placement: False,
        mesh.tensor: lambda placement: placement.shard_dim is None,
        mesh.pipeline: lambda placement: "pipeline" in placement.partial_axes,
    }
    weights = {f"parameter {name}": (parameter, placements[name]) for name, parameter in parameters.items()}
    owned = {
        f"{kind} of {f.name}": (value, f.placement) for f in fragments for kind, value in f.values.items()
    }  # fmt: skip
    names = {
        axis: [name for name, (_, placement) in {**weights, **owned}.items() if is_replicated(placement)]
        for axis, is_replicated in replicated.items()
    }
    if not partitioned:
        names[mesh.data_context] = list(weights)
    compared = {name for axis, found in names.items() if axis.is_split for name in found}
    tensors = {name: tensor for name, (tensor, _) in {**weights, **owned}.items() if name in compared}
    hashes = hash_all(tensors, world)
    differences = differing_masters(parameters, fragments, world, partitioned)
    for axis, found in names.items():
        differences += differing_hashes({name: hashes[name] for name in found} if axis.is_split else {}, axis, world)
    raise_if_different(differences, world, step)


def differing_masters(
    parameters: Mapping[str, Tensor], fragments: Sequence[Fragment], world: World, partitioned: bool
) -> list[str]:
    """One sentence for each fragment whose master weights, rounded, are not the weights that its rank computes with."""
    differs = []
    for f in fragments:
        weight = parameters[f.name].detach().view(-1)
        copy = weight[: f.count] if partitioned else weight[f.start : f.start + f.count]
        bits = SAME_BITS[copy.element_size()]
        differs.append((f.values["weights"].to(copy.dtype).view(bits) != copy.view(bits)).any())
    flags = torch.stack(differs).tolist() if differs else []
    return [
        f"parameter {f.name} differs on rank {world.rank} from its master weights"
        for f, flag in zip(fragments, flags, strict=True)
        if flag
    ]


def hash_all(tensors: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """The hash of each tensor; they are brought to the CPU together."""
    if not tensors:
        return {}
    hashes = torch.stack([tensor_hash(tensor).to(world.device) for tensor in tensors.values()])
    return dict(zip(tensors, hashes.tolist(), strict=True))


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
    """Raises the same ReplicaError on all ranks if any rank passes a difference. `step` counts from 0."""
    if not int(world.all_reduce_sum(torch.tensor(len(differences)))):
        return
    by_rank = world.gather_objects(differences) or []  # None but on the main rank
    distinct = sorted({line for lines in by_rank for line in lines})
    more = [f"and {len(distinct) - MAX_SHOWN} more"] if len(distinct) > MAX_SHOWN else []
    shown = world.broadcast_object([*distinct[:MAX_SHOWN], *more])
    raise ReplicaError(
        f"step {step + 1}: {'; '.join(shown)}; replicated tensors must be equal bit by bit: start again from the last "
        "checkpoint; if it happens again on another machine too, look for an input or a random number that depends on "
        "the rank"
    )
