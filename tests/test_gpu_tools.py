"""The scripts of tools/gpu: `make gpu` rehearsed on a CPU, and what they compute from wheels, traces and metrics."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from megasora.config.schema import every_key

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools" / "gpu"


@pytest.fixture
def load_tool(monkeypatch):
    """load_tool(name): a script of tools/gpu as a module."""
    import importlib

    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_passes_every_stage_and_writes_every_result(tmp_path):
    stages = "attention optimizer wan small bench float8 resume"  # the suite has the tests, and that of the overlap
    environment = {**os.environ, "REHEARSE": "1", "STAGES": stages, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run([TOOLS / "run.sh"], env=environment, capture_output=True, check=False)
    log = (tmp_path / "raw" / "log.txt").read_text()
    ends = {line["stage"]: line["code"] for line in read_lines(tmp_path / "stages.jsonl")}
    assert done.returncode == 0 and set(ends.values()) == {0}, f"{ends}\n{log[-4000:]}"
    assert {path.name for path in tmp_path.iterdir()} == {
        "environment.json", "stages.jsonl", "attention.json", "optimizer.json", "wan.json", "small-4k.json",
        "float8.json", "runs.json", "raw",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {
        "log.txt", "runs.tar.gz", "sample.mp4", "sample.sheet.png", "sample.json",
    }  # fmt: skip
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert runs["repeat and small-4k"]["bitwise_equal"] and runs["resumed and repeat"]["bitwise_equal"]
    assert runs["resumed"]["steps"] == 4
    attention = json.loads((tmp_path / "attention.json").read_text())
    assert attention and not [line for line in attention if line.get("error") or line["relative_error"] > 1e-5]
    assert "error" not in json.loads((tmp_path / "wan.json").read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_key_in_the_commands_is_one_of_the_configuration():
    sections = {key.split(".")[0] for key in every_key()}
    named = set(re.findall(r"(?<![\w/])([a-z]+(?:\.[a-z_]+)+)=", (TOOLS / "run.sh").read_text()))
    keys = {key for key in named if key.split(".")[0] in sections}
    assert len(keys) > 20 and keys <= set(every_key())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"STAGES": "attention profile"}, "STAGES has no stage profile; it is some of: attention checks optimizer"),
        ({"MINUTES": "0"}, "MINUTES=0 must be a whole number from 1 to 99"),
        ({"MINUTES": "9.5"}, "MINUTES=9.5 must be a whole number from 1 to 99"),
    ],
)
def test_a_wrong_selection_is_one_line_and_exit_code_2(environment, message, tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, **environment}
    done = subprocess.run([TOOLS / "run.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_names_the_rehearsal(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run([TOOLS / "run.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "sees no GPU; REHEARSE=1 rehearses on a CPU" in done.stderr
    assert not (tmp_path / "out").exists()


def write_wheel(folder, name, requirements=()):
    with zipfile.ZipFile(folder / name, "w") as archive:
        package = "-".join(name.split("-")[:2])
        archive.writestr(f"{package}.dist-info/METADATA", "".join(f"Requires-Dist: {r}\n" for r in requirements))


def test_wheels_of_another_python_and_missing_requirements_are_reported(load_tool, tmp_path, monkeypatch):
    check_wheels = load_tool("check_wheels")
    monkeypatch.setattr(check_wheels, "tracked_files", set)
    write_wheel(tmp_path, "good-1.0-cp312-cp312-manylinux_2_28_x86_64.whl", ["numpy>=2", "extra_one; extra == 'x'"])
    write_wheel(tmp_path, "old-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", ["missing.package<3"])
    problems = check_wheels.check(tmp_path, "3.12", 64, {"numpy"})
    assert problems == [
        "old-1.0-cp311-cp311-manylinux_2_28_x86_64.whl is not for cp312 on Linux x86-64",
        f"old requires missing-package<3, which neither {tmp_path} nor the machine has",
    ]
    assert check_wheels.check(tmp_path, "3.12", 0, {"numpy"})[-1].endswith("exceed the limit of 0 MiB")


def test_a_profile_counts_overlapping_kernels_once_and_finds_the_gap(load_tool, monkeypatch):
    profile_steps = load_tool("profile_steps")
    monkeypatch.setattr(profile_steps, "ON_GPU", True)

    def event(name, start, duration, category="kernel"):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    trace = {"traceEvents": [
        event("nvjet_gemm", 0, 100), event("flash_fwd", 50, 100), event("forward_kernel", 750, 250),
        event("cudaStreamSynchronize", 140, 500, "cuda_runtime"),
    ]}  # fmt: skip
    summary = profile_steps.summarize(trace, 2)
    assert summary["step_ms"] == 0.5 and summary["busy_fraction"] == 0.4 and summary["launches_per_step"] == 1.5
    assert summary["waits_per_step"] == 0.5
    assert {kind: figures["ms_per_step"] for kind, figures in summary["kinds"].items()} == {
        "Triton kernels of MegaSora": 0.125, "matrix product": 0.05, "attention": 0.05,
    }  # fmt: skip
    (gap,) = summary["gaps"]
    assert (gap["us"], gap["after"], gap["before"]) == (600, "flash_fwd", "forward_kernel")
    assert gap["cpu"] == "cudaStreamSynchronize"


def test_a_summary_of_runs_takes_the_last_of_a_repeated_step(load_tool, tmp_path):
    summarize_runs = load_tool("summarize_runs")
    lines = [{"step": s, "loss": l, "time_step": 1.0} for s, l in ((1, 4.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = summarize_runs.read_metrics(tmp_path)
    assert [line["loss"] for line in metrics] == [4.0, 2.0, 1.0]
    assert summarize_runs.summarize(metrics)["loss"] == 1.5
    other = [{**line, "loss": line["loss"] * 1.25} for line in metrics]
    assert summarize_runs.compare(other, metrics) == {
        "steps": 3, "largest_relative_difference": 0.25, "bitwise_equal": False,
    }  # fmt: skip
