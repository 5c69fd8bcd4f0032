"""Every layout trains the same model: against the single process, on the same global batch."""

from functools import cache

import layouts
import pytest
import torch
from layouts import DIALECTS, LAYOUTS, configure, relative_error, single_process, train_both, whole

from megasora.testing.spawn import run_ranks

MODULES_FLOAT64, STEPS_FLOAT32 = 1e-10, 2e-5


@cache
def expected(dialect: str, depth: int, packs: int, dtype: torch.dtype, steps: int) -> dict:
    config = configure(layouts.layout(1, depth=depth, packs=packs), dialect)
    return single_process(config, dtype, steps)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_trains_the_same_model(layout):
    configs = [configure(layout, dialect) for dialect in DIALECTS]
    results = run_ranks(train_both, layout.processes, configs)
    for number, (dialect, config) in enumerate(zip(DIALECTS, configs, strict=True)):
        size = (dialect, config.model.depth, config.data.packs_per_step)
        modules, steps = [rank[number][0] for rank in results], results[0][number][1]

        exact = expected(*size, torch.float64, 1)
        assert modules[0]["loss"] == pytest.approx(exact["losses"][0], rel=MODULES_FLOAT64)
        assert modules[0]["norm"] == pytest.approx(exact["norms"][0], rel=MODULES_FLOAT64)
        error, name = relative_error(whole(modules), exact["gradients"])
        assert error <= MODULES_FLOAT64, f"{dialect}: gradient of {name} is {error:.1e} off"

        single = expected(*size, torch.float32, layouts.STEPS)
        assert single["norms"][0] > config.optim.clip, "clipping must be active"
        assert steps["losses"] == pytest.approx(single["losses"], rel=STEPS_FLOAT32)
        assert steps["norms"] == pytest.approx(single["norms"], rel=STEPS_FLOAT32)
        clip, beta = config.optim.clip / single["norms"][0], config.optim.betas[0]
        means = {name: (1 - beta) * clip * gradient for name, gradient in single["gradients"].items()}
        error, name = relative_error(steps["means"], means)
        assert error <= STEPS_FLOAT32, f"{dialect}: clipped gradient of {name} is {error:.1e} off"
        error, name = relative_error(steps["weights"], single["weights"])
        assert error <= STEPS_FLOAT32, f"{dialect}: {name} is {error:.1e} off after {layouts.STEPS} steps"
