"""Results of the jobs of worker.py, and their JSON form on the way from a worker process to its pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EncodedClip:
    """A clip whose patches were written to the file of its job."""

    height: int  # pixels
    width: int
    frames: int
    fps: float  # frames per second; 0.0: an image
    grid: list[int]  # latent frames, rows, columns of tokens
    patch_dim: int  # features of a token
    sha256: str  # of the source file
    quality: dict[str, float]  # scores by name


@dataclass(frozen=True)
class FoundScenes:
    """The scenes of a clip."""

    # per scene: start, end in seconds (end None: that of the file), hashes of its first and middle frame
    scenes: list[list[Any]]


@dataclass(frozen=True)
class Rejection:
    """Why a clip is not used."""

    filter_name: str  # one of summary.FILTERS
    reason: str  # short, to be counted
    message: str  # names the file


Result = EncodedClip | FoundScenes | Rejection
TYPES = {result_type.__name__: result_type for result_type in (EncodedClip, FoundScenes, Rejection)}


def to_message(result: Result) -> dict[str, Any]:
    """The result as JSON values."""
    return {"type": type(result).__name__, **asdict(result)}


def from_message(message: dict[str, Any]) -> Result:
    """The inverse of `to_message`."""
    values = dict(message)
    return TYPES[values.pop("type")](**values)
