"""The batch scripts on a real Slurm: two nodes of two simulated GPUs on this machine, see tools/slurm_lab.py."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import check_same_checkpoints, read_jsonl

from megasora.errors import CONFIGURATION, CRASH
from megasora.observe.status import read_status

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
import slurm_lab  # noqa: E402

pytestmark = [pytest.mark.waits, pytest.mark.timeout(400)]

SECRET = "0123456789-key-that-no-file-may-hold"
NAME = "runs/of 2; touch pwned $(touch pwned) `touch pwned` > pwned"  # no shell may evaluate it
STEPS, EVERY = 60, 10
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass
class Cluster:
    """A running Slurm, and the project's folder on it, from which jobs are submitted."""

    lab: slurm_lab.Lab
    project: Path
    shards: Path
    settings: list[str]

    @property
    def local(self) -> Path:
        """The local disk of each machine."""
        return self.lab.state / "local"

    def run(self, *words: object, node: str = slurm_lab.HEAD, **environment: str) -> subprocess.CompletedProcess:
        variables = {
            "OMP_NUM_THREADS": "1", "SBATCH_GPUS_PER_NODE": "2", "WANDB_API_KEY": SECRET, "TMPDIR": str(self.local),
            "PYTHONPATH": os.pathsep.join([str(self.project / "inject"), os.environ.get("PYTHONPATH", "")]).strip(":"),
        }  # fmt: skip
        lab = [sys.executable, ROOT / "tools" / "slurm_lab.py", "--state", self.lab.state, "run", "--node", node]
        return subprocess.run(
            [str(word) for word in (*lab, *words)], capture_output=True, text=True, check=False, timeout=200,
            cwd=self.project, env={**os.environ, **variables, **environment},
        )  # fmt: skip

    def submit(self, *words: object, **environment: str) -> str:
        done = self.run("sbatch", "--parsable", *words, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def train(self, run: str | Path, *settings: str) -> list[str]:
        """Arguments of slurm/train.sbatch for a run of these tests."""
        return [
            str(ROOT / "tests/runs/tiny.yaml"), f"run.dir={run}", f"data.shards={self.shards}", *self.settings,
            f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "validation.every=1000", "data.packs_per_step=4",
            *settings,
        ]  # fmt: skip

    def job(self, number: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, number: str, done, seconds: float = 300) -> dict[str, str]:
        """Waits until `done(job)`. After a requeue Slurm waits until old credentials expire: 5 s here."""
        end = time.monotonic() + seconds
        while not done(job := self.job(number)):
            assert time.monotonic() < end and job["JobState"] not in ENDED, (job, self.output(number))
            time.sleep(0.5)
        return job

    def result(self, number: str, seconds: float = 300) -> tuple[str, int]:
        """(state, exit code) of a job that has ended."""
        job = self.wait(number, lambda job: job["JobState"] in ENDED, seconds)
        return job["JobState"], int(job["ExitCode"].split(":")[0])

    def wait_for_step(self, run: Path, step: int, number: str) -> None:
        """Polls the run's file often and Slurm rarely: a step takes less time than a query."""
        metrics = run / "metrics.jsonl"

        def reached(job: dict[str, str]) -> bool:
            end = time.monotonic() + 2
            while not (is_reached := metrics.is_file() and len(metrics.read_bytes().splitlines()) >= step):
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
            return is_reached

        self.wait(number, reached)

    def output(self, number: str) -> str:
        return "".join(path.read_text() for path in sorted(self.project.glob(f"*-{number}*.out")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, shards, tiny):
    try:
        slurm_lab.check_machine()
    except slurm_lab.LabError as error:
        pytest.skip(f"no Slurm on this machine: {error}")
    project = tmp_path_factory.mktemp("project")
    (project / "inject").mkdir()
    for name in ("slurm", "tools"):
        (project / name).symlink_to(ROOT / name)
    (project / ".venv").symlink_to(sys.prefix)
    lab = slurm_lab.Lab(tmp_path_factory.mktemp("slurm") / "lab")
    lab.up(nodes=2, gpus=2, cpus=8)
    yield Cluster(lab, project, shards, tiny)
    lab.down()
    assert not lab.state.exists() and not lab.holders()


@pytest.fixture(scope="module")
def uninterrupted(cluster, launch) -> Path:
    """An uninterrupted run of four processes under plain torchrun."""
    run = cluster.project / "uninterrupted"
    code, output = launch("megasora.train", *cluster.train(run), processes=4)
    assert code == 0, output
    return run


def readme_line() -> list[str]:
    """The first command of slurm/README.md."""
    text = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
    return shlex.split(re.search(r"^sbatch .*slurm/train\.sbatch .*$", text, re.MULTILINE).group(0))


def check_same_run(run: Path, uninterrupted: Path) -> None:
    """Compares the metrics of every step and the final weights bit for bit; of a repeated step, both lines."""
    expected = {line["step"]: (line["loss"], line["grad_norm"]) for line in read_jsonl(uninterrupted)}
    steps = [(line["step"], (line["loss"], line["grad_norm"])) for line in read_jsonl(run)]
    assert {step for step, _ in steps} == set(expected) == set(range(1, STEPS + 1))
    for step, metrics in steps:
        assert metrics == expected[step], step
    check_same_checkpoints(run, uninterrupted, STEPS)


def test_the_command_of_the_readme_trains_on_both_nodes_like_torchrun(cluster, uninterrupted):
    program, option, _, script, _, *_ = readme_line()
    assert (program, option, script) == ("sbatch", "--nodes", "slurm/train.sbatch")
    number = cluster.submit(option, 2, script, *cluster.train(NAME))
    assert cluster.result(number) == ("COMPLETED", 0), cluster.output(number)
    run = cluster.project / NAME
    check_same_run(run, uninterrupted)
    assert not list(cluster.project.rglob("pwned"))
    assert sorted(p.name for p in (run / "logs").iterdir()) == [f"rank-{rank:05d}.log" for rank in range(4)]
    output = cluster.output(number)
    assert "4 processes" in output and f"step {STEPS}/{STEPS}" in output  # printed by the main process
    assert "node1" in output and "node2" in output and "fit" in output  # printed by the preflight
    assert f"step {STEPS}/{STEPS}" in (run / "logs" / "rank-00000.log").read_text()
    status = read_status(run)
    assert (status.alive, status.step, status.steps) == (False, STEPS, STEPS) and status.state.startswith("done")
    for path in [*run.rglob("*.*"), *cluster.project.glob("*.out")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.timeout(600)
def test_a_run_that_is_stopped_and_loses_a_node_equals_the_uninterrupted_one(cluster, uninterrupted):
    run = cluster.project / "interrupted"
    settings = cluster.train(run, "checkpoint.every=1000")  # saved only when it is stopped
    number = cluster.submit("--nodes", 2, "slurm/train.sbatch", *settings)

    def restarts(count: int) -> None:
        cluster.wait(number, lambda job: int(job["Restarts"]) == count and job["JobState"] == "RUNNING")

    # sent by Slurm before the time limit, only to the batch script
    cluster.wait_for_step(run, 3, number)
    assert read_status(run).alive
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    restarts(1)
    first = len(read_jsonl(run))
    assert 3 <= first < STEPS
    assert (run / "checkpoints" / "latest").read_text() == f"step-{first:08d}\n"

    # sent by a person or a preemption, to all processes of the steps
    cluster.wait_for_step(run, first + 3, number)
    cluster.run("scancel", "--signal=TERM", number)
    restarts(2)
    second = len(read_jsonl(run))
    assert (run / "checkpoints" / "latest").read_text() == f"step-{second:08d}\n"

    # a node is lost with all its processes, and comes back
    cluster.wait_for_step(run, second + 3, number)
    cluster.run("bash", "-c", "kill -9 -1", node="node2")
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")
    cluster.wait(number, lambda job: job["JobState"] == "PENDING")
    assert cluster.run("slurmd", "-N", "node2", node="node2").returncode == 0
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")

    assert cluster.result(number) == ("COMPLETED", 0), cluster.output(number)
    assert int(cluster.job(number)["Restarts"]) == 3
    check_same_run(run, uninterrupted)
    ends = [end for _, _, end in read_status(run).launches]
    assert len(ends) == 4 and all(end.startswith("stopped on request") for end in ends[:2])
    assert f"saved after step {first}" in ends[0] and f"saved after step {second}" in ends[1]
    assert ends[3].startswith("done")


def test_a_configuration_error_ends_the_job_with_2_and_without_a_requeue(cluster):
    number = cluster.submit("--nodes", 2, "slurm/train.sbatch", *cluster.train("runs/typo", "model.hedas=3"))
    assert cluster.result(number) == ("FAILED", CONFIGURATION)
    assert cluster.job(number)["Restarts"] == "0"
    assert cluster.output(number).count("did you mean 'model.heads'?") == 1
    assert not (cluster.project / "runs" / "typo").exists()


@pytest.mark.parametrize("options", [["--spare", "x"], ["--spare", "2"], ["--relaunhces", "1"]])
def test_wrong_options_of_the_script_end_the_job_with_2(cluster, options):
    number = cluster.submit("--nodes", 2, "slurm/train.sbatch", *options, *cluster.train("runs/options"))
    assert cluster.result(number) == ("FAILED", CONFIGURATION)
    assert options[0] in cluster.output(number)


@pytest.mark.parametrize("option", ["--gpus-per-node=9", "--partition=nowhere"])
def test_resources_that_the_cluster_does_not_have_are_an_error_at_submission(cluster, option):
    done = cluster.run("sbatch", option, "slurm/train.sbatch", *cluster.train("runs/refused"))
    assert done.returncode != 0 and done.stderr.strip()


def test_a_crash_loop_stops_after_the_given_number_of_relaunches_with_the_reason(cluster):
    run = cluster.project / "crashes"
    run.mkdir()
    (run / "checkpoints").write_text("a file where a folder must be")
    settings = cluster.train(run, "data.packs_per_step=2")
    number = cluster.submit("--gpus-per-node=1", "slurm/train.sbatch", "--relaunches", 1, *settings)
    assert cluster.result(number) == ("FAILED", CRASH)
    output = cluster.output(number)
    assert output.count("relaunch 1 of at most 1") == 1
    assert "error: 2 crashes without a new checkpoint between them" in output
    assert str(run / "checkpoints") in output.splitlines()[-1]
    assert cluster.job(number)["Restarts"] == "0"
    status = read_status(run)
    assert not status.alive and status.state.startswith("crashed") and len(status.launches) == 2


def test_an_ingest_array_with_a_killed_task_writes_the_shards_of_a_single_process(cluster, clips, launch):
    single, shared = cluster.project / "single", cluster.project / "shared"
    settings = ["ingest.clips_per_block=8", "ingest.workers=1", *cluster.settings]
    code, output = launch("megasora.cli", "ingest", clips, "--out", single, *settings)
    assert code == 0, output
    words = ["--cpus-per-task=1", "slurm/ingest.sbatch", clips, shared, *settings]
    number = cluster.submit("--array=0-2", *words)
    cluster.wait(f"{number}_1", lambda job: job["JobState"] == "RUNNING")
    cluster.run("scancel", "--signal=KILL", "--full", f"{number}_1")
    states = {task: cluster.result(f"{number}_{task}")[0] for task in range(3)}
    assert states == {0: "COMPLETED", 1: "CANCELLED", 2: "COMPLETED"}, cluster.output(number)
    assert not (shared / "dataset.json").exists()
    again = cluster.submit("--array=1", *words)
    assert cluster.result(f"{again}_1") == ("COMPLETED", 0), cluster.output(again)
    names = sorted(p.name for p in single.iterdir() if p.is_file())
    assert "dataset.json" in names and sum(name.endswith(".tar") for name in names) > 3
    for name in names:
        assert (single / name).read_bytes() == (shared / name).read_bytes(), name


def test_one_command_ingests_trains_and_samples(cluster, clips):
    prompt = 'a red circle; $(touch pwned) "moves" right `touch pwned`'
    (cluster.project / "prompts.txt").write_text(f"--help\n\n{prompt}\n")
    (cluster.project / "few").mkdir()
    for path in sorted((clips / "train").iterdir())[:20]:
        (cluster.project / "few" / path.name).symlink_to(path)
    words = ["--clips", "few", "--shards", "chained", "--prompts", "prompts.txt", "--samples", "samples"]
    settings = cluster.train("runs/chain", "run.steps=2", "data.packs_per_step=2", "ingest.workers=1")
    settings.remove(f"data.shards={cluster.shards}")
    done = cluster.run(sys.executable, "tools/chain.py", *words, *settings, SBATCH_GPUS_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in done.stdout.splitlines())
    assert list(jobs) == ["ingest", "train", "sample"]
    assert cluster.result(jobs["sample"] + "_0") == ("COMPLETED", 0), [cluster.output(n) for n in jobs.values()]
    videos = sorted(p.name for p in (cluster.project / "samples").iterdir() if p.suffix == ".mp4")
    assert videos == ["000000.mp4", "000002.mp4"]  # the second line is empty
    sidecar = json.loads((cluster.project / "samples" / "000002.json").read_text())
    assert sidecar["prompt"] == prompt
    assert not list(cluster.project.rglob("pwned"))


def preflight(cluster, run: Path | str, *options: str) -> subprocess.CompletedProcess:
    words = ["-m", "megasora.preflight", "--nodes", "node1,node2", "--processes", "2", "--port", "29000", *options]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=8"]
    return cluster.run(*srun, sys.executable, *words, *cluster.train(run))


def test_the_preflight_names_a_node_with_a_wrong_clock_a_missing_package_and_a_full_disk(cluster, tmp_path):
    import webdataset

    package = next(Path(webdataset.__file__).parents[1].glob("webdataset-*.dist-info"))
    (tmp_path / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 3600\n")
    inject = cluster.project / "inject"
    faults = [
        f"mount --bind {shlex.quote(str(tmp_path))} {shlex.quote(str(inject))}",  # its Python's clock is an hour ahead
        f"mount -t tmpfs none {shlex.quote(str(package))}",
        f"mount -o remount,size=1m {cluster.local}",
    ]
    remedies = [
        f"umount {shlex.quote(str(inject))}", f"umount {shlex.quote(str(package))}",
        f"mount -o remount,size=2048m {cluster.local}",
    ]  # fmt: skip
    try:
        assert cluster.run("bash", "-ec", "\n".join(faults), node="node2").returncode == 0
        start = time.monotonic()
        result = preflight(cluster, "runs/preflight", "--required", "2")
        assert time.monotonic() - start < 20
        assert result.returncode == CRASH and result.stdout == ""
        verdict = next(line for line in result.stderr.splitlines() if line.startswith("megasora: preflight:"))
        assert "1 of 2 nodes are fit, 2 are needed; node2:" in verdict and "node1:" not in verdict
        assert "webdataset is missing" in verdict
        assert re.search(r"its clock is 3[56]\d\d\.\d s ahead of the others", verdict)
        assert f"{cluster.local} has" in verdict and "MiB free, 1024 are needed" in verdict
        without = preflight(cluster, "runs/preflight", "--required", "1", "--exclude-unfit")
        assert (without.returncode, without.stdout) == (0, "node1\n"), without.stderr
    finally:
        assert cluster.run("bash", "-ec", "\n".join(remedies), node="node2").returncode == 0
    assert not (cluster.project / "runs" / "preflight").exists()


def test_a_run_folder_on_a_local_disk_is_an_error(cluster):
    result = preflight(cluster, cluster.local / "run", "--required", "2")
    assert result.returncode == CONFIGURATION and result.stdout == ""
    assert re.search(r"node2: run\.dir=\S+/local/run is not shared: what node1 writes is not seen here", result.stderr)
