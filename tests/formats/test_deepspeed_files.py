"""Exported checkpoints: read back, by MegaSora and by the converters of DeepSpeed, in one process. Bad input."""

import contextlib
import io
import os
import shutil
import types
from pathlib import Path

import pytest
import torch

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.imported import IMPORTED
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, read_state
from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.formats.deepspeed_export import export_deepspeed
from megasora.formats.deepspeed_import import import_deepspeed
from megasora.formats.deepspeed_reader import KINDS, open_zero
from megasora.formats.source import ExportSource

SHAPES = {  # in the order of the model, which is not the alphabetical one
    "up.weight": torch.Size((7, 5)), "up.bias": torch.Size((7,)), "table": torch.Size((1, 3)),
    "down.weight": torch.Size((5, 7)), "down.bias": torch.Size((5,)), "scale": torch.Size((1,)),
}  # fmt: skip
CURSOR = {"epoch": 1, "window": 2, "pack": 3}
STATE = {
    "parallel": {"processes": 4}, "ema_updates": 11, "task": {"cursor": CURSOR, "damaged": []},
    "guard": {"losses": [1.5]}, "code": "abc", "config": {"run": {"seed": 0}},
}  # fmt: skip
STEP, TAG = 12, "global_step12"


def uses_weight_decay(name, parameter):
    return parameter.ndim > 1 and name != "table"


def values(kind, name):
    """Random fp32 numbers; second moments are positive."""
    generator = torch.Generator().manual_seed(sorted(SHAPES).index(name) + 100 * KINDS.index(kind))
    random = torch.randn(SHAPES[name], generator=generator)
    return random.square() if kind == "exp_avg_sq" else random


def save(run, kinds=KINDS, state=STATE, value_of=values, step=STEP, settings=()):
    shapes = {name: SHAPES[name] for name in sorted(SHAPES)}
    folder = save_full_tensors(CheckpointStore(run / "checkpoints"), step, shapes, kinds, value_of, state)
    config = load(None, ["optim.weight_decay=0.25", "optim.warmup_steps=100", "optim.lr=0.5", *settings])
    return ExportSource(folder, config, read_state(folder), ShardedCheckpoint(folder), "weights")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"))


@pytest.fixture
def export(source, tmp_path):
    """export(stage, processes, dtype) -> the folder of an exported checkpoint."""

    def make(stage=1, processes=2, dtype=torch.float32, of=source):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        export_deepspeed(of, out, SHAPES, uses_weight_decay, stage, processes, dtype)
        return out

    return make


LAYOUTS = [(stage, processes) for stage in (1, 2, 3) for processes in (1, 2, 3, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "processes"), LAYOUTS)
def test_an_exported_checkpoint_is_read_back_bit_for_bit(export, tmp_path, stage, processes, dtype):
    out, store = export(stage, processes, dtype), CheckpointStore(tmp_path / "run" / "checkpoints")
    written = []
    folder = import_deepspeed(out, store, SHAPES, on_written=written.append)
    back = ShardedCheckpoint(folder)
    assert folder.name == "step-00000012" and back.kinds == set(KINDS) and dict(back.shapes) == SHAPES
    assert all(torch.equal(back.full_tensor(kind, name), values(kind, name)) for kind in KINDS for name in SHAPES)
    assert read_state(folder) == {"step": STEP, **STATE}
    assert sum(written) >= 3 * 4 * sum(shape.numel() for shape in SHAPES.values())
    assert (out / "latest").read_text() == TAG and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "processes"), LAYOUTS)
def test_zero_to_fp32_of_deepspeed_gives_the_weights_bit_for_bit(export, stage, processes, dtype):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        found = get_fp32_state_dict_from_zero_checkpoint(str(export(stage, processes, dtype)))
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], values("weights", name)) for name in SHAPES)


@pytest.mark.parametrize(("stage", "processes"), [(1, 3), (2, 2), (3, 3)])
def test_ds_to_universal_of_deepspeed_gives_weights_and_moments_bit_for_bit(export, tmp_path, stage, processes):
    from deepspeed.checkpoint import ds_to_universal

    folder = tmp_path / "universal"
    settings = types.SimpleNamespace(
        input_folder=str(export(stage, processes) / TAG), output_folder=str(folder), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)
    for kind, file in {"weights": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
        for name in SHAPES:
            saved = torch.load(folder / "zero" / name / f"{file}.pt", weights_only=True)
            saved = saved["param"] if stage < 3 else saved
            assert torch.equal(saved.view(SHAPES[name]), values(kind, name))


def test_groups_steps_and_the_next_learning_rate_are_those_of_the_run(export):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    files = export(2, 2) / TAG
    states = torch.load(files / "zero_pp_rank_1_mp_rank_00_optim_states.pt", weights_only=False)["optimizer_state_dict"]
    assert type(states["loss_scaler"]) is LossScaler and states["loss_scaler"].loss_scale == 1
    groups = states["base_optimizer_state"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert all(abs(group["lr"] - 0.5 * 13 / 100) < 1e-12 and group["betas"] == (0.9, 0.99) for group in groups)
    assert [state["step"] for state in states["base_optimizer_state"]["state"].values()] == [11.0, 11.0]
    model = torch.load(files / "mp_rank_00_model_states.pt", weights_only=False)
    assert [list(group) for group in model["param_shapes"]] == [
        ["up.weight", "down.weight"], ["up.bias", "table", "down.bias", "scale"],
    ]  # fmt: skip
    assert (model["global_steps"], model["skipped_steps"], model["megasora"]["task"]["cursor"]) == (12, 1, CURSOR)


def test_memory_of_an_export_is_one_tensor(export, monkeypatch):
    """The skeletons of all files are written before the first value, without the memory of the values."""
    large = torch.Size((1 << 18, 1 << 18))  # 256 GiB; a hole in a file of torch.save
    from megasora.formats.deepspeed_files import fill, hole, write_skeleton

    monkeypatch.chdir(export().parent)
    tensor = write_skeleton(Path("large.pt"), {"x": hole(large)})["x"]
    fill(tensor, torch.tensor([3.0]), large.numel() - 1)
    assert tensor.read_elements(large.numel() - 2, 2).tolist() == [0, 3]
    assert os.stat("large.pt").st_blocks * 512 < 1 << 20


def test_imported_weights_are_exported_with_moments_of_zero(tmp_path, export):
    out = export(3, 2, of=save(tmp_path / "imported", ("weights",), {IMPORTED: "elsewhere"}, step=0))
    found = open_zero(out, None, SHAPES)
    assert found.updates == 0 and not any(found.full_tensor("exp_avg", name).any() for name in SHAPES)
    assert torch.equal(found.full_tensor("weights", "table"), values("weights", "table"))


def test_a_checkpoint_without_the_state_of_a_run_gives_weights_to_start_from(export, tmp_path):
    out = export()
    change(out / TAG / "mp_rank_00_model_states.pt", lambda model: model.pop("megasora"))
    folder = import_deepspeed(out, CheckpointStore(tmp_path / "run" / "checkpoints"), SHAPES, TAG)
    assert folder.name == "step-00000000" and ShardedCheckpoint(folder).kinds == {"weights"}
    assert read_state(folder)[IMPORTED] == f"DeepSpeed, {out / TAG}"
    assert torch.equal(ShardedCheckpoint(folder).full_tensor("weights", "table"), values("weights", "table"))


# ---------------------------------------------------------------- bad input


def change(path, edit):
    """Rewrites a file of torch.save after `edit(values)`."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def edit_state(edit):
    return lambda out: change(out / TAG / "mp_rank_00_model_states.pt", lambda model: edit(model["megasora"]))


def edit_model(edit):
    return lambda out: change(out / TAG / "mp_rank_00_model_states.pt", edit)


def edit_rank(edit):
    path = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    return lambda out: change(out / TAG / path, lambda values: edit(values["optimizer_state_dict"]))


def replace_by_link(path):
    path.rename(path.with_name("target"))
    path.symlink_to("target")


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def other_step(states):
    for state in states["base_optimizer_state"]["state"].values():
        state["step"] += 1


RANK_1, MODEL = "zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
DAMAGE = {  # what was done to the folder -> words of the message
    "no latest": (lambda out: (out / "latest").unlink(), "has no file latest; give the folder that load_checkpoint"),
    "dangling latest": (lambda out: (out / "latest").write_text("global_step99\n"), "global_step99 is not there"),
    "latest elsewhere": (lambda out: (out / "latest").write_text("../other"), "is no name of a folder"),
    "latest is a folder": (lambda out: [(out / "latest").unlink(), (out / "latest").mkdir()], "cannot be read"),
    "linked tag": (lambda out: replace_by_link(out / TAG), f"{TAG} is a link"),
    "linked file": (lambda out: replace_by_link(out / TAG / RANK_1), f"{RANK_1} is a link"),
    "lost rank": (lambda out: (out / TAG / RANK_1).unlink(), f"2 processes and lacks {RANK_1}"),
    "rank too many": (
        lambda out: shutil.copy(out / TAG / RANK_1, out / TAG / RANK_1.replace("rank_1", "rank_2", 1)),
        "has zero_pp_rank_2_mp_rank_00_optim_states.pt too",
    ),
    "no model": (lambda out: (out / TAG / MODEL).unlink(), "it is no whole checkpoint of DeepSpeed"),
    "tensor parallel": (lambda out: (out / TAG / "mp_rank_01_model_states.pt").touch(), "several tensor parallel"),
    "pipeline": (lambda out: (out / TAG / "layer_00-model_00-model_states.pt").touch(), "pipeline stages"),
    "universal": (lambda out: (out / TAG / "zero").mkdir(), "a universal checkpoint"),
    "half a file": (lambda out: os.truncate(out / TAG / RANK_1, 900), f"{RANK_1} cannot be read"),
    "no torch file": (lambda out: (out / TAG / RANK_1).write_bytes(b"PK\3\4" + bytes(99)), "cannot be read"),
    "code": (lambda out: torch.save({"module": Code()}, out / TAG / MODEL), "holds posix.system, which is not loaded"),
    "code in the state": (edit_state(lambda state: state.update(x=Code())), "holds posix.system, which is not loaded"),
    "a class": (edit_model(lambda model: model.update(args=Path("x"))), "holds pathlib"),
    "a list": (lambda out: torch.save([1], out / TAG / MODEL), "has no dp_world_size, param_shapes, module"),
    "no processes": (edit_model(lambda model: model.update(dp_world_size=0)), "has no dp_world_size of a ZeRO"),
    "other world": (edit_model(lambda model: model.update(dp_world_size=1)), f"has {RANK_1} too"),
    "other shape": (
        edit_model(lambda model: model["param_shapes"][0].update({"up.weight": torch.Size((5, 7))})),
        "up.weight is [7, 5] in the model of the run, the checkpoint has [5, 7]",
    ),
    "other names": (
        edit_model(lambda model: model["param_shapes"][0].update({"more": torch.Size((5,))})),
        "has parameters that the model of the run has not (more)",
    ),
    "other step": (edit_rank(other_step), "the step of the optimizer (11, 12) differs between its files"),
    "other tag's weights": (
        edit_model(lambda model: model["module"]["down.bias"].add_(1)), "down.bias differs between mp_rank_00"
    ),
    "short partition": (
        edit_rank(lambda states: states["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(3))),
        "weights of rank 1 are 3 elements, 34 to 36 expected",
    ),
    "no moments": (edit_rank(lambda states: states["base_optimizer_state"]["state"][0].pop("exp_avg")), "KeyError"),
    "not finite": (
        edit_rank(lambda states: states["base_optimizer_state"]["state"][0]["exp_avg"].fill_(float("nan"))),
        "exp_avg of down.weight are NaN or infinite",
    ),
    "old state": (edit_state(lambda state: state.update(step=7)), "the state of step 7, the checkpoint is of step 12"),
    "other optimizer": (edit_model(lambda model: model.update(skipped_steps=0)), "had 11 steps, the model 12"),
    "step of text": (edit_model(lambda model: model.update(skipped_steps="1")), "has no skipped_steps"),
    "step 12.0": (edit_state(lambda state: state.update(step=12.0)), "the state of step 12.0"),
    "step of lines": (edit_state(lambda state: state.update(step="1\n2")), "the state of step 1\\n2, the checkpoint"),
    "no cursor": (edit_state(lambda state: state["task"].pop("cursor")), '["task"]["cursor"] is not'),
    "cursor of text": (edit_state(lambda state: state["task"]["cursor"].update(pack="3")), '["task"]["cursor"] is not'),
    "half a state": (edit_state(lambda state: state.pop("guard")), "has no guard; pass what load_checkpoint returned"),
    "tensor in the state": (edit_state(lambda state: state.update(x=torch.ones(2))), "holds other than JSON values"),
    "no state": (edit_model(lambda model: model.update(megasora=3)), "has no step, parallel"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_hostile_checkpoint_is_refused_in_one_line(export, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    out = export()
    damage, words = DAMAGE[case]
    damage(out)
    with pytest.raises(MegaSoraError) as caught:
        import_deepspeed(out, CheckpointStore(tmp_path / "run" / "checkpoints"), SHAPES)
    message = str(caught.value)
    assert words in message and "\n" not in message and str(out) in message
    assert not (tmp_path / "executed").exists() and not list(tmp_path.glob("run/checkpoints/*"))


def test_files_of_two_saves_of_stage_3_are_refused(export, tmp_path):
    out = export(3)
    change(out / TAG / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda model: model.update(global_steps=STEP + 1))
    with pytest.raises(MegaSoraError, match="global_steps of rank 1 differs between its files"):
        open_zero(out, None, SHAPES)


@pytest.mark.parametrize("place", ["run", "empty", "file", "nothing"])
def test_other_places_are_refused(source, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    path = source.folder.parent.parent if place == "run" else tmp_path / place
    with pytest.raises(MegaSoraError, match="and no DeepSpeed checkpoint"):
        open_zero(path, None, SHAPES)


def test_a_run_that_has_a_later_checkpoint_keeps_it(source, export):
    store = CheckpointStore(source.folder.parent)
    with pytest.raises(MegaSoraError, match="has step-00000012 already, and the imported checkpoint is of step 12"):
        import_deepspeed(export(), store, SHAPES)
    assert read_state(source.folder)["step"] == STEP


def test_exports_that_deepspeed_could_not_continue_are_refused(source, tmp_path):
    def export(of, shapes=SHAPES):
        export_deepspeed(of, tmp_path / "out", shapes, uses_weight_decay)

    average = ExportSource(source.folder, source.config, source.state, source.sharded, "ema")
    with pytest.raises(MegaSoraError, match="--weights ema: DeepSpeed continues a training"):
        export(average)
    with pytest.raises(MegaSoraError, match="optim.name=muon, whose states DeepSpeed's AdamW cannot continue"):
        export(save(tmp_path / "muon", settings=["optim.name=muon"]))
    with pytest.raises(MegaSoraError, match="table is not as in the model"):
        export(source, {**SHAPES, "table": torch.Size((3, 1))})
    infinite = lambda kind, name: values(kind, name) / (0 if name == "scale" else 1)  # noqa: E731
    with pytest.raises(MegaSoraError, match="weights of scale are NaN or infinite"):
        export(save(tmp_path / "infinite", value_of=infinite))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()


def test_an_export_that_does_not_fit_on_the_disk_leaves_nothing(export, tmp_path, monkeypatch):
    export()
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=1, f_frsize=512))
    with pytest.raises(OSError, match="the checkpoint for DeepSpeed needs .* are free") as caught:
        export()
    assert caught.value.filename == str(tmp_path / "out1") and [path.name for path in tmp_path.iterdir()] == ["out0"]
