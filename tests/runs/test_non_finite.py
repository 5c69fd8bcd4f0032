"""A step whose loss or gradient is not finite is skipped on all ranks: no state changes, and the run goes on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import check_same_checkpoints, full_tensors, read_jsonl, train, train_arguments
from rewrite_shards import rewrite_clip

from megasora.run_log.ledger import read_ledger, read_skipped
from megasora.tasks import dit
from megasora.testing.spawn import run_ranks

FAULTY_STEP, STEPS = 2, 4
BF16 = "run.dtype=bfloat16"
CASES = {  # name: (kind of the fault, settings of two processes)
    "data": ("gradient", []),
    "data-zero2": ("loss", ["parallel.zero_stage=2"]),
    "data-zero3": ("gradient", ["parallel.zero_stage=3"]),
    "data-bf16": ("loss", [BF16]),
    "data-bf16-zero2": ("gradient", [BF16, "parallel.zero_stage=2"]),
    "data-bf16-zero3": ("loss", [BF16, "parallel.zero_stage=3"]),
    "pipeline": ("loss", ["parallel.pipeline=2"]),
    "pipeline-bf16": ("gradient", [BF16, "parallel.pipeline=2"]),
    "tensor": ("loss", ["parallel.tensor=2"]),  # the gradient is finite: rank 1 has no use for that of token 0
    "context": ("loss", ["parallel.context=2"]),
}


def train_with_fault(arguments, kind, first=FAULTY_STEP, last=FAULTY_STEP, stop_after=0):
    """(end of the run, sample ids of the clips with the fault) of a run whose steps `first` to `last` are faulty on the
    last rank only.

    `kind`: loss: the prediction of one token of the first clip is NaN; gradient: that of the loss has an infinity;
    all: the prediction of all tokens is NaN.
    """
    forward_backward, velocity_error, state = dit.DiTTask.forward_backward, dit.velocity_error, {"faulty": False}
    clips = []

    def faulty_forward_backward(self, batch, step, lap):
        is_rank = dist.get_rank() == dist.get_world_size() - 1
        state["faulty"] = is_rank and first <= step + 1 <= last
        if state["faulty"]:
            clips.append(int(batch.shares[0].value.clean.sample_ids_G[0]))
        return forward_backward(self, batch, step, lap)

    def faulty_velocity_error(prediction, target, weight):
        if state["faulty"] and kind == "gradient":
            prediction.register_hook(lambda grad: grad * torch.inf)
        elif state["faulty"]:
            tokens = slice(None) if kind == "all" else slice(1)
            prediction = prediction.clone()
            prediction[tokens] = prediction[tokens] * torch.nan
            state["faulty"] = kind == "all"  # in the first pack only
        return velocity_error(prediction, target, weight)

    dit.DiTTask.forward_backward, dit.velocity_error = faulty_forward_backward, faulty_velocity_error
    return train(arguments, stop_after), clips


def arguments_of(run, shards, tiny, *more):
    every = [f"run.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9", "validation.every=4", "run.ledger=true"]
    return [*train_arguments(run, shards, tiny), *every, *more]


@pytest.fixture(scope="module")
def one_process(shards, tiny, tmp_path_factory):
    """{dtype: losses}: of a run on one process that skips the faulty step."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = tmp_path_factory.mktemp("one") / dtype
        ((end, _),) = run_ranks(train_with_fault, 1, arguments_of(run, shards, tiny, f"run.dtype={dtype}"), "loss")
        assert end is None
        losses[dtype] = [line["loss"] for line in read_jsonl(run)]
    return losses


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_skip_the_step_and_no_state_changes(case, one_process, shards, tiny, tmp_path):
    kind, settings = CASES[case]
    ends = run_ranks(train_with_fault, 2, arguments_of(tmp_path, shards, tiny, *settings), kind)
    assert [end for end, _ in ends] == [None, None]
    metrics = read_jsonl(tmp_path)
    assert [line.get("skipped") for line in metrics] == [None, "non-finite", None, None]
    assert (metrics[1]["loss"] is None) == (kind == "loss")
    assert metrics[1]["grad_norm"] is None or case == "tensor"
    before, after, next_one = (full_tensors(tmp_path, step) for step in (1, 2, 3))
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert len([name for name in after if not torch.equal(after[name], next_one[name])]) > 60

    (line,) = read_jsonl(tmp_path, "skipped.jsonl")
    assert (line["step"], line["reason"]) == (FAULTY_STEP, "non-finite")
    assert line["non_finite_clips"] == (ends[-1][1] if kind == "loss" else [])
    trained, skipped = read_ledger(tmp_path), read_skipped(tmp_path)
    assert trained[FAULTY_STEP] == [] and skipped == {FAULTY_STEP: line["sample_ids"]} and line["sample_ids"]
    assert all(trained[step] for step in (1, 3, 4))
    states = [json.loads((tmp_path / "checkpoints" / f"step-{s:08d}" / "state.json").read_text()) for s in (1, 2, 3)]
    assert [state["ema_updates"] for state in states] == [1, 1, 2]

    dtype = "bfloat16" if "bf16" in case else "float32"
    losses = [line["loss"] for line in metrics]
    assert losses[2:] == pytest.approx(one_process[dtype][2:], rel=1e-5 if dtype == "float32" else 2e-3)


def test_a_run_that_was_stopped_after_the_skipped_step_continues_bit_for_bit(shards, tiny, tmp_path):
    whole, stopped = (arguments_of(tmp_path / name, shards, tiny, "parallel.zero_stage=2") for name in ("a", "b"))
    assert [end for end, _ in run_ranks(train_with_fault, 2, whole, "loss")] == [None, None]
    ends = run_ranks(train_with_fault, 2, stopped, "loss", FAULTY_STEP, FAULTY_STEP, FAULTY_STEP)
    assert all(end.startswith("StopRequested: saved after step 2;") for end, _ in ends)
    assert run_ranks(train, 2, stopped) == [None, None]
    check_same_checkpoints(tmp_path / "a", tmp_path / "b", STEPS)
    a, b = (read_jsonl(tmp_path / name) for name in ("a", "b"))
    assert [(m["loss"], m["grad_norm"]) for m in a] == [(m["loss"], m["grad_norm"]) for m in b]
    assert read_ledger(tmp_path / "a") == read_ledger(tmp_path / "b")


def test_too_many_in_a_row_end_the_run_with_the_steps_the_clips_and_a_remedy_that_fits(shards, tiny, tmp_path):
    arguments = [*arguments_of(tmp_path / "some", shards, tiny), "optim.max_skipped_steps=2"]
    ends = run_ranks(train_with_fault, 2, arguments, "loss", 2, 4)
    first, second = ends[1][1]
    expected = (
        "NonFiniteError: steps 2 to 3: loss or gradient norm not finite (2 in a row, optim.max_skipped_steps=2); not "
        f"finite in clips {first}, {second}; the losses of all other clips are finite, so look at these and leave them "
        "out of the dataset"
    )
    assert all(end.startswith(expected) and "optim.lr" not in end for end, _ in ends)
    assert [line.get("skipped") for line in read_jsonl(tmp_path / "some")] == [None, "non-finite", "non-finite"]

    arguments = [*arguments_of(tmp_path / "all", shards, tiny), "optim.max_skipped_steps=2"]
    ((end, _),) = run_ranks(train_with_fault, 1, arguments, "all", 2, 4)
    newest = tmp_path / "all" / "checkpoints" / "step-00000002"
    remedy = f"start another run.dir with optim.lr below 0.001, if need be from these weights: run.start=init:{newest}"
    assert end.startswith("NonFiniteError: steps 2 to 3: loss or gradient norm not finite") and end.endswith(remedy)


# ---------------------------------------------------------------------- numbers of the shards


def write_nan(shards, folder, split, clip):
    """A copy of the shards, with valid checksums, in which the first number of a clip is NaN; its sample id."""
    shutil.copytree(shards, folder, dirs_exist_ok=True)

    def change(data, row):
        at = int(row["patches"]["offset"])
        data[at : at + 2] = np.float16(np.nan).tobytes()

    return rewrite_clip(folder, split, clip, change)


def test_a_clip_with_nan_is_left_out_if_damage_is_tolerated_and_else_its_step(shards, tiny, tmp_path):
    sample_id = write_nan(shards, tmp_path / "shards", "train", 9)
    steps = ["run.steps=8", "checkpoint.every=8", "validation.every=8"]
    for name, fraction in (("strict", 0), ("tolerant", 0.1)):
        run = arguments_of(tmp_path / name, tmp_path / "shards", tiny, *steps, f"data.max_damaged_fraction={fraction}")
        assert run_ranks(train, 1, run) == [None]
    skipped = {line["step"]: line for line in read_jsonl(tmp_path / "strict", "skipped.jsonl")}
    damaged = read_jsonl(tmp_path / "tolerant", "damaged.jsonl")
    assert {(line["step"], line["sample_id"]) for line in damaged} == {(step, sample_id) for step in skipped} != set()
    assert all("a number, infinite or NaN, in the patches of sample" in line["error"] for line in damaged)
    assert all(line["non_finite_clips"] == [sample_id] for line in skipped.values())
    assert not (tmp_path / "tolerant" / "skipped.jsonl").exists()
    strict, tolerant = read_ledger(tmp_path / "strict"), read_ledger(tmp_path / "tolerant")
    for step in strict:
        if step in skipped:
            assert strict[step] == []
            assert tolerant[step] == [i for i in skipped[step]["sample_ids"] if i != sample_id]
        else:
            assert strict[step] == tolerant[step]


def test_a_held_out_clip_with_nan_is_named_and_the_run_goes_on(shards, tiny, tmp_path):
    sample_id = write_nan(shards, tmp_path / "shards", "val", 3)
    assert run_ranks(train, 2, arguments_of(tmp_path / "run", tmp_path / "shards", tiny)) == [None, None]
    for line in read_jsonl(tmp_path / "run", "validation.jsonl"):
        assert line["loss"] is None and [one["loss"] for one in line["bins"]] == [None] * 3
        assert line["non_finite_clips"] == [sample_id]
    assert [line.get("skipped") for line in read_jsonl(tmp_path / "run")] == [None] * STEPS


def test_no_file_of_a_run_has_a_number_that_json_does_not_have(shards, tiny, tmp_path):
    run_ranks(train_with_fault, 1, arguments_of(tmp_path / "run", shards, tiny), "all")

    def refuse(name):
        raise AssertionError(name)

    files = [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".json", ".jsonl")]
    assert len(files) > 5
    for file in files:
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=refuse)
