"""Every layout trains the model that one process trains on the same global batch."""

from functools import cache
from unittest.mock import patch

import layouts
import pytest
import torch
from layouts import LAYOUTS, MODULATIONS, configure, module_errors, single_process, step_errors, train_both

from megasora.parallel import ulysses
from megasora.testing.spawn import run_ranks

MODULES_FLOAT64, STEPS_FLOAT32 = 1e-10, 2e-5


@cache
def expected(modulation: str, depth: int, packs: int, dtype: torch.dtype, steps: int) -> dict:
    config = configure(layouts.layout(1, depth=depth, packs=packs), modulation)
    return single_process(config, dtype, steps)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_trains_the_same_model(layout):
    configs = [configure(layout, modulation) for modulation in MODULATIONS]
    results = run_ranks(train_both, layout.processes, configs)
    for i, (modulation, config) in enumerate(zip(MODULATIONS, configs, strict=True)):
        size = (modulation, config.model.depth, config.data.packs_per_step)
        modules, steps = [rank[i][0] for rank in results], results[0][i][1]

        for what, error in module_errors(modules, expected(*size, torch.float64, 1)).items():
            assert error <= MODULES_FLOAT64, f"{modulation}, float64: {what} has error {error:.1e}"
        for what, error in step_errors(steps, expected(*size, torch.float32, layouts.STEPS), config).items():
            assert error <= STEPS_FLOAT32, f"{modulation}, float32 steps: {what} has error {error:.1e}"


def train_with_groups_of_one_head(config):
    with patch.object(ulysses, "head_groups", lambda heads: [slice(head, head + 1) for head in range(heads)]):
        return layouts.train_modules(config)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("recompute", ["none", "keep_attention"])
def test_heads_that_are_exchanged_one_by_one_train_the_same_model(recompute):
    config = configure(layouts.layout(4, context=4, ulysses=2, recompute=recompute), "shared")
    results = run_ranks(train_with_groups_of_one_head, 4, config)
    exact = expected("shared", config.model.depth, config.data.packs_per_step, torch.float64, 1)
    for what, error in module_errors(results, exact).items():
        assert error <= MODULES_FLOAT64, f"{what} has error {error:.1e}"


IN_BFLOAT16 = [  # each DeepSpeed optimizer class, with gradients that are partial over tensor and over pipeline
    layouts.layout(1),
    layouts.layout(4, tensor=2, pipeline=2),
    layouts.layout(2, pipeline=2, schedule="zbv"),
    layouts.layout(4, tensor=2, context=2, zero_stage=2),
    layouts.layout(2, context=2, zero_stage=3),
]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", IN_BFLOAT16, ids=lambda layout: layout.name)
def test_bfloat16_is_equally_close_to_float32_in_every_layout(layout):
    config = configure(layout, "shared")
    config.run.dtype = "bfloat16"
    steps = run_ranks(layouts.train_steps, layout.processes, config, 1)[0]
    exact = expected("shared", config.model.depth, config.data.packs_per_step, torch.float32, layouts.STEPS)
    assert steps["losses"][0] == pytest.approx(exact["losses"][0], rel=0.01)
    scale = (1 - config.optim.betas[0]) * config.optim.max_grad_norm / exact["norms"][0]
    error = sum(float((steps["exp_avg"][n] - scale * g).square().sum()) for n, g in exact["gradients"].items())
    assert (error / sum(float((scale * g).square().sum()) for g in exact["gradients"].values())) ** 0.5 < 0.025
