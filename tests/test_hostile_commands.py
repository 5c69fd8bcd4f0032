"""Commands with paths, numbers and outputs that no one would give by intent end in one line, without a traceback."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasora.cli import INTERRUPTED, OUTPUT_CLOSED, main
from megasora.commands.argument_types import location, number, path, whole_number
from megasora.errors import SeveralProblems, describe, printable

SECONDS = 20.0
ROOT = Path(__file__).resolve().parents[1]


def run(arguments: list[str], capsys) -> tuple[int, str]:
    """(exit code, standard error) of a command, which ends in little time; its lines after the usage are one."""
    start = time.process_time()
    try:
        code = main(arguments)
    except SystemExit as leave:  # by argparse, which prints the usage before the error
        code = leave.code
    assert time.process_time() - start < SECONDS, arguments
    error = capsys.readouterr().err
    lines = error.splitlines()
    if lines and lines[0].startswith("usage:"):
        lines = [line for line in lines if ": error: " in line]
    assert len(lines) == 1 and lines[0].isprintable(), (arguments, error)
    return code, lines[0]


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A working folder with a path of each kind."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text").write_text("x")
    Path("empty").touch()
    Path("binary").write_bytes(b"\xff\xfe\0" * 100)
    os.mkfifo("fifo")
    Path("device").symlink_to("/dev/zero")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("run.yaml").write_text("run: {steps: 3}\n")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("run: {steps: 3}\n")  # of a run without a checkpoint
    return tmp_path


PATHS = [
    "missing", "folder", "text", "empty", "binary", "fifo", "device", "loop", "text/x", "dangling/x", "/etc/passwd",
    "/dev/null", "", "a\0b", "a\nb", "\x1b[31mred", "caf\udce9", "x" * 300, "y/" * 3000, "~nobody-of-this-name/x",
]  # fmt: skip
VERBS = {  # @: the path
    "ingest": ["ingest @ --out new", "ingest folder --out @", "ingest folder --out new --config @"],
    "shards": ["shards @", "shards @ --verify", "shards @ --show 1 sheet.png", "shards @ --tokens-per-pack 64"],
    "train": ["train @", "train run.yaml run.dir=@", "train run.yaml data.shards=@", "train run.yaml run.start=init:@"],
    "run folder": ["status @", "report @", "sample @ --prompt x --out a.mp4", "checkpoint export @ --out a.b"],
    "given": [
        "sample run --prompt x --out a.mp4 --image @", "sample run --prompt x --out a.mp4 --video @ --extend 2s",
        "sample run --prompt x --out a.mp4 --connect @ @", "sample run --prompt x --out a.mp4 --keyframes @:0",
        "sample run --prompts @ --out d", "sample run --script @ --out a.mp4",
    ],
    "out": ["sample folder --prompt x --out @", "checkpoint export text --out @", "checkpoint import-wan text --out @"],
    "import": [
        "checkpoint import-wan @ --out w.safetensors", "checkpoint import-wan @ --run w",
        "checkpoint import-dcp @ --run w", "checkpoint import-deepspeed @ --run w",
    ],
    "checkpoint": [
        "checkpoint inspect @", "checkpoint verify @", "checkpoint diff @ run", "checkpoint diff folder @",
        "checkpoint reshape @ --processes 2 --out w", "checkpoint average @ @ --out w",
        "checkpoint average @ --sigma 0.1 --out w", "checkpoint prune @ --keep 1",
        "checkpoint export @ --format dcp --out w", "checkpoint export @ --format deepspeed --out w",
    ],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_path_of_a_command_may_be_hostile(verb, places, capsys):
    before = sorted(places.rglob("*"))
    for line in VERBS[verb]:
        for hostile in PATHS:
            if "run.dir=@" in line and hostile in ("missing", "folder", "empty"):
                continue  # a run may be made there
            arguments = [word.replace("@", hostile) for word in line.split()]
            assert run(arguments, capsys)[0] == 2, arguments
    shutil.rmtree("runs", ignore_errors=True)  # of the training runs that failed without data
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize(
    "folder", ["text", "text/x", "loop", "loop/x", "dangling", "dangling/x", "/etc/passwd", "fifo"]
)
def test_a_run_folder_that_cannot_be_made_is_one_line_that_names_the_setting(folder, places, capsys):
    for check in ([], ["--check"]):
        code, error = run(["train", "run.yaml", f"run.dir={folder}", *check], capsys)
        assert code == 2 and f"run.dir={folder}: " in error and "choose another" in error


def test_a_run_folder_that_this_user_may_not_write_is_one_line(places, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    code, error = run(["train", "run.yaml", "run.dir=folder/run"], capsys)
    assert code == 2 and "run.dir=folder/run: this user may not write into " in error


NUMBERS = ["x", "", "1.5.2", "9" * 5000, "१", "--1", "1e400x", "0x10", "1 2", "\x1b[31m"]


@pytest.mark.parametrize(
    "line",
    [
        "shards folder --tokens-per-pack @", "shards folder --show @ a.png", "ingest folder --out new --part @/8",
        "ingest folder --out new --part 1/@", "sample folder --prompt x --out a.mp4 --frames @",
        "sample folder --prompt x --out a.mp4 --seed @", "sample folder --prompt x --out a.mp4 --fps @",
        "sample folder --prompt x --out a.mp4 --guidance-scale @", "sample folder --prompt x --out a.mp4 --size @x8",
        "sample folder --prompt x --out a.mp4 --num-inference-steps @",
        "sample folder --prompt x --out a.mp4 --solver @", "sample run --prompt x --out a.mp4 --video v.mp4 --extend @",
        "sample run --prompt x --out a.mp4 --edit @ --video v.mp4", "sample run --prompts p.txt --out d --part @/8",
        "sample run --prompt x --out a.mp4 --keyframes a.png:@", "web folder --port @",
    ],
)  # fmt: skip
def test_every_number_of_a_command_may_be_hostile(line, places, capsys):
    for hostile in NUMBERS:
        arguments = [word.replace("@", hostile) for word in line.split()]
        assert run(arguments, capsys)[0] == 2


@pytest.mark.parametrize(
    "line",
    ["doctor x", "status a b", "report", "train", "train run.yaml word", "checkpoint", "ingest folder", "nothing"],
)
def test_missing_and_superfluous_arguments_are_one_line(line, places, capsys):
    assert run(line.split(), capsys)[0] == 2


def test_two_dashes_end_the_options(places, capsys):
    for arguments in (["train", "--", "run.yaml", "run.steps=0"], ["train", "run.yaml", "--", "run.steps=0"]):
        assert "run.steps=0 must be at least 1" in run(arguments, capsys)[1]


def test_the_types_of_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert path("~/a b/") == Path("/home/ann/a b") and location("s3://b/c") == "s3://b/c"
    assert whole_number("1e3") == 1000 and number("2.5") == 2.5
    for kind, text in ((path, ""), (path, "a\0"), (whole_number, "1.5"), (number, "x")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


# ---------------------------------------------------------------- outputs and signals


PRINTING = "import sys, megasora.cli as cli; cli.run_command = lambda _: print('x' * %d) or 0; sys.exit(cli.main([]))"


@pytest.mark.parametrize("characters", [1, 1_000_000])  # less and more than the buffer
def test_a_reader_that_closes_the_pipe_causes_no_traceback(characters):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", PRINTING % characters], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (OUTPUT_CLOSED, "")


def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTING % 1], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_output_that_the_terminal_cannot_show_is_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "from megasora.cli import main; main(['status', 'caf\u00e9'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.stderr.startswith("megasora: error: no run folder caf\\xe9") and done.stderr.count("\n") == 1


def test_an_interrupt_ends_a_command_with_130(capsys, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("megasora.observe.status.read_status", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(["status", "run"]) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "megasora: stopped\n"


# ---------------------------------------------------------------- messages


def test_printable_text_has_no_control_characters_and_a_limit():
    assert printable("a\x1b[31m\n\u202e\udce9b é") == "a\\x1b[31m\\n\\u202e\\udce9b é"
    assert printable("abc" * 5, 4) == "abca... (15 characters)" and printable("abc", 3) == "abc"


def test_a_system_error_names_its_file_and_the_remedy():
    assert describe(OSError(28, "No space left on device", "a/b")) == (
        "[Errno 28] No space left on device: 'a/b'; free some space on its file system"
    )
    assert describe(ValueError("two\nlines\x1b")) == "two\\nlines\\x1b"
    assert describe(SeveralProblems("two\nlines\x1b")) == "two\nlines\\x1b"
