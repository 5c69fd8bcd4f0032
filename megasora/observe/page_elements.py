"""HTML elements of the report page. Text goes through `escape`; parameters called html are HTML already."""

from __future__ import annotations

import html
from typing import Any, NamedTuple


class Page(NamedTuple):
    """What the page of one kind of run has between its head and its configuration."""

    figures: dict[str, Any]  # report.json
    tiles: list[list[str]]  # rows of headline figures, HTML
    sections: list[str]  # HTML, "" for one that has nothing to show
    module: str  # python -m MODULE trains such a run
    data: str  # where its data came from, HTML


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def section(anchor: str, title: str, body_html: str, lead_html: str = "") -> str:
    """A section of the page; `lead_html` is a paragraph under its title."""
    lead = f'<p class="lead">{lead_html}</p>' if lead_html else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body_html}</section>'


def tile(label: str, value_html: str, description: str, meter_html: str = "") -> str:
    """One headline figure."""
    head = f'<div class="card tile"><h3>{escape(label)}</h3><strong>{value_html}</strong>'
    return f"{head}{meter_html}<p>{escape(description)}</p></div>"
