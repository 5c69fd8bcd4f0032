"""With FP8 products every layout computes what one process computes: the scales are those of whole packs and matrices.

In float64, where two orders of a sum do not round an element to different FP8 numbers, errors are those of other
layouts; a scale of a part of a row, of a shard or of a share would give errors of some percent.
"""

import layouts
import pytest
import torch
from layouts import configure, module_errors, single_process, train_modules

from megasora.errors import MegaSoraError
from megasora.parallel.layout import check_layout
from megasora.testing.spawn import run_ranks

CASES = [
    (layouts.layout(4, tensor=2, context=2), "rowwise"),
    (layouts.layout(4, tensor=2, context=2), "tensorwise"),
    (layouts.layout(2, pipeline=2, schedule="zbv", recompute="full"), "tensorwise"),
]


def with_recipe(layout, recipe):
    config = configure(layout, "shared")
    config.model.mlp_ratio, config.model.fp8_recipe = 3.0, recipe
    return config


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout, recipe", CASES, ids=lambda value: getattr(value, "name", value))
def test_a_layout_computes_the_products_of_one_process(layout, recipe):
    config = with_recipe(layout, recipe)
    results = run_ranks(train_modules, layout.processes, config)
    one_process = layouts.layout(1, depth=config.model.depth, packs=config.data.packs_per_step)
    expected = single_process(with_recipe(one_process, recipe), torch.float64, 1)
    plain = single_process(with_recipe(one_process, "none"), torch.float64, 1)
    for what, error in module_errors(results, expected).items():
        assert error <= 1e-10, f"{what} has error {error:.1e}"
    assert max(module_errors(results, plain).values()) > 1e-3  # it is FP8


def test_features_that_fp8_products_cannot_take_are_refused_with_the_next_legal_numbers():
    config = with_recipe(layouts.layout(1, tensor=4), "rowwise")
    with pytest.raises(MegaSoraError, match=r"model.width=32 must be a multiple of 64; use 64, or model"):
        check_layout(config, 4)
    config = with_recipe(layouts.layout(1), "rowwise")
    config.model.mlp_ratio = 2.4
    with pytest.raises(MegaSoraError, match=r"model.width=32 x model.mlp_ratio=2.4 = 76 must be a multiple of 16; use"):
        check_layout(config, 1)
