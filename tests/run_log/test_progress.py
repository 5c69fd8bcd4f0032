"""Progress is one live line on a terminal, and a plain line every 15 seconds elsewhere."""

from __future__ import annotations

import errno
import io
import sys
import types

import pytest

from megasora.run_log import progress as progress_module
from megasora.run_log.progress import ProgressLine


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now.seconds)
    return now


def test_without_a_terminal_a_plain_line_is_printed_every_15_seconds_and_at_the_end(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = ProgressLine(total=100, done=40)
    for step in range(41, 101):
        clock.seconds += 1.0
        progress.update(step, f"loss {step}")
    progress.close()
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["41/100", "56/100", "71/100", "86/100", "100/100"]
    assert lines[1] == "step 56/100  loss 56  0.7 min left"  # 44 steps at 1 s, counted from the resume
    assert lines[-1] == "step 100/100  loss 100  0.0 min left"


def test_messages_are_separate_lines(capsys):
    progress = ProgressLine(total=10, done=0)
    progress.print("step 5: validation loss [/x] 1.5")
    assert capsys.readouterr().err == "step 5: validation loss [/x] 1.5\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_is_live_and_messages_are_not_markup(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = ProgressLine(total=10, done=0)
    progress.update(3, "loss 0.5")
    progress.print("wandb: [/x] [red] failed")
    progress.update(10, "loss 0.4")
    progress.close()
    shown = sys.stderr.getvalue()
    assert "wandb: [/x] [red] failed" in shown and "10/10" in shown and "loss 0.4" in shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_closed_terminal_does_not_end_the_run(is_terminal, clock, monkeypatch):
    closed = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    progress = ProgressLine(total=10, done=0)
    monkeypatch.setattr(closed, "write", lambda text: (_ for _ in ()).throw(OSError(errno.EIO, "closed")))
    for step in range(1, 11):
        clock.seconds += 20.0
        progress.update(step, "loss 0.5")
    progress.print("a message")
    progress.close()
    assert progress.is_closed
