"""Processes that sample together: the layout is that of the command, and is refused where it does not fit."""

import pytest
import torch
from conftest import TINY

from megasora.build import build_model, patch_dim
from megasora.config import load
from megasora.data.pack import Record, make_batch
from megasora.errors import MegaSoraError
from megasora.model.init import DrawnWeights
from megasora.parallel.launcher import Launcher
from megasora.sample_ranks import sampling_config, sampling_ranks

TRAINED = ["parallel.tensor=2", "parallel.context=4", "parallel.schedule=zbv", "run.dtype=bfloat16", "run.threads=1"]


class Weights(DrawnWeights):
    @torch.no_grad()
    def fill(self, out, *arguments):
        super().fill(out, *arguments)
        out += 0.1


WEIGHTS = Weights(seed=1)


def config_of(*overrides):
    return sampling_config(load(None, [*TINY, *TRAINED]), overrides)


def test_the_layout_is_that_of_the_command_and_not_that_of_the_training():
    config = config_of("parallel.pipeline=2", "sample.frames=1")
    assert (config.parallel.pipeline, config.parallel.tensor, config.parallel.context) == (2, 1, 1)
    assert config.parallel.schedule == "1f1b" and config.run.dtype == "auto"
    assert config.sample.frames == load(None, TINY).sample.frames  # of sample.* the caller takes care


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tensor=2"], 3, "= 2 must divide the 3 processes; start 2 or 4 processes"),
        (["parallel.tensor=4"], 4, "parallel.tensor=4 must divide model.heads=2"),
        (["parallel.context=2", "parallel.rows=2"], 2, "parallel.rows=2 divides the frames of a codec"),
        (["parallel.pipeline=4"], 4, "model.depth=2 blocks cannot be divided evenly into 4 stages"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_any_process_is_waited_for(overrides, processes, message):
    launcher = Launcher(size=processes, address="nowhere.invalid", port=1)
    with pytest.raises(MegaSoraError, match=message), sampling_ranks(config_of(*overrides), launcher, WEIGHTS):
        pass


def test_training_settings_that_sampling_does_not_read_are_no_obstacle():
    """E.g. a number of packs per step that is no multiple of the data ranks."""
    config = sampling_config(load(None, [*TINY, "data.packs_per_step=3", "optim.name=muon"]), ["parallel.tensor=2"])
    launcher = Launcher(size=4, address="nowhere.invalid", port=1)
    with pytest.raises(MegaSoraError, match="MASTER_ADDR=nowhere.invalid"), sampling_ranks(config, launcher, WEIGHTS):
        pass


def test_one_process_has_the_whole_model_and_writes():
    config = config_of()
    words, size = torch.zeros(2, 16, dtype=torch.int64), (16.0, 16.0, 5.0, 8.0)
    patches = torch.randn(2, 8, patch_dim(config))
    pack = make_batch([Record(i, patches[i], (2, 2, 2), words, size, "x") for i in range(2)], 19)
    model = build_model(config, patch_dim(config))
    for name, parameter in model.named_parameters():
        WEIGHTS.fill(parameter, name)
    threads = torch.get_num_threads()
    with sampling_ranks(config, Launcher(), WEIGHTS) as ranks:
        assert ranks.is_writer and (ranks.data_rank, ranks.data_size) == (0, 1)
        ranks.barrier()
        (v_LP,) = ranks.denoiser([pack])
        assert ranks.denoiser.pad_tokens(19) == 19
    torch.set_num_threads(threads)
    with torch.no_grad():
        expected_LP = model(pack)
    torch.testing.assert_close(v_LP[:16].cpu(), expected_LP[:16], rtol=2e-5, atol=2e-5)
    assert not v_LP[16:].any() and not torch.distributed.is_initialized()
