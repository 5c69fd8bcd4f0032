"""Invalid layouts raise an error that a user can act on; all others are accepted."""

import dataclasses
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, configure

from megasora.config import Config, load
from megasora.errors import MegaSoraError
from megasora.parallel.layout import check_layout, nearest_divisors, nearest_multiples, resolve_zero_stage
from megasora.parallel.pipeline import num_stages
from megasora.parallel.world import World
from megasora.testing.spawn import run_ranks
from megasora.train import check_same_start, main

PLAIN = ["model.width=256", "model.heads=16", "model.depth=12", "data.packs_per_step=8", "data.tokens_per_pack=4096"]

INVALID = {  # (processes, overrides, part of the message)
    "the processes are no multiple": (
        6, "parallel.tensor=2 parallel.context=2",
        "parallel.pipeline=1 x parallel.context=2 x parallel.tensor=2 = 4 must divide the 6 processes; "
        "start 4 or 8 processes",
    ),
    "too few processes": (1, "parallel.pipeline=3", "= 3 must divide the 1 processes; start 3 processes"),
    "heads over tensor": (3, "parallel.tensor=3", "parallel.tensor=3 must divide model.heads=16; use 1, 2, 4 or 8"),
    "hidden features over tensor": (
        4, "parallel.tensor=4 model.mlp_ratio=2.71",
        "parallel.tensor=4 must divide the 693 hidden features of an MLP (model.width=256 x model.mlp_ratio=2.71); "
        "use 1, or another ratio",
    ),
    "a remedy for heads that the MLP bears too": (
        3, "parallel.tensor=3 model.mlp_ratio=2.6640625", "must divide model.heads=16; use 1 or 2",
    ),
    "heads over ulysses": (
        3, "parallel.context=3 parallel.ulysses=3",
        "parallel.ulysses=3 must divide parallel.context=3 and model.heads=16; use 1; 1 is a ring",
    ),
    "context over ulysses": (
        6, "parallel.context=6 parallel.ulysses=4",
        "parallel.ulysses=4 must divide parallel.context=6 and model.heads=16; use 1 or 2; 1 is a ring",
    ),
    "heads over tensor and ulysses": (
        32, "parallel.tensor=4 parallel.context=8 parallel.ulysses=8",
        "parallel.ulysses=8 must divide parallel.context=8 and model.heads=16 / parallel.tensor=4 = 4; use 1, 2 or 4",
    ),
    "more ranks than tokens": (
        8, "parallel.context=4 parallel.tensor=2 data.tokens_per_pack=7",
        "data.tokens_per_pack=7 is less than the parallel.context=4 x parallel.tensor=2 = 8 ranks that would share a "
        "pack; use at least 8",
    ),
    "blocks over stages": (
        8, "parallel.pipeline=8",
        "model.depth=12 blocks cannot be divided evenly into 8 stages, 1 on each rank of parallel.pipeline=8 "
        "(parallel.schedule=1f1b); use model.depth=8 or 16, or parallel.pipeline=3, 4, 6 or 12",
    ),
    "blocks over the stages of a V": (
        4, "parallel.pipeline=4 parallel.schedule=zbv",
        "model.depth=12 blocks cannot be divided evenly into 8 stages, 2 on each rank of parallel.pipeline=4 "
        "(parallel.schedule=zbv); use model.depth=8 or 16, or parallel.pipeline=1, 2, 3 or 6",
    ),
    "fewer blocks than stages on a rank": (
        2, "parallel.pipeline=2 parallel.schedule=interleaved parallel.stages_per_rank=5 model.depth=4",
        "model.depth=4 blocks cannot be divided evenly into 10 stages, 5 on each rank of parallel.pipeline=2 "
        "(parallel.schedule=interleaved); use model.depth=10",
    ),
    "interleaved with one stage a rank": (
        2, "parallel.pipeline=2 parallel.schedule=interleaved",
        "parallel.stages_per_rank=1: interleaving needs 2 or more stages per rank; use 2, or parallel.schedule=1f1b",
    ),
    "stages a rank without interleaving": (
        2, "parallel.pipeline=2 parallel.stages_per_rank=2",
        "parallel.stages_per_rank=2 is for parallel.schedule=interleaved, not 1f1b; use 1",
    ),
    "packs over data-parallel ranks": (
        6, "parallel.tensor=2",
        "data.packs_per_step=8 must be a multiple of the 3 data-parallel ranks (6 processes / 2); use 6 or 9",
    ),
    "fewer packs than data-parallel ranks": (
        3, "data.packs_per_step=2", "data.packs_per_step=2 must be a multiple of the 3 data-parallel ranks "
        "(3 processes / 1); use 3",
    ),
    "fewer packs than a 1f1b pipeline needs": (
        4, "parallel.pipeline=4 data.packs_per_step=2",
        "data.packs_per_step=2 over 1 pipelines is 2 packs each; parallel.schedule=1f1b with parallel.pipeline=4 "
        "needs at least 4; use data.packs_per_step=4",
    ),
    "packs of several 1f1b pipelines": (
        8, "parallel.pipeline=4 data.packs_per_step=6", "6 over 2 pipelines is 3 packs each",
    ),
    "uneven rounds of an interleaved pipeline": (
        4, "parallel.pipeline=4 parallel.schedule=interleaved parallel.stages_per_rank=3 data.packs_per_step=9",
        "data.packs_per_step=9 over 1 pipelines is 9 packs each; parallel.schedule=interleaved",
    ),
    "ZeRO-2 with a pipeline": (
        2, "parallel.pipeline=2 parallel.zero_stage=2",
        "parallel.zero_stage=2 cannot be combined with parallel.pipeline=2: a pipeline reduces gradients once, after "
        "all packs of a step; use parallel.zero_stage=1",
    ),
    "ZeRO-3 with a pipeline": (2, "parallel.pipeline=2 parallel.zero_stage=3", "parallel.zero_stage=3 cannot be"),
    "an axis of no ranks": (1, "parallel.tensor=0", "parallel.tensor=0 must be at least 1"),
    "an axis of less than no ranks": (1, "parallel.context=-2", "parallel.context=-2 must be at least 1"),
    "no stages a rank": (2, "parallel.pipeline=2 parallel.stages_per_rank=0", "stages_per_rank=0 must be at least 1"),
}  # fmt: skip

LEGAL = [  # processes, overrides
    (1, ""),
    (8, ""),
    (3, "parallel.context=3"),  # a ring needs no heads
    (16, "parallel.tensor=16"),
    (16, "parallel.context=16 parallel.ulysses=16"),
    (32, "parallel.tensor=4 parallel.context=8 parallel.ulysses=4"),
    (4, "parallel.context=2 parallel.tensor=2 data.tokens_per_pack=4"),
    (12, "parallel.pipeline=12 data.packs_per_step=12"),
    (4, "parallel.pipeline=4 parallel.schedule=interleaved parallel.stages_per_rank=3"),
    (6, "parallel.pipeline=6 parallel.schedule=zbv data.packs_per_step=1"),
    (2, "parallel.zero_stage=3"),
    (512, "parallel.pipeline=4 parallel.context=4 parallel.tensor=4 data.packs_per_step=64 parallel.ulysses=2"),
]


def error_message(processes, overrides):
    with pytest.raises(MegaSoraError) as caught:
        check_layout(load(None, [*PLAIN, *overrides]), processes)
    return str(caught.value)


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_layout_raises_an_error_with_the_numbers_and_a_remedy(case):
    processes, overrides, expected = INVALID[case]
    message = error_message(processes, overrides.split())
    assert expected in message and "\n" not in message


@pytest.mark.parametrize("processes, overrides", LEGAL)
def test_a_valid_layout_is_accepted(processes, overrides):
    check_layout(load(None, [*PLAIN, *overrides.split()]), processes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_of_the_table_is_accepted(layout):
    check_layout(configure(layout, "block"), layout.processes)


def test_the_zero_stage_is_2_on_gpus_without_a_pipeline_unless_it_is_given():
    parallel, piped = Config().parallel, dataclasses.replace(Config().parallel, pipeline=2)
    assert [resolve_zero_stage(p, device) for p in (parallel, piped) for device in ("cuda", "cpu")] == [2, 1, 1, 1]
    for stage in (1, 2, 3):
        given = dataclasses.replace(parallel, zero_stage=stage)
        assert [resolve_zero_stage(given, device) for device in ("cuda", "cpu")] == [stage, stage]


SIZE = st.sampled_from([1, 1, 1, 2, 2, 3, 4])


@settings(deadline=None, max_examples=200)
@given(
    data=SIZE, extra=st.sampled_from([0, 0, 0, 0, 1, 2]), tensor=SIZE, context=SIZE, ulysses=SIZE, pipeline=SIZE,
    schedule=st.sampled_from(["1f1b", "interleaved", "zbv"]), stages=st.integers(1, 3), zero=st.sampled_from([0, 1, 2]),
    heads=st.sampled_from([1, 4, 6, 12]), depth=st.sampled_from([4, 12, 18]), packs=st.sampled_from([2, 12, 15, 24]),
    tokens=st.sampled_from([7, 16]),
)  # fmt: skip
def test_a_layout_is_accepted_exactly_if_everything_can_be_divided_evenly(
    data, extra, tensor, context, ulysses, pipeline, stages, schedule, zero, heads, depth, packs, tokens
):
    product, piped = tensor * context * pipeline, pipeline > 1
    processes = product * data + extra
    config = Config()
    config.parallel = dataclasses.replace(
        config.parallel, tensor=tensor, context=context, ulysses=ulysses, pipeline=pipeline, schedule=schedule,
        stages_per_rank=stages, zero_stage=zero,
    )  # fmt: skip
    config.model = dataclasses.replace(config.model, heads=heads, width=heads * 12, depth=depth)
    config.data = dataclasses.replace(config.data, packs_per_step=packs, tokens_per_pack=tokens)
    data = processes // product
    valid = (
        processes % product == 0
        and packs % data == 0
        and context % ulysses == 0
        and heads % (tensor * ulysses) == 0
        and tokens >= context * tensor
        and (stages == 1 or schedule == "interleaved")
        and not (piped and schedule == "interleaved" and stages == 1)
        and not (piped and depth % num_stages(schedule, pipeline, stages))
        and not (piped and schedule == "1f1b" and packs // data < pipeline)
        and not (piped and schedule == "interleaved" and (packs // data) % max(1, packs // data // pipeline))
        and not (piped and zero > 1)
    )
    with nullcontext() if valid else pytest.raises(MegaSoraError):
        check_layout(config, processes)


ONE_WRONG = {  # (processes, overrides) where one key is wrong and another value of it suffices
    "parallel.tensor": (48, "parallel.tensor=3 data.packs_per_step=48"),
    "parallel.ulysses": (12, "parallel.context=12 parallel.ulysses=3"),
    "data.packs_per_step": (3, ""),
    "model.depth": (5, "parallel.pipeline=5"),
    "data.tokens_per_pack": (4, "parallel.context=4 data.tokens_per_pack=3"),
    "parallel.stages_per_rank": (2, "parallel.pipeline=2 parallel.schedule=interleaved"),
}


@pytest.mark.parametrize("key", ONE_WRONG)
def test_every_value_that_a_message_proposes_is_accepted(key):
    processes, overrides = ONE_WRONG[key]
    remedy = error_message(processes, overrides.split()).partition("; use ")[2]
    values = re.findall(r"\d+", remedy.partition("; ")[0].partition(", or ")[0])
    assert values, remedy
    for value in values:
        check_layout(load(None, [*PLAIN, *overrides.split(), f"{key}={value}"]), processes)


def test_nearest_divisors_and_nearest_multiples():
    assert nearest_divisors(16, 3) == "1, 2, 4 or 8"
    assert nearest_divisors(12, 5) == "2, 3, 4 or 6"
    assert nearest_divisors(1, 7) == "1"
    assert nearest_multiples(4, 6) == "4 or 8"
    assert nearest_multiples(4, 3) == "4"


# ---------------------------------------------------------------------- at launch


def test_an_invalid_layout_ends_a_launch_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "run.yaml"
    path.write_text("model: {width: 60, heads: 6}\nparallel: {tensor: 4}\n")
    assert main(["--check", str(path), f"run.dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert message == "megasora: error: parallel.tensor=4 must divide model.heads=6; use 1, 2, 3 or 6\n"
    assert not (tmp_path / "run").exists()


def test_under_torchrun_an_invalid_layout_raises_before_the_model_is_built(tmp_path, launch):
    path = tmp_path / "run.yaml"
    path.write_text("model: {width: 9216, depth: 999, heads: 96}\nparallel: {pipeline: 2}\n")
    code, output = launch("megasora.train", path, f"run.dir={tmp_path / 'run'}", processes=2, timeout=60)
    assert code != 0
    assert output.count("megasora: error: model.depth=999 blocks cannot be divided evenly into 2 stages") == 1
    assert not (tmp_path / "run").exists()


def start_with_different_settings(cases):
    """On two ranks: the error messages when the second was started with other overrides; None if there is no error."""
    world = World(dist.get_rank(), 2, dist.get_rank(), 2, torch.device("cpu"))
    messages = []
    for overrides in cases:
        try:
            check_same_start(load(None, overrides if world.rank else []), world)
            messages.append(None)
        except MegaSoraError as error:
            messages.append(str(error))
    return messages


def test_ranks_started_with_different_settings_raise_on_every_rank():
    cases = [[], ["optim.lr=1"], ["parallel.tensor=2", "data.patch=[1,2,2]"]]
    first, second = run_ranks(start_with_different_settings, 2, cases)
    assert first == second
    same, one, two = first
    assert same is None
    assert one == (
        "process 1 was started with another configuration than process 0 (optim.lr: 0.0001 -> 1.0); "
        "give all processes the same file and the same settings"
    )
    assert "parallel.tensor: 1 -> 2" in two and "data.patch: [1, 1, 1] -> [1, 2, 2]" in two


# ---------------------------------------------------------------------- the docs


def documented_commands():
    """(processes, arguments) of each command for training in README.md, docs/ and slurm/README.md."""
    root, commands = Path(__file__).parents[2], []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md")), root / "slurm" / "README.md"):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if re.search(r"megasora(\.train|\s+train) |slurm/train.sbatch ", line) and "configs/" in line:
                    size = lambda name, other, line=line: int((re.findall(rf"--{name} (\d+)", line) or [other])[0])  # noqa: E731
                    per_node = size("gpus-per-node", 8) if "sbatch" in line else size("nproc-per-node", 1)
                    words = shlex.split(line, comments=True)
                    arguments = [w for w in words if w.startswith("configs/") or re.match(r"[a-z_.]+=", w)]
                    commands.append((size("nodes", size("nnodes", 1)) * per_node, tuple(arguments)))
    return commands


@pytest.mark.parametrize("processes, arguments", documented_commands(), ids=str)
def test_the_commands_of_the_docs_are_accepted(processes, arguments):
    assert sum(argument.startswith("configs/") for argument in arguments) == 1
    paths = [a for a in arguments if a.startswith("configs/")]
    root = Path(__file__).parents[2]
    check_layout(load(str(root / paths[0]), [a for a in arguments if a not in paths]), processes)


def test_the_docs_have_commands_for_training():
    assert len(documented_commands()) >= 8 and max(processes for processes, _ in documented_commands()) == 256
