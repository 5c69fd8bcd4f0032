"""What several folders of tests share: rendered clips, their shards, and one short training run.

`make test` deals the files to several processes. What is shared is made by the first that asks for it. The files with
the most slow tests are dealt first, then those that mostly wait, beside which the many quick ones run.
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


def is_one_of_several(config: pytest.Config) -> bool:
    """Whether this process has been dealt a part of the suite."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_one_of_several(config):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: (-slow[item.path], item.get_closest_marker("waits") is None))


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, pytestconfig) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): a folder of that name that `make(folder)` has filled, in one of the suite's processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if is_one_of_several(pytestconfig) else base) / "shared"

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
    """launch(module, *arguments, processes=None): a fresh interpreter, or torchrun; (exit code, stdout + stderr)."""

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
    """A run of 20 steps on one process, saved at 10 and 20."""

    def make(run: Path) -> None:
        code, output = launch("megasora.train", *train_arguments(run, shards, tiny))
        assert code == 0, output

    return made_once("single", make)


def train_arguments(run: Path, shards: Path, tiny: list[str]) -> list[str]:
    config = Path(__file__).parent / "runs" / "tiny.yaml"
    every = ["run.steps=20", "checkpoint.every=10", "validation.every=10"]
    return [str(config), f"run.dir={run}", f"data.shards={shards}", *every, *tiny]


def train(arguments: list[str], stop_after: int = 0) -> str | None:
    """What megasora.train does, on each rank of a process group that exists; why it ended before the last step.

    `stop_after`: the step after which the run is asked to stop.
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


def lines(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    """What a run has written, an object a line."""
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def is_running(pid: int) -> bool:
    """Not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def check_repeats(whole: Path, resumed: Path) -> None:
    """`resumed`, a copy of `whole` that went on from step 10 to 20 once more, has repeated it bit for bit."""
    first, again = lines(whole), lines(resumed)[20:]
    assert [line["step"] for line in again] == list(range(11, 21))
    for a, b in zip(first[10:], again, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    check_same_saves(whole, resumed, 20)


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights, averages and means of a checkpoint, whole: `kind/name`."""
    from megasora.checkpoint.sharded import ShardedCheckpoint

    checkpoint = ShardedCheckpoint(run / "checkpoints" / f"step-{step:08d}")
    assert checkpoint.kinds == {"weights", "ema", "exp_avg", "exp_avg_sq"}
    return {f"{kind}/{name}": checkpoint.full_tensor(kind, name) for kind in sorted(checkpoint.kinds) for name in checkpoint.shapes}


def check_same_saves(run: Path, other: Path, step: int) -> None:
    """Two runs have saved the same after a step, bit for bit, in whatever layouts."""
    ours, theirs = saved(run, step), saved(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
