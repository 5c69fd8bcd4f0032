"""Prompts to videos: `Sampler.from_run("RUN").video("a red circle moves right", size=(32, 48), frames=17)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megasora.sampling.sampler import Sampler

__all__ = ["Sampler"]


def __getattr__(name: str) -> Any:
    if name == "Sampler":  # imported when it is used: torch takes a second
        from megasora.sampling.sampler import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
