"""The report's charts: matplotlib SVG in sentinel colours, which become the CSS variables of report.html."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from megasora.observe.run_folder import PARTS, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PAINTS = ("ink", "muted", "line", "accent", "second", *PARTS, "other")  # CSS variables of report.html


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` steps, fewer at the ends; NaN does not count."""
    finite = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    place = np.arange(len(values))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(values))
    counted = count[high] - count[low]
    return np.where(counted > 0, (total[high] - total[low]) / np.maximum(counted, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a curve: the lowest and highest of each stretch, so that no spike is lost."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    kept = [i[[int(y[i].argmin()), int(y[i].argmax())]] for i in np.array_split(np.arange(len(x)), most // 2)]
    kept = np.unique(np.concatenate(kept))
    return x[kept], y[kept]


def paint(name: str) -> str:
    """The sentinel that stands for a CSS variable in matplotlib's SVG."""
    return f"#fe00{PAINTS.index(name):02x}"


def ramp(place: int, count: int) -> str:
    """CSS colour of bin `place` out of `count`, from the clean end to the noise end."""
    return f"color-mix(in oklch, var(--clean), var(--noise) {100 * place / max(count - 1, 1):.0f}%)"


def ramp_paint(place: int, count: int) -> str:
    return f"#fd{place:02x}{count:02x}"


def compact(value: float, digits: int = 3) -> str:
    """1234567 -> 1.23M, 12000 -> 12k, 0.00012 -> 1.2e-4."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{digits}g}{letter}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def chart(title: str, about: str, legend: Iterable[tuple[str, str]], draw: Callable[[Axes], None]) -> str:
    """A figure of the page: title, a line about it, a legend of (CSS colour, text), and what `draw` draws.

    All words but those at the axes are HTML, so that they stay legible where the chart is scaled down.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height, left, right, top, bottom = 420, 224, 42, 10, 6, 34  # units of the SVG, about px
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.margins(x=0.02)
        draw(axes)
        first, last = axes.get_xlim()
        if last - first < 1:  # a run of one step
            axes.set_xlim(first - 0.5, last + 0.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(paint("line"))
        axes.grid(axis="y", color=paint("line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, colors=paint("muted"), pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value, 4)))
        axes.set_xlabel("step", color=paint("muted"), labelpad=2)
        sink = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", metadata=nothing)

    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"font(-[a-z]+)?: [^;\"]*;? ?", "", svg)  # the page's font; see .plot text in report.html
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda m: f"var(--{PAINTS[int(m[1], 16)]})", svg)
    svg = re.sub(r"#fd([0-9a-f]{2})([0-9a-f]{2})", lambda m: ramp(int(m[1], 16), int(m[2], 16)), svg)
    keys = "".join(f'<li><i style="background:{color}"></i>{escape(text)}</li>' for color, text in legend)
    return (
        f'<figure class="card chart"><figcaption><h3>{escape(title)}</h3><p>{escape(about)}</p>'
        f'<ul class="legend">{keys}</ul></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)}: {escape(about)}">{svg}</div></figure>'
    )


def set_range(axes: Axes, noisy: np.ndarray, whole: Iterable[np.ndarray] = (), zero: bool = False) -> None:
    """Show the middle 99 % of `noisy` and all of `whole`; from `zero`, or logarithmic over a factor of 20."""
    noisy = noisy[np.isfinite(noisy)]
    ends = [np.quantile(noisy, (0.005, 0.995)) if len(noisy) else noisy, *whole]
    values = np.concatenate(ends)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = (0.0 if zero else values.min()), values.max()
    if low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low if zero else low - margin, high + margin)


def window_of(values: np.ndarray) -> int:
    """Steps of the running mean: a fortieth of the run, odd."""
    return max(1, len(values) // 40) | 1


def tell_window(values: np.ndarray) -> str:
    window = window_of(values)
    return f"mean of {window} steps" if window > 1 else "every step"


def draw_noisy(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """One number a step: every step, faint, and the running mean."""
    axes.plot(*thin(steps, values), color=paint("accent"), linewidth=0.7, alpha=0.3)
    draw_points(axes, *thin(steps, smooth(values, window_of(values))), paint("accent"))


def noisy_chart(title: str, about: str, label: str, run: Run, values: np.ndarray, zero: bool = True) -> str:
    """`values` over the steps, no chart where there are none; `zero`: the axis starts there."""
    if not np.isfinite(values).any():
        return ""

    def draw(axes: Axes) -> None:
        draw_noisy(axes, run.steps, values)
        set_range(axes, values, [smooth(values, window_of(values))], zero)

    return chart(title, about, [("var(--accent)", f"{label}, {tell_window(values)}")], draw)


def draw_points(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    """A line, with a mark at each value as long as the marks do not touch."""
    marker = "o" if len(steps) <= 40 else ""
    axes.plot(steps, values, color=color, linewidth=1.7, marker=marker, markersize=3.5)


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)
