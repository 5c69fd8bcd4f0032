"""VideoDiT with shared modulation computes what diffusers' Wan model computes from the same weights."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.formats.wan import import_wan
from megasora.formats.wan_files import WEIGHTS_FILE
from megasora.formats.wan_folder import mlp_ratio, read_wan
from megasora.formats.wan_layers import build_layers
from megasora.testing.wan import (
    CLIPS,
    PATCH,
    build_dit,
    make_pack,
    make_tiny_wan,
    run_reference,
    shapes_of,
    write_weights,
)

WAN_1B = {  # config.json of Wan 2.1 T2V 1.3B
    "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
    "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": 8960, "freq_dim": 256, "image_dim": None, "in_channels": 16,
    "num_attention_heads": 12, "num_layers": 30, "out_channels": 16, "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def weights(tiny):
    return write_weights(tiny, tiny.folder.parent / "weights.safetensors")


@pytest.fixture
def model(tiny, weights):
    model = build_dit(read_wan(tiny.folder), tiny.settings)
    model.load_state_dict(load_file(weights))
    return model


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the transformer's folder, for tests that change it."""
    return shutil.copytree(tiny.folder / "transformer", tmp_path / "transformer")


def by_clip(out_LP, batch):
    return out_LP[: batch.num_tokens].split(batch.cu_segments.diff().tolist())


def relative_error(values, expected):
    return float((values - expected).detach().abs().max() / expected.detach().abs().max())


# ---------------------------------------------------------------- equal outputs and gradients


def test_each_clip_of_a_pack_equals_the_output_of_diffusers_for_it_alone(tiny, model):
    batch = make_pack()
    expected = run_reference(tiny.reference, batch)
    assert len(expected) == len(CLIPS) and len(batch.timesteps_R) == len(CLIPS) + 1  # one has a clean frame
    for i, (a, b) in enumerate(zip(by_clip(model(batch), batch), expected, strict=True)):
        assert b.std() > 0.5
        assert relative_error(a, b) <= 1e-5, f"clip {i}"


def test_every_gradient_equals_that_of_diffusers(tiny, model):
    batch = make_pack()
    generator = torch.Generator().manual_seed(2)
    weights_LP = [torch.randn(o.shape, generator=generator) for o in by_clip(batch.patches_LP, batch)]
    tiny.reference.zero_grad()
    for out in (by_clip(model(batch), batch), run_reference(tiny.reference, batch)):
        sum((o * w).sum() for o, w in zip(out, weights_LP, strict=True)).backward()
    wan_gradients = {name: p.grad for name, p in tiny.reference.named_parameters()}
    layers = build_layers(2, 16, PATCH)
    assert layers.keys() == dict(model.named_parameters()).keys()
    for name, layer in layers.items():
        expected = layer.to_dit(*(wan_gradients[wan_name] for wan_name in layer.names))
        assert relative_error(model.get_parameter(name).grad, expected) <= 2e-5, name


@pytest.mark.parametrize("head_dim", [20, 128])
def test_the_rotary_split_equals_wans_if_the_head_dim_is_no_multiple_of_6(head_dim, tmp_path):
    tiny = make_tiny_wan(tmp_path, depth=1, heads=2, head_dim=head_dim)  # t rotates more features than h and w
    model, batch = build_dit(read_wan(tiny.folder), tiny.settings), make_pack()
    model.load_state_dict(load_file(write_weights(tiny, tmp_path / "weights.safetensors")))
    for a, b in zip(by_clip(model(batch), batch), run_reference(tiny.reference, batch), strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_comparison_is_sensitive_to_coords(axis, tiny, model):
    batch = make_pack()
    coords_L3 = batch.coords_L3.clone()
    coords_L3[:, axis] *= 2
    wrong = model(dataclasses.replace(batch, coords_L3=coords_L3))
    errors = [
        relative_error(a, b) for a, b in zip(by_clip(wrong, batch), run_reference(tiny.reference, batch), strict=True)
    ]
    for error, (grid, *_) in zip(errors, CLIPS, strict=True):
        assert (error > 1e-3) is (grid[axis] > 1)


def test_the_size_of_a_clip_does_not_reach_the_model(model):
    batch = make_pack()
    other = dataclasses.replace(batch, native_size_G4=batch.native_size_G4 * 3)
    assert torch.equal(model(batch), model(other))


def test_a_hidden_caption_is_that_of_zeros(tiny, model):
    batch = make_pack()
    hidden = dataclasses.replace(batch, drop_text_G=torch.tensor([True, False, True, False]))
    zeros = batch.text_SE.clone()
    for i in (0, 2):
        zeros[batch.cu_text[i] : batch.cu_text[i + 1]] = 0
    expected = run_reference(tiny.reference, dataclasses.replace(batch, text_SE=zeros))
    for a, b in zip(by_clip(model(hidden), batch), expected, strict=True):
        assert relative_error(a, b) <= 1e-5
    assert relative_error(model(hidden)[: batch.num_tokens], model(batch)[: batch.num_tokens]) > 1e-3


# ---------------------------------------------------------------- the written file and its settings


def test_the_file_has_every_weight_in_fp32_and_no_temporary_file_remains(tiny, weights):
    tensors = load_file(weights)
    model = build_dit(read_wan(tiny.folder), tiny.settings)
    assert {name: p.shape for name, p in model.named_parameters()} == {n: w.shape for n, w in tensors.items()}
    assert {w.dtype for w in tensors.values()} == {torch.float32}
    size = sum(w.numel() for w in tiny.reference.parameters())
    assert sum(w.numel() for w in tensors.values()) == size
    assert not list(weights.parent.glob(".*"))


def test_the_folders_of_a_pipeline_and_of_its_transformer_are_equivalent(tiny):
    assert read_wan(tiny.folder) == read_wan(tiny.folder / "transformer")
    assert len(read_wan(tiny.folder).files) > 2


def test_bfloat16_weights_in_one_file_are_converted_exactly(tiny, folder, weights, tmp_path):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    narrow_weights = {name: p.detach().bfloat16().contiguous() for name, p in tiny.reference.named_parameters()}
    save_file(narrow_weights, folder / WEIGHTS_FILE)
    import_to(folder, tmp_path / "narrow.safetensors")
    exact, narrow = load_file(weights), load_file(tmp_path / "narrow.safetensors")
    for name, value in exact.items():
        assert torch.equal(narrow[name], value.bfloat16().float()), name


def test_the_settings_of_the_released_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WAN_1B))
    (tmp_path / WEIGHTS_FILE).touch()
    assert read_wan(tmp_path).settings() == [
        "model.width=1536", "model.depth=30", "model.heads=12", "model.mlp_ratio=5.8334", "model.modulation=shared",
        "model.conditioning=timestep", "model.qk_norm=across_heads", "model.text_depth=0", "text.name=t5",
        "text.path=google/umt5-xxl", "text.max_tokens=512", "text.pad=true", "data.patch=[1,2,2]", "codec.channels=16",
    ]  # fmt: skip
    config = load(None, read_wan(tmp_path).settings())
    assert config.text.pad and config.model.mlp_hidden == 8960


def test_a_model_without_a_null_token_needs_text_features_that_can_be_zero():
    with pytest.raises(
        MegaSoraError, match=r"conditioning=timestep has no null token: .*text\.name=bytes has not; use"
    ):
        load(None, ["model.conditioning=timestep"])
    with pytest.raises(MegaSoraError, match=r"model\.conditioning=none.* full.*timestep"):
        load(None, ["model.conditioning=none"])


def test_the_ratio_gives_the_hidden_width_exactly():
    known = {(8960, 1536): 5.8334, (13824, 5120): 2.7, (14336, 3072): 4.6667, (435, 100): 4.351}  # 100 * 4.35 < 435
    assert {key: mlp_ratio(*key) for key in known} == known
    for width in (1, 7, 96, 100, 1536, 5120):
        for hidden in range(1, 5 * width, max(1, width // 50)):
            assert int(width * mlp_ratio(hidden, width)) == hidden


# ---------------------------------------------------------------- errors


def import_to(folder, out):
    wan = read_wan(folder)
    import_wan(wan, shapes_of(wan), out)


def check_error(folder, out, *words):
    before = sorted(out.parent.iterdir())
    with pytest.raises(MegaSoraError) as error:
        import_to(folder, out)
    for word in words:
        assert word in str(error.value)
    assert sorted(out.parent.iterdir()) == before


CONFIGS = {  # changed values of config.json, words of the error
    "image channels": ({"in_channels": 36}, ["image-to-video", "in_channels=36 for out_channels=16"]),
    "image embedder": ({"image_dim": 1280}, ["image-to-video", "image_dim=1280"]),
    "image keys": ({"added_kv_proj_dim": 96, "pos_embed_seq_len": 514}, ["added_kv_proj_dim=96, pos_embed_seq_len=51"]),
    "another model": ({"_class_name": "WanVACETransformer3DModel"}, ["WanVACETransformer3DModel", "Wan 2.x"]),
    "another epsilon": ({"eps": 1e-5}, ["eps=1e-05", "1e-06"]),
    "another norm": ({"qk_norm": "rms_norm"}, ["qk_norm=rms_norm", "rms_norm_across_heads"]),
    "no cross norm": ({"cross_attn_norm": False}, ["cross_attn_norm=False"]),
    "other frequencies": ({"freq_dim": 128}, ["freq_dim=128", "256"]),
    "no depth": ({"num_layers": None}, ["num_layers=None"]),
    "deep patches": ({"patch_size": [2, 2, 2]}, ["patch_size=[2, 2, 2]"]),
    "more blocks": ({"num_layers": 3}, ["lack", "blocks.2.attn1.norm_k.weight", "more"]),
    "fewer blocks": ({"num_layers": 1}, ["no parameter for", "blocks.1.attn1.norm_k.weight", "more"]),
    "a wider MLP": ({"ffn_dim": 561}, ["blocks.0.ffn.net.0.proj.weight [560, 96]", "blocks.0.mlp.up.weight [561, 96]"]),
    "other channels": ({"in_channels": 8, "out_channels": 8}, ["patch_embedding.weight [96, 16, 1, 2, 2]", "[96, 32]"]),
    "other features": ({"text_dim": 24}, ["text.up.weight [96, 24]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_of_another_model_raises(name, folder, tmp_path):
    values, words = CONFIGS[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    check_error(folder, tmp_path / "out.safetensors", *words)


TABLE = "blocks.0.scale_shift_table"
TENSORS = {  # changed tensors of one file, None: removed; words of the error
    "missing": ({TABLE: None}, ["lack", TABLE]),
    "unknown": ({"blocks.0.attn2.add_k_proj.bias": torch.zeros(2)}, ["no parameter for", "add_k_proj.bias"]),
    "transposed": ({TABLE: torch.zeros(6, 1, 96)}, [f"{TABLE} [6, 1, 96]", "modulation.table [6, 96]"]),
    "quantised": ({TABLE: torch.zeros(1, 6, 96, dtype=torch.int8)}, [TABLE, "I8", "BF16"]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights_that_do_not_fit_raise(name, folder, tmp_path):
    changes, words = TENSORS[name]
    index = json.loads((folder / f"{WEIGHTS_FILE}.index.json").read_text())["weight_map"]
    file = folder / index[TABLE]
    tensors = {key: value for key, value in (load_file(file) | changes).items() if value is not None}
    save_file(tensors, file)
    check_error(folder, tmp_path / "out.safetensors", *words)


def test_a_tensor_in_two_files_raises(folder, tmp_path):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    check_error(folder, tmp_path / "out.safetensors", second.name, "repeats", min(load_file(first)))


def test_missing_and_truncated_files_raise(folder, tmp_path):
    file = sorted(folder.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    check_error(folder, tmp_path / "out.safetensors", file.name, "cannot be read")
    file.unlink()
    check_error(folder, tmp_path / "out.safetensors", "lacks", file.name)
    (folder / "config.json").write_text("<html>")
    check_error(folder, tmp_path / "out.safetensors", "config.json cannot be read")


def test_a_folder_of_two_experts_raises(tiny, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "transformer_2")
    check_error(tmp_path, tmp_path / "out.safetensors", "two models", "transformer_2", str(folder))
    assert read_wan(tmp_path / "transformer_2").depth == 2


def test_an_existing_file_is_not_overwritten(folder, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("content")
    check_error(folder, out, "out.safetensors exists")
    assert out.read_text() == "content"
    check_error(folder, tmp_path / "out.bin", "must end in .safetensors")


def test_a_failed_import_leaves_no_file(folder, tmp_path):
    wan = read_wan(folder)

    def disk_full(size):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        import_wan(wan, shapes_of(wan), tmp_path / "out.safetensors", disk_full)
    assert sorted(tmp_path.iterdir()) == before
