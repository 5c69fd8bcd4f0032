"""The first exit that a process of a launch records is kept; a crash leaves others a second to record the cause."""

from __future__ import annotations

import threading
import time

from megasora.errors import CRASH, STOPPED
from megasora.run_log.launches import EXIT, read_exit, record_exit


def test_an_exit_code_recorded_within_a_second_of_a_crash_wins(tmp_path):
    crash = threading.Thread(target=record_exit, args=(tmp_path, CRASH, "RuntimeError: connection closed", 0))
    crash.start()
    time.sleep(0.2)
    record_exit(tmp_path, STOPPED, "saved after step 7", 1)
    crash.join()
    assert read_exit(tmp_path)["code"] == STOPPED


def test_an_exit_that_cannot_be_written_raises_nothing(tmp_path):
    record_exit(tmp_path / "nowhere", STOPPED, "", 0)
    (tmp_path / EXIT).write_text("{incomplete")
    assert read_exit(tmp_path) is None
