"""Frames of interlaced video to progressive frames, one for one, by FFmpeg's bwdif filter."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

TAGS = ("colorspace", "color_range", "color_trc", "color_primaries")


def deinterlace(frames: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Passes (key, frame) pairs on, in order; from the first frame that is marked interlaced on, through the filter.

    The filter changes only the frames that are marked.
    """
    graph, waiting = None, deque()
    for number, (key, frame) in enumerate(frames):
        if graph is None and not frame.interlaced_frame:
            yield key, frame
            continue
        graph = graph or build_graph(frame)
        waiting.append((key, [getattr(frame, tag) for tag in TAGS]))
        frame.pts, frame.time_base = number, Fraction(1, 1000)
        graph.push(frame)
        yield from filtered(graph, waiting)
    if graph is not None:
        graph.push(None)
        yield from filtered(graph, waiting)


def build_graph(frame):
    """A filter graph that deinterlaces frames of this size and format."""
    import av

    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    ).configure()
    return graph


def filtered(graph, waiting: deque) -> Iterator[tuple[Any, Any]]:
    """The frames that are ready, with their keys and colour tags; removes them from `waiting`."""
    import av

    while waiting:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        key, tags = waiting.popleft()
        for name, value in zip(TAGS, tags, strict=True):
            setattr(frame, name, value)
        yield key, frame
