"""The collectives over all ranks that saving and loading need, and how ranks agree on an error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from megasora.errors import MegaSoraError

T = TypeVar("T")


class Ranks(Protocol):
    """`megasora.parallel.world.World` has them."""

    rank: int

    def barrier(self) -> None: ...

    def gather_objects(self, value: object) -> list | None: ...

    def broadcast_object(self, value: object) -> Any: ...

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor: ...

    def share_on_node(self, make: Callable[[], T]) -> T: ...


Failure = tuple[bool, int, str, str]  # (is an OSError, errno, message, file)


def failure_of(error: BaseException | None) -> Failure | None:
    """An error as it can be sent to other ranks."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return True, error.errno or errno.EIO, error.strerror or str(error), str(error.filename or "")
    name = "" if isinstance(error, MegaSoraError) else f"{type(error).__name__}: "
    return False, 0, f"{name}{error}", ""


def raise_failure(failure: Failure) -> None:
    """Raises the OSError or MegaSoraError of another rank."""
    is_system, number, message, file = failure
    raise OSError(number, message, file or None) if is_system else MegaSoraError(message)


def attempt(action: Callable[[], object]) -> Failure | None:
    """Calls `action()`; its MegaSoraError or OSError as it can be sent to other ranks, or None."""
    try:
        action()
    except (MegaSoraError, OSError) as error:
        return failure_of(error)
    return None


def raise_first(ranks: Ranks, failure: Failure | None) -> None:
    """Raises the error of the first rank that has one on all ranks; returns if none has."""
    failures = ranks.gather_objects(failure)
    first: Failure | None = ranks.broadcast_object(next((f for f in failures or () if f is not None), None))
    if first is not None:
        raise_failure(first)


def on_all(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action()` returned on this rank; the MegaSoraError or OSError of the first rank that has one is raised on
    all."""
    results: list[T] = []
    raise_first(ranks, attempt(lambda: results.append(action())))
    return results[0]


def on_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action()` returned on the main process, on all ranks; its MegaSoraError or OSError is raised on all."""
    result, error = None, None
    if ranks.rank == 0:
        try:
            result = action()
        except (MegaSoraError, OSError) as caught:
            error = caught
    result, failure = ranks.broadcast_object((result, failure_of(error)))
    if error is not None:
        raise error
    if failure is not None:
        raise_failure(failure)
    return result
