"""Samples during training: of the EMA weights, in every layout, while training goes on as without them."""

import gc
import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, check_same_checkpoints, read_jsonl, train, train_arguments
from PIL import Image

from megasora.checks import check_codec_run, check_samples
from megasora.config import load
from megasora.errors import MegaSoraError, StopRequested
from megasora.parallel.mesh import build_mesh
from megasora.parallel.world import World
from megasora.sampling import Sampler
from megasora.sampling.provenance import read_sidecar
from megasora.tasks.dit import DiTTask
from megasora.tasks.dit_samples import TrainingSamples
from megasora.testing.spawn import run_ranks
from megasora.trainer import Trainer

PROMPTS = ["a red circle moves right", "a blue square moves left", "a green triangle moves up"]
SAMPLE = [
    "sample.every=2", f"sample.prompts={json.dumps(PROMPTS)}", "sample.frames=1", "sample.size=24x32",
    "sample.solver=euler", "sample.num_inference_steps=2", "sample.watermark=false",
]  # fmt: skip
TRAINING = ["run.steps=4", "checkpoint.every=4", "validation.clips=2", "optim.lr=0.05", "optim.warmup_steps=1"]
RUNS = {  # name: settings, on two processes
    "zero 1 in bfloat16": ["run.dtype=bfloat16"],
    "zero 2": ["parallel.zero_stage=2"],
    "zero 3 in bfloat16": ["parallel.zero_stage=3", "run.dtype=bfloat16"],
    "context": ["parallel.context=2"],
    "pipeline": ["parallel.pipeline=2"],  # the last: DeepSpeed keeps one mpu per process
}
IN_FLOAT32 = [name for name in RUNS if "bfloat16" not in name]
STOPPED = "context"  # this run is stopped while the samples of step 2 are made, and resumed
LEVELS = 1  # of 255, between images of two layouts


def run_arguments(folder, shards, name, *settings):
    return [*train_arguments(folder / name, shards, TINY), *TRAINING, *RUNS[name], *settings]


def train_sampling(arguments, stop_after=0):
    """Trains; returns (activities of the watchdog, elements of all tensors after one and after three more samplings).

    `stop_after`: a stop is requested during this step, on one rank; then the activities are returned.
    """
    config, activities = load(arguments[0], arguments[1:]), []
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"))
    task = DiTTask(config, world, build_mesh(config.parallel, "cpu"))
    trainer = Trainer(config, world, task, lambda: rank == 1 and trainer.step + 1 == stop_after, activities.append)
    try:
        trainer.run()
    except StopRequested:
        return activities
    heartbeats, elements = list(activities), []
    for times in (1, 2):
        for _ in range(times):
            trainer.sample()
        gc.collect()
        elements.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))
    return heartbeats, elements


def train_all(plain, sampling, config_folder):
    """{name: result of `train_sampling`}; trains each run also without samples, and one in two launches.

    `config_folder`: of the key that signs sidecars.
    """
    os.environ["XDG_CONFIG_HOME"] = config_folder
    results = {}
    for name in RUNS:
        error = train(plain[name])
        assert error is None, error
        if name == STOPPED:
            results["stopped"] = train_sampling(sampling[name], stop_after=3)
        results[name] = train_sampling(sampling[name])
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """(folder of runs without samples, folder of runs with them, results of the ranks), of one start of processes."""
    plain, sampling = (tmp_path_factory.mktemp(name) for name in ("plain", "sampling"))
    results = run_ranks(
        train_all, 2, {name: run_arguments(plain, shards, name) for name in RUNS},
        {name: run_arguments(sampling, shards, name, *SAMPLE) for name in RUNS},
        str(tmp_path_factory.mktemp("config")), timeout=550,
    )  # fmt: skip
    return plain, sampling, results


def read_samples(folder):
    """uint8 [prompts, H, W, 3] of a folder of samples."""
    record = json.loads((folder / "samples.json").read_text())
    assert [entry["prompt"] for entry in record["prompts"]] == PROMPTS
    return np.stack([np.array(Image.open(folder / entry["file"])) for entry in record["prompts"]])


def sample_from_checkpoint(run, weights):
    """The same clips, in this process and from the last checkpoint."""
    sampler = Sampler.from_run(run, weights, "cpu")
    timelines = [
        sampler.timeline(text, frames=1, seed=sampler.config.run.seed, sample_id=i) for i, text in enumerate(PROMPTS)
    ]
    stores = sampler.sample(timelines, sampler.config.sample)
    return np.concatenate([store.frames_FHWC for store in stores])


slow = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in RUNS])
def test_training_is_bit_for_bit_that_without_samples(runs, name):
    plain, sampling, _ = runs
    assert not (plain / name / "train_samples").exists()
    check_same_checkpoints(plain / name, sampling / name, 4)
    for a, b in zip(read_jsonl(plain / name), read_jsonl(sampling / name), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
        assert a.get("context_mib_sent") == b.get("context_mib_sent")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in IN_FLOAT32])
def test_samples_are_those_of_the_ema_weights_of_the_checkpoint(runs, name):
    run = runs[1] / name
    samples, expected = read_samples(run / "train_samples" / "step-00000004"), sample_from_checkpoint(run, "ema")
    assert np.abs(samples.astype(int) - expected).max() <= LEVELS
    raw = sample_from_checkpoint(run, "raw")
    assert np.abs(samples.astype(int) - raw).max() > 10 * LEVELS  # the comparison is not empty
    if name != STOPPED:
        early = read_samples(run / "train_samples" / "step-00000002")
        assert np.abs(samples.astype(int) - early).max() > 10 * LEVELS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_samples_of_all_layouts_agree_and_are_complete(runs):
    folders = [runs[1] / name / "train_samples" for name in RUNS if name != STOPPED]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
        names = {path.name for path in (folder / "step-00000004").iterdir()}
        assert names == {
            "sheet.png",
            "samples.json",
            *(f"{i:03d}{end}" for i in range(3) for end in (".png", ".sheet.png", ".json")),
        }
    expected = read_samples(runs[1] / "zero 2" / "train_samples" / "step-00000002").astype(int)
    for name in (name for name in IN_FLOAT32 if name != STOPPED):
        samples = read_samples(runs[1] / name / "train_samples" / "step-00000002")
        assert np.abs(samples - expected).max() <= LEVELS, name
    comment = json.loads(Image.open(folders[0] / "step-00000004" / "001.png").text["Comment"])
    assert comment["ai_generated"] and comment["step"] == 4 and comment["prompt"] == PROMPTS[1]
    sidecar = read_sidecar(folders[0] / "step-00000004" / "001.png")
    assert not sidecar.problem and sidecar.record["prompt"] == PROMPTS[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sampling_sends_a_heartbeat_before_each_model_call_and_keeps_no_memory(runs):
    for name in RUNS:
        for activities, elements in (rank[name] for rank in runs[2]):
            at = [i for i, text in enumerate(activities) if text == "the samples of step 4"]
            assert len(at) >= 3, name  # two solver steps, and the start
            saved = next(i for i, text in enumerate(activities) if text == "the save after step 4")
            assert saved < min(at), name
            assert elements[1] - elements[0] < 64, name  # DeepSpeed's stage 3 may keep a few numbers for a while


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stop_ends_sampling_after_one_model_call_and_leaves_nothing(runs):
    for activities in (rank["stopped"] for rank in runs[2]):
        after = activities[activities.index("the samples of step 2") :]
        assert after[:3] == ["the samples of step 2", "the loader, for step 3", "step 3"]
        assert after[-1] == "the save after step 3"
    folder = runs[1] / STOPPED / "train_samples"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("prompts", "data_ranks", "tokens", "expected"),
    [
        (3, 1, 100, [[[0, 1, 2]]]),
        (3, 2, 100, [[[0, 2]], [[1, None]]]),
        (5, 2, 25, [[[0, 2], [4]], [[1, 3], [None]]]),
        (1, 3, 12, [[[0]], [[None]], [[None]]]),
    ],
)
def test_data_ranks_have_equal_packs_and_every_prompt_once(prompts, data_ranks, tokens, expected):
    class Axis:
        size = data_ranks

    for rank in range(data_ranks):
        samples = object.__new__(TrainingSamples)
        samples.sample = load(None, [f"sample.prompts={json.dumps(['x'] * prompts)}"]).sample
        samples.config, samples.grid = load(None, [f"data.tokens_per_pack={tokens}"]), (2, 2, 3)
        samples.mesh = type("Mesh", (), {"data": Axis()})()
        samples.mesh.data.rank = rank
        assert samples.packs() == expected[rank]


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sample.every=-1"], "sample.every=-1 must be at least 0"),
        (["sample.prompts=[]"], "sample.every=2 without prompts"),
        (["sample.prompts=['x', ' ']"], r"sample.prompts\[1\] is empty"),
        (
            ["sample.frames=17", "sample.size=64x64"],
            "320 tokens, but data.tokens_per_pack=256; use fewer sample.frames",
        ),
        (["sample.frames=9", "sample.size=15x16"], "sample.size=15x16: an H.264 video has an even height and width"),
        (["sample.prompts=['a b c']", "text.max_tokens=2"], "sample.prompts: caption of 3 words"),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused_with_a_remedy(settings, message):
    with pytest.raises(MegaSoraError, match=message):
        check_samples(load(None, [*TINY, *SAMPLE, *settings]))


def test_a_codec_run_refuses_prompts(tmp_path):
    config = load(None, [f"run.dir={tmp_path / 'run'}", "codec.name=vae", "codec.channels=4", *SAMPLE])
    with pytest.raises(MegaSoraError, match=r"sample.every=2 samples a DiT .* use 0"):
        check_codec_run(config)
