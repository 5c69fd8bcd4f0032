"""A node finds missing packages, full disks and missing shards."""

from __future__ import annotations

from megasora.config import load
from megasora.preflight.node import inspect_node
from megasora.run_log.code_version import source_hash


def test_problems_of_a_node_are_found(tmp_path, monkeypatch):
    config = load(None, [f"run.dir={tmp_path / 'a' / 'run'}", f"data.shards={tmp_path / 'shards'}", "run.device=cpu"])
    monkeypatch.setattr("megasora.preflight.node.version_of", lambda name: None if name == "av" else "1")
    monkeypatch.setattr("megasora.preflight.node.MIN_DISK_MIB", 1 << 40)
    node = inspect_node("here", config, 1)
    text = "; ".join(node.problems)
    assert "av is missing" in text and f"no shard in {tmp_path / 'shards'}" in text
    assert f"{tmp_path} has" in text and "MiB free" in text  # the nearest existing folder above the run's
    assert node.versions["av"] == "missing" and node.versions["megasora"] == source_hash()
    assert not (tmp_path / "a").exists()
