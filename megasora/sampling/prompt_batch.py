"""`megasora sample RUN --prompts FILE --out DIR`: a clip a line.

    line 1 --> DIR/000000.mp4 (.png for one frame), .sheet.png, .json       DIR/results.jsonl: a line per clip

All lines are checked before the first is sampled. Clips are sampled together where that fills packs. A line whose files
are there from the same request is not sampled again; one that fails is recorded, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.config import Config
from megasora.errors import DONE, MegaSoraError, describe
from megasora.files import check_folder, read_regular_file
from megasora.ingest.parts import Part
from megasora.jsonl import JsonlWriter, parse_json
from megasora.locks import locked
from megasora.sampling.clip_plan import ClipPlan
from megasora.sampling.outputs import beside, check_output
from megasora.sampling.progress import shown_progress
from megasora.sampling.requests import MAX_SEED, Request
from megasora.sampling.sample_settings import run_settings

if TYPE_CHECKING:
    from megasora.sampling.session import Session

MAX_FILE_BYTES, MAX_SIDECAR_BYTES = 1 << 28, 1 << 24
OpenSession = Callable[[Config], "AbstractContextManager[Session]"]


@dataclass(frozen=True)
class Line:
    """A line of a file: its number from 1, and its values."""

    file: Path
    number: int
    values: dict[str, Any]

    def error(self, error: Exception) -> MegaSoraError:
        return MegaSoraError(f"{self.file} line {self.number}: {describe(error)}")


@dataclass(frozen=True)
class Row:
    """A clip of a batch."""

    line: Line
    plan: ClipPlan
    out: Path


def sample_prompts(options: argparse.Namespace, open_session: OpenSession) -> int:
    """Samples the lines of `options.prompts` into the folder `options.out`; the exit code. Raises MegaSoraError."""
    check_folder(options.out, f"--out {options.out}")
    lines = read_lines(options.prompts, "--prompts")
    part = part_of_command(options.part)
    config = run_settings(options.run, options.overrides, vars(options))
    defaults = {name: getattr(options, name) for name in ("negative_prompt", "size", "frames", "fps")}
    rows = checked(lines, lambda line: row_of(line, defaults, options.seed or 0, config, options.out))
    with open_session(config) as session:
        checked(rows, lambda row: session.check(row.plan, row.out))
        part = Part(part.index * session.data_size + session.data_rank, part.count * session.data_size)
        if session.is_writer:
            options.out.mkdir(parents=True, exist_ok=True)
        session.barrier()
        return BatchRun(session, rows[part.index :: part.count], options.out, part).run()


# ---------------------------------------------------------------- lines


def read_lines(path: Path, flag: str) -> list[Line]:
    """The lines of a .jsonl file of objects, or of a .txt file, each a prompt; empty ones are left out.

    Raises MegaSoraError for all else, with the number of the line.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise MegaSoraError(f"{flag} {path} must end in .jsonl, one object a line, or .txt, one prompt a line")
    try:
        texts = read_regular_file(path, MAX_FILE_BYTES).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise MegaSoraError(f"{flag} {path} cannot be read: {error.strerror or error}") from None
    parse = parse_object if path.suffix == ".jsonl" else parse_prompt
    numbered = [(number, text.strip()) for number, text in enumerate(texts, 1)]
    lines = [Line(path, number, {}) for number, text in numbered if text]
    content = dict(numbered)
    lines = checked(lines, lambda line: dataclasses.replace(line, values=parse(content[line.number])))
    if not lines:
        raise MegaSoraError(f"{flag} {path} has no lines; write one clip a line")
    return lines


def parse_object(text: bytes) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        reason = str(error).split(": line ")[0]  # without the line of the JSON text, which is one line of the file
        raise MegaSoraError(f"it is not JSON: {reason}") from None
    if not isinstance(values, dict):
        raise MegaSoraError('it is not a JSON object, e.g. {"prompt": "a red circle moves right"}')
    return values


def parse_prompt(text: bytes) -> dict[str, Any]:
    try:
        return {"prompt": text.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise MegaSoraError(f"it is not UTF-8 text: {error}") from None


def checked(items: Sequence[Any], check: Callable[[Any], Any]) -> list[Any]:
    """`check(item)` of each item that has a line. Raises MegaSoraError for the first that fails, after all."""
    results, errors = [], []
    for item in items:
        line = item if isinstance(item, Line) else item.line
        try:
            results.append(check(item))
        except (MegaSoraError, OSError) as error:
            errors.append(line.error(error))
    if errors:
        more = f" (and {len(errors) - 1} more of {len(items)} lines are bad)" if len(errors) > 1 else ""
        raise MegaSoraError(f"{errors[0]}{more}")
    return results


def row_of(line: Line, defaults: dict[str, Any], seed: int, config: Config, out: Path) -> Row:
    """The clip of a line. `defaults`: of flags, for the lines that need the value and do not have it."""
    request = Request.from_values({"seed": (seed + line.number - 1) % MAX_SEED, **line.values}, line.file.parent)
    unset = [key for key in needed(request) if getattr(request, key) is None]
    request = dataclasses.replace(request, **{key: defaults[key] for key in unset})
    request.check()
    plan = ClipPlan.of(request, config)
    path = out / f"{line.number - 1:06d}{'.png' if plan.num_frames == 1 else '.mp4'}"
    check_output(path, plan)
    return Row(line, plan, path)


def needed(request: Request) -> list[str]:
    """The values that the given files of a request do not determine."""
    is_fixed = request.kind in ("extend", "prepend", "edit", "keyframes")
    return [
        "negative_prompt", *([] if request.files else ["size"]), *([] if is_fixed else ["frames"]),
        *([] if request.video or request.connect else ["fps"]),
    ]  # fmt: skip


def part_of_command(text: str | None) -> Part:
    """The part of --part, or of a task of a Slurm array."""
    if text is not None:
        return Part.parse(text)
    return Part.from_environment({key: value for key, value in os.environ.items() if key.startswith("SLURM_")})


# ---------------------------------------------------------------- sampling


class BatchRun:
    """Samples rows, and records the result of each in DIR/results.jsonl, or of a part in DIR/results-1-of-8.jsonl."""

    def __init__(self, session: Session, rows: list[Row], out: Path, part: Part):
        self.session, self.rows, self.out = session, rows, out
        self.name = "results.jsonl" if part.count == 1 else f"results-{part.index + 1}-of-{part.count}.jsonl"
        self.errors: list[MegaSoraError] = []

    def run(self) -> int:
        if not self.session.is_writer:
            return self.sample(lambda row, error: None)
        with locked(self.out / f".{self.name}.lock" / "lock", str(self.out / self.name)):
            path = self.out / self.name
            path.unlink(missing_ok=True)
            writer = JsonlWriter(path)
            try:
                return self.sample(lambda row, error: writer.write(result_of(row, error)))
            finally:
                writer.close()

    def sample(self, record: Callable[[Row, Exception | None], None]) -> int:
        from megasora.sampling.session import sample_clips

        is_done = [self.is_done(row) for row in self.rows]
        todo = [row for row, there in zip(self.rows, is_done, strict=True) if not there]
        self.session.barrier()  # all have read what is done
        for row, there in zip(self.rows, is_done, strict=True):
            if there:
                record(row, None)
        label, done = f"{len(todo)} of {len(self.rows)} clips", 0
        with shown_progress(label, self.session.is_writer) as progress:
            for group in self.groups(todo):
                step = lambda fraction, n, at=done: progress((at + n * fraction) / len(todo))  # noqa: E731
                clips = [(row.plan, row.out) for row in group]
                errors = sample_clips(self.session, clips, partial(step, n=len(group)))
                for row, error in zip(group, errors, strict=True):
                    record(row, error)
                    if error is not None:
                        self.errors.append(row.line.error(error))
                done += len(group)
        return self.end(len(todo))

    def end(self, sampled: int) -> int:
        if self.session.is_writer:
            there = f", {len(self.rows) - sampled} were there" if sampled < len(self.rows) else ""
            print(f"{self.out}  {sampled - len(self.errors)} clips sampled{there}")
        if self.errors:
            what = f"{len(self.errors)} of {len(self.rows)} clips failed"
            raise MegaSoraError(f"{what}, see {self.out / self.name}; the first: {self.errors[0]}")
        return DONE

    def is_done(self, row: Row) -> bool:
        """Whether the files of a row are there, from the same request."""
        from megasora.sampling.session import digest, hashes_of

        try:
            sidecar = parse_json(read_regular_file(beside(row.out)[1], MAX_SIDECAR_BYTES))
            if not row.out.is_file() or not isinstance(sidecar, dict):
                return False
            return sidecar.get("fingerprint") == digest(self.session.fingerprint(row.plan, hashes_of(row.plan)))
        except (OSError, ValueError):
            return False

    def groups(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows that are sampled together: as many as fill a pack, of the same number of solver steps.

        So the result of a row does not depend on the others.
        """
        by_key: dict[Any, list[tuple[Row, int]]] = {}
        for row in rows:
            key, tokens = self.session.pack_key(row.plan)
            by_key.setdefault(key, []).append((row, tokens))
        for members in by_key.values():
            group: list[Row] = []
            total = 0
            for row, tokens in members:
                if group and total + tokens > self.session.sampler.config.data.tokens_per_pack:
                    yield group
                    group, total = [], 0
                group.append(row)
                total += tokens
            yield group


def result_of(row: Row, error: Exception | None) -> dict[str, Any]:
    """A line of results.jsonl."""
    result = {"row": row.line.number - 1, "prompt": row.plan.request.prompt}
    return result | ({"file": row.out.name} if error is None else {"error": describe(error)})
