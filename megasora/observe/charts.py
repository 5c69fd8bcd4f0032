"""Charts of the report: matplotlib draws SVG in placeholder colours, which become CSS variables of report.html.

So one drawing serves the light and the dark theme of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from megasora.observe.curves import decimate, describe_smoothing, smooth, smoothing_window
from megasora.observe.formatting import compact
from megasora.observe.page_elements import escape
from megasora.observe.run_data import STEP_PHASES, RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSS_COLORS = ("ink", "muted", "line", "accent", "second", "good", *STEP_PHASES, "other")  # variables of report.html
WIDTH, HEIGHT = 420, 224  # units of the SVG, about px
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 6, 34  # margins around the axes


def placeholder_color(name: str) -> str:
    """The colour that stands for a CSS variable in matplotlib's SVG."""
    return f"#fe00{CSS_COLORS.index(name):02x}"


def placeholder_bin_color(index: int, count: int) -> str:
    """The colour that stands for `bin_color(index, count)` in matplotlib's SVG."""
    return f"#fd{index:02x}{count:02x}"


def bin_color(index: int, count: int) -> str:
    """CSS colour of timestep bin `index` of `count`, from clean to noise."""
    return f"color-mix(in oklch, var(--clean), var(--noise) {100 * index / max(count - 1, 1):.0f}%)"


def chart(
    title: str,
    description: str,
    legend: Iterable[tuple[str, str]],
    draw: Callable[[Axes], None],
    x_label: str = "step",
) -> str:
    """HTML of a figure: title, description, legend of (CSS colour, text), and what `draw` draws over whole numbers.

    All text except that at the axes is HTML, so that it stays legible when the chart is scaled down.
    """
    keys = "".join(f'<li><i style="background:{color}"></i>{escape(text)}</li>' for color, text in legend)
    return (
        f'<figure class="card chart"><figcaption><h3>{escape(title)}</h3><p>{escape(description)}</p>'
        f'<ul class="legend">{keys}</ul></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)}: {escape(description)}">'
        f"{inline_svg(render_svg(title, draw, x_label))}</div></figure>"
    )


def render_svg(hash_salt: str, draw: Callable[[Axes], None], x_label: str) -> str:
    """The SVG file that matplotlib writes; `hash_salt` makes its ids reproducible."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    axes_box = (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - BOTTOM - TOP) / HEIGHT)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": hash_salt, "font.size": 10}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_axes(axes_box)
        axes.margins(x=0.02)
        draw(axes)
        style_axes(axes, x_label)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=no_metadata)
    return file.getvalue()


def style_axes(axes: Axes, x_label: str) -> None:
    """Whole numbers on the x axis, a horizontal grid, and no frame except the x axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.patch.set_visible(False)
    first, last = axes.get_xlim()
    if last - first < 1:  # a run of one step
        axes.set_xlim(first - 0.5, last + 0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(placeholder_color("line"))
    axes.grid(axis="y", color=placeholder_color("line"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=placeholder_color("muted"), pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value, 4)))
    axes.set_xlabel(x_label, color=placeholder_color("muted"), labelpad=2)


def inline_svg(svg: str) -> str:
    """matplotlib's SVG file as an element of the page: scalable, without ids, fonts and metadata, in CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"font(-[a-z]+)?: [^;\"]*;? ?", "", svg)  # the page sets the font: .plot text in report.html
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)  # two decimals
    return fill_in_colors(svg)


def fill_in_colors(svg: str) -> str:
    """Replaces the placeholder colours by CSS colours."""
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda m: f"var(--{CSS_COLORS[int(m[1], 16)]})", svg)
    return re.sub(r"#fd([0-9a-f]{2})([0-9a-f]{2})", lambda m: bin_color(int(m[1], 16), int(m[2], 16)), svg)


def smoothed_chart(
    title: str, description: str, label: str, run: RunData, values: np.ndarray, from_zero: bool = True
) -> str:
    """Chart of one value per step and its running mean; "" if no value is finite."""
    if not np.isfinite(values).any():
        return ""

    def draw(axes: Axes) -> None:
        draw_smoothed(axes, run.steps, values)
        set_y_range(axes, values, [smooth(values, smoothing_window(values))], from_zero)

    return chart(title, description, [("var(--accent)", f"{label}, {describe_smoothing(values)}")], draw)


def draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Every step, faint, and the running mean."""
    axes.plot(*decimate(steps, values), color=placeholder_color("accent"), linewidth=0.7, alpha=0.3)
    smoothed = smooth(values, smoothing_window(values))
    draw_line(axes, *decimate(steps, smoothed), placeholder_color("accent"))


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    """A line, with a marker at each value if there are few."""
    marker = "o" if len(steps) <= 40 else ""
    axes.plot(steps, values, color=color, linewidth=1.7, marker=marker, markersize=3.5)


def set_y_range(
    axes: Axes,
    noisy: np.ndarray,
    full: Iterable[np.ndarray] = (),
    from_zero: bool = False,
    least_of_high: float = 0.0,
    may_be_log: bool = True,
) -> None:
    """Sets the range to the middle 99 % of `noisy` and all of `full`, from at least `least_of_high` times the highest
    value on; logarithmic if it spans a factor of 20 and `may_be_log`."""
    noisy = noisy[np.isfinite(noisy)]
    values = np.concatenate([np.quantile(noisy, (0.005, 0.995)) if len(noisy) else noisy, *full])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    high = values.max()
    low = 0.0 if from_zero else max(values.min(), least_of_high * high) if least_of_high else values.min()
    if may_be_log and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low if from_zero else low - margin, high + margin)
