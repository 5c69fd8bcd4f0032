"""`megasora status RUN`: the state of a run, from its folder alone, on any machine that sees the folder.

Input: launches.jsonl, exit.json, the ends of metrics.jsonl and slow_ranks.jsonl, checkpoints/latest, config.yaml.
Output: a table. No slow import is made and no process of the run is contacted: a run counts as dead if its files have
not changed for too long.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.store import LATEST
from megasora.errors import CONFIGURATION, CRASH, DATA, DONE, HANG, NON_FINITE, STOPPED, MegaSoraError, printable
from megasora.jsonl import read_tail
from megasora.observe.formatting import format_duration, pluralize
from megasora.observe.json_kinds import is_kind, keep_kinds, read_object
from megasora.run_log.launches import LAUNCHES, read_exit

WATCH_SECONDS = 2.0
SILENT_SECONDS, SILENT_STEPS = 120.0, 20  # dead after both without a change of its files
SHOWN_LAUNCHES, SHOWN_SLOW, SHOWN_NOTICES = 8, 4, 4
MAX_DIGITS = 20  # of run.steps
RECORDED = {"code": int, "reason": str, "rank": int}  # in exit.json
MAX_TIME = 1e10  # of a launch, seconds
LAUNCH = {"time": float, "processes": int, "host": str, "pid": int, "job": str, "requeues": int, "previous_exit": dict}
SLOW_RANKS = {"time": float, "ranks": list, "hosts": list, "seconds": list, "others": list}
# key of metrics.jsonl -> row of the table and its text; of those that the last step of this kind of run has
FIGURES = {
    "loss": ("loss", "{:.4f}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "perplexity": ("perplexity", "{:,.1f}"),
    "grad_norm": ("gradient norm", "{:.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "clips_per_second": ("clips/s", "{:,.1f}"),
    "mfu": ("MFU", "{:.1%}"),
}
EXIT_NAMES = {
    DONE: "done", CRASH: "crashed", CONFIGURATION: "invalid configuration", DATA: "damaged data",
    NON_FINITE: "non-finite losses or spikes", HANG: "hung", STOPPED: "stopped on request",
}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """State of a run.

    `state`: one line. `alive`: it trains or starts. `figures`: those FIGURES that the last step has, None where it
    has no value. `step_seconds`: of the last step. `launches`: (time, where, how it ended), oldest first. `slow`: the
    ranks that are slower than the others, or "". `notices`: of run.json, on what is slower than it could be.
    """

    state: str
    alive: bool
    step: int
    steps: int | None
    figures: dict[str, float | None]
    step_seconds: float
    checkpoint: str
    launches: list[tuple[float, str, str]]
    slow: str
    notices: list[str]


def read_status(run_dir: Path, now: float | None = None) -> Status:
    """Raises MegaSoraError if `run_dir` is not a run folder."""
    now = time.time() if now is None else now
    if not run_dir.is_dir():
        raise MegaSoraError(f"no run folder {run_dir}; give the run.dir of a run: megasora status runs/demo")
    launches, metrics = read_tail(run_dir / LAUNCHES), read_tail(run_dir / "metrics.jsonl")
    if not launches and not metrics:
        raise MegaSoraError(f"{run_dir} has no {LAUNCHES}: nothing was started here yet; train first, see README.md")
    launches = [{"time": 0.0} | keep_kinds(launch, LAUNCH) for launch in launches]
    line = metrics[-1] if metrics else {}
    last_step = keep_kinds(line, {"step": int, "time_step": float} | dict.fromkeys(FIGURES, float))
    step_seconds = float(last_step.get("time_step", 0.0))
    state, alive = current_state(run_dir, launches, step_seconds, now)
    ends = [describe_exit(launch.get("previous_exit")) for launch in launches[1:]] + [state]
    latest = run_dir / "checkpoints" / LATEST
    return Status(
        state=state,
        alive=alive,
        step=int(last_step.get("step", 0)),
        steps=configured_steps(run_dir),
        figures={key: last_step.get(key) for key in FIGURES if key in line},
        step_seconds=step_seconds,
        checkpoint=f"{latest.read_text().strip()}, {ago(now - latest.stat().st_mtime)}" if latest.is_file() else "none",
        launches=[(launch["time"], describe_launch(launch), end) for launch, end in zip(launches, ends, strict=False)],
        slow=describe_slow_ranks(read_tail(run_dir / "slow_ranks.jsonl"), launches) if alive else "",
        notices=read_notices(run_dir / "run.json"),
    )


def read_notices(path: Path) -> list[str]:
    """None from a file that is missing or damaged."""
    try:
        notices = read_object(path).get("notices")
    except MegaSoraError:
        return []
    return [text for text in notices if is_kind(text, str)][:SHOWN_NOTICES] if is_kind(notices, list) else []


def current_state(run_dir: Path, launches: list[dict[str, Any]], step_seconds: float, now: float) -> tuple[str, bool]:
    """(one line, whether the run is alive)."""
    if recorded := read_exit(run_dir):
        return describe_exit(recorded), False
    silence = now - last_change(run_dir)
    process_gone = bool(launches) and has_ended(launches[-1])
    if process_gone or silence >= max(SILENT_SECONDS, SILENT_STEPS * step_seconds):
        return f"dead: last change {ago(silence)}, killed or hung", False
    return f"running, last change {ago(silence)}", True


def describe_slow_ranks(changes: list[dict[str, Any]], launches: list[dict[str, Any]]) -> str:
    """`changes`: lines of slow_ranks.jsonl, of which those of earlier launches do not count."""
    last = keep_kinds(changes[-1], SLOW_RANKS) if changes else {}
    if not launches or last.get("time", 0) < launches[-1].get("time", 0):
        return ""
    values = zip(*(last.get(key, ()) for key in ("ranks", "hosts", "seconds", "others")), strict=False)
    parts = [
        f"process {rank} on {printable(host)}: {own:.3g} s per step, the others {other:.3g} s"
        for rank, host, own, other in values
        if is_kind(rank, int) and is_kind(host, str) and is_kind(own, float) and is_kind(other, float)
    ]
    return "; ".join(parts[:SHOWN_SLOW]) + f" and {len(parts) - SHOWN_SLOW} more" * (len(parts) > SHOWN_SLOW)


def last_change(run_dir: Path) -> float:
    """Time of the last change of a file that a run writes; 0 if there is none."""
    names = (LAUNCHES, "metrics.jsonl", "validation.jsonl", "logs/rank-00000.log", f"checkpoints/{LATEST}")
    return max((path.stat().st_mtime for name in names if (path := run_dir / name).is_file()), default=0.0)


def has_ended(launch: dict[str, Any]) -> bool:
    """Whether its main process is gone; False for a launch on another machine."""
    if launch.get("host") != platform.node():
        return False
    try:
        os.kill(int(launch["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False


def configured_steps(run_dir: Path) -> int | None:
    """run.steps of config.yaml, which another version may have written: its keys are not validated."""
    from megasora.config import read_yaml

    path = run_dir / "config.yaml"
    run = read_yaml(path).get("run") if path.is_file() else None
    steps = run.get("steps") if isinstance(run, dict) else None
    return int(steps) if isinstance(steps, str) and steps.isdecimal() and len(steps) < MAX_DIGITS else None


def describe_exit(recorded: dict[str, Any] | None) -> str:
    """`recorded`: the contents of exit.json, or None."""
    if not recorded:
        return "killed: no process recorded a reason"
    recorded = keep_kinds(recorded, RECORDED)
    code, reason = recorded.get("code"), recorded.get("reason")
    process = f" (process {recorded.get('rank')})" if code and code != STOPPED else ""  # all processes stop
    return f"{EXIT_NAMES.get(code, f'exit code {code}')}: {reason}{process}"


def describe_launch(launch: dict[str, Any]) -> str:
    text = f"{pluralize(int(launch.get('processes') or 0), 'process')}, {launch.get('host')}"
    if "job" in launch:
        text += f", job {launch['job']}" + (f" requeued {launch['requeues']}x" if launch.get("requeues") else "")
    return text


def ago(seconds: float) -> str:
    return f"{format_duration(seconds)} ago"


def build_table(run_dir: Path, status: Status) -> Any:
    """A table for rich."""
    from rich.table import Table
    from rich.text import Text

    progress = f"{status.step}" + (f" of {status.steps} ({status.step / status.steps:.0%})" if status.steps else "")
    if status.alive and status.steps and status.step_seconds:
        progress += f", about {format_duration((status.steps - status.step) * status.step_seconds)} left"
    rows = {"state": status.state, "step": progress}
    for key, value in status.figures.items():
        name, text = FIGURES[key]
        rows[name] = "-" if value is None else text.format(value)
    rows |= {"checkpoint": status.checkpoint, "restarts": str(max(0, len(status.launches) - 1))}
    if status.slow:
        rows["slow"] = status.slow
    if status.notices:
        rows["notice"] = "; ".join(status.notices)
    for start, where, end in status.launches[-SHOWN_LAUNCHES:]:
        start = min(max(start, 0.0), MAX_TIME)
        rows[time.strftime("%m-%d %H:%M:%S", time.localtime(start))] = f"{where}: {end}"
    table = Table(title=Text(printable(str(run_dir))), title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    return table


def show_status(run_dir: Path, watch: bool) -> None:
    """Prints the table; with `watch`, refreshes it until the run has ended."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        console.width = 160  # so that no row wraps
    if not watch:
        console.print(build_table(run_dir, read_status(run_dir)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = read_status(run_dir)
            live.update(build_table(run_dir, status), refresh=True)
            if not status.alive:
                return
            time.sleep(WATCH_SECONDS)
