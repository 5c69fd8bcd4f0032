"""Our run -> a script of plain DeepSpeed -> our run: it trains as one run does, for ZeRO 1, 2 and 3, in fp32 and bf16,
from the exported checkpoint or from a universal one that DeepSpeed made of it."""

import contextlib
import io
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, train, train_arguments
from deepspeed_script import Script, run_scripts

from megasora.build import build_model, patch_dim
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, read_state
from megasora.config import load
from megasora.formats.deepspeed_export import export_deepspeed
from megasora.formats.deepspeed_import import import_deepspeed
from megasora.formats.source import ExportSource
from megasora.parallelize import uses_weight_decay
from megasora.testing.spawn import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START, END = 3, 10  # the script trains steps 4 to 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """`processes`: of the export; unless 2, a universal checkpoint is made of it. `zero`: settings of the script."""

    stage: int
    dtype: str = "fp32"
    processes: int = 2
    zero: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.stage}-of-{self.processes}"


CASES = [
    Case(1),
    Case(2, zero=(("parameter_alignment", True),)),
    Case(3),
    Case(1, "bf16"),
    Case(1, processes=3, zero=(("elastic_checkpoint", True),)),
    Case(3, processes=1, zero=(("sub_group_size", 5000),)),
]


def settings(run: Path, shards: Path, tiny: list[str], case: Case) -> list[str]:
    kept = ["checkpoint.keep=9", f"checkpoint.every={START}", f"run.steps={END}"]
    dtype = f"run.dtype={ {'fp32': 'float32', 'bf16': 'bfloat16'}[case.dtype] }"
    quick = ["validation.clips=1", "validation.bins=1"]
    return [*train_arguments(run, shards, tiny), *kept, *quick, dtype, f"parallel.zero_stage={case.stage}"]


def train_all(runs: list[list[str]]) -> list[str | None]:
    return [train(arguments) for arguments in runs]


def shapes_of(config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = build_model(config, patch_dim(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def export(arguments: list[str], case: Case, out: Path) -> None:
    config = load(arguments[0], arguments[1:])
    folder = Path(config.run.dir) / "checkpoints" / f"step-{START:08d}"
    source = ExportSource(folder, config, read_state(folder), ShardedCheckpoint(folder), "weights")
    dtype = DTYPES[case.dtype]
    export_deepspeed(source, out, shapes_of(config), uses_weight_decay, case.stage, case.processes, dtype)


def make_universal(out: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = types.SimpleNamespace(
        input_folder=str(out / f"global_step{START}"), output_folder=str(out / "universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


@dataclass(frozen=True)
class Runs:
    """Losses by step, and the final tensors, of the uninterrupted runs and of the continued ones."""

    folder: Path
    script_losses: dict[str, list[float]]

    def losses(self, name: str) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_jsonl(self.folder / name)}

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        checkpoint = ShardedCheckpoint(self.folder / name / "checkpoints" / f"step-{END:08d}")
        kinds = ("weights", "exp_avg", "exp_avg_sq")
        return {f"{kind}/{key}": checkpoint.full_tensor(kind, key) for kind in kinds for key in checkpoint.shapes}


@pytest.fixture(scope="module")
def runs(made_once, shards, tiny) -> Runs:
    def make(folder: Path) -> None:
        originals = [settings(folder / dtype, shards, tiny, Case(1, dtype)) for dtype in DTYPES]
        assert run_ranks(train_all, 2, originals) == [[None] * 2] * 2
        scripts = []
        for case in CASES:
            out = folder / f"out-{case.name}"
            export(originals[list(DTYPES).index(case.dtype)], case, out)
            if case.processes != 2:
                make_universal(out)
            scripts.append(
                Script(
                    str(out),
                    str(folder / f"saved-{case.name}"),
                    case.stage,
                    case.dtype,
                    5,
                    case.processes != 2,
                    case.zero,
                )
            )
        torch.save(run_ranks(run_scripts, 2, originals[0], scripts)[0], folder / "losses")
        continued = [settings(folder / case.name, shards, tiny, case) for case in CASES]
        for case, arguments in zip(CASES, continued, strict=True):
            store = CheckpointStore(folder / case.name / "checkpoints")
            import_deepspeed(folder / f"saved-{case.name}", store, shapes_of(load(arguments[0], arguments[1:])))
        assert run_ranks(train_all, 2, continued) == [[None] * len(CASES)] * 2

    folder = made_once("deepspeed", make)
    by_script = torch.load(folder / "losses", weights_only=True)
    return Runs(folder, {case.name: found for case, found in zip(CASES, by_script, strict=True)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_that_a_script_of_deepspeed_continues_is_the_uninterrupted_run(runs, case):
    """Also in bf16: DeepSpeed rounds the same fp32 weights in the same way."""
    expected = runs.losses(case.dtype)
    found = dict(enumerate(runs.script_losses[case.name], START + 1)) | runs.losses(case.name)
    assert sorted(found) == list(range(START + 1, END + 1))
    differences = {step: abs(found[step] / expected[step] - 1) for step in found}
    a, b = runs.tensors(case.dtype), runs.tensors(case.name)
    assert a.keys() == b.keys()
    assert max(differences.values()) < 1e-6, differences
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6
