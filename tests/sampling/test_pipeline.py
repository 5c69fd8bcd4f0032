"""A trained run answers text and image prompts: any size and length, the same for the same seed and in any company."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore
from megasora.codec import build_codec
from megasora.data.patches import frames_to_float, frames_to_uint8
from megasora.errors import MegaSoraError
from megasora.sampling.pipeline import SamplingPipeline, Request, override_sample_config

PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def pipeline(trained) -> SamplingPipeline:
    return SamplingPipeline.from_run(trained)


def make(pipeline: SamplingPipeline, *requests: Request, seed: int = 0, **settings) -> list[np.ndarray]:
    return pipeline(list(requests), override_sample_config(pipeline.config, **settings), seed)


def ask(height: int = 16, width: int = 24, frames: int = 5, **changes) -> Request:
    return dataclasses.replace(Request(PROMPT, height, width, frames, 12.0), **changes)


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((100 + x * 60 // width, 100 + y * 60 // height, 120 + 0 * x), -1).astype(np.uint8)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40), (48, 8)])
def test_any_size_and_length_comes_out_as_asked(frames, height, width, pipeline):
    video = make(pipeline, ask(height, width, frames))[0]
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8
    assert video.std() > 1  # not a constant


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 10])
def test_a_prompt_is_shaped_like_the_clips_of_training(frames, pipeline):
    """The grid that the codec makes of such a clip, and its native size, length and rate; images have no rate."""
    record = pipeline.build_prompt(ask(16, 24, frames)).record
    latents = pipeline.codec.encode(torch.zeros(frames, 3, 16, 24))
    assert record.grid == tuple(latents.shape[1:]) and record.patches_LP.shape == (latents[0].numel(), len(latents))
    assert record.native_size == (16, 24, frames, 12.0 if frames > 1 else 0.0)


def test_a_sample_is_a_function_of_its_seed(pipeline):
    first, again, other = (make(pipeline, ask(), seed=seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_prompt_guidance_and_steps_change_a_sample(pipeline):
    usual = make(pipeline, ask())[0]
    assert not np.array_equal(usual, make(pipeline, ask(prompt="a blue square moves up"))[0])
    assert not np.array_equal(usual, make(pipeline, ask(), guidance_scale=1.0)[0])
    assert not np.array_equal(usual, make(pipeline, ask(), num_inference_steps=3)[0])
    assert not np.array_equal(usual, make(pipeline, ask(), solver="euler")[0])
    assert not np.array_equal(usual, make(pipeline, ask(sample_id=1))[0])
    assert not np.array_equal(usual, make(pipeline, ask(fps=24.0))[0])


def test_the_averaged_weights_are_used_unless_the_last_ones_are_asked_for(trained, pipeline):
    raw = SamplingPipeline.from_run(trained, weights="raw")
    checkpoint = CheckpointStore(trained / "checkpoints").newest()
    saved = ShardedCheckpoint(checkpoint)
    for which, kind in ((pipeline, "ema"), (raw, "weights")):
        used = which.model.state_dict()
        assert saved.shapes.keys() == used.keys()
        assert all(torch.equal(saved.full_tensor(kind, name), used[name]) for name in used)
    assert not np.array_equal(make(pipeline, ask())[0], make(raw, ask())[0])


def test_a_sample_does_not_depend_on_its_company(pipeline):
    """Alone, and packed with others before and behind: the same but for the order of sums in the matrix products."""
    mine = ask(sample_id=7)
    others = [
        ask(8, 48, 2, prompt="a green square", sample_id=1),
        ask(24, 8, 9, prompt="a blue circle moves up", sample_id=2),
    ]
    alone = make(pipeline, mine)[0]
    for company in ([mine, *others], [others[0], mine, others[1]], [*others, mine]):
        together = make(pipeline, *company)[company.index(mine)]
        assert np.abs(together.astype(int) - alone).max() <= 1  # grey level


def test_an_image_prompt_is_the_first_frame_as_the_codec_keeps_it(pipeline):
    image = picture(16, 24)
    codec = build_codec(pipeline.config.codec)
    kept = frames_to_uint8(codec.decode(codec.encode(frames_to_float(torch.from_numpy(image)[None])))).numpy()[0]
    assert np.abs(kept.astype(int) - image).mean() < 5  # a smooth picture survives 24 coefficients
    for frames in (1, 5, 9):
        video = make(pipeline, ask(frames=frames, image=image), seed=3)[0]
        assert len(video) == frames
        assert np.array_equal(video[0], kept)
    free = make(pipeline, ask(frames=9), seed=3)[0]
    assert np.abs(free[0].astype(int) - kept).mean() > 8
    assert not np.array_equal(video[1:], free[1:])  # the rest has seen it


def test_images_and_texts_are_answered_side_by_side(pipeline):
    image = picture(16, 24)
    with_image, without = ask(image=image, sample_id=1), ask(sample_id=2)
    together = make(pipeline, with_image, without)
    for video, request in zip(together, (with_image, without), strict=True):
        assert np.abs(video.astype(int) - make(pipeline, request)[0]).max() <= 1


def test_progress_is_told_at_every_call_of_the_model(pipeline):
    from megasora.sampling.generate import num_model_calls

    for solver in ("euler", "heun"):
        sample, calls = override_sample_config(pipeline.config, num_inference_steps=3, solver=solver), []
        pipeline([ask(), ask(sample_id=1)], sample, 0, lambda calls=calls: calls.append(1))
        assert len(calls) == num_model_calls(sample) == {"euler": 3, "heun": 5}[solver]


def test_settings_that_are_not_given_are_those_of_the_run(pipeline):
    assert override_sample_config(pipeline.config, num_inference_steps=None, guidance_scale=None) == pipeline.config.sample
    changed = override_sample_config(pipeline.config, num_inference_steps=7, guidance_scale=0.0)
    assert (changed.num_inference_steps, changed.guidance_scale, changed.size) == (7, 0.0, pipeline.config.sample.size)


def test_a_file_says_that_it_is_generated_and_by_which_run(trained, pipeline, monkeypatch):
    facts = json.loads(pipeline.provenance('a "red" circle', 3))
    assert facts == {
        "ai_generated": True, "by": "MegaSora", "run": "single", "step": 20, "prompt": 'a "red" circle', "seed": 3
    }  # fmt: skip
    monkeypatch.chdir(trained)
    assert SamplingPipeline.from_run(Path(".")).run == "single"


# ---------------------------------------------------------------- refusals

REFUSALS = {
    "empty": (dict(prompt=" \n"), ["--prompt is empty"]),
    "not text": (dict(prompt="caf\udce9"), ["--prompt is not UTF-8"]),
    "too long": (dict(prompt="red " * 65), ["65 words", "text.max_tokens=64"]),
    "height": (dict(height=20), ["--size 20x24", "8x8", "nearest: 16x24"]),
    "width": (dict(width=3), ["--size 16x3", "8x8", "nearest: 16x8"]),
    "frames": (dict(frames=0), ["--frames 0", "at least 1"]),
    "image": (dict(image=picture(16, 16)), ["--image has 16x16", "--size is 16x24"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_request_that_cannot_be_answered_is_refused_before_the_model_is_called(name, pipeline):
    changes, words = REFUSALS[name]
    calls = []
    with pytest.raises(MegaSoraError) as refusal:
        pipeline([ask(), ask(**changes)], pipeline.config.sample, 0, lambda: calls.append(1))
    for word in words:
        assert word in str(refusal.value)
    assert not calls


def test_the_longest_prompt_that_is_allowed_is_answered(pipeline):
    assert make(pipeline, ask(prompt="red " * 64))[0].shape == (5, 16, 24, 3)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MegaSoraError, match=f"{folder} is not a run folder: it has no config.yaml"):
            SamplingPipeline.from_run(folder)


def test_a_run_without_a_checkpoint_says_when_there_will_be_one(trained, tmp_path):
    shutil.copy(trained / "config.yaml", tmp_path)
    with pytest.raises(MegaSoraError, match="holds no checkpoint to sample from; train until .*checkpoint.every=10"):
        SamplingPipeline.from_run(tmp_path)


def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = CheckpointStore(run / "checkpoints").newest() / "fragments" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(MegaSoraError, match=f"{file.name} is damaged"):
        SamplingPipeline.from_run(run)
