"""A run of Wan's dialect becomes a folder that diffusers loads, with the weights of the run to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasora.checkpoint.imported import save_imported
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore
from megasora.config import Config, load
from megasora.errors import MegaSoraError
from megasora.formats.diffusers_folder import export_diffusers
from megasora.formats.source import ExportSource
from megasora.formats.wan import open_weights
from megasora.formats.wan_files import WEIGHTS_FILE
from megasora.formats.wan_folder import read_wan
from megasora.formats.wan_layers import ADDED_TO_WAN, parameter_shapes
from megasora.testing.wan import build_dit, make_pack, make_tiny_wan, run_reference, shapes_of

diffusers = pytest.importorskip("diffusers", reason="pip install megasora[encoders]")


@pytest.fixture(autouse=True)
def without_accelerate(monkeypatch):
    """diffusers needs accelerate to keep some weights of Wan in fp32; here all of them have the dtype of the files."""
    if find_spec("accelerate") is None:
        monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def imported(tiny, tmp_path_factory):
    """What import-wan makes, and no step has changed."""
    return make_source(tmp_path_factory.mktemp("run"), tiny.folder, [*tiny.settings, "text.path=google/umt5-xxl"])


def make_source(run: Path, wan: Path, settings: list[str]) -> ExportSource:
    folder = read_wan(wan)
    shapes = shapes_of(folder)
    value_of = open_weights(folder, shapes)
    return save_source(run, load(None, settings), {name: value_of(name) for name in shapes})


def save_source(run: Path, config: Config, weights: dict[str, torch.Tensor]) -> ExportSource:
    shapes = {name: value.shape for name, value in weights.items()}
    folder = save_imported(CheckpointStore(run / "checkpoints"), shapes, weights.__getitem__, "a test")
    return ExportSource(folder, config, {}, ShardedCheckpoint(folder), "weights")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def check_same(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].dtype == value.dtype and torch.equal(values[name], value), name


def load_exported(out: Path, **options):
    model, info = diffusers.WanTransformer3DModel.from_pretrained(
        out, subfolder="transformer", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_imported_weights_are_exported_to_the_bit_in_one_file_or_in_parts(shard_bytes, tiny, imported, tmp_path):
    written = []
    export_diffusers(imported, tmp_path / "out", written.append, shard_bytes=shard_bytes)
    state = dict(tiny.reference.state_dict())
    check_same(weights_of(tmp_path / "out"), state)
    check_same(dict(load_exported(tmp_path / "out").state_dict()), state)
    assert sum(written) == sum(4 * value.numel() for value in state.values())
    files = sorted(path.name for path in (tmp_path / "out" / "transformer").iterdir())
    if shard_bytes == 10**9:
        assert files == ["config.json", WEIGHTS_FILE]
    else:
        count = len(files) - 2
        parts = [f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert count > 2 and files == sorted(["config.json", f"{WEIGHTS_FILE}.index.json", *parts])
        sizes = [(tmp_path / "out" / "transformer" / part).stat().st_size for part in parts]
        assert max(sizes) < shard_bytes + 10_000  # and the header
    assert read_wan(tmp_path / "out").settings() == read_wan(tiny.folder).settings()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_come_back_to_the_bit(dtype, tiny, tmp_path):
    folder = shutil.copytree(tiny.folder / "transformer", tmp_path / "wan")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = {key: value.to(dtype).contiguous() for key, value in tiny.reference.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    source = make_source(tmp_path / "run", folder, tiny.settings)
    export_diffusers(source, tmp_path / "out", dtype=dtype)
    check_same(weights_of(tmp_path / "out"), state)
    assert load_exported(tmp_path / "out", torch_dtype=dtype).proj_out.weight.dtype == dtype


def test_a_trained_model_computes_the_same_in_diffusers(tiny, imported, tmp_path):
    model, batch = build_dit(read_wan(tiny.folder), tiny.settings), make_pack()
    model.load_state_dict({name: imported.sharded.full_tensor("weights", name) for name in imported.sharded.shapes})
    before = model(batch).detach()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        model(batch)[: batch.num_tokens].square().mean().backward()
        adam.step()
        adam.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    source = save_source(tmp_path / "run", imported.config, weights)
    export_diffusers(source, tmp_path / "out", shard_bytes=300_000)
    exported = weights_of(tmp_path / "out")
    assert all(not torch.equal(value, exported[name]) for name, value in tiny.reference.state_dict().items())
    with torch.no_grad():
        out = model(batch)[: batch.num_tokens].split(batch.cu_segments.diff().tolist())
        expected = run_reference(load_exported(tmp_path / "out"), batch)
    for a, b in zip(out, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-5
    assert float((torch.cat(out) - before[: batch.num_tokens]).abs().max()) > 0.01


# ---------------------------------------------------------------- refused


def check_refused(source: ExportSource, out: Path, *words: str, **options) -> None:
    with pytest.raises(MegaSoraError) as caught:
        export_diffusers(source, out, **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert not out.exists() and not list(out.parent.glob(".*"))


def with_modules_of_their_own(imported, run: Path, **weights: float) -> ExportSource:
    """The imported model with model.conditioning=full, all of whose modules add nothing but `weights`."""
    config = load(None, ["model.conditioning=full"])
    config.model = replace(imported.config.model, conditioning="full")
    config.codec, config.data, config.text = imported.config.codec, imported.config.data, imported.config.text
    values = {name: imported.sharded.full_tensor("weights", name) for name in imported.sharded.shapes}
    for name, shape in parameter_shapes(config.model, 64, values["text.up.weight"].shape[1]).items():
        values.setdefault(name, torch.full(shape, weights.get(name, 0.0 if name in ADDED_TO_WAN else 1.0)))
    return save_source(run, config, values)


def test_modules_that_wan_lacks_are_left_out_if_they_add_nothing_and_named_if_they_do(tiny, imported, tmp_path):
    export_diffusers(with_modules_of_their_own(imported, tmp_path / "zero"), tmp_path / "out")
    check_same(weights_of(tmp_path / "out"), dict(tiny.reference.state_dict()))
    for name in ("first_frame", "null_text", "native.mlp.2.weight", "pooled_text.1.bias"):
        source = with_modules_of_their_own(imported, tmp_path / name, **{name: 1e-20})
        remedy = f"run.start=init:{source.folder} model.conditioning=timestep"
        check_refused(
            source, tmp_path / "refused", f"Wan has no {name}, which are not zero", remedy, str(source.folder)
        )


SETTINGS = {
    "model.modulation": "block", "model.qk_norm": "per_head", "model.text_depth": 1, "model.rope_base": 500.0,
    "model.rope_ntk_factor": [1.0, 2.0, 2.0], "text.name": "bytes", "data.patch": [2, 2, 2],
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_of_another_model_are_refused_by_name(key, imported, tmp_path):
    section, name = key.split(".")
    config = replace(imported.config, **{section: replace(getattr(imported.config, section), **{name: SETTINGS[key]})})
    check_refused(
        replace(imported, config=config), tmp_path / "out", f"{key}={SETTINGS[key]}, not", "--format megasora"
    )


def test_settings_that_are_not_those_of_the_checkpoint_are_refused(imported, tmp_path):
    for section, changes in (("model", {"mlp_ratio": 4.0}), ("model", {"depth": 3}), ("codec", {"channels": 8})):
        config = replace(imported.config, **{section: replace(getattr(imported.config, section), **changes)})
        check_refused(
            replace(imported, config=config), tmp_path / "out", "restore its config.yaml", str(imported.folder)
        )


def test_weights_that_are_not_finite_or_too_large_are_named(imported, tmp_path):
    values = {name: imported.sharded.full_tensor("weights", name) for name in imported.sharded.shapes}
    name = "blocks.1.cross.kv.weight"
    values[name][-1, 0] = 7e4
    source = save_source(tmp_path / "large", imported.config, values)
    check_refused(source, tmp_path / "out", "blocks.1.attn2.to_v.weight", "7e+04", "65504", "bf16", dtype=torch.float16)
    values[name][-1, 0] = float("nan")
    source = save_source(tmp_path / "nan", imported.config, values)
    check_refused(source, tmp_path / "out", "blocks.1.attn2.to_v.weight", "NaN")


def test_an_existing_folder_is_not_overwritten_and_a_failure_leaves_nothing(imported, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for place in (out, link, out / "mine"):
        with pytest.raises(MegaSoraError, match="exists; remove it or choose another name"):
            export_diffusers(imported, place)
    with pytest.raises(MegaSoraError, match="there is no folder"):
        export_diffusers(imported, tmp_path / "a" / "b")

    def disk_full(size):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        export_diffusers(imported, tmp_path / "new", disk_full)
    assert str(caught.value.filename).startswith(str(tmp_path / "new" / "transformer"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    (out / "mine").unlink()
    export_diffusers(imported, out)  # an empty folder is filled
    assert sorted(path.name for path in out.iterdir()) == ["scheduler", "transformer"]
