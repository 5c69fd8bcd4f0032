"""Layouts that model.compile supports train the model of one process that is not compiled."""

from functools import partial

import layouts
import pytest
import torch

from megasora import parallelize
from megasora.model.block import compile_block
from megasora.testing.spawn import run_ranks

COMPILED = [
    layouts.layout(2, context=2, recompute="keep_attention", depth=2),
    layouts.layout(2, zero_stage=2, packs=2, depth=2),
]


def train_compiled(config):
    """Without generated code, which takes minutes to compile; tests/model/test_compile.py has it."""
    parallelize.compile_block = partial(compile_block, compiler="aot_eager")  # in this process only
    return layouts.train_steps(config)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", COMPILED, ids=lambda layout: layout.name)
def test_a_compiled_layout_trains_the_same_model(layout):
    config = layouts.configure(layout, "block")
    config.model.compile, config.model.kernel_backend = True, "torch"
    eager = layouts.layout(1, depth=config.model.depth, packs=config.data.packs_per_step)
    expected = layouts.single_process(layouts.configure(eager, "block"), torch.float32, layouts.STEPS)
    steps = run_ranks(train_compiled, layout.processes, config)[0]
    for what, error in layouts.step_errors(steps, expected, config).items():
        assert error <= 2e-5, f"{what} has error {error:.1e}"
