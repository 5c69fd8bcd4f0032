"""What must hold after each launch of a disturbed run, and at its end. Every function returns a list of violations.

O1 losses and gradient norms, O2 the ledger, O3 saved tensors: equal to those of the undisturbed run. O4 a correct
resume or a documented exit code. O5 no process, lock or temporary file is left.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from blake3 import blake3
from conftest import full_tensors
from fault_launch import processes_of

from megasora import errors
from megasora.run_log.ledger import read_ledger

CODES = {code for name, code in vars(errors).items() if name.isupper() and isinstance(code, int)}
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5  # relative, where another layout sums in another order
WEIGHT_TOLERANCE = 1e-4  # of the largest value of a tensor
FREE_KEY_BIAS = "text.blocks.0.qkv.bias"  # the softmax does not depend on a bias of the keys: AdamW steps with noise
BLOCK_BYTES = 1 << 20  # of a file with a table of digests
SAVE_STEPS = 5  # at most so many while a checkpoint is written
GONE_SECONDS = 5.0  # within which all processes of a launch have ended after their launcher


# ---------------------------------------------------------------- after a launch


def check_exit(run: Path, code: int, allowed: set[int | None], start: float) -> list[str]:
    """exit.json is absent or one object of this launch, with an allowed code; 0 if and only if the launcher says so."""
    recorded, file, problems = None, run / "exit.json", []
    if file.exists():
        try:
            recorded = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return [f"exit.json is no JSON: {file.read_bytes()[:80]!r}"]
        if not isinstance(recorded, dict) or not {"code", "reason", "rank", "time"} <= recorded.keys():
            return [f"exit.json has not its keys: {recorded}"]
        if recorded["time"] < start:  # of the launch before
            recorded = None
    recorded_code = recorded["code"] if recorded else None
    if recorded is not None and recorded_code not in CODES:
        problems.append(f"exit.json has the code {recorded_code}, which is not documented")
    if recorded_code not in allowed:
        reason = f": {recorded['reason']}" if recorded else ""
        problems.append(f"exit.json has the code {recorded_code}, not {' or '.join(map(str, allowed))}{reason}")
    if (code == errors.DONE) != (recorded_code == errors.DONE):
        problems.append(f"the launcher exited with {code}, exit.json has {recorded_code}")
    return problems


def check_processes(token: str) -> list[str]:
    """No process of the launch lives GONE_SECONDS after its launcher has ended; those that do are killed."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := processes_of(token)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [f"processes {left} have survived their launcher by {GONE_SECONDS:g} s"] if left else []


def check_resume(resumed: int | None, newest: int, lost: str | None, reached: int, every: int, log: str) -> list[str]:
    """The launch has resumed from the newest whole checkpoint and has lost at most one save interval, and the steps
    during which the next checkpoint was written.

    `lost`: the name of a checkpoint that was damaged before the launch, which it must name. `reached`: the last step
    that the run had made.
    """
    if resumed is None:
        return []
    problems = [] if resumed == newest else [f"resumed from step {resumed}, the newest whole checkpoint is {newest}"]
    if lost is not None and lost not in log:
        problems.append(f"the damaged {lost} was not named")
    if lost is None and resumed < reached - every - SAVE_STEPS:
        problems.append(f"resumed from step {resumed}: more than {every} steps of {reached} are lost")
    return problems


def whole_checkpoints(run: Path) -> list[Path]:
    """Checkpoints whose manifest has its own digest and whose files have theirs, oldest first."""
    return [folder for folder in sorted((run / "checkpoints").glob("step-*")) if is_whole(folder)]


def is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = {folder / name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        whole = folder.name == f"step-{manifest['step']:08d}" and folder / "state.json" in files
        own = manifest.pop("blake3")  # of the rest, as it is written
        whole &= blake3(json.dumps(manifest, indent=1).encode()).hexdigest() == own
        for file, (size, digest) in files.items():
            data = file.read_bytes()
            whole &= len(data) == size and digest_of(file, data) == digest
        return whole
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def digest_of(file: Path, data: bytes) -> str:
    """Of a safetensors file that of its table at the end, if the table has the digests of the blocks before it."""
    if file.suffix != ".safetensors":
        return blake3(data).hexdigest()
    first = 8 + int.from_bytes(data[:8], "little")  # the header is a block
    blocks = -(-(len(data) - first - 32) // (BLOCK_BYTES + 32))
    header, content, table = data[:first], data[first : -32 * (1 + blocks)], data[-32 * (1 + blocks) :]
    pieces = [header, *(content[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(blocks))]
    own = [blake3(piece).digest() for piece in pieces]
    return blake3(table).hexdigest() if b"".join(own) == table else ""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


# ---------------------------------------------------------------- at the end of a run


def check_run(run: Path, reference: Path, steps: int, exact_steps: int) -> list[str]:
    """O1 to O3 and the files of O5. Steps up to `exact_steps` were trained in the layout of the reference alone."""
    return [
        *check_ledger(run, reference, steps),
        *check_metrics(run, reference, steps, exact_steps),
        *check_tensors(run, reference, steps, exact=exact_steps >= steps),
        *check_files(run),
    ]


def check_ledger(run: Path, reference: Path, steps: int) -> list[str]:
    ledger, expected = read_ledger(run), read_ledger(reference)
    if sorted(expected) != list(range(1, steps + 1)):
        return [f"the ledger of the undisturbed run has {len(expected)} steps, not {steps}"]
    wrong = [step for step in sorted(ledger.keys() | expected.keys()) if ledger.get(step) != expected.get(step)]
    return [f"the ledger differs at {len(wrong)} steps, first at step {wrong[0]}"] if wrong else []


def check_metrics(run: Path, reference: Path, steps: int, exact_steps: int) -> list[str]:
    """Every line, also of steps that were repeated after a resume, has the loss and norm of the undisturbed run."""
    expected = {line["step"]: line for line in metrics_of(reference)}
    seen, problems = set(), []
    for line in metrics_of(run):
        step = line["step"]
        seen.add(step)
        for key, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
            allowed = 0.0 if step <= exact_steps else tolerance * abs(expected[step][key])
            if not abs(line[key] - expected[step][key]) <= allowed:
                problems.append(f"step {step}: {key} {line[key]!r}, {expected[step][key]!r} undisturbed")
    missing = set(range(1, steps + 1)) - seen
    if missing:
        problems.append(f"metrics.jsonl has no line of {len(missing)} steps, first of step {min(missing)}")
    return problems[:5]


def metrics_of(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl; a killed process may leave one incomplete."""
    lines = []
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def largest_loss_error(run: Path, reference: Path) -> float:
    """The largest relative difference of a loss from that of the same step of the undisturbed run."""
    expected = {line["step"]: line["loss"] for line in metrics_of(reference)}
    return max(abs(line["loss"] / expected[line["step"]] - 1) for line in metrics_of(run))


def check_tensors(run: Path, reference: Path, step: int, exact: bool) -> list[str]:
    tensors, expected = full_tensors(run, step), full_tensors(reference, step)
    if tensors.keys() != expected.keys():
        return [f"the last checkpoint has other tensors: {sorted(tensors.keys() ^ expected.keys())[:4]}"]
    problems = []
    for name, values in expected.items():
        difference, scale = (tensors[name] - values).abs(), float(values.abs().max())
        if name.endswith(FREE_KEY_BIAS) and not exact:
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        error = float(difference.max())
        if not error <= (0.0 if exact else WEIGHT_TOLERANCE * scale):
            problems.append(f"{name} of the last checkpoint differs by {error:.1e}, its largest value is {scale:.1e}")
    return problems[:5]


def check_files(run: Path) -> list[str]:
    """Locks, temporary files and staging folders have a name that begins with a dot."""
    left = [str(path.relative_to(run)) for path in run.rglob(".*")]
    return [f"left behind: {', '.join(left[:8])}"] if left else []
