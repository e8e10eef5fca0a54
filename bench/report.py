"""From rows to files: benchmarks.json, the page, the charts; each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qingyu.bench.charts import draw
from qingyu.bench.page import charts_of, page, quick_table
from qingyu.bench.records import Row
from qingyu.bench.summary import summarize
from qingyu.bench.targets import targets
from qingyu.errors import MissingExtraError

__all__ = ["figures_of", "rendered", "write_report"]


def figures_of(rows: Sequence[Row], *, note: str = "") -> dict[str, Any]:
    """All that benchmarks.json holds but the list of charts; ``note`` is for the page's readers."""
    return {**summarize(rows), "note": note, "targets": [one.written() for one in targets(rows)]}


def rendered(figures: dict[str, Any]) -> str:
    """The page for figures that have a list of their ``charts``."""
    body = page(figures)
    return body + ("\n" + charts_of(figures, figures["charts"]) if figures["charts"] else "")


def write_report(rows: Sequence[Row], folder: Path, *, note: str = "") -> str:
    """Write all files into ``folder``; the table for a terminal. Without matplotlib there are no charts."""
    figures = figures_of(rows, note=note)
    missing = ""
    try:
        figures["charts"] = draw(figures, folder / "benchmarks")
    except MissingExtraError as error:
        figures["charts"] = []
        missing = f"\nno charts: {error}"
    _write(folder / "benchmarks.json", json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
    _write(folder / "benchmarks.md", rendered(figures))
    return quick_table(figures) + missing


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)
