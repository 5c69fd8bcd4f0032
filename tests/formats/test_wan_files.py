"""Wan's weights under every name by which they are found: variants, the release, ComfyUI; and hostile files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasora.errors import MegaSoraError
from megasora.formats.allowed_pickle import StoredTensor
from megasora.formats.wan import import_wan
from megasora.formats.wan_files import WEIGHTS_FILE
from megasora.formats.wan_folder import WanFolder, read_wan
from megasora.formats.wan_names import diffusers_names
from megasora.testing.wan import (
    CHANNELS,
    PATCH,
    TEXT_DIM,
    build_dit,
    make_pack,
    make_tiny_wan,
    run_reference,
    shapes_of,
    write_weights,
)

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
ORIGINAL = [  # (in diffusers, in the original release), by hand from the class WanModel
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"to_out\.0", "o"),
    (r"\.to_([qkv])\.", r".\1."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
]


def original_name(name: str) -> str:
    for pattern, replacement in ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_wan(tmp_path_factory.mktemp("wan"), depth=2, heads=1, head_dim=128)


@pytest.fixture(scope="module")
def weights(tiny):
    """All weights as imported from the folder that diffusers wrote."""
    return load_file(write_weights(tiny, tiny.folder.parent / "weights.safetensors"))


@pytest.fixture(scope="module")
def state(tiny):
    return {name: p.detach().contiguous() for name, p in tiny.reference.named_parameters()}


@pytest.fixture
def folder(tmp_path, tiny):
    """A folder with config.json of diffusers and no weights."""
    (tmp_path / "model").mkdir()
    shutil.copy(tiny.folder / "transformer" / "config.json", tmp_path / "model")
    return tmp_path / "model"


def original_config(**changes) -> dict:
    """config.json of the release; text_dim is in none of them, but this model is narrower."""
    sizes = {"dim": 128, "num_heads": 1, "num_layers": 2, "ffn_dim": 128 * 8960 // 1536, "in_dim": CHANNELS}
    others = {"eps": 1e-6, "freq_dim": 256, "model_type": "t2v", "out_dim": CHANNELS, "text_len": 512}
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "text_dim": TEXT_DIM,
        **sizes,
        **others,
        **changes,
    }


def imported(place, out) -> dict[str, torch.Tensor]:
    wan = read_wan(place)
    import_wan(wan, shapes_of(wan), out)
    return load_file(out)


def check_equal(values, expected):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(values[name], value), name


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: v.bfloat16().float() for name, v in weights.items()}


def write_parts(state, folder, pattern: str, index: str) -> list[str]:
    """Two files and their index, in the form of diffusers."""
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = pattern.format(f"0000{number}-of-00002")
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return sorted(set(weight_map.values()))


# ---------------------------------------------------------------- names of files


@pytest.mark.parametrize("variant", ["bf16", "fp16", "non_ema"])
def test_a_single_file_of_a_variant_is_read(variant, folder, state, weights, tmp_path):
    save_file({n: w.bfloat16() for n, w in state.items()}, folder / f"diffusion_pytorch_model.{variant}.safetensors")
    check_equal(imported(folder, tmp_path / "out.safetensors"), rounded(weights))


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        ("diffusion_pytorch_model-{}.safetensors", INDEX_FILE),
        ("diffusion_pytorch_model.bf16-{}.safetensors", "diffusion_pytorch_model.safetensors.index.bf16.json"),
        ("diffusion_pytorch_model-{}.bf16.safetensors", "diffusion_pytorch_model.bf16.safetensors.index.json"),
        ("part-{}.safetensors", INDEX_FILE),
    ],
)
def test_several_files_of_a_variant_are_read(pattern, index, folder, state, weights, tmp_path):
    files = write_parts(state, folder, pattern, index)
    assert [file.name for file in read_wan(folder).files] == files
    check_equal(imported(folder, tmp_path / "out.safetensors"), weights)


def test_the_weights_without_a_variant_are_preferred_and_several_variants_are_an_error(folder, state, tmp_path):
    for variant in ("bf16", "fp16"):
        save_file(state, folder / f"diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(MegaSoraError, match=r"several weights, .*bf16.safetensors, .*fp16.safetensors; give one"):
        read_wan(folder)
    chosen = folder / "diffusion_pytorch_model.fp16.safetensors"
    assert read_wan(chosen).files == (chosen,)
    save_file(state, folder / WEIGHTS_FILE)
    assert read_wan(folder).files == (folder / WEIGHTS_FILE,)


def test_dtypes_may_be_mixed(folder, state, weights, tmp_path):
    save_file({n: w.bfloat16() if w.ndim > 1 else w for n, w in state.items()}, folder / WEIGHTS_FILE)
    values = imported(folder, tmp_path / "out.safetensors")
    for name, value in rounded(weights).items():
        assert torch.equal(values[name], value if weights[name].ndim > 1 else weights[name]), name


# ---------------------------------------------------------------- names of weights


def test_the_names_of_the_release_are_those_that_diffusers_converts():
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    linear = ("weight", "bias")
    names = [f"{n}.{k}" for n in ("patch_embedding", "head.head", "time_projection.1") for k in linear]
    names += [f"{n}.{i}.{k}" for n in ("text_embedding", "time_embedding") for i in (0, 2) for k in linear]
    names += ["head.modulation"]
    for i in (0, 7, 39):
        names += [f"blocks.{i}.{n}.{k}" for n in ("ffn.0", "ffn.2", "norm3") for k in linear] + [
            f"blocks.{i}.modulation"
        ]
        for attention in ("self_attn", "cross_attn"):
            names += [f"blocks.{i}.{attention}.{n}.{k}" for n in "qkvo" for k in linear]
            names += [f"blocks.{i}.{attention}.norm_{n}.weight" for n in "qk"]
    for prefix in ("", "model.diffusion_model."):
        stored = [prefix + name for name in names]
        expected = convert_wan_transformer_to_diffusers({name: name for name in stored})
        converted = {new: old.removeprefix("model.diffusion_model.") for new, old in diffusers_names(stored).items()}
        assert converted == {new: old.removeprefix("model.diffusion_model.") for new, old in expected.items()}


def test_names_of_diffusers_and_of_other_models_stay(state):
    assert diffusers_names(state) == {name: name for name in state}
    assert diffusers_names(["x", "model.diffusion_model.y"]) == {
        "x": "x",
        "model.diffusion_model.y": "model.diffusion_model.y",
    }


@pytest.mark.parametrize("files", ["one", "several"])
def test_the_original_release_gives_the_outputs_of_diffusers(files, state, weights, tiny, tmp_path):
    folder = tmp_path / "Wan2.1-T2V-tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config()))
    original = {original_name(name): value for name, value in state.items()}
    assert original.keys() & state.keys() == {"patch_embedding.weight", "patch_embedding.bias"}
    if files == "one":
        save_file(original, folder / WEIGHTS_FILE)
    else:
        write_parts(original, folder, "diffusion_pytorch_model-{}.safetensors", INDEX_FILE)
    values = imported(folder, tmp_path / "out.safetensors")
    check_equal(values, weights)
    model, batch = build_dit(read_wan(folder), tiny.settings), make_pack()
    model.load_state_dict(values)
    outs = model(batch)[: batch.num_tokens].split(batch.cu_segments.diff().tolist())
    for out, expected in zip(outs, run_reference(tiny.reference, batch), strict=True):
        assert float((out - expected).detach().abs().max() / expected.detach().abs().max()) <= 1e-5


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_file_of_comfyui_needs_no_configuration(prefix, state, weights, tmp_path):
    file = tmp_path / "wan2.1_t2v_tiny_bf16.safetensors"
    save_file({prefix + original_name(name): value for name, value in state.items()}, file)
    wan = read_wan(file)
    assert wan == WanFolder((file,), 2, 1, 128, 128 * 8960 // 1536, CHANNELS, TEXT_DIM, PATCH)
    check_equal(imported(file, tmp_path / "out.safetensors"), weights)


def test_the_two_models_of_an_original_release_are_an_error(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()
    with pytest.raises(MegaSoraError, match="holds two models, low_noise_model and high_noise_model"):
        read_wan(tmp_path)


ORIGINALS = {  # changes of config.json of the release, words of the error
    "image to video": ({"model_type": "i2v"}, "image-to-video model (model_type=i2v)"),
    "more channels": ({"in_dim": 36}, "image-to-video model (in_channels=36 for out_channels=16)"),
    "no heads": ({"num_heads": 0}, "num_heads=0 must be a positive integer"),
    "indivisible": ({"num_heads": 3}, "num_heads=3 must divide dim=128"),
    "a text": ({"dim": "128"}, "dim=128 must be a positive integer"),
    "huge": ({"num_layers": 10**30}, "must be a positive integer"),
    "no norm": ({"qk_norm": False}, "qk_norm=False must be rms_norm_across_heads"),
    "another model": ({"_class_name": "VaceWanModel"}, "describes a VaceWanModel"),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_config_of_another_model_raises(name, tmp_path):
    changes, words = ORIGINALS[name]
    (tmp_path / "config.json").write_text(json.dumps(original_config(**changes)))
    (tmp_path / WEIGHTS_FILE).touch()
    with pytest.raises(MegaSoraError) as caught:
        read_wan(tmp_path)
    assert words in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


# ---------------------------------------------------------------- files of torch.save


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_a_file_of_torch_save_is_read_by_either_kind_of_names(suffix, state, weights, tmp_path):
    file = tmp_path / f"wan.{suffix}"
    torch.save({original_name(name): value for name, value in state.items()}, file)
    assert read_wan(file) == WanFolder((file,), 2, 1, 128, 128 * 8960 // 1536, CHANNELS, TEXT_DIM, PATCH)
    check_equal(imported(file, tmp_path / "a.safetensors"), weights)
    parameters = {name: torch.nn.Parameter(value.bfloat16()) for name, value in state.items()}
    torch.save(OrderedDict(parameters), file)
    check_equal(imported(file, tmp_path / "b.safetensors"), rounded(weights))


@pytest.mark.parametrize("index", [None, "diffusion_pytorch_model.pth.index.json"])
def test_several_files_of_torch_save_are_read_with_and_without_an_index(index, folder, state, weights, tmp_path):
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.pth"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    assert len(read_wan(folder).files) == 2
    check_equal(imported(folder, tmp_path / "a.safetensors"), weights)
    (folder / "diffusion_pytorch_model-00001-of-00002.pth").unlink()
    check_error(folder, tmp_path, "lacks", "download the whole folder")


def test_parts_without_an_index_are_read_if_none_is_missing(folder, state, weights, tmp_path):
    write_parts(state, folder, "diffusion_pytorch_model-{}.safetensors", INDEX_FILE)
    (folder / INDEX_FILE).unlink()
    check_equal(imported(folder, tmp_path / "out.safetensors"), weights)


def test_safetensors_are_preferred_to_pickles(folder, state):
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not read")
    save_file(state, folder / WEIGHTS_FILE)
    assert read_wan(folder).files == (folder / WEIGHTS_FILE,)


def test_one_tensor_of_a_file_is_read_at_a_time(state, tmp_path, monkeypatch):
    """By its bytes: the largest read is that of the largest tensor."""
    file, reads = tmp_path / "wan.pth", []
    torch.save(state, file)
    original = StoredTensor.read_elements
    monkeypatch.setattr(
        StoredTensor, "read_elements", lambda self, start, count: reads.append(count) or original(self, start, count)
    )
    imported(file, tmp_path / "out.safetensors")
    assert sorted(reads) == sorted(value.numel() for value in state.values())


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


PICKLES = {  # what torch.save is given, words of the error
    "code": ({"a": Code()}, "holds posix.system"),
    "a module": (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear"),
    "a list": ([torch.zeros(2)], "holds a list, no weights by name"),
    "a tensor": (torch.zeros(2), "holds a StoredTensor, no weights by name"),
    "nothing": ({}, "no weights by name"),
    "a training": ({"model": {"a": torch.zeros(2)}, "step": 5}, "holds model, step, no tensors"),
    "numbers for names": ({5: torch.zeros(2)}, "holds 5, no tensors"),
    "another model": ({"lora_A.weight": torch.zeros(2, 2)}, "no weights of a Wan 2.x model"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_holds_more_than_weights_is_refused_and_not_run(name, folder, tmp_path):
    value, words = PICKLES[name]
    torch.save(value, tmp_path / "wan.pth")
    check_error(tmp_path / "wan.pth", tmp_path, "wan.pth", words)
    shutil.copy(tmp_path / "wan.pth", folder)
    if name != "another model":
        check_error(folder, tmp_path, "wan.pth", words)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x80\x04\x95" + b"a" * 200, b"PK\5\6" + b"\0" * 18], ids=repr)
def test_a_damaged_archive_is_one_line(data, folder, tmp_path):
    (tmp_path / "wan.pth").write_bytes(data)
    check_error(tmp_path / "wan.pth", tmp_path, "wan.pth", "cannot be read")
    (folder / "wan.pth").write_bytes(data)
    check_error(folder, tmp_path, "wan.pth", "cannot be read")


def test_a_truncated_archive_is_one_line(state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "wan.pth").write_bytes(data[: len(data) // 2])
    check_error(tmp_path / "wan.pth", tmp_path, "wan.pth", "cannot be read")


# ---------------------------------------------------------------- damaged and hostile files


def check_error(place, tmp_path, *words):
    out = tmp_path / "out.safetensors"
    with pytest.raises(MegaSoraError) as caught:
        imported(place, out)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert not list(tmp_path.glob("*out.safetensors*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_an_error_that_names_the_tensor(value, folder, state, tmp_path):
    name = "blocks.1.ffn.net.2.weight"
    damaged = state[name].clone()
    damaged[3, 5] = damaged[0, 0] = value
    save_file({**state, name: damaged}, folder / WEIGHTS_FILE)
    check_error(folder, tmp_path, WEIGHTS_FILE, f"2 of {damaged.numel()} weights of {name} are NaN or infinite")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, None, "x.exe"])
def test_an_index_that_names_files_elsewhere_is_an_error(name, folder, state, tmp_path):
    save_file(state, tmp_path / "other.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
    check_error(folder, tmp_path, INDEX_FILE, "no weight file of its own folder")


def test_a_missing_part_is_named(folder, state, tmp_path):
    files = write_parts(state, folder, "diffusion_pytorch_model-{}.safetensors", INDEX_FILE)
    (folder / files[1]).unlink()
    check_error(folder, tmp_path, "lacks", files[1])
    (folder / INDEX_FILE).unlink()
    check_error(folder, tmp_path, f"lacks {WEIGHTS_FILE} or its index")


JSONS = ["", "[", "[]", "5", "nul", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"weight_map": []}', "\xff\xfe"]


@pytest.mark.parametrize("text", JSONS, ids=lambda text: text[:14])
def test_a_hostile_config_or_index_is_one_line(text, folder, state, tmp_path):
    (folder / INDEX_FILE).write_text(text, encoding="latin-1")
    check_error(folder, tmp_path, INDEX_FILE)
    (folder / "config.json").write_text(text, encoding="latin-1")
    check_error(folder, tmp_path, "config.json")


def test_a_fifo_for_a_file_does_not_block(folder, tmp_path):
    os.mkfifo(folder / INDEX_FILE)
    check_error(folder, tmp_path, "not a regular file")
    (folder / INDEX_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)
    check_error(folder, tmp_path, WEIGHTS_FILE, "no regular file")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    check_error(folder, tmp_path, "config.json", "not a regular file")


def header_file(header: object, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "empty": b"",
    "short": b"\1\2\3",
    "huge header": header_file({}, 1 << 62),
    "header beyond the file": header_file({}, 5000),
    "no JSON": header_file(b"<html>"),
    "deep": header_file(b"[" * 100_000),
    "overlapping": header_file({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}),
    "beyond the file": header_file({"a": {**F32, "data_offsets": [0, 1 << 40], "shape": [1 << 38]}}),
    "negative": header_file({"a": {**F32, "data_offsets": [-16, 0]}}),
    "unknown dtype": header_file({"a": {**F32, "dtype": "Q7"}}),
    "shape that does not fit": header_file({"a": {**F32, "shape": [5]}}),
    "a product that overflows": header_file({"a": {**F32, "shape": [1 << 62, 1 << 62]}}),
    "a pickle": b"\x80\x04\x95" + b"a" * 200,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_file_is_one_line(name, folder, tmp_path):
    (folder / WEIGHTS_FILE).write_bytes(HEADERS[name])
    check_error(folder, tmp_path, WEIGHTS_FILE, "cannot be read")
    check_error(folder / WEIGHTS_FILE, tmp_path, WEIGHTS_FILE, "cannot be read")


def test_a_file_of_another_model_is_one_line(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"lora_A.weight": torch.zeros(2, 2)}, file)
    check_error(file, tmp_path, "other.safetensors", "no weights of a Wan 2.x model")
