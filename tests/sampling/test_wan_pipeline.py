"""A Wan folder becomes a run with one command and a video with a second one: that of WanPipeline of diffusers.

The models are tiny, with random weights: transformer, autoencoder and umT5 in the folders of a pipeline.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megasora.build import patch_dim
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.start import choose_start
from megasora.checkpoint.store import CheckpointStore
from megasora.checkpoint.stored_weights import open_weights
from megasora.cli import main
from megasora.config import IngestConfig, load_run_config
from megasora.data.clip_reader import read_clip
from megasora.data.patches import unpatchify
from megasora.errors import MegaSoraError
from megasora.sampling.generate import draw_noise
from megasora.sampling.latents import WindowLatents
from megasora.sampling.sampler import Sampler
from megasora.sampling.timeline import Given, Timeline
from megasora.sampling.window_sampling import Job, WindowSampling
from megasora.testing.wan import make_tiny_pipeline

diffusers = pytest.importorskip("diffusers", reason="pip install megasora[encoders]")

PROMPT, NEGATIVE = "a red circle moves right", "blue square"
HEIGHT, WIDTH, FRAMES, STEPS, SCALE, SHIFT = 32, 48, 5, 4, 3.0, 3.0
TOKENS = 2 * 2 * 3  # of such a clip: 2 latent frames of 4 x 6 latents, in patches of 2 x 2
SETTINGS = [
    f"sample.size={HEIGHT}x{WIDTH}", f"sample.frames={FRAMES}", f"sample.num_inference_steps={STEPS}",
    f"sample.guidance_scale={SCALE}", f"objective.shift_tokens={TOKENS}",
]  # fmt: skip


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """diffusers' pipeline, saved in a folder; its timesteps are those of the sampler here."""
    pipeline, folder = make_tiny_pipeline(tmp_path_factory.mktemp("wan"), f"{PROMPT} {NEGATIVE}", SHIFT)
    set_timesteps = pipeline.scheduler.set_timesteps  # without sigmas, it would shift the timesteps twice
    pipeline.scheduler.set_timesteps = lambda n, device: set_timesteps(sigmas=np.linspace(1, 1 / n, n), device=device)
    return pipeline, folder


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """diffusers repairs prompts with a library that need not be installed; these prompts need no repair."""
    import diffusers.pipelines.wan.pipeline_wan as source

    monkeypatch.setattr(source, "prompt_clean", lambda text: text)


@pytest.fixture(scope="module")
def run(wan, tmp_path_factory):
    """The run folder that the first command writes."""
    folder = tmp_path_factory.mktemp("runs") / "wan"
    assert main(["checkpoint", "import-wan", str(wan[1]), "--run", str(folder), *SETTINGS]) == 0
    return folder


@pytest.fixture(scope="module")
def sampler(run):
    return Sampler.from_run(run, device="cpu")


class LastLatents:
    """A LatentStore that keeps the latents sampled last."""

    patches_LP: torch.Tensor | None = None

    def get(self, *window: int) -> None:
        return None

    def put(self, timeline: int, window: int, sampling_pass: int, patches_LP: torch.Tensor) -> None:
        self.patches_LP = patches_LP


def noise_of(sampler: Sampler, clip: Timeline, seed: int) -> torch.Tensor:
    """The noise [1, C, T, h, w] that a sample begins with."""
    clip, grid = dataclasses.replace(clip, seed=seed), sampler.coder.grid(clip.frames, clip.height, clip.width)
    job = Job(0, clip, None, 0, sampler.windows(clip, sampler.config.sample)[0])
    window = WindowLatents(torch.zeros(math.prod(grid), patch_dim(sampler.config)), grid, torch.ones(grid[0]), None)
    config = sampler.config
    sampling = WindowSampling(config, config.sample, sampler.denoiser, sampler.coder, sampler.encode)
    noise_LP = draw_noise(sampling.clip_prompt(job, window))
    return unpatchify(noise_LP, grid, tuple(sampler.config.data.patch))[None]


def sample_diffusers(wan, noise: torch.Tensor, frames: int = FRAMES, **options) -> torch.Tensor:
    """Latents [C, T, h, w], or with output_type="np" frames [F, H, W, 3] in [0, 1].

    Here the shift grows with the square root of the tokens, and is `SHIFT` for the clip of `FRAMES`.
    """
    wan[0].scheduler.set_shift(SHIFT * (noise.shape[2] / 2) ** 0.5)
    return wan[0](
        prompt=PROMPT, height=HEIGHT, width=WIDTH, num_frames=frames, num_inference_steps=STEPS, latents=noise,
        **{"guidance_scale": SCALE, "output_type": "latent", **options},
    ).frames[0]  # fmt: skip


def sample_latents(sampler: Sampler, clip: Timeline, seed: int, **changes) -> torch.Tensor:
    """Latents [C, T, h, w] of the sampler here."""
    last = LastLatents()
    sampler.sample([dataclasses.replace(clip, seed=seed)], sampler.override_settings(**changes), latents=last)
    grid = sampler.coder.grid(clip.frames, clip.height, clip.width)
    return unpatchify(last.patches_LP, grid, tuple(sampler.config.data.patch))


def make_clip(frames: int = FRAMES) -> Timeline:
    return Timeline(PROMPT, HEIGHT, WIDTH, frames, 16.0)


def error_between(values, expected) -> float:
    return float(abs(values - expected).max() / abs(expected).max())


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_latents_and_frames_are_those_of_wan_pipeline(scale, negative, wan, sampler):
    clip, seed = make_clip(), 3
    noise = noise_of(sampler, clip, seed)
    options = {"guidance_scale": scale, "negative_prompt": negative}
    latents, expected = sample_latents(sampler, clip, seed, **options), sample_diffusers(wan, noise, **options)
    assert expected.std() > 0.3 and error_between(noise[0], expected) > 0.1
    assert error_between(latents, expected) < 1e-4
    frames = (sampler.codec.decode(latents).clamp(-1, 1) + 1) / 2
    expected = sample_diffusers(wan, noise, output_type="np", **options)
    assert expected.shape == (FRAMES, HEIGHT, WIDTH, 3) and expected.std() > 0.02
    assert error_between(frames.permute(0, 2, 3, 1).numpy(), expected) < 1e-4
    clips = [dataclasses.replace(clip, seed=seed)]
    video = sampler.sample(clips, sampler.override_settings(**options))[0].frames_FHWC
    assert np.abs(video - np.rint(expected * 255)).max() <= 1  # grey level


def test_guidance_prompts_and_the_shift_matter_to_this_comparison(wan, sampler):
    clip = make_clip()
    noise = noise_of(sampler, clip, 0)
    expected = sample_diffusers(wan, noise)
    assert error_between(sample_latents(sampler, clip, 0), expected) < 1e-4
    for changes in ({"unconditional": "null_token"}, {"negative_prompt": NEGATIVE}, {"guidance_scale": 2.0}):
        assert error_between(sample_latents(sampler, clip, 0, **changes), expected) > 1e-3, changes
    sampler.config.objective.shift_tokens *= 2
    assert error_between(sample_latents(sampler, clip, 0), expected) > 1e-3
    sampler.config.objective.shift_tokens //= 2


def test_the_two_commands_write_the_image_and_the_video(wan, run, sampler, tmp_path, capsys):
    image, video = tmp_path / "image.png", tmp_path / "video.mp4"
    command = ["sample", str(run), "--prompt", PROMPT, "sample.watermark=false"]
    for out in (image, video):
        assert main([*command, "--out", str(out), "--seed", "7"]) == 0
    expected = sample_diffusers(wan, noise_of(sampler, make_clip(1), 7), frames=1, output_type="np")
    assert np.abs(np.array(Image.open(image)) - np.rint(expected[0] * 255)).max() <= 1
    assert len(read_clip(video, IngestConfig()).frames_FHWC) == FRAMES
    assert main([*command, "--out", str(image), "--negative-prompt", NEGATIVE]) == 0
    settings = json.loads(image.with_suffix(".json").read_text())
    assert settings["request"]["negative_prompt"] == NEGATIVE
    noise = noise_of(sampler, make_clip(1), 0)
    expected = sample_diffusers(wan, noise, frames=1, output_type="np", negative_prompt=NEGATIVE)
    assert np.abs(np.array(Image.open(image)) - np.rint(expected[0] * 255)).max() <= 1


def test_wan_21_is_refused_given_frames_which_it_was_not_trained_with(sampler):
    weights = dataclasses.asdict(sampler.config.objective.frame_conditioning)
    assert {name for name, weight in weights.items() if weight > 0} == {"none"}
    with pytest.raises(MegaSoraError, match=r"was not trained with \(objective\.frame_conditioning\.first=0"):
        sampler.video(PROMPT, image=np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def test_an_image_prompt_gives_what_the_image_pipeline_of_wan_22_gives(wan, sampler, monkeypatch):
    """The image is a clean latent frame, with timestep 0 for its tokens alone (`expand_timesteps`)."""
    parts = {name: part for name, part in wan[0].components.items() if name != "transformer_2"}
    pipeline = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.prompt_clean", lambda text: text)
    monkeypatch.setattr(sampler.config.objective.frame_conditioning, "first", 1)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    clip = dataclasses.replace(make_clip(), given=(Given(0, image[None]),))
    expected = sample_diffusers((pipeline,), noise_of(sampler, clip, 5), image=Image.fromarray(image))
    latents = sample_latents(sampler, clip, 5)
    assert error_between(latents, expected) < 1e-4
    assert error_between(sample_latents(sampler, make_clip(), 5), expected) > 0.1
    assert error_between(latents[:, 1:], sample_latents(sampler, make_clip(), 5)[:, 1:]) > 1e-3


def test_the_run_folder_has_the_settings_of_the_pipeline_and_the_weights_once(wan, run):
    config = load_run_config(run)
    assert (config.codec.name, config.codec.factors, config.codec.channels) == ("wan", [4, 8, 8], 16)
    assert config.codec.path == config.text.path == str(wan[1].absolute())
    assert (config.objective.shift, config.text.pad, config.sample.solver) == (SHIFT, True, "euler")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "history.json"]
    assert sorted(path.name for path in run.parent.iterdir()) == ["wan"]  # no temporary folder
    checkpoint = ShardedCheckpoint(run / "checkpoints" / "step-00000000")
    assert checkpoint.kinds == {"weights"} and checkpoint.stored_kind("ema") == "weights"
    name = "blocks.1.attention.out.weight"
    expected = dict(wan[0].transformer.named_parameters())["blocks.1.attn1.to_out.0.weight"]
    assert torch.equal(checkpoint.full_tensor("weights", name), expected)


def test_the_default_size_and_shift_are_those_of_the_model(wan, tmp_path):
    from megasora.commands.import_wan import run_config
    from megasora.formats.wan_folder import read_wan

    config = run_config(wan[1], read_wan(wan[1]), [])
    assert (config.sample.size, config.sample.frames, config.sample.fps) == ("480x832", 81, 16)
    assert config.objective.shift_tokens == 21 * 30 * 52
    transformer = wan[1] / "transformer"
    assert run_config(transformer, read_wan(transformer), []).codec.path == config.codec.path


def test_the_other_commands_read_such_a_run_folder(run, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["checkpoint", "export", str(run), "--out", str(out)]) == 0
    exported, checkpoint = load_file(out), ShardedCheckpoint(run / "checkpoints" / "step-00000000")
    assert exported.keys() == checkpoint.shapes.keys()
    assert all(torch.equal(exported[name], checkpoint.full_tensor("weights", name)) for name in exported)
    assert "step-00000000  whole" in capsys.readouterr().out
    assert main(["status", str(run)]) == 2 and "nothing was started here yet" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["resume-or-fresh", "resume", "resume:step-00000000"])
def test_a_training_cannot_resume_imported_weights_but_may_start_from_them(start, run, tmp_path):
    store = CheckpointStore(run / "checkpoints")
    with pytest.raises(MegaSoraError, match="imported weights .* another run.dir, with run.start=init:.*00000000"):
        choose_start(store, start)
    weights = open_weights(run / "checkpoints" / "step-00000000", "PATH")
    bias = torch.full(weights.shapes["patch_in.bias"], torch.nan)
    weights.fill(bias, "patch_in.bias")
    assert bias.isfinite().all()


def copy_pipeline(wan, to: Path, *without: str) -> Path:
    shutil.copytree(wan[1], to)
    for name in without:
        shutil.rmtree(to / name)
    return to


def test_a_pipeline_without_a_part_or_with_a_foreign_one_is_one_line_and_leaves_nothing(wan, run, tmp_path, capsys):
    def error_of(folder: Path, *more: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["checkpoint", "import-wan", str(folder), *more]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    new = ("--run", str(tmp_path / "new"))
    bare = copy_pipeline(wan, tmp_path / "a", "vae")
    assert "codec.name=wan needs codec.path" in error_of(bare, *new)
    other = tmp_path / "vae"
    diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0] * 4, latents_std=[1] * 4
    ).save_pretrained(other)
    message = error_of(bare, *new, f"codec.path={other}")
    assert "codec.channels=16, but the codec of" in message and "has 4" in message
    encoder = copy_pipeline(wan, tmp_path / "b") / "text_encoder"
    values = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**values, "d_model": 24}))
    assert "has 24 features, the transformer reads 20" in error_of(encoder.parent, *new)
    assert "is not empty; give a new folder" in error_of(wan[1], "--run", str(other))
    back = error_of(run, "--out", str(tmp_path / "x.safetensors"))
    assert "is a run folder of MegaSora, and no model of Wan; it is read with: megasora checkpoint inspect" in back
    assert "settings are of --run" in error_of(wan[1], "--out", str(tmp_path / "x.safetensors"), "sample.frames=1")
