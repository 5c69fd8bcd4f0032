"""Training of a codec: layouts, resume, the kinds of latents, the finished codec, and launches that are errors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_tensors, read_jsonl

from megasora.data.clip_writer import write_image, write_video
from megasora.testing.spawn import run_ranks

STEPS = 6
TINY = [  # a network that trains in milliseconds
    "codec.name=vae", "codec.factors=[4,8,8]", "codec.channels=4",
    "vae.patch=4", "vae.width=8", "vae.multipliers=[1,2]", "vae.blocks=1",
    "data.clips_per_pack=3", "data.packs_per_step=2", "data.crop=[9,16,16]", "data.reader_threads=1",
    "optim.lr=2e-3", "optim.eps=1e-4", "optim.warmup_steps=2", "optim.ema_decay=0.9", "reconstruction.kl=1e-4",
    f"run.steps={STEPS}", "run.seed=3", "run.threads=1", "run.ledger=true", "run.debug_every=2",
    "checkpoint.every=3", "validation.every=3", "validation.clips=3", "wandb.mode=disabled",
    # without L1: its gradient is a sign, which rounding, different on each CPU, changes where a pixel is nearly right
    "reconstruction.mse=1", "reconstruction.l1=0", "reconstruction.gradient=0",
]  # fmt: skip
SIZES = [(9, 16, 16), (9, 16, 24), (5, 16, 16), (1, 17, 19), (7, 24, 18), (1, 16, 16), (13, 16, 16)]  # T, H, W


def frames_of(index: int, size: tuple[int, int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3]: a colour gradient that moves."""
    t, y, x = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
    waves = [np.sin((x * (1 + index % 3) + y * c + 2 * t + index) / 5) for c in range(3)]
    return (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def write_clips(folder: Path) -> None:
    for index, size in enumerate([*SIZES, *SIZES[:4]]):
        path = folder / ("val" if index >= len(SIZES) else "") / f"clip{index:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = frames_of(index, size)
        if len(frames) == 1:
            write_image(frames[0], path.with_suffix(".png"))
        else:
            write_video(frames, 12, path.with_suffix(".mp4"))


@pytest.fixture(scope="session")
def codec_clips(made_once) -> Path:
    return made_once("codec-clips", write_clips)


def train_codec(
    arguments: list[str], stop_after: int = 0, nan_steps: tuple[int, ...] = (), nan_clip: int = -1
) -> str | None:
    """Trains as megasora.train_codec does, on each rank of an existing group; the error that ended it early, or None.

    `nan_clip`: this clip has NaN in the given steps.
    """
    import torch.distributed as dist

    from megasora.checks import resolve_network
    from megasora.config import load
    from megasora.errors import MegaSoraError
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World
    from megasora.tasks.codec import CodecTask
    from megasora.trainer import Trainer

    config = resolve_network(load(None, arguments))
    partition_small_weights()
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"))
    task = CodecTask(config, world, build_mesh(config.parallel, "cpu"))
    build_work = task.work.build_work

    def poisoned(stack, piece, make_noise):
        work = build_work(stack, piece, make_noise)
        if trainer.step + 1 in nan_steps and nan_clip in work.sample_ids:
            work.frames[work.sample_ids.index(nan_clip)] = math.nan
        return work

    task.work.build_work = poisoned
    trainer = Trainer(config, world, task, lambda: trainer.step + 1 == stop_after)
    try:
        trainer.run()
        task.finish(lambda activity: None)
    except MegaSoraError as error:
        return f"{type(error).__name__}: {error}"
    return None


def partition_small_weights() -> None:
    """ZeRO-3 then partitions all weights of a tiny network, which it would else keep whole."""
    from megasora.parallel import deepspeed_engine

    original = deepspeed_engine.deepspeed_config

    def config_of(*arguments):
        config = original(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    deepspeed_engine.deepspeed_config = config_of


def arguments_of(run: Path, clips: Path, *settings: str) -> list[str]:
    return [f"run.dir={run}", f"data.clips={clips}", *TINY, *settings]


@pytest.fixture(scope="session")
def codec_run(made_once, codec_clips) -> Path:
    """A finished run on one process."""

    def make(run: Path) -> None:
        assert run_ranks(train_codec, 1, arguments_of(run, codec_clips)) == [None]

    return made_once("codec-run", make)


def check_same_run(run: Path, other: Path, steps: int = STEPS) -> None:
    a, b = read_jsonl(run), read_jsonl(other)
    assert [m["step"] for m in a] == [m["step"] for m in b] == list(range(1, steps + 1))
    for first, second in zip(a, b, strict=True):
        for key in ("loss", "l1", "gradient", "ssim", "psnr", "kl"):
            assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-7), (first["step"], key)
        # AdamW's first updates are about the sign of the gradient: they amplify rounding where it is nearly zero
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5 if first["step"] == 1 else 1e-4)
    for first, second in zip(read_jsonl(run, "validation.jsonl"), read_jsonl(other, "validation.jsonl"), strict=True):
        for key in ("loss", "psnr", "ssim", "flicker"):
            assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-6), key


LAYOUTS = {  # of two ranks
    "data": [],
    "data, ZeRO-2": ["parallel.zero_stage=2", "data.reader_threads=0"],
    "data, ZeRO-3": ["parallel.zero_stage=3"],
    "clips split in time": ["parallel.context=2"],
    "clips split in rows": ["parallel.context=2", "parallel.rows=2"],
    "clips split in time, ZeRO-3": ["parallel.context=2", "parallel.zero_stage=3"],
}
L1 = ["reconstruction.mse=0", "reconstruction.l1=1", "reconstruction.gradient=1"]
LEARNING = [*L1, "run.steps=60", "checkpoint.every=100", "validation.every=60", "optim.ema_decay=0", "optim.lr=1e-2"]
KINDS = {
    "kl": LEARNING,
    "vq": [*LEARNING, "vae.kind=vq", "vae.codebook_size=16"],
    "fsq": [*LEARNING, "vae.kind=fsq", "vae.fsq_levels=[8,8,5,5]"],
    "none": [*LEARNING, "vae.time=none", "codec.factors=[1,8,8]"],
}


def train_codecs(runs: dict[str, list[str]]) -> dict[str, str | None]:
    """Trains one after the other, in the same processes."""
    return {name: train_codec(arguments) for name, arguments in runs.items()}


def train_on_two_ranks(settings: dict[str, list[str]], folder: Path, clips: Path) -> Path:
    """`folder`, with a finished run for each name in `settings`."""
    ends = run_ranks(
        train_codecs, 2, {name: arguments_of(folder / name, clips, *own) for name, own in settings.items()}
    )
    assert ends == [dict.fromkeys(settings)] * 2
    return folder


@pytest.fixture(scope="module")
def layout_runs(codec_clips, tmp_path_factory) -> Path:
    return train_on_two_ranks(LAYOUTS, tmp_path_factory.mktemp("layouts"), codec_clips)


@pytest.fixture(scope="module")
def kind_runs(codec_clips, tmp_path_factory) -> Path:
    return train_on_two_ranks(KINDS, tmp_path_factory.mktemp("kinds"), codec_clips)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_train_as_one_process(layout, codec_run, layout_runs):
    check_same_run(codec_run, layout_runs / layout)


def test_a_stopped_run_resumes_bit_for_bit(codec_run, codec_clips, tmp_path):
    run = tmp_path / "run"
    (end,) = run_ranks(train_codec, 1, arguments_of(run, codec_clips), 2)
    assert end == "StopRequested: saved after step 2; the same command resumes from there"
    assert run_ranks(train_codec, 1, arguments_of(run, codec_clips, "data.clip_cache_mib=0")) == [None]
    for a, b in zip(read_jsonl(codec_run), read_jsonl(run), strict=True):
        assert [a[key] for key in ("loss", "grad_norm", "kl")] == [b[key] for key in ("loss", "grad_norm", "kl")]
    expected, resumed = full_tensors(codec_run, STEPS), full_tensors(run, STEPS)
    assert expected.keys() == resumed.keys() and len(expected) > 50
    assert not [name for name in expected if not torch.equal(expected[name], resumed[name])]
    assert (codec_run / "codec" / "codec.json").read_text() == (run / "codec" / "codec.json").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_network_learns_and_its_codec_reconstructs(kind, kind_runs):
    from megasora.codec import build_codec
    from megasora.config import CodecConfig

    run = kind_runs / kind
    metrics, (first, last) = read_jsonl(run), read_jsonl(run, "validation.jsonl")
    assert last["psnr"] > first["psnr"] + 4
    assert ("perplexity" in metrics[-1]) == (kind in ("vq", "fsq"))
    if kind == "vq":
        assert 1.5 < metrics[-1]["perplexity"] <= 16 and metrics[-1]["commitment"] > 0
    codec = build_codec(CodecConfig(name="vae", path=str(run), device="cpu"))
    frames = torch.from_numpy(frames_of(1, (9, 16, 24))).permute(0, 3, 1, 2).float() / 127.5 - 1
    error = (codec.decode(codec.encode(frames)) - frames).square().mean()
    psnr = 10 * math.log10(4 / float(error))
    assert psnr > first["psnr"] + 3  # EMA weights; the clip is one of the training clips


def test_latents_of_held_out_clips_have_unit_variance(codec_run, codec_clips):
    from megasora.codec import build_codec
    from megasora.config import CodecConfig

    codec = build_codec(CodecConfig(name="vae", path=str(codec_run), device="cpu"))
    latents = []
    for index in range(40):
        frames = frames_of(index, SIZES[index % 3])
        latents.append(codec.encode(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(1))
    std = torch.cat(latents, 1).std(1)
    assert ((std - 1).abs() < 0.35).all()  # 7 clips were measured
    assert abs(float(std.mean()) - 1) < 0.15


def test_the_finished_run_has_pictures_a_ledger_and_a_codec_that_is_written_again(codec_run, codec_clips, tmp_path):
    from PIL import Image

    from megasora.run_log.ledger import read_ledger

    for step in (0, 3, 6):
        picture = Image.open(codec_run / "reconstructions" / f"step-{step:08d}.png")
        assert picture.width >= 64 and picture.height >= 3 * 64
    ids = [i for clips in read_ledger(codec_run).values() for i in clips]
    assert len(ids) == 6 * STEPS and set(ids) == set(range(len(SIZES)))
    assert [ids.count(i) for i in range(len(SIZES))].count(5) >= 6  # 36 clips: five epochs of 7 and one clip
    assert json.loads((codec_run / "run.json").read_text())["task"] == "codec"

    run = tmp_path / "run"
    shutil.copytree(codec_run, run)
    shutil.rmtree(run / "codec")
    assert run_ranks(train_codec, 1, arguments_of(run, codec_clips)) == [None]
    for name in ("codec.json", "codec.safetensors"):
        assert (run / "codec" / name).read_bytes() == (codec_run / "codec" / name).read_bytes()


@pytest.mark.slow
def test_training_the_decoder_leaves_the_encoder_as_it_is(codec_run, codec_clips, tmp_path):
    from safetensors.torch import load_file

    from megasora.codec.vae.folder import read_manifest

    settings = ["reconstruction.train=decoder", f"codec.path={codec_run}", "data.crop=[0,0,0]", "run.steps=3"]
    first = tmp_path / "one"
    base = [text for text in TINY if not text.startswith(("codec.factors", "codec.channels", "vae."))]
    for run, processes in ((first, 1), (tmp_path / "two", 2)):
        arguments = [f"run.dir={run}", f"data.clips={codec_clips}", *base, *settings]
        assert run_ranks(train_codec, processes, arguments) == [None] * processes
    check_same_run(first, tmp_path / "two", 3)
    before, after = (load_file(run / "codec" / "codec.safetensors") for run in (codec_run, first))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert len(changed) == sum(name.startswith("decoder.") for name in before)
    a, b = (read_manifest(run / "codec") for run in (codec_run, first))
    assert a.encoder_fingerprint == b.encoder_fingerprint and a.decoder_sha256 != b.decoder_sha256


def test_a_clip_with_nan_is_named_and_its_step_left_out(codec_clips, tmp_path):
    run = tmp_path / "run"
    settings = arguments_of(run, codec_clips, "data.packs_per_step=2", "data.clips_per_pack=4", "run.steps=4")
    assert run_ranks(train_codec, 2, settings, 0, (2, 3), 5) == [None, None]
    (line, *_), metrics = read_jsonl(run, "skipped.jsonl"), read_jsonl(run)
    assert (line["step"], line["reason"], line["non_finite_clips"]) == (2, "non-finite", [5])
    assert [("skipped" in m, m["loss"] is None) for m in metrics][:2] == [(False, False), (True, True)]
    assert metrics[-1]["loss"] is not None and math.isfinite(metrics[-1]["grad_norm"])


ADVERSARIAL = [
    "reconstruction.adversarial.weight=0.5", "reconstruction.adversarial.start_step=3",
    "reconstruction.adversarial.width=4", "reconstruction.adversarial.layers=2", "optim.lr=5e-4",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_adversarial_run_is_the_same_in_other_layouts_and_after_a_resume(codec_clips, tmp_path):
    one, two, rows = (tmp_path / name for name in ("one", "two", "rows"))
    assert run_ranks(train_codec, 1, arguments_of(one, codec_clips, *ADVERSARIAL)) == [None]
    (end, _) = run_ranks(train_codec, 2, arguments_of(two, codec_clips, *ADVERSARIAL), 4)
    assert end.startswith("StopRequested: saved after step 4")
    assert run_ranks(train_codec, 2, arguments_of(two, codec_clips, *ADVERSARIAL)) == [None, None]
    split = ["parallel.context=2", "parallel.rows=2", "parallel.zero_stage=2"]
    assert run_ranks(train_codec, 2, arguments_of(rows, codec_clips, *ADVERSARIAL, *split)) == [None, None]
    metrics = read_jsonl(one)
    assert [("discriminator" in m, "adversarial" in m) for m in metrics] == [(False, False)] * 2 + [(True, True)] * 4
    assert 0.5 < metrics[2]["discriminator"] < 2  # hinge loss of a new discriminator: about 1
    for other in (two, rows):
        for a, b in zip(metrics, read_jsonl(other), strict=True):
            for key in ("loss", *(["discriminator", "adversarial"] if a["step"] > 2 else [])):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (other.name, a["step"], key)
    saved = full_tensors(two, STEPS)
    assert float(saved["weights/discriminator.updates"]) == 4


ERRORS = {  # settings -> words of the one-line message
    "no clips": (["data.clips="], ["data.clips is not set", "data.clips=data/clips"]),
    "a folder that is missing": (["data.clips=/nowhere"], ["/nowhere", "give the folder that holds the clips"]),
    "another codec": (["codec.name=dct"], ["codec.name=dct", "codec.name=vae"]),
    "a decoder without an encoder": (["reconstruction.train=decoder"], ["reconstruction.train=decoder", "codec.path"]),
    "tensor parallelism": (["parallel.tensor=2"], ["parallel.tensor=2", "parallel.context"]),
    "packs that do not divide": (
        ["data.packs_per_step=3", "parallel.context=1"],
        ["data.packs_per_step=3", "multiple"],
    ),
    "other settings": (["vae.width=16"], ["vae.width: 8 -> 16", "choose another run.dir"]),
    "other clips": (["data.clips=val"], ["was trained on other clips", "clips: 7 -> "]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_invalid_launch_is_an_error_of_one_line(case, codec_run, codec_clips, capsys, monkeypatch, tmp_path):
    from megasora.train_codec import main

    settings, words = ERRORS[case]
    monkeypatch.setenv("WORLD_SIZE", "2")
    is_resumed = case.startswith("other")
    if settings == ["data.clips=val"]:
        write_image(frames_of(0, (1, 16, 16))[0], tmp_path / "a.png")
        settings = [f"data.clips={tmp_path}"]
    config = tmp_path / "config.yaml"
    config.write_text("{}\n")
    run = codec_run if is_resumed else tmp_path / "new"
    assert main(["--check", str(config), *arguments_of(run, codec_clips), *settings]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "new").exists()


def test_a_run_folder_of_the_other_entry_point_is_refused(codec_run, codec_clips, capsys, tmp_path):
    from megasora.train import main as train_main
    from megasora.train_codec import main

    config = tmp_path / "config.yaml"
    config.write_text("{}\n")
    assert train_main(["--check", str(config), f"run.dir={codec_run}"]) == 2
    assert "is a run of megasora.train_codec, not of megasora.train; choose another run.dir" in capsys.readouterr().err
    dit = tmp_path / "dit"
    dit.mkdir()
    (dit / "run.json").write_text("{}")
    assert main(["--check", str(config), *arguments_of(dit, codec_clips)]) == 2
    assert "is a run of megasora.train, not of megasora.train_codec; choose another run.dir" in capsys.readouterr().err
