"""Sampling text and image prompts from a trained run: sizes, lengths, seeds, independence of other clips, errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_runs import flip

from megasora.build import patch_dim
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore
from megasora.codec import build_codec
from megasora.data.patches import frames_to_float, frames_to_uint8
from megasora.errors import MegaSoraError
from megasora.sampling.frame_store import FrameStore
from megasora.sampling.latents import first_pass
from megasora.sampling.sampler import Sampler
from megasora.sampling.timeline import Timeline, keyframes
from megasora.sampling.window_sampling import WindowSampling

PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def sampler(trained) -> Sampler:
    return Sampler.from_run(trained)


def make(sampler: Sampler, *clips: Timeline, seed: int = 0, **settings) -> list[np.ndarray]:
    clips = [dataclasses.replace(clip, seed=seed) for clip in clips]
    return [store.frames_FHWC for store in sampler.sample(clips, sampler.override_settings(**settings))]


def make_clip(height: int = 16, width: int = 24, frames: int = 5, image=None, **changes) -> Timeline:
    clip = dataclasses.replace(Timeline(PROMPT, height, width, frames, 12.0), **changes)
    return clip if image is None else keyframes(clip, {0: image})


def make_image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((100 + x * 60 // width, 100 + y * 60 // height, 120 + 0 * x), -1).astype(np.uint8)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40), (48, 8)])
def test_videos_have_the_requested_size_and_length(frames, height, width, sampler):
    video = make(sampler, make_clip(height, width, frames))[0]
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8
    assert video.std() > 1  # not a constant


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 10])
def test_a_prompt_has_the_grid_and_native_size_of_a_training_clip(frames, sampler):
    """The grid equals that of the codec for such a clip; images have fps 0."""
    sample, clip = sampler.config.sample, make_clip(16, 24, frames)
    sampling = WindowSampling(sampler.config, sample, sampler.denoiser, sampler.coder, sampler.encode)
    (jobs,) = sampler.plan([clip], [FrameStore(clip)], sample)
    window = first_pass(jobs[0].store.window(jobs[0].window), sampler.coder, patch_dim(sampler.config))
    record = sampling.clip_prompt(jobs[0], window).record
    latents = sampler.codec.encode(torch.zeros(frames, 3, 16, 24))
    assert record.grid == tuple(latents.shape[1:]) and record.patches_LP.shape == (latents[0].numel(), len(latents))
    assert record.native_size == (16, 24, frames, 12.0 if frames > 1 else 0.0)


def test_a_sample_is_a_function_of_the_seed(sampler):
    first, again, other = (make(sampler, make_clip(), seed=seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_prompt_guidance_and_steps_change_a_sample(sampler):
    default = make(sampler, make_clip())[0]
    assert not np.array_equal(default, make(sampler, make_clip(prompt="a blue square moves up"))[0])
    assert not np.array_equal(default, make(sampler, make_clip(), guidance_scale=1.0)[0])
    assert not np.array_equal(default, make(sampler, make_clip(), num_inference_steps=3)[0])
    assert not np.array_equal(default, make(sampler, make_clip(), solver="euler")[0])
    assert not np.array_equal(default, make(sampler, make_clip(sample_id=1))[0])
    assert not np.array_equal(default, make(sampler, make_clip(fps=24.0))[0])


def test_the_ema_weights_are_used_by_default(trained, sampler):
    raw = Sampler.from_run(trained, weights="raw")
    checkpoint = ShardedCheckpoint(CheckpointStore(trained / "checkpoints").newest())
    for loaded, kind in ((sampler, "ema"), (raw, "weights")):
        state = loaded.denoiser.model.state_dict()
        assert checkpoint.shapes.keys() == state.keys()
        assert all(torch.equal(checkpoint.full_tensor(kind, name), state[name]) for name in state)
    assert not np.array_equal(make(sampler, make_clip())[0], make(raw, make_clip())[0])


def test_a_sample_does_not_depend_on_other_clips(sampler):
    """Alone and packed with others: equal up to the order of sums in the matrix products."""
    clip = make_clip(sample_id=7)
    others = [
        make_clip(8, 48, 2, prompt="a green square", sample_id=1),
        make_clip(24, 8, 9, prompt="a blue circle moves up", sample_id=2),
    ]
    alone = make(sampler, clip)[0]
    for clips in ([clip, *others], [others[0], clip, others[1]], [*others, clip]):
        together = make(sampler, *clips)[clips.index(clip)]
        assert np.abs(together.astype(int) - alone).max() <= 1  # grey level


def test_an_image_prompt_is_the_first_frame_up_to_the_error_of_the_codec(sampler):
    image = make_image(16, 24)
    codec = build_codec(sampler.config.codec)
    decoded = frames_to_uint8(codec.decode(codec.encode(frames_to_float(torch.from_numpy(image)[None])))).numpy()[0]
    assert np.abs(decoded.astype(int) - image).mean() < 5  # 24 coefficients suffice for a smooth image
    for frames in (1, 5, 9):
        video = make(sampler, make_clip(frames=frames, image=image), seed=3)[0]
        assert len(video) == frames
        assert np.array_equal(video[0], decoded)
    without_image = make(sampler, make_clip(frames=9), seed=3)[0]
    assert np.abs(without_image[0].astype(int) - decoded).mean() > 8
    assert not np.array_equal(video[1:], without_image[1:])  # the other frames depend on it


def test_clips_with_and_without_an_image_can_be_sampled_together(sampler):
    image = make_image(16, 24)
    with_image, without = make_clip(image=image, sample_id=1), make_clip(sample_id=2)
    together = make(sampler, with_image, without)
    for video, clip in zip(together, (with_image, without), strict=True):
        assert np.abs(video.astype(int) - make(sampler, clip)[0]).max() <= 1


def test_progress_is_the_fraction_that_is_done(sampler):
    image, fractions = make_image(16, 24), []
    clips = [make_clip(), dataclasses.replace(keyframes(make_clip(), {4: image}), sample_id=1)]
    sampler.sample(clips, sampler.override_settings(num_inference_steps=4, solver="euler"), fractions.append)
    assert len(fractions) == 4 + 2  # the clip with a last image has a second pass, from level 0.5
    assert fractions == sorted(fractions) and 0 < fractions[0] < 0.25 and fractions[-1] == pytest.approx(1)


def test_settings_of_none_stay_those_of_the_run(sampler):
    assert sampler.override_settings(num_inference_steps=None, guidance_scale=None) == sampler.config.sample
    changed = sampler.override_settings(num_inference_steps=7, guidance_scale=0.0)
    assert (changed.num_inference_steps, changed.guidance_scale, changed.size) == (7, 0.0, sampler.config.sample.size)


def test_provenance_names_the_run_and_says_that_the_file_is_generated(trained, sampler, monkeypatch):
    provenance = json.loads(sampler.provenance('a "red" circle', 3))
    assert provenance == {
        "ai_generated": True, "by": "MegaSora", "run": "single", "step": 20, "prompt": 'a "red" circle', "seed": 3
    }  # fmt: skip
    monkeypatch.chdir(trained)
    assert Sampler.from_run(Path(".")).run == "single"


# ---------------------------------------------------------------- errors

INVALID_CLIPS = {
    "empty": (dict(prompt=" \n"), ["--prompt is empty"]),
    "not text": (dict(prompt="caf\udce9"), ["--prompt is not UTF-8"]),
    "negative prompt": (dict(negative_prompt="caf\udce9"), ["--negative-prompt is not UTF-8"]),
    "too long": (dict(prompt="red " * 65), ["65 words", "text.max_tokens=64"]),
    "height": (dict(height=0), ["--size 0x24", "at least 1x1"]),
    "frames": (dict(frames=0), ["--frames 0", "at least 1"]),
}


@pytest.mark.parametrize("name", INVALID_CLIPS)
def test_an_invalid_clip_raises_before_the_model_is_called(name, sampler):
    changes, words = INVALID_CLIPS[name]
    calls = []
    with pytest.raises(MegaSoraError) as error:
        sampler.sample([make_clip(), make_clip(**changes)], sampler.config.sample, calls.append)
    for word in words:
        assert word in str(error.value)
    assert not calls


WRONG_CALLS = {  # what the Python API gets -> words of the error
    "float video": (lambda s, v: s.extend(v / 255.0, PROMPT, 4), ["the video is float64 [5, 16, 24, 3]", "uint8"]),
    "no array": (lambda s, v: s.extend("in.mp4", PROMPT, 4), ["the video is str", "numpy array"]),
    "grey image": (lambda s, v: s.video(PROMPT, image=v[0, ..., 0]), ["the image of frame 0 is uint8 [16, 24]"]),
    "channels first": (lambda s, v: s.loop(v.transpose(0, 3, 1, 2), PROMPT, 4), ["[5, 3, 16, 24]", "[F, H, W, 3]"]),
    "no frames": (lambda s, v: s.prepend(v[:0], PROMPT, 4), ["[0, 16, 24, 3]"]),
    "second video": (lambda s, v: s.connect(v, v[0], PROMPT, 4), ["the video after is uint8 [16, 24, 3]"]),
    "frames": (lambda s, v: s.extend(v, PROMPT, 0), ["frames=0 must be at least 1"]),
    "negative frames": (lambda s, v: s.video(PROMPT, frames=-5), ["frames=-5"]),
    "fps": (lambda s, v: s.video(PROMPT, fps=0.0), ["--fps 0 must be above 0"]),
    "seed": (lambda s, v: s.video(PROMPT, seed=-1), ["--seed -1"]),
    "nan": (lambda s, v: s.video(PROMPT, guidance_scale=float("nan")), ["sample.guidance_scale=nan"]),
    "solver": (lambda s, v: s.video(PROMPT, solver="ddim"), ["sample.solver=ddim", "euler"]),
    "unknown": (lambda s, v: s.video(PROMPT, foo=1), ["foo is no setting", "guidance_scale"]),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_in_python_are_errors_for_people(name, sampler):
    call, words = WRONG_CALLS[name]
    with pytest.raises(MegaSoraError) as error:
        call(sampler, np.zeros((5, 16, 24, 3), np.uint8))
    assert all(word in str(error.value) for word in words), error.value


def test_a_mask_holds_for_all_frames_or_has_as_many(sampler):
    video, mask = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8), np.zeros((16, 24), np.uint8)
    mask[:8] = 255
    edited = [sampler.edit(video, PROMPT, 0.9, m) for m in (mask, mask[None] > 0, np.stack([mask] * 5))]
    assert all(np.array_equal(edited[0], other) for other in edited[1:])
    assert np.array_equal(edited[0][:, 8:], video[:, 8:]) and not np.array_equal(edited[0][:, :8], video[:, :8])


def test_a_given_image_of_another_size_raises():
    with pytest.raises(MegaSoraError, match="has 16x16 pixels, the clip 16x24"):
        make_clip(image=make_image(16, 16))


def test_the_longest_legal_prompt_can_be_sampled(sampler):
    assert make(sampler, make_clip(prompt="red " * 64))[0].shape == (5, 16, 24, 3)


def test_a_folder_that_is_no_run_raises(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MegaSoraError, match=f"{folder} is not a run folder: it has no config.yaml"):
            Sampler.from_run(folder)


def test_a_codec_run_raises(trained, tmp_path):
    shutil.copy(trained / "config.yaml", tmp_path)
    (tmp_path / "run.json").write_text('{"task": "codec"}', encoding="utf-8")
    with pytest.raises(MegaSoraError, match="is a run of megasora.train_codec, which trains a codec, not a DiT"):
        Sampler.from_run(tmp_path)


def test_a_run_without_a_checkpoint_raises_with_the_step_of_the_first(trained, tmp_path):
    shutil.copy(trained / "config.yaml", tmp_path)
    with pytest.raises(MegaSoraError, match="holds no checkpoint to sample from; train until .*checkpoint.every=10"):
        Sampler.from_run(tmp_path)


def test_the_checkpoint_before_a_damaged_one_is_sampled_with_a_line(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for step, expected in ((20, 10), (10, None)):
        flip(run / "checkpoints" / f"step-{step:08d}" / "fragments" / "rank-00000.safetensors", -5)
        if expected is None:
            with pytest.raises(MegaSoraError, match="no checkpoint of .* is whole: .*00.safetensors is damaged"):
                Sampler.from_run(run)
        else:
            assert Sampler.from_run(run).step == expected
            assert "is damaged: its digests differ from the manifest; reading step-0" in capsys.readouterr().err
