"""A new run folder that a command makes, whole or not at all: a checkpoint and config.yaml."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megasora.checkpoint.store import CheckpointStore
from megasora.config import Config, to_yaml
from megasora.files import write_text_atomic
from megasora.formats.safetensors_folder import new_folder

RUN_INFO = "run.json"  # what was trained, on what data


@contextmanager
def new_run(out: Path, config: Config, origin: Path | None = None) -> Iterator[CheckpointStore]:
    """The store of the new run folder `out`, which gets a config.yaml with these settings, and `out` as run.dir.

    `origin`: a checkpoint whose run's run.json is copied, if it is there. Raises MegaSoraError unless `out` is new.
    """
    with new_folder(out) as staging:
        yield CheckpointStore(staging / "checkpoints")
        settings = dataclasses.replace(
            config, run=dataclasses.replace(config.run, dir=str(out), start="resume-or-fresh")
        )
        write_text_atomic(staging / "config.yaml", to_yaml(settings))
        info = origin.absolute().parent.parent / RUN_INFO if origin is not None else None
        if info is not None and info.is_file():
            shutil.copyfile(info, staging / RUN_INFO)
