"""One training step sends what docs/parallel.md says: for every layout, each collective's axis, dtype and elements.

One rank of each layout runs on a fake process group, so no other rank is started. Every layout is recorded in bfloat16
and with `model.qk_norm=across_heads`, which adds collectives; those for which DeepSpeed has other optimizer classes in
float32 are recorded in float32 too.
"""

from functools import cache
from pathlib import Path

import layouts
import pytest
from layouts import LAYOUTS, configure
from step_traffic import record_step

from megasora.parallel import deepspeed_engine
from megasora.testing.spawn import run_fake_rank, run_ranks

SCALARS = 10  # most elements that a step reduces beside the tensors: counts, sums, norms, flags; and one for each rank
IN_FLOAT32 = [
    layouts.layout(2, zero_stage=1),
    layouts.layout(2, zero_stage=2),
    layouts.layout(2, zero_stage=3),
    layouts.layout(4, tensor=2, pipeline=2),
    layouts.layout(8, tensor=2, context=2),
    layouts.layout(8, tensor=2, context=2, zero_stage=3),
]
EVERY_STEP = [
    *((layout, "shared", "bfloat16") for layout in LAYOUTS if layout.processes > 1),
    *((layout, "block", "float32") for layout in IN_FLOAT32),
]


def recording_rank(layout):
    """The last rank; under ZeRO-3 rank 0, as DeepSpeed compares module orders with those that rank 0 broadcasts."""
    return 0 if "parallel.zero_stage=3" in layout.settings else layout.processes - 1


@cache
def recorded_step(layout, modulation, dtype):
    config = configure(layout, modulation)
    config.run.dtype = dtype
    return run_fake_rank(record_step, recording_rank(layout), layout.processes, config)


def unexpected(step):
    """{axes, op, dtype: (recorded, expected)} of all traffic that is not as expected."""
    result = {}
    for key in step.recorded.keys() | step.expected.keys():
        elements, expected = step.recorded[key], step.expected.get(key)
        if expected is None:
            fits = key.op == "all_reduce" and elements <= SCALARS + len(key.ranks)
        else:
            fits = expected.start <= elements < expected.stop + SCALARS + len(key.ranks)
        if not fits:
            axes = [name for name, ranks in step.axes.items() if ranks == key.ranks] or ["world"]
            result["/".join(axes), key.op, str(key.dtype)] = elements, expected
    return result


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("layout, modulation, dtype", EVERY_STEP, ids=lambda value: getattr(value, "name", value))
def test_a_step_sends_what_the_docs_say(layout, modulation, dtype):
    assert unexpected(recorded_step(layout, modulation, dtype)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if "context=" in layout.name], ids=lambda layout: layout.name
)
def test_context_mib_sent_is_what_the_ring_and_ulysses_send(layout):
    step = recorded_step(layout, "shared", "bfloat16")
    ring, ulysses = step.axes["ring"], step.axes["ulysses"]
    sent = sum(n * key.dtype.itemsize for key, n in step.recorded.items() if key.op == "send" and key.ranks == ring)
    exchanged = sum(n * key.dtype.itemsize for key, n in step.recorded.items() if key.op == "all_to_all")
    assert step.context_bytes_sent == sent + exchanged * (len(ulysses) - 1) // len(ulysses) > 0


@pytest.mark.slow
def test_a_real_process_group_records_the_same_as_a_fake_one():
    layout = layouts.layout(4, context=4, ulysses=2)
    config = configure(layout, "shared")
    config.run.dtype = "bfloat16"
    assert run_ranks(record_step, 4, config)[3].recorded == recorded_step(layout, "shared", "bfloat16").recorded


@pytest.mark.slow
def test_a_rank_of_a_large_world_sends_what_the_docs_say():
    layout = layouts.layout(512, tensor=2, context=64, ulysses=2, pipeline=2, packs=8)
    config = configure(layout, "shared")
    config.run.dtype = "bfloat16"
    step = run_fake_rank(record_step, 77, 512, config)
    assert unexpected(step) == {}
    assert {name: len(ranks) for name, ranks in step.axes.items()} == {
        "pipeline": 2, "data": 2, "context": 64, "ring": 32, "ulysses": 2, "tensor": 2, "data_context": 128, "model": 4,
    }  # fmt: skip


# ---------------------------------------------------------------------- mutations


def record_step_with_bf16_reduction(config):
    original = deepspeed_engine.deepspeed_config

    def without_communication_dtype(*arguments):
        return {key: value for key, value in original(*arguments).items() if key != "communication_data_type"}

    deepspeed_engine.deepspeed_config = without_communication_dtype
    return record_step(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, op",
    [
        (layouts.layout(2, zero_stage=1), "all_reduce"),
        (layouts.layout(2, zero_stage=2), "all_reduce"),
        (layouts.layout(2, zero_stage=3), "reduce_scatter"),
        (layouts.layout(4, context=2, pipeline=2), "all_reduce"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_reduced_in_bfloat16_are_detected(layout, op):
    config = configure(layout, "shared")
    config.run.dtype = "bfloat16"
    step = run_fake_rank(record_step_with_bf16_reduction, recording_rank(layout), layout.processes, config)
    detected = {key for key in unexpected(step) if "data_context" in key[0]}
    assert {(key[1], key[2]) for key in detected} == {(op, "torch.bfloat16"), (op, "torch.float32")}


# ---------------------------------------------------------------------- the docs


def table_of_the_docs():
    """{(axis, op, dtype)} of the rows of "What a step sends"."""
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    section = text.partition("## What a step sends")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {(axis, op, dtype) for axis, op, dtype, *_ in rows[2:]}


@pytest.mark.slow
def test_the_table_of_the_docs_has_a_row_for_all_that_is_sent_and_no_other():
    sent = set().union(*(recorded_step(layout, "shared", "bfloat16").rows for layout in LAYOUTS[1:]))
    assert table_of_the_docs() == sent
