"""The replica check is silent if ranks agree; a flipped bit raises an error with tensor and ranks on every rank."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from layouts import configure, global_batch, layout, objective_of, random_local_model

from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.parallel.mesh import build_mesh
from megasora.parallel.replica_check import check_packs, check_replicas
from megasora.parallel.share import share_pack
from megasora.parallel.world import World
from megasora.testing.spawn import run_ranks

STEP = 17  # counted from 0; messages count from 1, like metrics.jsonl


def flip_a_bit(tensor):
    """Flips the lowest bit of the first byte of the last element."""
    tensor.detach().view(-1)[-1:].view(torch.uint8)[0] ^= 1


@dataclass(frozen=True)
class Case:
    """Settings of the mesh of four ranks, the tensors with a flipped bit, and the differences the error must name."""

    settings: dict
    flipped: dict  # name: ranks
    differences: tuple = ()
    partitioned: bool = False


BY_DATA, BY_PIPELINE = dict(tensor=2), dict(tensor=2, pipeline=2)
UNSHARDED, SHARDED = "timestep.mlp.0.weight", "blocks.0.attention.qkv.weight"
PARAMETERS = {  # ranks are numbered with tensor innermost
    "nothing": Case(BY_DATA, {}),
    "nothing on a pipeline": Case(BY_PIPELINE, {}),
    "an unsharded parameter on one rank": Case(
        BY_DATA, {UNSHARDED: [2]},
        (f"parameter {UNSHARDED} differs on the data_context axis: rank 0 from rank 2",
         f"parameter {UNSHARDED} differs on the tensor axis: rank 2 from rank 3"),
    ),
    "a sharded parameter on one data rank": Case(
        BY_DATA, {SHARDED: [3]}, (f"parameter {SHARDED} differs on the data_context axis: rank 1 from rank 3",)
    ),
    "shards of two tensor ranks": Case(BY_DATA, {SHARDED: [1, 3]}),
    "one of four": Case(
        {}, {SHARDED: [2]}, (f"parameter {SHARDED} differs on the data_context axis: ranks 0, 1, 3 from rank 2",)
    ),
    "two of four": Case(
        {}, {SHARDED: [1, 2]}, (f"parameter {SHARDED} differs on the data_context axis: ranks 0, 3 from ranks 1, 2",)
    ),
    "over context": Case(
        dict(context=2, tensor=2), {"null_text": [0]},
        ("parameter null_text differs on the data_context axis: rank 0 from rank 2",
         "parameter null_text differs on the tensor axis: rank 0 from rank 1"),
    ),
    "conditioning on one stage": Case(
        BY_PIPELINE, {"null_text": [2, 3]},
        ("parameter null_text differs on the pipeline axis: rank 0 from rank 2",
         "parameter null_text differs on the pipeline axis: rank 1 from rank 3"),
    ),
    "a block of one stage, on one tensor rank": Case(
        BY_PIPELINE, {"blocks.3.cross_norm.bias": [3]},
        ("parameter blocks.3.cross_norm.bias differs on the tensor axis: rank 2 from rank 3",),
    ),
    "partitions are not copies": Case(BY_DATA, {SHARDED: [3]}, partitioned=True),
    "partitions of an unsharded parameter": Case(
        BY_DATA, {UNSHARDED: [3]}, (f"parameter {UNSHARDED} differs on the tensor axis: rank 2 from rank 3",),
        partitioned=True,
    ),
    "more differences than are shown": Case(
        BY_DATA, {name: [1] for name in (UNSHARDED, "native.mlp.0.bias", "null_text", "text.norm.bias")},
        ("parameter native.mlp.0.bias differs on the data_context axis: rank 1 from rank 3",
         "parameter native.mlp.0.bias differs on the tensor axis: rank 0 from rank 1",
         "parameter null_text differs on the data_context axis: rank 1 from rank 3",
         "parameter null_text differs on the tensor axis: rank 0 from rank 1", "and 4 more"),
    ),
}  # fmt: skip
PACKS = {  # flipped: "index field" of clean packs, or "noised index field" of noised shares
    "nothing": Case(BY_DATA, {}),
    "nothing over context and tensor": Case(dict(context=2, tensor=2), {}),
    "coords on a tensor peer": Case(
        BY_DATA, {"1 coords_L3": [3]}, ("pack 1's coords_L3 differs on the tensor axis: rank 2 from rank 3",)
    ),
    "a clean patch on a context rank": Case(
        dict(context=4), {"0 patches_LP": [1]},
        ("pack 0's patches_LP differs on the context axis: ranks 0, 2, 3 from rank 1",),
    ),
    "text on a pipeline rank": Case(
        BY_PIPELINE, {"1 text_SE": [0, 1]},
        ("pack 1's text_SE differs on the pipeline axis: rank 0 from rank 2",
         "pack 1's text_SE differs on the pipeline axis: rank 1 from rank 3"),
    ),
    "noise on a tensor peer": Case(
        dict(context=2, tensor=2), {"noised 0 patches_LP": [1]},
        ("pack 0's patches_LP differs on the tensor axis: rank 0 from rank 1",),
    ),
    "a timestep on a tensor peer": Case(
        BY_DATA, {"noised 1 timesteps_R": [2]},
        ("pack 1's timesteps_R differs on the tensor axis: rank 2 from rank 3",),
    ),
}  # fmt: skip
REMEDY = (
    "; replicated tensors must be equal bit by bit: start again from the last checkpoint; if it happens again on "
    "another machine too, look for an input or a random number that depends on the rank"
)


def message_of(check):
    try:
        check()
    except MegaSoraError as error:
        return str(error)
    return None


def config_of(case):
    return configure(layout(4, depth=4, packs=4, **case.settings), "block")


def parameters_message(case, world, cache):
    config = config_of(case)
    mesh = cache.mesh(config)
    local = cache.model(config)
    parameters = {name: p for stage in local.stages.values() for name, p in stage.named_parameters()}
    flipped = [parameters[name] for name, ranks in case.flipped.items() if world.rank in ranks]
    for parameter in flipped:
        flip_a_bit(parameter)
    message = message_of(lambda: check_replicas(parameters, local.placements, mesh, world, STEP, case.partitioned))
    for parameter in flipped:
        flip_a_bit(parameter)
    return message


def packs_message(case, world, cache):
    """As the trainer does: clean packs over all axes that share them, then the noised shares."""
    config = config_of(case)
    mesh = cache.mesh(config)
    packs = global_batch(config)[mesh.data.rank :: mesh.data.size]
    noised = [objective_of(config).add_noise(share_pack(pack, config, mesh), STEP)[0] for pack in packs]
    for what, ranks in case.flipped.items():
        *noised_prefix, index, field = what.split()
        if world.rank in ranks:
            flip_a_bit(getattr((noised if noised_prefix else packs)[int(index)], field))

    def check():
        check_packs(packs, (mesh.tensor, mesh.context, mesh.pipeline), world, STEP)
        check_packs(noised, (mesh.tensor, mesh.pipeline), world, STEP)

    return message_of(check)


class MeshesAndModels:
    """A cache: builds each mesh and each model once."""

    def __init__(self):
        self.meshes, self.models = {}, {}

    def mesh(self, config):
        key = dataclasses.astuple(config.parallel)
        if key not in self.meshes:
            self.meshes[key] = build_mesh(config.parallel, "cpu")
        return self.meshes[key]

    def model(self, config):
        key = dataclasses.astuple(config.parallel)
        if key not in self.models:
            self.models[key] = random_local_model(config, self.mesh(config))
        return self.models[key]


def run_cases():
    world, cache = World(dist.get_rank(), 4, dist.get_rank(), 4, torch.device("cpu")), MeshesAndModels()
    parameters = {name: parameters_message(case, world, cache) for name, case in PARAMETERS.items()}
    return parameters, {name: packs_message(case, world, cache) for name, case in PACKS.items()}


@pytest.fixture(scope="module")
def on_ranks():
    return run_ranks(run_cases, 4, timeout=90)  # if only some ranks raise, the others hang


@pytest.mark.parametrize("kind, name", [(0, n) for n in PARAMETERS] + [(1, n) for n in PACKS])
def test_a_flipped_bit_raises_an_error_on_every_rank_with_the_tensor_and_the_ranks(kind, name, on_ranks):
    case, messages = (PARAMETERS, PACKS)[kind][name], [rank[kind][name] for rank in on_ranks]
    expected = f"step {STEP + 1}: {'; '.join(case.differences)}{REMEDY}" if case.differences else None
    assert messages == [expected] * 4


# ---------------------------------------------------------------------- in a run


def train_with_check(settings, broken):
    """A short run with the check at every step: (steps checked, counted from 0; error message or None).

    `broken(task)`: before the check of the second step, flips a bit on rank 1.
    """
    from megasora.tasks.dit import DiTTask
    from megasora.trainer import Trainer

    checked = []

    class CheckedTask(DiTTask):
        def check_consistency(self, packs, noised, step):
            checked.append(step)
            if step == 1 and self.world.rank == 1:
                broken(self)
            super().check_consistency(packs, noised, step)

    config = load(None, settings)
    world = World(dist.get_rank(), 2, dist.get_rank(), 2, torch.device("cpu"))
    message = message_of(Trainer(config, world, CheckedTask(config, world, build_mesh(config.parallel, "cpu"))).run)
    return checked, message


NORM = "blocks.1.cross_norm.weight"


def flip_weight(task):
    flip_a_bit(task.engine.parameters[NORM])


def flip_owned(kind):
    """In what rank 1 owns of a weight that tensor ranks have copies of."""

    def flip(task):
        fragment = next(f for f in task.fragments() if f.placement.shard_dim is None and f.name.startswith("blocks"))
        flip_a_bit(fragment.values[kind])

    return flip


TENSOR_RUNS = {  # settings, what is broken, words of the message
    "a weight": ([], flip_weight, f"parameter {NORM} differs on the tensor axis: rank 0 from rank 1"),
    "a moment": ([], flip_owned("exp_avg"), "differs on the tensor axis: rank 0 from rank 1"),
    "a master weight": ([], flip_owned("weights"), "differs on the tensor axis: rank 0 from rank 1"),
}
DATA_RUNS = {
    "a master weight, which has one owner": ([], flip_owned("weights"), "differs on rank 1 from its master weights"),
    "a weight in stage 2": (["parallel.zero_stage=2"], flip_weight, f"{NORM} differs on the data_context axis"),
    "nothing in bf16": (["run.dtype=bfloat16"], None, None),
    "nothing in stage 2 in bf16": (["run.dtype=bfloat16", "parallel.zero_stage=2"], None, None),
    "nothing in stage 3": (["parallel.zero_stage=3"], None, None),
    "nothing in stage 3 in bf16": (["run.dtype=bfloat16", "parallel.zero_stage=3"], None, None),
}


def run_with_check(axis, settings, folder):
    runs = TENSOR_RUNS if axis == "tensor" else DATA_RUNS
    return [
        train_with_check([*settings, *own, f"run.dir={folder}/{i}"], broken or (lambda task: None))
        for i, (own, broken, _) in enumerate(runs.values())
    ]


@pytest.mark.parametrize("axis, runs", [("tensor", TENSOR_RUNS), ("data", DATA_RUNS)])  # DeepSpeed keeps one mesh
def test_a_run_passes_the_check_and_ends_on_every_rank_after_a_flipped_bit(axis, runs, shards, tiny, tmp_path):
    settings = [
        *tiny, f"data.shards={shards}", "run.device=cpu", "run.steps=3", "run.debug_every=1", "validation.clips=1",
        "validation.bins=1", "checkpoint.every=100", f"parallel.tensor={2 if axis == 'tensor' else 1}",
    ]  # fmt: skip
    for results in run_ranks(run_with_check, 2, axis, settings, str(tmp_path)):
        for (name, (_, _, words)), (checked, message) in zip(runs.items(), results, strict=True):
            assert checked == ([0, 1, 2] if words is None else [0, 1]), (name, message)
            assert (message is None) == (words is None), (name, message)
            assert words is None or (message.startswith("step 2: ") and words in message), (name, message)
