"""Errors, and the exit codes of a process, on which slurm/train.sbatch acts.

code  meaning           what the batch script does
0     done              ends the job
1     crash             restarts the run, a bounded number of times
2     configuration     ends the job: a restart would fail again
3     data              ends the job: a shard is damaged or missing
4     non-finite        ends the job: the loss or a gradient is not a finite number
5     hang              restarts the run, as after a crash
75    stopped           requeues the job: a checkpoint was saved on request
"""

DONE, CRASH, CONFIGURATION, DATA, NON_FINITE, HANG, STOPPED = 0, 1, 2, 3, 4, 5, 75


class MegaSoraError(Exception):
    """An error for people: its message names the file or key, the numbers and the remedy.

    Entry points print the message and exit with `exit_code`.
    """

    exit_code = CONFIGURATION


class DataError(MegaSoraError):
    """A file of the dataset is damaged or missing; the message names the file and the byte offset."""

    exit_code = DATA


class NonFiniteError(MegaSoraError):
    """The loss or the gradient norm is not a finite number; the message names the step."""

    exit_code = NON_FINITE


class StopRequested(MegaSoraError):
    """The run was asked to stop and has saved a checkpoint; the same command resumes it."""

    exit_code = STOPPED
