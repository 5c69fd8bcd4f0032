"""Averages of a run that trains, is resumed with other ones configured, and is averaged afterwards."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import full_tensors, train_arguments

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.cli import main

SETTINGS = ["optim.ema_decays=[0.5]", "optim.ema_sigmas=[0.05,0.1]", "checkpoint.every=1", "checkpoint.keep=6"]
DECAYS = {  # of the update that makes the average after step t
    "ema": lambda t: min(0.9, t / (9 + t)),
    "ema_0.5": lambda t: min(0.5, t / (9 + t)),
    "ema_sigma_0.05": lambda t: (1 - 1 / t) ** (16.9722 + 1),
    "ema_sigma_0.1": lambda t: (1 - 1 / t) ** (6.9372 + 1),
}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, shards, launch, tiny):
    """20 steps with four averages, and a checkpoint at each of the last six."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    code, output = launch("megasora.train", *train_arguments(run, shards, tiny), *SETTINGS)
    assert code == 0, output
    return run


def read(run, step: int) -> ShardedCheckpoint:
    return ShardedCheckpoint(run / "checkpoints" / f"step-{step:08d}")


@pytest.mark.slow
def test_more_averages_change_nothing_of_the_training(averaged, trained):
    expected = full_tensors(trained, 20)
    made = read(averaged, 20)
    assert made.kinds == {"weights", "exp_avg", "exp_avg_sq", *DECAYS}
    for key, values in expected.items():
        kind, _, name = key.partition("/")
        assert torch.equal(made.full_tensor(kind, name), values)


@pytest.mark.slow
def test_each_average_is_the_recurrence_over_the_weights_of_all_steps(averaged):
    checkpoints = {step: read(averaged, step) for step in range(15, 21)}
    for name in ("patch_in.weight", "patch_out.bias", "text.byte.weight"):
        for kind, decay in DECAYS.items():
            expected = checkpoints[15].full_tensor(kind, name).double()
            for step in range(16, 21):
                weights = checkpoints[step].full_tensor("weights", name)
                expected = decay(step) * expected + (1 - decay(step)) * weights.double()
            torch.testing.assert_close(checkpoints[20].full_tensor(kind, name).double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_resume_starts_new_averages_from_the_weights_and_drops_others(averaged, shards, launch, tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(averaged, run)
    again = [*train_arguments(run, shards, tiny), "run.start=resume:step-00000015", *SETTINGS[2:]]
    code, output = launch("megasora.train", *again, "optim.ema_decays=[0.5,0.75]", "optim.ema_sigmas=[]")
    assert code == 0, output
    assert "the average ema_0.75 is not in the checkpoint and starts from its weights" in output
    assert output.count("of the checkpoint is not configured (optim.ema_*) and ends") == 2
    made, original, start = read(run, 20), read(averaged, 20), read(averaged, 15)
    assert made.kinds == {"weights", "exp_avg", "exp_avg_sq", "ema", "ema_0.5", "ema_0.75"}
    for name in original.shapes:
        for kind in ("weights", "ema", "ema_0.5", "exp_avg"):
            assert torch.equal(made.full_tensor(kind, name), original.full_tensor(kind, name))
    expected, name = start.full_tensor("weights", "patch_in.weight").double(), "patch_in.weight"
    for step in range(16, 21):
        decay = min(0.75, step / (9 + step))
        expected = decay * expected + (1 - decay) * read(run, step).full_tensor("weights", name).double()
    torch.testing.assert_close(made.full_tensor("ema_0.75", name).double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_an_average_that_was_saved_is_sampled_exported_and_combined(averaged, tmp_path, capsys):
    out = tmp_path / "mean"
    assert main(["checkpoint", "average", str(averaged), "--sigma", "0.08", "--out", str(out)]) == 0
    assert "from 12 saved averages" in capsys.readouterr().out
    sample = ["--prompt", "a red circle", "--frames", "1", "--out"]
    for run, weights in ((averaged, "ema_sigma_0.1"), (averaged, "raw"), (out, "ema")):
        assert main(["sample", str(run), *sample, str(tmp_path / f"{weights}.png"), "--weights", weights]) == 0
    assert (tmp_path / "ema_sigma_0.1.png").read_bytes() != (tmp_path / "raw.png").read_bytes()
    capsys.readouterr()
    assert main(["sample", str(averaged), *sample, str(tmp_path / "x.png"), "--weights", "ema_0.7"]) == 2
    known = "--weights may be raw, ema, ema_0.5, ema_sigma_0.05, ema_sigma_0.1"
    assert capsys.readouterr().err.endswith(f"has no average ema_0.7; {known}\n")
