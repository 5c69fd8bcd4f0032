"""Tables of commands: as wide as they need to be in a pipe or a file, and folded to the width of a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megasora.errors import printable

MAX_WIDTH = 2000  # characters of a line that no terminal limits


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> None:
    """Prints a table; the first `texts` columns are texts, the others numbers, aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, name in enumerate(columns):
        is_text = index < texts
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=MAX_WIDTH)).print(table)
