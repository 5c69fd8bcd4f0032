"""The JSON file of a benchmark: date, commit and machine first, then the results."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch


def environment() -> dict[str, object]:
    """Date, commit, machine and versions; the commit is None outside of a git checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changes = (
            git("rev-parse", "HEAD"),
            bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        )
    except (OSError, subprocess.CalledProcessError):
        commit, changes = None, None
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changes,
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write_record(path: Path, head: Mapping[str, object], body: Mapping[str, object]) -> None:
    """Writes `head`, from `environment`, and `body`, the results. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **body}, indent=1, default=float) + "\n", encoding="utf-8")
