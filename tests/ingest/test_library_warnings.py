"""What libraries print while clips are read is counted by kind, the same for any number of workers, and not shown."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from megasora.config import load
from megasora.data.clip_writer import write_image, write_video
from megasora.ingest import ingest
from megasora.ingest.library_warnings import MAX_KINDS, OTHERS, LibraryWarnings, python_warnings_to
from megasora.ingest.output_folder import SPEC_FILE

NOISY = r"""
import ctypes, logging, os, sys, warnings

def score(frames_FHWC, fps):
    level = int(frames_FHWC[0, 0, 0, 0])
    warnings.warn(f"Corrupt EXIF data. Expecting to read {level} bytes", UserWarning)
    logging.getLogger("decoder").warning("buffer %d at 0x%x\nsecond line", level, 1 << level % 40)
    logging.getLogger("decoder").info("not a warning")
    print("printed to stdout", end="", flush=True)
    print("printed to stderr", file=sys.stderr)
    os.write(2, b"a C library: \xff\x1b[31m\n")
    if level == 30:
        import av
        av.logging.log(av.logging.ERROR, "h264", "error while decoding MB 3 4")
        av.logging.log(av.logging.ERROR, "h264", "error while decoding MB 3 4")
        av.logging.log(av.logging.WARNING, "h264", "deprecated pixel format")
    if level == 40:
        os.write(2, b"corrupted size vs. prev_size\n")
        os.abort()
    return level
"""


@pytest.fixture
def noisy(tmp_path, monkeypatch) -> Path:
    """Four images, of which the last crashes its worker, with a score function that prints in every way."""
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    for level in (10, 20, 30, 40):
        (tmp_path / "clips").mkdir(exist_ok=True)
        write_image(np.full((16, 16, 3), level, np.uint8), tmp_path / "clips" / f"{level}.png")
    return tmp_path / "clips"


def ingest_noisy(clips: Path, out: Path, *overrides: str) -> dict[str, list]:
    settings = ["codec.channels=24", "ingest.scores=[noisy:score]", "ingest.missing_caption=empty", *overrides]
    ingest(clips, out, load(None, settings))
    return json.loads((out / SPEC_FILE).read_text())["report"]["warnings"]


def test_warnings_of_every_kind_are_counted_with_their_first_example(noisy, tmp_path, capfd):
    found = ingest_noisy(noisy, tmp_path / "out", "ingest.workers=1")
    assert {kind: number for kind, (number, _) in found.items()} == {
        "UserWarning: Corrupt EXIF data. Expecting to read N bytes": 4,
        "decoder: buffer N at N second line": 4,
        "printed to stdoutprinted to stderr": 4,
        "a C library: \ufffd\x1b[Nm": 4,
        "libav.h264: error while decoding MB N N": 2,
        "corrupted size vs. prev_size": 1,
    }
    first = found["UserWarning: Corrupt EXIF data. Expecting to read N bytes"][1]
    assert first == f"{noisy / '10.png'}: UserWarning: Corrupt EXIF data. Expecting to read 10 bytes"
    screen = capfd.readouterr()
    assert screen.err == "" and "\x1b" not in screen.out and "\\x1b[31m" in screen.out.replace("\n", "")
    assert "warnings of libraries" in screen.out
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["rejected"] == {"crash": 1}
    block = json.loads((tmp_path / "out" / "blocks" / "000000.json").read_text())
    assert "SIGABRT (corrupted size vs. prev_size)" in block["details"]["examples"]["crash"][0]


def test_counts_do_not_depend_on_workers_and_restarts(noisy, tmp_path):
    one = ingest_noisy(noisy, tmp_path / "one", "ingest.workers=1", "ingest.clips_per_block=2")
    many = ingest_noisy(noisy, tmp_path / "many", "ingest.workers=3", "ingest.clips_per_block=2")
    (tmp_path / "one" / "blocks" / "000001.json").unlink()
    again = ingest_noisy(noisy, tmp_path / "one", "ingest.workers=2", "ingest.clips_per_block=2")
    assert one == many == again


def test_a_clean_ingest_has_no_warnings_and_its_blocks_have_no_such_key(tmp_path, capfd):
    (tmp_path / "clips").mkdir()
    write_video(
        np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8), 12, tmp_path / "clips" / "a.mp4"
    )
    ingest(tmp_path / "clips", tmp_path / "out", load(None, ["ingest.missing_caption=empty", "ingest.workers=1"]))
    assert json.loads((tmp_path / "out" / SPEC_FILE).read_text())["report"]["warnings"] == {}
    details = json.loads((tmp_path / "out" / "blocks" / "000000.json").read_text())["details"]
    assert sorted(details) == ["examples", "first_rejection", "rejected_by_filter"]
    assert capfd.readouterr().err == ""


def test_a_flood_of_lines_is_counted_in_little_memory():
    printed = LibraryWarnings()
    for i in range(10_000):
        printed.add(f"line {i} " + chr(97 + i % 26) * 1000)
    assert len(printed.kinds) == MAX_KINDS + 1 and printed.kinds.total() == 10_000 and printed.kinds[OTHERS] > 0
    assert len(json.dumps(printed.details())) < 20_000


def test_python_warnings_and_logs_of_the_main_process_are_received_and_then_shown_again(capsys):
    received: list[str] = []
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    with python_warnings_to(received.append):
        for _ in range(2):
            warnings.warn("old\nname", DeprecationWarning, stacklevel=1)
        logger.warning("%d tokens are too many", 77)
        logger.info("loaded")
        logging.getLogger("another").error("failed")
    assert received == ["DeprecationWarning: old name"] * 2 + ["a.library: 77 tokens are too many", "another: failed"]
    assert capsys.readouterr().err == "" and logger.handlers == [handler]
    logger.warning("shown")
    assert "shown" in capsys.readouterr().err
