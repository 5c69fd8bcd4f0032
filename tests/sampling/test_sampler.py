"""Sampling text and image prompts from a trained run: sizes, lengths, seeds, independence of other requests, errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_runs import flip

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore
from megasora.codec import build_codec
from megasora.data.patches import frames_to_float, frames_to_uint8
from megasora.errors import MegaSoraError
from megasora.sampling.pipeline import Request, SamplingPipeline, override_sample_config

PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def pipeline(trained) -> SamplingPipeline:
    return SamplingPipeline.from_run(trained)


def make(pipeline: SamplingPipeline, *requests: Request, seed: int = 0, **settings) -> list[np.ndarray]:
    return pipeline(list(requests), override_sample_config(pipeline.config, **settings), seed)


def make_request(height: int = 16, width: int = 24, frames: int = 5, **changes) -> Request:
    return dataclasses.replace(Request(PROMPT, height, width, frames, 12.0), **changes)


def make_image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((100 + x * 60 // width, 100 + y * 60 // height, 120 + 0 * x), -1).astype(np.uint8)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40), (48, 8)])
def test_videos_have_the_requested_size_and_length(frames, height, width, pipeline):
    video = make(pipeline, make_request(height, width, frames))[0]
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8
    assert video.std() > 1  # not a constant


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 10])
def test_a_prompt_has_the_grid_and_native_size_of_a_training_clip(frames, pipeline):
    """The grid equals that of the codec for such a clip; images have fps 0."""
    record = pipeline.build_prompt(make_request(16, 24, frames)).record
    latents = pipeline.codec.encode(torch.zeros(frames, 3, 16, 24))
    assert record.grid == tuple(latents.shape[1:]) and record.patches_LP.shape == (latents[0].numel(), len(latents))
    assert record.native_size == (16, 24, frames, 12.0 if frames > 1 else 0.0)


def test_a_sample_is_a_function_of_the_seed(pipeline):
    first, again, other = (make(pipeline, make_request(), seed=seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_prompt_guidance_and_steps_change_a_sample(pipeline):
    default = make(pipeline, make_request())[0]
    assert not np.array_equal(default, make(pipeline, make_request(prompt="a blue square moves up"))[0])
    assert not np.array_equal(default, make(pipeline, make_request(), guidance_scale=1.0)[0])
    assert not np.array_equal(default, make(pipeline, make_request(), num_inference_steps=3)[0])
    assert not np.array_equal(default, make(pipeline, make_request(), solver="euler")[0])
    assert not np.array_equal(default, make(pipeline, make_request(sample_id=1))[0])
    assert not np.array_equal(default, make(pipeline, make_request(fps=24.0))[0])


def test_the_ema_weights_are_used_by_default(trained, pipeline):
    raw = SamplingPipeline.from_run(trained, weights="raw")
    checkpoint = ShardedCheckpoint(CheckpointStore(trained / "checkpoints").newest())
    for loaded, kind in ((pipeline, "ema"), (raw, "weights")):
        state = loaded.model.state_dict()
        assert checkpoint.shapes.keys() == state.keys()
        assert all(torch.equal(checkpoint.full_tensor(kind, name), state[name]) for name in state)
    assert not np.array_equal(make(pipeline, make_request())[0], make(raw, make_request())[0])


def test_a_sample_does_not_depend_on_other_requests(pipeline):
    """Alone and packed with others: equal up to the order of sums in the matrix products."""
    request = make_request(sample_id=7)
    others = [
        make_request(8, 48, 2, prompt="a green square", sample_id=1),
        make_request(24, 8, 9, prompt="a blue circle moves up", sample_id=2),
    ]
    alone = make(pipeline, request)[0]
    for requests in ([request, *others], [others[0], request, others[1]], [*others, request]):
        together = make(pipeline, *requests)[requests.index(request)]
        assert np.abs(together.astype(int) - alone).max() <= 1  # grey level


def test_an_image_prompt_is_the_first_frame_up_to_the_error_of_the_codec(pipeline):
    image = make_image(16, 24)
    codec = build_codec(pipeline.config.codec)
    decoded = frames_to_uint8(codec.decode(codec.encode(frames_to_float(torch.from_numpy(image)[None])))).numpy()[0]
    assert np.abs(decoded.astype(int) - image).mean() < 5  # 24 coefficients suffice for a smooth image
    for frames in (1, 5, 9):
        video = make(pipeline, make_request(frames=frames, image=image), seed=3)[0]
        assert len(video) == frames
        assert np.array_equal(video[0], decoded)
    without_image = make(pipeline, make_request(frames=9), seed=3)[0]
    assert np.abs(without_image[0].astype(int) - decoded).mean() > 8
    assert not np.array_equal(video[1:], without_image[1:])  # the other frames depend on it


def test_requests_with_and_without_an_image_can_be_sampled_together(pipeline):
    image = make_image(16, 24)
    with_image, without = make_request(image=image, sample_id=1), make_request(sample_id=2)
    together = make(pipeline, with_image, without)
    for video, request in zip(together, (with_image, without), strict=True):
        assert np.abs(video.astype(int) - make(pipeline, request)[0]).max() <= 1


def test_progress_is_called_after_each_model_call(pipeline):
    from megasora.sampling.generate import num_model_calls

    for solver in ("euler", "heun"):
        sample, calls = override_sample_config(pipeline.config, num_inference_steps=3, solver=solver), []
        pipeline([make_request(), make_request(sample_id=1)], sample, 0, lambda calls=calls: calls.append(1))
        assert len(calls) == num_model_calls(sample) == {"euler": 3, "heun": 5}[solver]


def test_settings_of_none_stay_those_of_the_run(pipeline):
    assert (
        override_sample_config(pipeline.config, num_inference_steps=None, guidance_scale=None) == pipeline.config.sample
    )
    changed = override_sample_config(pipeline.config, num_inference_steps=7, guidance_scale=0.0)
    assert (changed.num_inference_steps, changed.guidance_scale, changed.size) == (7, 0.0, pipeline.config.sample.size)


def test_provenance_names_the_run_and_says_that_the_file_is_generated(trained, pipeline, monkeypatch):
    provenance = json.loads(pipeline.provenance('a "red" circle', 3))
    assert provenance == {
        "ai_generated": True, "by": "MegaSora", "run": "single", "step": 20, "prompt": 'a "red" circle', "seed": 3
    }  # fmt: skip
    monkeypatch.chdir(trained)
    assert SamplingPipeline.from_run(Path(".")).run == "single"


# ---------------------------------------------------------------- errors

INVALID_REQUESTS = {
    "empty": (dict(prompt=" \n"), ["--prompt is empty"]),
    "not text": (dict(prompt="caf\udce9"), ["--prompt is not UTF-8"]),
    "too long": (dict(prompt="red " * 65), ["65 words", "text.max_tokens=64"]),
    "height": (dict(height=20), ["--size 20x24", "8x8", "nearest: 16x24"]),
    "width": (dict(width=3), ["--size 16x3", "8x8", "nearest: 16x8"]),
    "frames": (dict(frames=0), ["--frames 0", "at least 1"]),
    "image": (dict(image=make_image(16, 16)), ["--image has 16x16", "--size is 16x24"]),
}


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_an_invalid_request_raises_before_the_model_is_called(name, pipeline):
    changes, words = INVALID_REQUESTS[name]
    calls = []
    with pytest.raises(MegaSoraError) as error:
        pipeline([make_request(), make_request(**changes)], pipeline.config.sample, 0, lambda: calls.append(1))
    for word in words:
        assert word in str(error.value)
    assert not calls


def test_the_longest_legal_prompt_can_be_sampled(pipeline):
    assert make(pipeline, make_request(prompt="red " * 64))[0].shape == (5, 16, 24, 3)


def test_a_folder_that_is_no_run_raises(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MegaSoraError, match=f"{folder} is not a run folder: it has no config.yaml"):
            SamplingPipeline.from_run(folder)


def test_a_codec_run_raises(trained, tmp_path):
    shutil.copy(trained / "config.yaml", tmp_path)
    (tmp_path / "run.json").write_text('{"task": "codec"}', encoding="utf-8")
    with pytest.raises(MegaSoraError, match="is a run of megasora.train_codec, which trains a codec, not a DiT"):
        SamplingPipeline.from_run(tmp_path)


def test_a_run_without_a_checkpoint_raises_with_the_step_of_the_first(trained, tmp_path):
    shutil.copy(trained / "config.yaml", tmp_path)
    with pytest.raises(MegaSoraError, match="holds no checkpoint to sample from; train until .*checkpoint.every=10"):
        SamplingPipeline.from_run(tmp_path)


def test_the_checkpoint_before_a_damaged_one_is_sampled_with_a_line(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for step, expected in ((20, 10), (10, None)):
        flip(run / "checkpoints" / f"step-{step:08d}" / "fragments" / "rank-00000.safetensors", -5)
        if expected is None:
            with pytest.raises(MegaSoraError, match="no checkpoint of .* is whole: .*00.safetensors is damaged"):
                SamplingPipeline.from_run(run)
        else:
            assert SamplingPipeline.from_run(run).step == expected
            assert "is damaged: its SHA-256 differs from manifest.json; reading step-0" in capsys.readouterr().err
