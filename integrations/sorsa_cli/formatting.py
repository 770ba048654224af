"""How the commands print: sizes, times, and the width of their tables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

NOT_A_TERMINAL = 140
"""Columns of a table that is written to a file or a pipe, which has no width to fit into; COLUMNS overrides it."""

NARROW = 110
"""Below this many columns, a table puts the two numbers of a pair below each other."""


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, by length."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def console() -> Console:
    """The console that tables are printed to."""
    from rich.console import Console

    found = Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = NOT_A_TERMINAL
    return found


def pair(first: str, between: str, second: str, page: Console) -> str:
    """Two numbers with a sign between them, on two lines where the page is narrow."""
    return f"{first}{between.rstrip()}\n{second}" if page.width < NARROW else f"{first}{between}{second}"
