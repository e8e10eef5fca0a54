"""Plain tables for a terminal, aligned for text in which Chinese characters are two cells wide."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence

__all__ = ["clip", "facts", "render", "width"]


def width(text: str) -> int:
    """Terminal cells that a text takes.

    >>> width("轻语 ok")
    7
    """
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, cells: int) -> str:
    """The text on one line in at most so many cells, ending in … where it was cut.

    >>> clip("今天天气真好", 9)
    '今天天气…'
    """
    shown = "".join(c if c.isprintable() else " " for c in text)
    if width(shown) <= cells:
        return shown
    kept, used = [], 1
    for character in shown:
        used += _cells(character)
        if used > cells:
            break
        kept.append(character)
    return "".join(kept) + "…"


def render(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> str:
    """A table as text; the columns in ``right`` are aligned to the right, as figures are."""
    lines = [list(header), *map(list, rows)]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = []
        for column, cell in enumerate(cells):
            blank = " " * (widths[column] - width(cell))
            padded.append(blank + cell if column in right else cell + blank)
        return "  ".join(padded).rstrip()

    return "\n".join([row(lines[0]), "  ".join("─" * cells for cells in widths), *map(row, lines[1:])])


def facts(values: Mapping[str, object]) -> str:
    """Names and values, one a line, values aligned."""
    cells = max(map(width, values))
    return "\n".join(
        f"{name}{' ' * (cells - width(name))}  {_shown(value)}" for name, value in values.items()
    )


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else str(value)
