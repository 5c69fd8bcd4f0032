"""The picture of a disturbed run: its step over the wall-clock time of its launches, with a mark at each fault."""

from __future__ import annotations

from pathlib import Path

MARKS = {  # first word of a fault: (its name, its mark)
    "kill": ("SIGKILL", "x"),
    "stop": ("SIGSTOP", "s"),
    "term": ("SIGTERM", "v"),
    "usr1": ("SIGUSR1", "^"),
    "full": ("disk full", "D"),
}


def draw(result: dict, file: Path) -> None:
    """Writes a PNG of `result`, which has the entries of chaos.json."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.add_subplot()
    end, reached = 0.0, 0
    for launch in result["launches"]:
        start, end = end, end + launch["seconds"]
        first = start + (launch["first_step_seconds"] or launch["seconds"])
        resumed = launch["resumed"]
        reached = launch["reached"] or resumed or reached  # the step before, of a launch that was killed at its start
        axes.axvspan(start, end, color="0.96" if launch["number"] % 2 else "0.9", lw=0)
        if resumed is not None:
            axes.plot([first, end], [resumed, reached], color="C0" if launch["bitwise"] else "C1", lw=2)
        if launch["damage"]:
            step = reached if resumed is None else resumed
            axes.plot(first, step, "P", color="C3", ms=8, label="resumed after damage to files")
        if launch["fault"]:
            name, mark = MARKS[launch["fault"].split(" ")[0]]
            axes.plot(end, reached, mark, color="k", ms=7, label=name)
        if launch["problems"]:
            axes.plot(end, reached, "o", mfc="none", mec="r", ms=16, label="violation")
    axes.plot([], [], color="C0", lw=2, label="reference layout")
    axes.plot([], [], color="C1", lw=2, label="another layout")
    axes.set(xlabel="time of the launches, s", ylabel="step", xlim=(0, end), ylim=(-10, result["steps"] * 1.05))
    axes.set_title(f"{len(result['launches'])} launches, seed {result['seed']}: {len(result['problems'])} violations")
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one for each label
    axes.legend(entries.values(), entries.keys(), loc="upper left")
    figure.savefig(file, dpi=110)
