"""Fixtures of several test folders: rendered clips, their shards, and one short training run.

`make test` distributes the test files over several processes. A shared fixture is made by the first process that needs
it. The files with the most slow tests start first, then those that mostly wait, so that quick ones run beside them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported: its kernels then run on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

TINY = [  # a model that trains in milliseconds, with every mechanism on
    "run.seed=3", "data.tokens_per_pack=256", "data.packs_per_step=2", "model.width=32",
    "model.depth=2", "model.heads=2", "codec.channels=24",
    "optim.lr=1e-3", "optim.warmup_steps=5", "optim.ema_decay=0.9",
    "validation.clips=8", "validation.bins=3", "wandb.mode=disabled", "run.threads=1", "sample.num_inference_steps=2",
]  # fmt: skip


def is_xdist_worker(config: pytest.Config) -> bool:
    """Whether this process runs a part of the suite."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_xdist_worker(config):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: (-slow[item.path], item.get_closest_marker("waits") is None))


@pytest.fixture(scope="session", autouse=True)
def signing_key(tmp_path_factory) -> None:
    """The key that samples are signed with is one of the tests."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, pytestconfig) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): the folder of that name, filled by `make(folder)` once for all processes of the suite."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if is_xdist_worker(pytestconfig) else base) / "shared"

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        shared.mkdir(exist_ok=True)
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def clips(made_once) -> Path:
    """60 training clips and 8 held-out ones, mp4 and png."""
    from megasora.testing.clip_files import write_dataset

    return made_once("clips", lambda folder: write_dataset(folder, 60, 8, seed=1, processes=1, show_progress=False))


@pytest.fixture(scope="session")
def shards(made_once, clips) -> Path:
    from megasora.config import load
    from megasora.ingest import ingest

    return made_once("shards", lambda folder: ingest(clips, folder, load(None, TINY)))


@pytest.fixture(scope="session")
def launch():
    """launch(module, *arguments, processes=None): runs a module, or torchrun; (exit code, stdout + stderr)."""

    def run(module: str, *arguments: object, processes: int | None = None, timeout: float = 240) -> tuple[int, str]:
        command = [sys.executable, "-m", module]
        if processes:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module]
            command = [sys.executable, "-m", *torchrun]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def trained(made_once, shards, launch, tiny) -> Path:
    """The run folder of 20 steps on one process, with checkpoints at 10 and 20."""

    def make(run: Path) -> None:
        code, output = launch("megasora.train", *train_arguments(run, shards, tiny))
        assert code == 0, output

    return made_once("single", make)


def train_arguments(run: Path, shards: Path, tiny: list[str]) -> list[str]:
    config = Path(__file__).parent / "runs" / "tiny.yaml"
    every = ["run.steps=20", "checkpoint.every=10", "validation.every=10"]
    return [str(config), f"run.dir={run}", f"data.shards={shards}", *every, *tiny]


def train(arguments: list[str], stop_after: int = 0) -> str | None:
    """Trains as megasora.train does, on each rank of an existing process group; the error that ended it early, or None.

    `stop_after`: the step after which a stop is requested.
    """
    import torch.distributed as dist

    from megasora.config import load
    from megasora.errors import MegaSoraError
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World
    from megasora.tasks.dit import DiTTask
    from megasora.trainer import Trainer

    config = load(arguments[0], arguments[1:])
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"))
    stop_requested = lambda: trainer.step + 1 == stop_after  # noqa: E731
    trainer = Trainer(config, world, DiTTask(config, world, build_mesh(config.parallel, "cpu")), stop_requested)
    try:
        trainer.run()
    except MegaSoraError as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_jsonl(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    """The objects of a JSON lines file of a run."""
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def check_resume_repeats(original: Path, resumed: Path) -> None:
    """Asserts that `resumed`, a copy of `original` resumed from step 10 to 20, has repeated it bit for bit."""
    first, again = read_jsonl(original), read_jsonl(resumed)[20:]
    assert [line["step"] for line in again] == list(range(11, 21))
    for a, b in zip(first[10:], again, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    check_same_checkpoints(original, resumed, 20)


def full_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All full tensors of a checkpoint (weights, EMA weights, moments), by `kind/name`."""
    from megasora.checkpoint.sharded import ShardedCheckpoint

    checkpoint = ShardedCheckpoint(run / "checkpoints" / f"step-{step:08d}")
    assert checkpoint.kinds == {"weights", "ema", "exp_avg", "exp_avg_sq"}
    keys = [(kind, name) for kind in sorted(checkpoint.kinds) for name in checkpoint.shapes]
    return {f"{kind}/{name}": checkpoint.full_tensor(kind, name) for kind, name in keys}


def check_same_checkpoints(run: Path, other: Path, step: int) -> None:
    """Asserts that two runs have saved the same tensors after a step, bit for bit, in any layouts."""
    a, b = full_tensors(run, step), full_tensors(other, step)
    assert a.keys() == b.keys() and len(a) > 100
    assert not [name for name in a if not torch.equal(a[name], b[name])]
