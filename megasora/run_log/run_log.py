"""The logs that the training loop writes.

main process   metrics.jsonl (one line per step), validation.jsonl, wandb, the progress line, run.json
other ranks    only the ledger, if they record the clips of their batches
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

import megasora
from megasora.checkpoint.history import HISTORY, History, write_history
from megasora.checkpoint.start import begins
from megasora.config import Config, to_yaml
from megasora.files import write_text_atomic
from megasora.jsonl import JsonlWriter, finite_or_none
from megasora.optim.step_guard import describe_clips
from megasora.run_log.code_version import source_hash
from megasora.run_log.ledger import Ledger, truncate_ledger
from megasora.run_log.progress import ProgressLine
from megasora.run_log.skipped import describe_skipped_step, log_skipped_step
from megasora.run_log.wandb_log import WandbLog

# of a run, without the logs of its launches
RUN_FILES = (
    "config.yaml", "run.json", "metrics.jsonl", "validation.jsonl", "damaged.jsonl", "skipped.jsonl", "ledger",
    "samples", "train_samples", "reconstructions", "codec", "eval", "report.html", "report.json",
)  # fmt: skip
# what the task has of these is on the progress line, or on that of a validation
STEP_FIGURES = {
    "loss": "loss {:.4f}", "psnr": "psnr {:.2f} dB", "tokens_per_second": "{:,.0f} tokens/s",
    "clips_per_second": "{:,.1f} clips/s",
}  # fmt: skip
VALIDATION_FIGURES = {
    "loss": "loss {:.4f}", "psnr": "psnr {:.2f} dB", "ssim": "ssim {:.4f}", "flicker": "flicker {:.4f}",
}  # fmt: skip


def prepare_run_folder(config: Config, step: int) -> None:
    """Writes config.yaml and removes ledger lines after `step`; on the main process, after a checkpoint was loaded and
    before any rank logs. If a new run begins in the folder of an old one, the old files are moved to previous-N/."""
    run_dir = Path(config.run.dir)
    if begins(run_dir, config.run.start):
        move_run_files(run_dir)
        write_history(run_dir, History(config.run.start))
    elif not (run_dir / HISTORY).exists():  # before the first line of the metrics: steps without it mean a lost file
        write_history(run_dir, History())
    truncate_ledger(run_dir, step)
    write_text_atomic(run_dir / "config.yaml", to_yaml(config))


def move_run_files(run_dir: Path) -> None:
    """Moves the files of an old run to the first free previous-N/, if there are any."""
    files = [path for name in RUN_FILES if os.path.lexists(path := run_dir / name)]
    if files:
        number = 1
        while os.path.lexists(previous := run_dir / f"previous-{number}"):
            number += 1
        previous.mkdir()
        for file in files:
            os.replace(file, previous / file.name)
        print(f"the files of the run that was here before are in {previous}", flush=True)


class RunLog:
    """The open logs of a run, on every rank. A context manager: closes all files, and after success also wandb."""

    def __init__(self, config: Config, rank: int, first_step: int):
        self.config, self.rank, self.run_dir = config, rank, Path(config.run.dir)
        self.is_main = rank == 0
        self.ledger: Ledger | None = None
        if self.is_main:
            self.metrics = JsonlWriter(self.run_dir / "metrics.jsonl")
            self.validation = JsonlWriter(self.run_dir / "validation.jsonl")
            self.wandb = WandbLog(config.wandb, self.run_dir, dataclasses.asdict(config))
            self.progress = ProgressLine(config.run.steps, first_step)
            self.printed_warning: str | None = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.ledger is not None:
            self.ledger.close()
        if not self.is_main:
            return
        self.progress.close()
        if kind is None:
            self.wandb.close()
            self.print_wandb_warning()
        self.metrics.close()
        self.validation.close()

    def write_run_info(self, info: dict[str, Any], device: torch.device, processes: int) -> None:
        """Writes run.json and prints the size of the run; `info`: see Task.run_info, with `parameters`."""
        if not self.is_main:
            return
        machine = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world_size": processes, "device": str(device),
            "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "megasora": megasora.__version__, "code": source_hash(),
        }  # fmt: skip
        write_text_atomic(self.run_dir / "run.json", json.dumps({**machine, **info}, indent=1) + "\n")
        axes = " x ".join(f"{name} {size}" for name, size in info["layout"].items() if size > 1)
        layout = f"{processes} process{'es' * (processes > 1)}{f' ({axes})' if axes else ''} on {device}"
        size = info["parameters"]
        model = f"{size / 1e6:.2f}M parameters" if size >= 10_000 else f"{size} parameters"
        step = [f"{count:,} {key.replace('_', ' ')}" for key, count in info.items() if key.endswith("_per_step")]
        self.print(", ".join([model, f"{info['clips']:,} clips", *step, layout]))
        for notice in info.get("notices", []):
            self.print(notice)

    def print_start(self, step: int, saved_settings: dict[str, Any], settings: dict[str, Any]) -> None:
        """The range of steps, and how the layout differs from that which has saved the checkpoint of `step`."""
        self.print(f"from step {step} to {self.config.run.steps}")
        changes = [
            f"{key} {saved_settings.get(key)} -> {value}"
            for key, value in settings.items()
            if saved_settings.get(key) != value
        ]
        if changes:
            self.print(f"since the checkpoint of step {step}: {', '.join(changes)}")

    def log_step(self, step: int, metrics: dict[str, Any], sample_ids: list[int] | None) -> None:
        """Call on every rank after step `step` (from 1). `sample_ids`: None if another rank records them."""
        if sample_ids is not None and self.config.run.ledger:
            self.ledger = self.ledger or Ledger(self.run_dir, self.rank)
            self.ledger.write(step, sample_ids, "skipped" in metrics, metrics.get("rolled_back_to"))
        if self.is_main:
            metrics = finite_or_none(metrics)
            self.metrics.write(metrics)
            self.wandb.write(step, metrics)
            self.progress.update(step, describe_figures(metrics, STEP_FIGURES, "  "))
            self.print_wandb_warning()

    def log_skipped(self, line: dict[str, Any]) -> None:
        """`line`: of skipped.jsonl."""
        if self.is_main:
            log_skipped_step(self.run_dir, line)
            self.print(describe_skipped_step(line))

    def log_validation(self, step: int, result: dict[str, Any] | None) -> None:
        """`result`: what Task.validate returned."""
        if self.is_main and result is not None:
            result = finite_or_none(result)
            self.validation.write({"step": step, **result})
            figures = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
            self.wandb.write(step, {f"validation_{key}": value for key, value in figures.items()})
            self.print(f"step {step}: validation {describe_figures(figures, VALIDATION_FIGURES, ', ')}")
            if clips := result.get("non_finite_clips"):
                self.print(f"step {step}: the validation loss is not finite in {describe_clips(clips)}")

    def print(self, text: str) -> None:
        if self.is_main:
            self.progress.print(text)

    def print_wandb_warning(self) -> None:
        """Prints what went wrong with wandb, once."""
        if self.wandb.warning and self.wandb.warning != self.printed_warning:
            self.printed_warning = self.wandb.warning
            self.progress.print(self.printed_warning)


def describe_figures(values: dict[str, Any], formats: dict[str, str], separator: str) -> str:
    """The values that `formats` has a text for; "-" in place of None: there is none, or it is not finite."""
    texts = [(text, values[key]) for key, text in formats.items() if key in values]
    return separator.join(re.sub("{.*}", "-", text) if value is None else text.format(value) for text, value in texts)
