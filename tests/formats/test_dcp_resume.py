"""A run that goes through a folder of torch.distributed.checkpoint continues as if it had not."""

from __future__ import annotations

import pytest
import torch
from conftest import check_same_checkpoints, full_tensors, read_jsonl, train_arguments

from megasora.build import build_model, patch_dim
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import read_state
from megasora.config import load_run_config
from megasora.formats.dcp_export import export_dcp
from megasora.formats.dcp_import import import_dcp
from megasora.formats.source import ExportSource


def shapes_of(config):
    with torch.device("meta"):
        model = build_model(config, patch_dim(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_an_exported_and_imported_run_continues_with_the_same_losses(trained, shards, tiny, launch, tmp_path):
    checkpoint, run = trained / "checkpoints" / "step-00000010", tmp_path / "run"
    source = ExportSource(
        checkpoint, load_run_config(trained), read_state(checkpoint), ShardedCheckpoint(checkpoint), "weights"
    )
    export_dcp(source, tmp_path / "dcp", everything=True)
    imported = import_dcp(tmp_path / "dcp", run, None, [], shapes_of)
    assert imported == run / "checkpoints" / "step-00000010"
    before, after = full_tensors(trained, 10), full_tensors(run, 10)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    code, output = launch("megasora.train", *train_arguments(run, shards, tiny), "run.start=resume")
    assert code == 0, output
    lines, expected = read_jsonl(run), read_jsonl(trained)[10:]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in expected
    ]
    check_same_checkpoints(trained, run, 20)
