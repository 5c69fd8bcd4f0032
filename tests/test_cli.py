"""The commands as a person types them: their help, the files they write, and errors of one line."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import train_arguments
from PIL import Image
from safetensors.torch import load_file

from megasora.build import build_model, patch_dim
from megasora.cli import main
from megasora.config import load
from megasora.data.shard_format import read_manifest
from megasora.train import main as train_main

RUN_TEST_YAML = Path(__file__).parent / "runs" / "tiny.yaml"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, into which a command may write."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    from megasora.testing.wan import make_tiny_wan

    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


# ---------------------------------------------------------------- help

HELP = {  # command -> words of its help on what is read and written, and on units
    "ingest": ["Reads every clip", "NAME.txt", "captions.jsonl", "Writes WebDataset tars", "--out DIR", ".jpeg"],
    "shards": ["Reads dataset.json", "prints clips, tokens and sizes"],
    "train": ["Reads a configuration", "writes the run folder", "metrics.jsonl", "in seconds", "torchrun"],
    "status": ["Reads the folder RUN", "tokens per second", "last checkpoint", "--watch"],
    "sample": [
        "Reads the newest checkpoint",
        "writes FILE",
        "--prompt",
        "--image",
        "--extend",
        "--script",
        "pixels",
        "frames per second",
        "DIR/results.jsonl",
        "torchrun",
    ],
    "web": ["Reads the newest checkpoint", "127.0.0.1", "which only this machine can open", "default RUN/web"],
    "provenance": ["Reads FILE", "sidecar FILE.json", "signature is valid", "exit code is 0", "2 if the file"],
    "report": ["Reads the metrics", "writes RUN/report.html", "report.json"],
    "checkpoint": [
        "inspect",
        "verify",
        "diff",
        "reshape",
        "average",
        "prune",
        "reads a Wan model as diffusers saves it",
    ],
    "checkpoint inspect": ["writes nothing", "layout that saved it", "norm, mean, standard deviation", "--tensors"],
    "checkpoint verify": ["Reads every byte", "changes nothing", "exit code is 2"],
    "checkpoint diff": ["writes nothing", "largest absolute difference", "exit code is 0 if they are equal"],
    "checkpoint reshape": ["writes the run folder RUN", "bit for bit", "archived", "--processes N"],
    "checkpoint average": ["writes the run folder RUN", "run.start=init:", "least squares", "--sigma S"],
    "checkpoint prune": ["never the newest", "holds the lock of the run", "bytes that are freed", "--dry-run"],
    "checkpoint export": ["Writes OUT, whole or not at all", "DeepSpeed's load_checkpoint", "--dtype", "--format"],
    "checkpoint import-dcp": ["unpickles nothing but tables of names", "Writes the run folder RUN", "--config YAML"],
    "checkpoint import-deepspeed": ["ZeRO 1, 2 or 3", "unpickles nothing but tensors", "Writes the run folder RUN"],
    "checkpoint import-wan": [
        "Reads FOLDER/transformer",
        "Writes FILE",
        "4 bytes per weight",
        "prints the settings",
        "writes a run folder",
    ],
    "codec": ["eval", "encode", "decode", "export", "maps frames to latents"],
    "codec eval": ["writes DIR/eval.json", "PSNR in dB", "DIR/sheet.png", "--split", "key=value", "codec.name=wan"],
    "codec encode": ["writes its latents", "[C, T, h, w]", "--codec PATH"],
    "codec decode": ["writes FILE", "native size", "H.264"],
    "codec export": ["newest checkpoint", "writes RUN/codec"],
    "doctor": ["Reads versions, devices and free disk", "writes nothing"],
}


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_is_read_and_written_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as leave:
        main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert leave.value.code == 0
    for word in [*HELP[command], f"example: megasora {command}"]:
        assert word in shown


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    named = {line.split()[0] for line in shown.splitlines() if line.startswith("    ")}
    assert {command.split()[0] for command in HELP} <= named


def test_the_version_is_the_packages(capsys):
    import megasora

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"megasora {megasora.__version__}"


@pytest.mark.parametrize(
    "arguments", [[], ["tarin"], ["sample", "run"], ["shards", "a", "b=c"], ["train", "a", "--fast"], ["checkpoint"]]
)
def test_an_invalid_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    assert capsys.readouterr().err.startswith("usage: megasora")


# ---------------------------------------------------------------- what a command writes


@pytest.mark.parametrize("settings_last", [True, False])
def test_ingest_takes_settings_before_and_after_its_options(settings_last, clips, tmp_path, capsys):
    source = tmp_path / "clips"
    source.mkdir()
    for path in sorted((clips / "train").iterdir())[:6]:
        shutil.copy(path, source)
    out, values = ["--out", str(tmp_path / "shards")], ["codec.channels=24", "data.patch=[1,2,2]"]
    assert main(["ingest", str(source), *(out + values if settings_last else values + out)]) == 0
    manifest = read_manifest(tmp_path / "shards")
    assert manifest.codec_fingerprint.startswith("dct-4x8x8-24") and manifest.patch == [1, 2, 2]
    shown = capsys.readouterr()
    assert shown.out.endswith(f"shards in {tmp_path / 'shards'}\n") and "train" in shown.out
    assert shown.err == ""  # the progress bar is for terminals


def test_ingest_reads_the_configuration_of_a_run(clips, tmp_path):
    (tmp_path / "run.yaml").write_text("codec:\n  channels: 24\n")
    assert main(["ingest", str(clips), "--out", str(tmp_path / "shards"), "--config", str(tmp_path / "run.yaml")]) == 0
    assert read_manifest(tmp_path / "shards").codec_fingerprint.startswith("dct-4x8x8-24")


def test_shards_prints_the_counts_of_each_split(shards, capsys):
    assert main(["shards", str(shards)]) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(shards)
    rows = {}
    for line in shown.splitlines():
        cells = line.replace("│", " ").split()
        if cells and cells[0] in manifest.splits:
            rows[cells[0]] = [int(cell.replace(",", "")) for cell in cells[1:-1]]
    for split, counts in manifest.splits.items():
        numbers = [counts[key] for key in ("clips", "images", "frames", "tokens", "max_tokens")]
        assert rows[split] == [*numbers, len(counts["shards"])]
    assert rows["train"][0] == 60 and rows["val"][0] == 8
    assert manifest.codec_fingerprint in shown and manifest.text_fingerprint in shown
    bars = [line.split() for line in shown.split("tokens per clip, train split\n")[1].splitlines()]
    assert sum(int(bar[2] if bar[1] != ".." else bar[3]) for bar in bars) == 60


def test_sample_writes_a_video_a_sheet_and_a_sidecar_marked_as_generated(trained, tmp_path, capsys):
    out, prompt = tmp_path / "out.mp4", 'a "red" circle — 赤'
    options = ["--size", "16x24", "--frames", "6", "--seed", "3", "--guidance-scale", "2", "--fps", "8"]
    assert main(["sample", str(trained), "--prompt", prompt, "--out", str(out), *options]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4", "out.sheet.png"]
    provenance = {"ai_generated": True, "by": "MegaSora", "run": "single", "step": 20, "prompt": prompt, "seed": 3}
    with av.open(str(out)) as file:
        assert json.loads(file.metadata["comment"]) == provenance
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert np.stack(frames).shape == (6, 16, 24, 3) and file.streams.video[0].average_rate == 8
    with Image.open(tmp_path / "out.sheet.png") as sheet:
        assert json.loads(sheet.text["Comment"]) == provenance
        assert sheet.width > 6 * 24
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar.items() >= {**provenance, "size": "16x24", "frames": 6, "fps": 8.0, "kind": "text"}.items()
    settings = {"solver": "heun", "guidance_scale": 2.0, "num_inference_steps": 2, "unconditional": "null_token"}
    assert sidecar["settings"].items() >= settings.items() and sidecar["caption"] == prompt
    assert sidecar["checkpoint"].items() >= {"run": "single", "step": 20, "weights": "ema"}.items()
    assert str(out) in capsys.readouterr().out


def test_the_same_sample_command_writes_the_same_bytes(trained, tmp_path):
    for name in ("a", "b"):
        assert main(["sample", str(trained), "--prompt", "a red circle", "--out", str(tmp_path / f"{name}.mp4")]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_sample_makes_an_image_if_the_name_ends_in_png(trained, tmp_path):
    assert main(["sample", str(trained), "--prompt", "a red circle", "--out", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32) and json.loads(image.text["Comment"])["ai_generated"] is True
    assert json.loads((tmp_path / "out.json").read_text())["frames"] == 1


def test_sample_starts_from_an_image_of_its_size(trained, tmp_path):
    first = np.full((24, 40, 3), (180, 90, 60), np.uint8)
    Image.fromarray(first).save(tmp_path / "first.png")
    options = ["--image", str(tmp_path / "first.png"), "--frames", "5"]
    assert main(["sample", str(trained), "--prompt", "x", "--out", str(tmp_path / "out.mp4"), *options]) == 0
    with av.open(str(tmp_path / "out.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
    assert len(frames) == 5 and np.abs(frames[0] - first).mean() < 4
    given = json.loads((tmp_path / "out.json").read_text())["given"]
    assert [(file["as"], file["file"]) for file in given] == [("image", str(tmp_path / "first.png"))]


def test_report_writes_a_page_and_its_figures(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == f"report in {run / 'report.html'}"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>") and 'http-equiv="refresh' not in page
    figures = json.loads((run / "report.json").read_text())
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert figures["first_val_loss"] == pytest.approx(lines[0]["loss"])
    assert figures["final_val_loss"] == pytest.approx(lines[-1]["loss"])
    assert {"padding_fraction", "tokens_per_second", "color_accuracy"} <= set(figures)


def test_import_wan_writes_weights_and_prints_the_settings_of_their_model(wan, tmp_path, capsys):
    out = tmp_path / "wan weights.safetensors"
    assert main(["checkpoint", "import-wan", str(wan.folder), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # the progress bar is for terminals
    first, *lines = shown.out.splitlines()
    assert str(out) in first and "megasora train" in first
    settings = shlex.split("\n".join(lines).replace("\\\n", ""))  # as a shell parses the pasted lines
    assert f"run.start=init:{out}" in settings and "data.patch=[1,2,2]" in settings
    text_path = [setting for setting in wan.settings if setting.startswith("text.path=")][-1]  # a tiny encoder
    config = load(None, [*settings, text_path])
    model = build_model(config, patch_dim(config))
    assert config.text.pad and config.text.max_tokens == 512
    model.load_state_dict(load_file(out))
    assert list(tmp_path.iterdir()) == [out]


def test_doctor_checks_this_machine(capsys):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


# ---------------------------------------------------------------- errors


def check_error(arguments: list[object], capsys, folder: Path, *words: str) -> None:
    """Checks exit code 2, one line on stderr with these words, nothing on stdout, and no change in `folder`."""
    before = tree(folder)
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("megasora: error: ") and shown.err.count("\n") == 1, shown.err
    for word in words:
        assert word in shown.err
    assert shown.out == ""
    assert tree(folder) == before


def folder_with(folder: Path, **files: bytes | str) -> Path:
    """A folder of files; the argument `a_mp4` makes a.mp4."""
    folder.mkdir()
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def largest_video(clips: Path) -> bytes:
    return max((clips / "train").glob("*.mp4"), key=lambda p: p.stat().st_size).read_bytes()


def test_ingest_rejects_an_unknown_key(clips, tmp_path, capsys):
    arguments = ["ingest", clips, "--out", tmp_path / "shards", "codec.chanels=3"]
    check_error(arguments, capsys, tmp_path, "codec.chanels", "codec.channels")


def test_ingest_rejects_a_missing_configuration(clips, tmp_path, capsys):
    arguments = ["ingest", clips, "--out", tmp_path / "shards", "--config", tmp_path / "no.yaml"]
    check_error(arguments, capsys, tmp_path, "no configuration file", "no.yaml")


def test_ingest_rejects_an_empty_folder(tmp_path, capsys):
    source = folder_with(tmp_path / "clips", readme_md="nothing")
    check_error(["ingest", source, "--out", tmp_path / "shards"], capsys, tmp_path, "no clip in", str(source), ".mp4")


def test_ingest_rejects_a_folder_of_text_files_named_mp4(tmp_path, capsys):
    source = folder_with(tmp_path / "clips", a_mp4="my diary\n" * 50, a_txt="a caption")
    words = ["none of the 1 clips", "a.mp4 is a text file named .mp4"]
    check_error(["ingest", source, "--out", tmp_path / "new" / "shards"], capsys, tmp_path, *words)


def test_ingest_rejects_a_folder_of_truncated_videos(clips, tmp_path, capsys):
    data = largest_video(clips)
    source = folder_with(tmp_path / "clips", a_mp4=data[: len(data) * 6 // 10], a_txt="a caption")
    words = ["none of the 1 clips", "a.mp4", "the file is cut or damaged"]
    check_error(["ingest", source, "--out", tmp_path / "shards"], capsys, tmp_path, *words)


def test_ingest_rejects_a_clip_without_caption(clips, tmp_path, capsys):
    source = folder_with(tmp_path / "clips", a_mp4=largest_video(clips))
    words = ["a.mp4 has no caption", "a.txt", "ingest.missing_caption=skip"]
    check_error(["ingest", source, "--out", tmp_path / "shards"], capsys, tmp_path, *words)


def test_ingest_does_not_overwrite_other_files(clips, tmp_path, capsys):
    other = folder_with(tmp_path / "shards", precious_txt="text")
    check_error(["ingest", clips, "--out", other], capsys, tmp_path, str(other), "is not empty", "another --out")
    check_error(["ingest", clips, "--out", other / "precious.txt" / "x"], capsys, tmp_path, "precious.txt")


def test_a_full_disk_is_an_error_of_one_line(clips, tmp_path, capsys, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megasora.data.shard_writer.os.fsync", full)
    check_error(["ingest", clips, "--out", tmp_path / "shards"], capsys, tmp_path, "No space left on device")


def test_shards_rejects_a_folder_without_shards(tmp_path, capsys):
    check_error(["shards", tmp_path], capsys, tmp_path, "no dataset.json", str(tmp_path), "megasora ingest")


def test_import_wan_rejects_other_folders_and_existing_files(wan, tmp_path, capsys):
    arguments = ["checkpoint", "import-wan", tmp_path, "--out", tmp_path / "out.safetensors"]
    check_error(arguments, capsys, tmp_path, "config.json cannot be read", "diffusers saved")
    (tmp_path / "out.safetensors").touch()
    arguments[2] = wan.folder
    check_error(arguments, capsys, tmp_path, "out.safetensors exists", "another name")
    check_error(
        [*arguments[:-1], tmp_path / "no" / "out.safetensors"], capsys, tmp_path, "there is no folder", "make it"
    )


TRAINING = {  # override -> words of the error
    "model.hedas=3": ["unknown key 'model.hedas'", "model.heads"],
    "model.heads=3": ["model.heads=3", "model.width=32"],
    "codec.channels=48": ["dct-4x8x8-24", "dct-4x8x8-48", "ingest again"],
    "optim.lr=5e-3": ["already holds another configuration", "optim.lr: 0.001 -> 0.005", "choose another run.dir"],
    "data.shards=''": ["data.shards is not set", "megasora ingest"],
    "run.steps=": ["run.steps"],
}


def test_train_rejects_triton_without_a_gpu_unless_it_is_interpreted(shards, tiny, tmp_path, capsys, monkeypatch):
    arguments = train_arguments(tmp_path / "run", shards, tiny)
    monkeypatch.setattr("megasora.kernels.launch.INTERPRETED", False)
    assert main(["train", *arguments, "model.kernel_backend=triton", "run.device=cpu"]) == 2
    assert "model.kernel_backend=triton needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_check_prints_the_run_folder_and_starts_nothing(shards, tiny, tmp_path, capsys):
    config, *overrides = train_arguments(tmp_path / "run", shards, tiny)
    for arguments in (
        ["--check", config, *overrides],
        [config, "--check", *overrides],
        [config, *overrides, "--check"],
    ):
        assert main(["train", *arguments]) == 0
        assert train_main(arguments) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'run'}\n" * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", TRAINING)
def test_train_rejects_invalid_settings_before_it_starts(override, run, shards, tiny, tmp_path, capsys):
    folder = run if override.startswith("optim") else tmp_path / "new"
    values = [
        f"run.dir={folder}",
        f"data.shards={shards}",
        "run.steps=20",
        "checkpoint.every=10",
        "validation.every=10",
    ]
    check_error(["train", RUN_TEST_YAML, *values, *tiny, override], capsys, tmp_path, *TRAINING[override])


def test_sample_and_report_reject_a_folder_that_is_no_run(tmp_path, capsys):
    options = ["--prompt", "a red circle", "--out", tmp_path / "out.mp4"]
    for folder in (tmp_path, tmp_path / "nowhere"):
        check_error(["sample", folder, *options], capsys, tmp_path, str(folder), "not a run folder")
        check_error(["report", folder], capsys, tmp_path, str(folder))


def test_sample_rejects_a_run_without_checkpoint(run, tmp_path, capsys):
    options = ["--prompt", "a red circle", "--out", tmp_path / "out.mp4"]
    shutil.rmtree(run / "checkpoints")
    check_error(
        ["sample", run, *options], capsys, tmp_path, "holds no checkpoint to sample from", "checkpoint.every=10"
    )
