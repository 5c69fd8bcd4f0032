"""The experiments of benchmarks.prompts find the known answers of a denoiser that is exact for the clips they use."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from optimal_denoiser import OptimalDenoiser, longer

from benchmarks import prompts, prompts_of_text, prompts_of_video
from benchmarks.prompt_bench import Bench, Clip
from megasora.codec import build_codec
from megasora.config import CodecConfig, Config, SampleConfig, TextConfig
from megasora.sampling.sampler import Sampler
from megasora.testing.clips import HELD_OUT, render
from megasora.text import build_text_encoder

COUNT = 3


@pytest.fixture(scope="module")
def bench() -> Bench:
    """The data are the clips of the experiments, at any length and from a frame before, in both directions."""
    codec, encoder = build_codec(CodecConfig(channels=3 * 4 * 8 * 8)), build_text_encoder(TextConfig())
    config = Config(sample=SampleConfig(solver="euler", num_inference_steps=4, guidance_scale=1.0, size="24x24"))
    config.codec.channels = codec.channels
    denoiser = OptimalDenoiser(codec, lambda caption: encoder.encode([caption])[0], clips=lambda *size: known(*size))
    bench = Bench(Sampler(config, denoiser, "exact", 7, codec=codec, encoder=encoder), COUNT, {"context_frames": 9})
    specs = {c.spec for frames in (5, 9, 13, 17) for c in bench.clips(frames)}

    def known(height, width, frames):
        pairs = []
        for spec in specs:
            for direction in {spec.direction, prompts_of_text.OPPOSITE[spec.direction]}:
                for before in (0, 1):
                    same = longer(dataclasses.replace(spec, direction=direction), before, frames)
                    if (spec.height, spec.width) == (height, width):
                        pairs.append((Clip(same, render(same)).caption(), same))
        return pairs

    return bench


def values(result):
    return {figure.name.partition(": ")[2]: figure for figure in result.figures}


def test_clips_are_those_of_another_seed_than_the_training_and_some_are_held_out(bench):
    clips = dataclasses.replace(bench, count=8).clips(9)
    combinations = [(c.spec.color, c.spec.shape, c.spec.direction) in HELD_OUT for c in clips]
    assert combinations == [False, False, False, True] * 2
    assert all(c.frames.shape == (9, c.spec.height, c.spec.width, 3) for c in clips)
    assert clips[0].spec.color in clips[0].caption() and "yellow" in clips[0].caption(color="yellow")


@pytest.mark.parametrize("kind", ["extend", "prepend"])
def test_an_exact_continuation_has_no_error(bench, kind):
    found = values(getattr(prompts_of_video, kind)(bench))
    assert found["error of the path"].value < 0.5  # px, of the detector
    assert found["error over that of freezing the nearest frame"].value < 0.1
    assert found["colour kept"].value == found["direction kept"].value == 1
    assert found["largest jump over the median step"].value < 1.5
    assert all(figure.is_met in (True, None) and figure.count == COUNT for figure in found.values())


def test_an_exact_image_prompt_follows_its_caption_and_the_opposite_one(bench):
    result = prompts_of_text.image(bench)
    assert [figure.is_met in (True, None) for figure in result.figures] == [True] * len(result.figures)
    assert len(result.rows) == 2 * COUNT


def test_a_frozen_continuation_has_the_error_of_freezing(bench, monkeypatch):
    """A sampler that repeats the last given frame has the ratio 1, and keeps no direction."""

    def frozen(self, timelines, **settings):
        given = [t.given[0].frames_FHWC for t in timelines]
        return [np.concatenate([g, g[-1:].repeat(t.frames - len(g), 0)]) for t, g in zip(timelines, given, strict=True)]

    monkeypatch.setattr(Bench, "sample", frozen)
    found = values(prompts_of_video.extend(bench))
    assert found["error over that of freezing the nearest frame"].value == pytest.approx(1, abs=0.1)
    assert found["error over that of freezing the nearest frame"].is_met is False
    assert found["direction kept"].value == 0 and found["colour kept"].value == 1


def test_the_command_writes_figures_and_sheets(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts.Sampler, "from_run", lambda run: bench.sampler)
    out, sheets = tmp_path / "figures.json", tmp_path / "sheets"
    options = ["--only", "extend", "--count", "2", "--settings", "context_frames=9"]
    prompts.main(["run", *options, "--out", str(out), "--sheets", str(sheets)])
    record = json.loads(out.read_text())
    assert record["step"] == 7 and record["count"] == 2 and record["seconds"]["extend"] >= 0
    assert [row["met"] for row in record["figures"]] == [None, True, True, True, None]
    assert all(math.isfinite(row["value"]) and row["count"] == 2 for row in record["figures"])
    assert (sheets / "extend.png").stat().st_size > 1000
    assert "| extend: colour kept | 1 ± 0 | 2 | >= 0.9 | yes |" in capsys.readouterr().out
