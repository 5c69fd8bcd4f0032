"""Errors, and the exit codes of a process, on which slurm/train.sbatch acts.

code  meaning           what the batch script does
0     done              ends the job
1     crash             restarts the run, a bounded number of times
2     configuration     ends the job: a restart would fail again
3     data              ends the job: a shard is damaged or missing
4     non-finite        ends the job: too many steps in a row with a loss that is not finite, or a spike
5     hang              restarts the run, as after a crash
75    stopped           requeues the job: a checkpoint was saved on request
"""

import errno
import re
from collections.abc import Sequence

DONE, CRASH, CONFIGURATION, DATA, NON_FINITE, HANG, STOPPED = 0, 1, 2, 3, 4, 5, 75


class MegaSoraError(Exception):
    """An error for people: its message names the file or key, the numbers and the remedy.

    Entry points print the message and exit with `exit_code`.
    """

    exit_code = CONFIGURATION


class SeveralProblems(MegaSoraError):
    """An error whose message has several lines. In other messages, a line break is part of a name."""


class DataError(MegaSoraError):
    """A file of the dataset is damaged or missing; the message names the file and the byte offset."""

    exit_code = DATA


class NonFiniteError(MegaSoraError):
    """The loss or the gradient norm is not finite in too many steps in a row, or the loss is a spike although the run
    has rolled back; the message names the steps."""

    exit_code = NON_FINITE


class ReplicaError(MegaSoraError):
    """Tensors that must be equal on several ranks differ; the message names the tensor and the ranks.

    Memory or a GPU may be faulty: the run restarts from its last checkpoint.
    """

    exit_code = CRASH


class StopRequested(MegaSoraError):
    """The run was asked to stop and has saved a checkpoint; the same command resumes it."""

    exit_code = STOPPED


# C0 and C1 controls, signs that turn the direction of text, separators of lines, and lone surrogates, which stand for
# bytes of a name that are no UTF-8
CONTROLS = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
REMEDIES = {  # error number of the system: what to do about it
    errno.ENOSPC: "free some space on its file system",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EROFS: "its file system is read-only; choose another place",
    errno.EACCES: "this user may not; change its permissions, or choose another place",
    errno.EISDIR: "it must be a file; give another path, or move this folder away",
    errno.ENOTDIR: "a part of its path is a file; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def describe(error: Exception) -> str:
    """The message of an error for a terminal, on one line except for SeveralProblems, without control characters; that
    of an OSError with the remedy."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        text += f"; {REMEDIES[error.errno]}"
    return "\n".join(map(printable, text.split("\n") if isinstance(error, SeveralProblems) else [text]))


def printable(text: str, limit: int | None = None) -> str:
    """Text for a terminal, on one line: control characters are escaped; cut after `limit` characters."""
    more = f"... ({len(text)} characters)" if limit is not None and len(text) > limit else ""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text[:limit]) + more


def first_of(names: Sequence[object], most: int) -> str:
    """ "7, 12 and 3 more": the first `most` names, and how many there are beyond them."""
    more = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {more} more" if more > 0 else "")
