"""Folders of torch.distributed.checkpoint: plain PyTorch reads what is exported, and what it saves is imported."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_dcp import KINDS, SHAPES, STATE, Module, save_fsdp, save_tensor_parallel, shapes_of, source_of, value
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import find_checkpoint, read_state
from megasora.config import load_run_config
from megasora.errors import MegaSoraError
from megasora.formats import dcp_export
from megasora.formats.dcp_export import export_dcp, num_bytes
from megasora.formats.dcp_folder import open_dcp
from megasora.formats.dcp_import import import_dcp
from megasora.testing.spawn import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("run"))


@pytest.fixture
def exported(source, tmp_path):
    """A whole training state."""
    export_dcp(source, tmp_path / "dcp", everything=True)
    return tmp_path / "dcp"


def import_to(place, run, overrides=("model.width=48",), prefix=None):
    return import_dcp(place, run, None, list(overrides), shapes_of, prefix)


def check_weights(checkpoint, kind="weights", dtype=torch.float32):
    sharded = ShardedCheckpoint(find_checkpoint(checkpoint, print))
    assert sharded.kinds == {"weights"} and sharded.shapes == SHAPES
    for name in SHAPES:
        assert torch.equal(sharded.full_tensor("weights", name), value(kind, name).to(dtype).float())


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_plain_torch_loads_the_weights_in_three_lines(kind, dtype, tmp_path):
    source, written = source_of(tmp_path / "run", kind), []
    export_dcp(source, tmp_path / "dcp", dtype, on_written=written.append)
    model = Module(dtype)
    for parameter in model.parameters():
        parameter.data.zero_()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    model.load_state_dict(state["model"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, value(kind, name).to(dtype))
    assert sum(written) == num_bytes(source, dtype) == sum(s.numel() for s in SHAPES.values()) * dtype.itemsize


def test_names_may_have_no_prefix(source, tmp_path):
    export_dcp(source, tmp_path / "dcp", prefix="")
    state = Module().state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert all(torch.equal(state[name], value("weights", name)) for name in SHAPES)
    check_weights(import_to(tmp_path / "dcp", tmp_path / "run"))


def test_the_optimizer_of_torch_takes_the_moments(exported):
    model = Module()
    optimizer = torch.optim.AdamW(model.parameters())
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=flat)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)  # torch's own param_groups are not in the folder
    dcp.load(state, checkpoint_id=exported, planner=planner)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=flat)
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        assert moments["step"] == STATE["ema_updates"]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[kind], value(kind, name))


def test_memory_holds_the_tensors_of_one_file(source, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []
    full_tensor = ShardedCheckpoint.full_tensor

    def watched(self, kind, name):
        result = full_tensor(self, kind, name)
        alive.add(result)
        most.append(sum(tensor.nbytes for tensor in alive))
        return result

    monkeypatch.setattr(ShardedCheckpoint, "full_tensor", watched)
    monkeypatch.setattr(dcp_export, "GROUP_BYTES", 100)  # less than the second tensor, more than the smaller ones
    export_dcp(source, tmp_path / "dcp", everything=True)
    files = sorted(path.name for path in (tmp_path / "dcp").glob("*.distcp"))
    assert len(files) > 8 and len(most) == len(KINDS) * len(SHAPES)
    assert max(most) <= 2 * max(shape.numel() for shape in SHAPES.values()) * 4
    import_to(tmp_path / "dcp", tmp_path / "run")


def test_the_same_checkpoint_gives_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        export_dcp(source, tmp_path / name, everything=True)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [".metadata", "__0_0.distcp"]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert str(tmp_path).encode() not in (tmp_path / "a" / ".metadata").read_bytes()


def test_an_impossible_export_leaves_nothing(source, tmp_path, monkeypatch):
    out = tmp_path / "dcp"
    weights_only = source_of(tmp_path / "run", kinds=("weights",))
    for arguments, words in (
        ((weights_only, out, torch.float32, True), "has weights only, no training state"),
        ((source, out, torch.bfloat16, True), "always fp32"),
        ((source, tmp_path / "no" / "dcp"), "there is no folder"),
        ((source, tmp_path / "run"), "exists"),
    ):
        with pytest.raises(MegaSoraError, match=words):
            export_dcp(*arguments)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        export_dcp(source, out)
    assert error.value.filename == str(out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- import


def check_training_state(run, source):
    checkpoint = run / "checkpoints" / "step-00000008"
    assert find_checkpoint(run, print) == checkpoint
    sharded = ShardedCheckpoint(checkpoint)
    assert sharded.kinds == set(KINDS) and sharded.shapes == SHAPES
    for kind in KINDS:
        for name in SHAPES:
            assert torch.equal(sharded.full_tensor(kind, name), value(kind, name)), (kind, name)
    assert read_state(checkpoint) == source.state
    assert load_run_config(run).model == source.config.model


def test_a_training_state_comes_back_bit_for_bit(exported, source, tmp_path):
    written = []
    import_dcp(exported, tmp_path / "run", None, ["run.steps=99"], shapes_of, on_written=written.append)
    check_training_state(tmp_path / "run", source)
    config = load_run_config(tmp_path / "run")
    assert (config.run.steps, config.run.seed, config.run.dir) == (99, 5, str(tmp_path / "run"))
    assert sum(written) >= num_bytes(source, everything=True)


def test_plain_torch_may_save_it_again(exported, source, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(exported, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    dcp.save(state, checkpoint_id=tmp_path / "again")
    import_to(tmp_path / "again", tmp_path / "run", ())
    check_training_state(tmp_path / "run", source)


def test_one_kind_of_it_can_be_imported_as_weights(exported, tmp_path):
    for prefix, kind in (("ema.", "ema"), ("ema_0.999.", "ema_0.999"), ("model.", "weights")):
        check_weights(import_to(exported, tmp_path / kind, prefix=prefix), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [save_fsdp, save_tensor_parallel])
def test_weights_sharded_over_two_processes_are_put_together(save, dtype, tmp_path):
    run_ranks(save, 2, str(tmp_path / "dcp"), dtype)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    checkpoint = import_to(tmp_path / "dcp", tmp_path / "run")
    check_weights(checkpoint, dtype=dtype)
    assert read_state(checkpoint)["imported"] == f"DCP, {tmp_path / 'dcp'}"
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- bad input


def break_metadata(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def check_refused(place, tmp_path, words, **arguments):
    with pytest.raises(MegaSoraError, match=words) as error:
        import_to(place, tmp_path / "run", **arguments)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


class MakesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_the_folder_is_named_and_not_run(exported, tmp_path):
    victim, metadata = tmp_path / "victim", (exported / ".metadata").read_bytes()
    for change in (
        lambda m: m.state_dict_metadata.update(a=MakesFile(victim)),
        lambda m: setattr(m, "planner_data", MakesFile(victim)),
    ):
        break_metadata(exported, change)
        check_refused(exported, tmp_path, r"\.metadata holds posix\.system, which is not loaded")
        (exported / ".metadata").write_bytes(metadata)
    dcp.save({"model": Module().state_dict(), "megasora": MakesFile(victim)}, checkpoint_id=tmp_path / "evil")
    check_refused(tmp_path / "evil", tmp_path, r"__0_0\.distcp holds posix\.system, which is not loaded")
    check_weights(import_to(tmp_path / "evil", tmp_path / "run", prefix="model."))  # which is not read then
    assert not victim.exists()


def rename(metadata, name, new):
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(name)
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        metadata.storage_data[MetadataIndex(new, index.offset, index.index)] = metadata.storage_data.pop(index)


def info(metadata, name="model.patch_in.weight"):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def chunk(metadata, name="model.patch_in.weight"):
    return metadata.state_dict_metadata[name].chunks[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(info(m), "relative_path", "../x.distcp"), r"\.\./x\.distcp is no name of a file"),
        (lambda m: setattr(info(m), "relative_path", "/etc/passwd"), "/etc/passwd is no name of a file"),
        (lambda m: setattr(info(m), "relative_path", "__1_0.distcp"), r"lacks __1_0\.distcp"),
        (lambda m: setattr(info(m), "length", 10**9), r"bytes, \d+ expected"),
        (lambda m: setattr(info(m), "length", 4), r"a chunk \[6, 4\] of model\.patch_in\.weight has 4 bytes"),
        (lambda m: setattr(info(m), "offset", -1), "is at bytes -1 to"),
        (lambda m: setattr(info(m, "ema.null_text"), "offset", 7), "cannot be read"),
        (lambda m: setattr(info(m), "offset", info(m, "ema.null_text").offset), "cannot be read|has no torch"),
        (lambda m: setattr(info(m), "transform_descriptors", ["zstd"]), r"is stored with \['zstd'\]"),
        (lambda m: setattr(chunk(m), "sizes", torch.Size([5, 4])), "do not cover its .6, 4. exactly once"),
        (lambda m: setattr(chunk(m), "sizes", torch.Size([7, 4])), "do not cover its .6, 4. exactly once"),
        (lambda m: setattr(chunk(m), "offsets", torch.Size([1, 0])), "describes no checkpoint"),
        (lambda m: m.state_dict_metadata["model.null_text"].chunks.append(chunk(m)), "describes no checkpoint"),
        (lambda m: setattr(m, "storage_data", None), "describes no checkpoint"),
        (lambda m: m.state_dict_metadata.pop("model.null_text"), "no weights of null_text"),
        (lambda m: m.state_dict_metadata.pop("ema.null_text"), "no ema of null_text"),
        (lambda m: rename(m, "ema.null_text", "model.other"), "no ema of null_text"),
        (lambda m: setattr(m.state_dict_metadata["model.null_text"].properties, "dtype", torch.int32), "int32"),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused(change, words, exported, tmp_path):
    break_metadata(exported, change)
    check_refused(exported, tmp_path, words)


def test_other_folders_are_named(exported, tmp_path):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("x")
        return tmp_path / name

    for place, words in (
        (tmp_path / "none", "is not there, and no checkpoint of torch.distributed.checkpoint"),
        (exported / "__0_0.distcp", "is a file of torch.save"),
        (folder("empty"), "is an empty folder"),
        (folder("native", "manifest.json"), "is a checkpoint of MegaSora"),
        (folder("zero", "mp_rank_00_model_states.pt"), "is a DeepSpeed checkpoint.*import-deepspeed"),
        (folder("safetensors", "model.safetensors.index.json"), "is a folder of .safetensors files"),
        (folder("half", "__0_0.distcp"), "is half a checkpoint"),
        (folder("ranks", "__0.metadata", "__0_0.distcp"), "has a metadata file per rank"),
        (folder("text", ".metadata"), "cannot be read"),
    ):
        check_refused(place, tmp_path, words)
    outer = tmp_path / "outer"
    shutil.copytree(exported, outer / "step-8")
    check_refused(outer, tmp_path, "use a folder in it, e.g. .*outer/step-8")
    (outer / "step-8" / "__0_0.distcp").unlink()
    check_refused(outer / "step-8", tmp_path, r"lacks __0_0\.distcp")


def test_another_model_is_refused(exported, tmp_path):
    state = {"model": Module().state_dict()}
    for change, words in (
        ({"patch_in.weight": torch.ones(6, 5)}, r"model.patch_in.weight is \[6, 5\], this model's \[6, 4\]"),
        ({"null_text": torch.ones(5, dtype=torch.int64)}, "null_text is torch.int64"),
        (
            {"null_text": torch.tensor([1, 2, float("nan"), float("inf"), 0])},
            "2 of 5 elements of model.null_text are NaN",
        ),
        ({"blocks.1.x": torch.ones(2)}, "no parameter for model.blocks.1.x"),
    ):
        shutil.rmtree(tmp_path / "dcp")
        dcp.save({"model": {**state["model"], **change}}, checkpoint_id=tmp_path / "dcp")
        check_refused(tmp_path / "dcp", tmp_path, words)
    shutil.rmtree(tmp_path / "dcp")
    dcp.save({"net": state["model"]}, checkpoint_id=tmp_path / "dcp")
    check_refused(
        tmp_path / "dcp", tmp_path, "has no weights of this model with the prefix 'model.' or ''; it has net.bl"
    )
    check_refused(tmp_path / "dcp", tmp_path, "with the prefix 'ema.'", prefix="ema.")
    check_weights(import_to(tmp_path / "dcp", tmp_path / "run", prefix="net."))


def test_the_state_is_of_this_version(source, tmp_path):
    for number, text in enumerate(("{", "[]", '{"format": 2}', '{"format": 1}', "1")):
        dcp.save({"model": Module().state_dict(), "megasora": text}, checkpoint_id=tmp_path / f"dcp{number}")
        check_refused(tmp_path / f"dcp{number}", tmp_path, "megasora is not the state of a run: .*prefix model")


def test_a_run_that_exists_is_not_replaced(exported, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("x")
    with pytest.raises(MegaSoraError, match="exists"):
        import_to(exported, tmp_path / "run")


def test_a_bit_flip_in_the_metadata_is_one_line(exported, tmp_path):
    path = exported / ".metadata"
    good, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(200):
        data = bytearray(good)
        data[int(torch.randint(len(data), (), generator=generator))] ^= 1 << int(
            torch.randint(8, (), generator=generator)
        )
        path.write_bytes(data)
        try:
            folder = open_dcp(exported)
            for name in folder.tensors:
                folder.read(name)
        except MegaSoraError as error:
            assert len(str(error).splitlines()) == 1
