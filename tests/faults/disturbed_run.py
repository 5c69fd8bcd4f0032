"""Disturbs a run at every launch, as a plan says, and checks each launch and the end of the run.

plan --run_plan--> one Outcome a launch --run_and_check--> figures and violations, compared with the undisturbed run
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from conftest import TINY, train_arguments
from fault_injection import FAULTS, Progress, apply_damage, wait_for
from fault_launch import ForkedRanks, Torchrun
from fault_oracles import (
    check_exit,
    check_processes,
    check_resume,
    check_run,
    largest_loss_error,
    metrics_of,
    step_of,
    whole_checkpoints,
)
from fault_plan import PROCESSES, Launch

from megasora.errors import DONE
from megasora.run_log.launches import read_exit

LAUNCH_SECONDS = 300.0  # a launch that has not ended, or not come to its fault, by then is a failure
EXTRA_LAUNCHES = 3  # undisturbed ones after the plan; the first should be enough
STARTS: dict[str, type[Torchrun] | type[ForkedRanks]] = {"torchrun": Torchrun, "fork": ForkedRanks}


@dataclass(frozen=True)
class Run:
    """The run that is disturbed: its folder, the undisturbed one, and the command without the layout."""

    folder: Path
    reference: Path
    arguments: list[str]  # without run.dir
    steps: int
    every: int  # steps between two checkpoints
    hang_seconds: float  # of launches of which a rank is suspended
    start: type[Torchrun] | type[ForkedRanks]

    def command(self, folder: Path, settings: tuple[str, ...] = ()) -> list[str]:
        return [*self.arguments, f"run.dir={folder}", *settings]


@dataclass
class Outcome:
    """What one launch did."""

    number: int
    layout: str
    bitwise: bool  # in this layout
    damage: str  # what was done before it
    fault: str = ""  # what has happened to it
    code: int = -1  # of the launcher
    recorded: int | None = None  # in exit.json
    resumed: int | None = None  # step; None if it ended before it said so
    reached: int = 0
    first_step_seconds: float | None = None  # after the start
    ended_seconds: float | None = None  # after the fault
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        before = f"{self.damage}; " if self.damage else ""
        first = "-" if self.first_step_seconds is None else f"{self.first_step_seconds:.1f}"
        resumed = "-" if self.resumed is None else self.resumed
        text = (
            f"{self.number:3}  [{self.layout}]  {before}{self.fault or 'undisturbed'}: exit {self.code}, "
            f"exit.json {self.recorded}, steps {resumed} -> {self.reached}, first step {first} s, {self.seconds:.1f} s"
        )
        return "\n     WRONG: ".join([text, *self.problems])


def make_run(out: Path, shards: Path, steps: int, every: int, start: str, hang_seconds: float) -> Run:
    """The undisturbed run in OUT/reference, made if it is not there, and an empty folder OUT/run beside it."""
    settings = [f"run.steps={steps}", f"checkpoint.every={every}", "checkpoint.keep=3", "run.ledger=true"]
    settings += [f"validation.every={max(steps // 4, 1)}"]
    arguments = [text for text in train_arguments(out, shards, TINY) if not text.startswith("run.dir=")]
    run = Run(out / "run", out / "reference", [*arguments, *settings], steps, every, hang_seconds, STARTS[start])
    shutil.rmtree(run.folder, ignore_errors=True)
    if read_exit(run.reference) is None:
        shutil.rmtree(run.reference, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        running = run.start(run.command(run.reference), PROCESSES, out / "reference.log", uuid.uuid4().hex)
        wait_for(running, lambda: False, time.monotonic() + 2 * LAUNCH_SECONDS)
        if running.poll() != 0:
            raise RuntimeError(f"the undisturbed run has failed, see {out / 'reference.log'}")
    return run


def run_plan(run: Run, plan: list[Launch], report: Callable[[object], None] = print) -> list[Outcome]:
    """Launches the run until it exits with 0, each launch disturbed as planned; at most EXTRA_LAUNCHES beyond it."""
    outcomes: list[Outcome] = []
    for number in count(1):
        launch = plan[number - 1] if number <= len(plan) else Launch()
        reached = next((outcome.reached for outcome in reversed(outcomes) if outcome.reached), 0)
        outcomes.append(run_launch(run, number, launch, reached))
        report(outcomes[-1])
        if outcomes[-1].code == DONE or number == len(plan) + EXTRA_LAUNCHES:
            return outcomes
    raise AssertionError


def run_launch(run: Run, number: int, launch: Launch, reached: int) -> Outcome:
    """Damages the checkpoints, starts one launch, disturbs it, waits for its end, and checks what is left of it.

    `reached`: the last step that the launch before it has made.
    """
    whole = whole_checkpoints(run.folder)
    damaged = launch.damage is not None and apply_damage(launch.damage, run.folder / "checkpoints", whole)
    left = whole_checkpoints(run.folder)
    layout, damage = launch.layout, str(launch.damage) if damaged else ""
    outcome = Outcome(number, str(layout), layout.is_bitwise(), damage)
    progress, token = Progress(run.folder), uuid.uuid4().hex
    log = run.folder.parent / f"launch-{number:03d}.log"
    log.write_bytes(b"")
    hang = (f"run.hang_seconds={run.hang_seconds}",) if launch.fault and launch.fault.kind == "stop_rank" else ()
    began, start = time.time(), time.monotonic()
    arguments = run.command(run.folder, (*layout.settings, *hang))
    running = run.start(arguments, layout.processes, log, token)
    try:
        disturb(running, launch, progress, outcome, start)
    except TimeoutError as error:
        running.kill()
        outcome.problems.append(str(error))
    outcome.problems += check_processes(token)  # these may write until they have ended
    outcome.seconds = round(time.monotonic() - start, 1)
    text = log.read_text(encoding="utf-8", errors="replace")
    outcome.code, outcome.recorded = running.poll(), (read_exit(run.folder) or {}).get("code")
    said = re.search(r"from step (\d+) to \d+", text)
    outcome.resumed = int(said[1]) if said else None
    outcome.reached = max((line["step"] for line in metrics_of(run.folder)[progress.first_lines :]), default=0)
    lost = whole[-1].name if len(left) < len(whole) else None
    newest = step_of(left[-1]) if left else 0
    outcome.problems += check_resume(outcome.resumed, newest, lost, reached, run.every, text)
    outcome.problems += check_exit(run.folder, outcome.code, allowed_codes(run, launch, outcome), began)
    return outcome


def disturb(
    running: Torchrun | ForkedRanks, launch: Launch, progress: Progress, outcome: Outcome, start: float
) -> None:
    """Carries out the fault of a launch at its moment, and waits for the end of the launch."""

    def at_moment() -> bool:
        if outcome.first_step_seconds is None and progress.steps() > 0:
            outcome.first_step_seconds = round(time.monotonic() - start, 1)
        return launch.fault is not None and progress.reached(launch.fault)

    deadline = start + LAUNCH_SECONDS
    if wait_for(running, at_moment, deadline):
        time.sleep(launch.fault.delay)
        undo = FAULTS[launch.fault.kind][0](running, launch.fault, progress.run)
        outcome.fault, fault_time = str(launch.fault), time.monotonic()
        try:
            wait_for(running, lambda: at_moment() and False, deadline)
        finally:
            outcome.ended_seconds = round(time.monotonic() - fault_time, 1)
            if undo:
                undo()


def allowed_codes(run: Run, launch: Launch, outcome: Outcome) -> set[int | None]:
    """The codes that may be in exit.json."""
    finished = {DONE} if outcome.reached in (0, run.steps) else set()
    return finished | (set(FAULTS[launch.fault.kind][1]) if outcome.fault else {DONE})


def exact_steps(outcomes: list[Outcome], plan: list[Launch]) -> int:
    """The number of first steps that no launch in another layout than the reference's has computed."""
    launches = zip(outcomes, plan, strict=False)
    others = [outcome for outcome, launch in launches if not launch.layout.is_bitwise() and outcome.reached]
    resumed = [outcome.resumed or 0 for outcome in others]
    return min(resumed, default=max(outcome.reached for outcome in outcomes))


def run_and_check(run: Run, plan: list[Launch], report: Callable[[object], None] = print) -> dict:
    """Carries out a plan; the result, as in chaos.json: `problems` is empty if all oracles hold."""
    outcomes = run_plan(run, plan, report)
    problems = [f"launch {outcome.number}: {text}" for outcome in outcomes for text in outcome.problems]
    exact = exact_steps(outcomes, plan)
    if outcomes[-1].code == DONE:
        problems += check_run(run.folder, run.reference, run.steps, exact)
    else:
        problems.append(f"the run has not ended after {len(outcomes)} launches")
    firsts = [outcome.first_step_seconds for outcome in outcomes if outcome.first_step_seconds is not None]
    return {
        "steps": run.steps,
        "checkpoint_every": run.every,
        "bitwise_steps": exact,
        "largest_loss_error": largest_loss_error(run.folder, run.reference),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "slowest_first_step_seconds": max(firsts, default=None),
        "launches": [asdict(outcome) for outcome in outcomes],
        "problems": problems,
    }
