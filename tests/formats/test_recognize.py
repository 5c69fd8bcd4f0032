"""What a folder or file is, and which command reads it, for every format and for what is none."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from megasora.checkpoint.imported import save_imported
from megasora.checkpoint.store import CheckpointStore
from megasora.cli import main
from megasora.errors import MegaSoraError
from megasora.formats.recognize import check_format, what_is


def make_native(folder):
    save_imported(
        CheckpointStore(folder / "checkpoints"), {"w": torch.Size((2,))}, lambda name: torch.ones(2), "a test"
    )
    return folder


def write(folder, files: dict[str, bytes | str | dict]):
    """A folder with these files; a dict is written as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


FOLDERS = {  # name: (files, format, words of what is said)
    "deepspeed": (
        {"latest": "global_step10", "global_step10/mp_rank_00_model_states.pt": b"PK"},
        "deepspeed", "DeepSpeed checkpoints (global_step10)", "import-deepspeed",
    ),
    "own_tag": (
        {"latest": "best", "best/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"PK"},
        "deepspeed", "DeepSpeed checkpoints (best)", "import-deepspeed",
    ),
    "global_step10": (
        {"bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": b"", "mp_rank_00_model_states.pt": b""},
        "deepspeed", "a DeepSpeed checkpoint", "import-deepspeed",
    ),
    "universal": (
        {"latest_universal": "x", "x/zero/a/fp32.pt": b""}, "deepspeed", "a universal checkpoint", "import-deepspeed",
    ),
    "dcp": ({".metadata": b"\x80", "__0_0.distcp": b""}, "dcp", "torch.distributed.checkpoint", "import-dcp"),
    "half_dcp": ({"__0_0.distcp": b""}, "other", "it has no .metadata", "copy it again"),
    "pipeline": (
        {"model_index.json": {"_class_name": "WanPipeline"}}, "diffusers", "diffusers, WanPipeline", "import-wan",
    ),
    "transformer": (
        {"config.json": {"_class_name": "WanTransformer3DModel"}}, "diffusers", "WanTransformer3DModel", "import-wan",
    ),
    "ours": ({"config.json": {"model_type": "megasora"}}, "megasora", "exported from MegaSora", "run.start=init:"),
    "t5": ({"config.json": {"model_type": "t5"}}, "transformers", "a model of transformers", "text.path"),
    "parts": ({"model.safetensors.index.json": {}}, "diffusers", ".safetensors files", "import-wan"),
    "torch": ({"a.pth": b"PK\x03\x04"}, "pickle", "files of torch.save", "import-wan"),
    "half": ({"config.yaml": "run: {}"}, "other", "a run folder without a checkpoint", "train it"),
    "step-00000010": ({"fragments/rank-00000.safetensors": b""}, "other", "half a checkpoint", "earlier checkpoint"),
    ".out.part": ({"config.yaml": ""}, "other", "an interrupted save or export", "remove it"),
    "checkpoints": ({"step-00000010/manifest.json": ""}, "other", "the folder of a run's checkpoints", "give the run"),
    "empty": ({}, "other", "an empty folder", ""),
    "text": ({"a.txt": "a", "b.txt": "b"}, "other", "a folder of something else (a.txt, b.txt)", ""),
    "broken_json": ({"config.json": b"{" * 5000}, "other", "something else", ""),
    "latest_of_others": ({"latest": "../../etc"}, "other", "something else", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_each_format(name, tmp_path):
    files, kind, words, remedy = FOLDERS[name]
    (tmp_path / name).mkdir()
    found = what_is(write(tmp_path / name, files))
    assert found.format == kind and words in found.description and remedy in found.remedy


def test_our_own_folders(tmp_path):
    run = make_native(tmp_path / "run")
    assert what_is(run).format == "run" and "checkpoint inspect" in what_is(run).remedy
    assert what_is(run / "checkpoints" / "step-00000000").format == "checkpoint"
    assert check_format(run, "run", "checkpoint").format == "run"


def test_files(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "half.safetensors").write_bytes(b"\0" * 20)
    expected = {"w.safetensors": "safetensors", "w.pth": "pickle", "old.pt": "pickle", "half.safetensors": "other"}
    assert {name: what_is(tmp_path / name).format for name in expected} == expected


def test_what_cannot_be_read_is_said_in_words(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for place, words in (
        (tmp_path / "none", "not there"),
        (tmp_path / "fifo", "not readable (not a regular file)"),
        (tmp_path / "loop", "not readable"),
        (tmp_path / ("x" * 300), "not there"),
        (tmp_path / "a\0b", "not there"),
    ):
        assert words in what_is(place).description
    with pytest.raises(MegaSoraError, match="is not there, and no DeepSpeed checkpoint$"):
        check_format(tmp_path / "none", "deepspeed")


VERBS = {  # verb and options -> the formats that it reads
    ("inspect", "@"): {"run", "checkpoint"},
    ("verify", "@"): {"run", "checkpoint"},
    ("diff", "@", "@"): {"run", "checkpoint", "safetensors"},
    ("reshape", "@", "--processes", "1", "--out", "new"): {"run", "checkpoint"},
    ("average", "@", "@", "--out", "new"): {"run", "checkpoint"},
    ("average", "@", "--sigma", "0.1", "--out", "new"): {"run"},
    ("prune", "@", "--keep", "1"): {"run"},
    ("export", "@", "--format", "dcp", "--out", "new"): {"run", "checkpoint"},
    ("import-dcp", "@", "--run", "new"): {"dcp"},
    ("import-deepspeed", "@", "--run", "new", "model.depth=2"): {"deepspeed"},
}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_folder_of_another_format_is_answered_with_the_command_that_reads_it(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {}
    for name in ("deepspeed", "dcp", "pipeline", "t5", "torch"):
        (tmp_path / name).mkdir()
        places[name] = write(tmp_path / name, FOLDERS[name][0])
    places["run"] = make_native(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    for name, place in places.items():
        found = what_is(place)
        if found.format in VERBS[verb]:
            continue
        assert main(["checkpoint", *(word.replace("@", name) for word in verb)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"{name} is {found.description}, and no " in lines[0]
        assert lines[0].endswith(what_is(place.relative_to(tmp_path)).remedy)
    assert sorted(tmp_path.rglob("*")) == before
