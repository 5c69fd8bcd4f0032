"""`megasora status RUN`: where a run is, alive or dead, from its folder alone, on any machine that sees it.

In: launches.jsonl, exit.json, the end of metrics.jsonl, checkpoints/latest, config.yaml. Out: a table. Nothing is
imported that takes time, and nothing is asked of the run: a run that hangs is seen by its silence.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.store import LATEST
from megasora.errors import CONFIGURATION, CRASH, DATA, DONE, HANG, NON_FINITE, STOPPED, MegaSoraError
from megasora.observe.launches import LAUNCHES, read_exit

TAIL_BYTES = 1 << 16
WATCH_SECONDS = 2.0
SILENT_SECONDS = 120.0  # after which a run that takes steps faster than that is taken for dead
SILENT_STEPS = 20
SHOWN_LAUNCHES = 8
WORDS = {
    DONE: "done", CRASH: "crashed", CONFIGURATION: "refused", DATA: "ended by damaged data",
    NON_FINITE: "ended by a loss that is no finite number", HANG: "hung", STOPPED: "stopped on request",
}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """`state`: one line. `alive`: it trains, or will soon. `launches`: (when, where, how it ended), oldest first."""

    state: str
    alive: bool
    step: int
    steps: int | None
    figures: dict[str, float | None]
    checkpoint: str
    launches: list[tuple[float, str, str]]


def read_status(run: Path, now: float | None = None) -> Status:
    """Raises MegaSoraError where `run` is no run folder."""
    now = time.time() if now is None else now
    if not run.is_dir():
        raise MegaSoraError(f"no run folder {run}; give the run.dir of a run: megasora status runs/demo")
    launches, metrics = tail(run / LAUNCHES), tail(run / "metrics.jsonl")
    if not launches and not metrics:
        raise MegaSoraError(f"{run} has no {LAUNCHES}: nothing was started here yet; train first, see README.md")
    ending, last = read_exit(run), metrics[-1] if metrics else {}
    silence = now - newest_change(run)
    patience = max(SILENT_SECONDS, SILENT_STEPS * float(last.get("time_step") or 0))
    if ending:
        alive, state = False, words_of(ending)
    else:
        gone = bool(launches) and has_ended(launches[-1])
        alive = not gone and silence < patience
        state = f"running, last word {ago(silence)}" if alive else f"dead: no word for {span(silence)}, killed or hung"
    latest = run / "checkpoints" / LATEST
    return Status(
        state=state,
        alive=alive,
        step=int(last.get("step", 0)),
        steps=total_steps(run),
        figures={key: last.get(key) for key in ("loss", "grad_norm", "tokens_per_second", "mfu", "time_step")},
        checkpoint=f"{latest.read_text().strip()}, {ago(now - latest.stat().st_mtime)}" if latest.is_file() else "none",
        launches=[
            (line["time"], place_of(line), end_of(launches[i + 1].get("before")) if i + 1 < len(launches) else state)
            for i, line in enumerate(launches)
        ],
    )


def tail(path: Path) -> list[dict[str, Any]]:
    """The objects in the last lines of a JSONL file; a torn line is left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    found = []
    for line in lines if size <= TAIL_BYTES else lines[1:]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [value for value in found if isinstance(value, dict)]


def newest_change(run: Path) -> float:
    names = (LAUNCHES, "metrics.jsonl", "validation.jsonl", "logs/rank-00000.log", f"checkpoints/{LATEST}")
    return max((path.stat().st_mtime for name in names if (path := run / name).is_file()), default=0.0)


def has_ended(launch: dict[str, Any]) -> bool:
    """Known only of a process of this machine."""
    if launch.get("host") != platform.node():
        return False
    try:
        os.kill(int(launch["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False


def total_steps(run: Path) -> int | None:
    """As it was configured; of any version, so that no key of it is checked."""
    from megasora.config import read_yaml

    path = run / "config.yaml"
    return read_yaml(path).get("run", {}).get("steps") if path.is_file() else None


def words_of(ending: dict[str, Any]) -> str:
    code, reason = ending.get("code"), ending.get("reason")
    return f"{WORDS.get(code, f'ended with {code}')}: {reason}" + (f" (process {ending['rank']})" if code else "")


def end_of(ending: dict[str, Any] | None) -> str:
    return words_of(ending) if ending else "killed: no process has said why"


def place_of(launch: dict[str, Any]) -> str:
    place = f"{launch.get('processes')} processes, {launch.get('host')}"
    if "job" in launch:
        place += f", job {launch['job']}" + (f" requeued {launch['requeues']}x" if launch.get("requeues") else "")
    return place


def span(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0, seconds):.0f} s"


def ago(seconds: float) -> str:
    return f"{span(seconds)} ago"


def render(run: Path, status: Status) -> Any:
    """A table for rich."""
    from rich.table import Table
    from rich.text import Text

    f = status.figures
    progress = f"{status.step}" + (f" of {status.steps} ({status.step / status.steps:.0%})" if status.steps else "")
    if status.alive and status.steps and f["time_step"]:
        progress += f", about {span((status.steps - status.step) * f['time_step'])} left"
    rows = {
        "state": status.state,
        "step": progress,
        "loss": "-" if f["loss"] is None else f"{f['loss']:.4f}",
        "gradient norm": "-" if f["grad_norm"] is None else f"{f['grad_norm']:.4f}",
        "tokens/s": "-" if f["tokens_per_second"] is None else f"{f['tokens_per_second']:,.0f}",
        "MFU": "-" if f["mfu"] is None else f"{f['mfu']:.1%}",
        "checkpoint": status.checkpoint,
        "restarts": str(max(0, len(status.launches) - 1)),
    }
    for when, place, end in status.launches[-SHOWN_LAUNCHES:]:
        rows[f"{time.strftime('%m-%d %H:%M:%S', time.localtime(when))}"] = f"{place}: {end}"
    table = Table(title=str(run), title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def show_status(run: Path, watch: bool) -> None:
    """Prints it; with `watch`, again and again until the run has ended."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        console.width = 160  # read line by line
    if not watch:
        console.print(render(run, read_status(run)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = read_status(run)
            live.update(render(run, status), refresh=True)
            if not status.alive:
                return
            time.sleep(WATCH_SECONDS)
