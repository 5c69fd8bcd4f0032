"""What goes wrong, and the codes with which a process ends. slurm/train.sbatch acts by them.

code  meaning           what the batch script does
0     done              ends
1     crash             starts the run again, a bounded number of times
2     configuration     ends: it would be wrong again
3     data              ends: a shard is damaged or missing
4     non-finite        ends: the loss or a gradient is not a finite number
5     hang              starts the run again, as after a crash
75    stopped           puts the job back into the queue: a checkpoint was written on request
"""

DONE, CRASH, CONFIGURATION, DATA, NON_FINITE, HANG, STOPPED = 0, 1, 2, 3, 4, 5, 75


class MegaSoraError(Exception):
    """Its message names the file or key, the numbers and the remedy; entry points print it and exit with its code."""

    exit_code = CONFIGURATION


class DataError(MegaSoraError):
    """A file of the data set is damaged or missing; the message names it and the place in it."""

    exit_code = DATA


class NonFiniteError(MegaSoraError):
    """The loss or the gradient norm is not a finite number; the message names the step."""

    exit_code = NON_FINITE


class StopRequested(MegaSoraError):
    """The run was asked to stop, has written a checkpoint, and goes on by the same command."""

    exit_code = STOPPED
