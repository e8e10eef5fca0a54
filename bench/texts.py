"""Chinese texts to measure with: from a file or the built-in sample, joined and cut to the lengths asked for."""

from __future__ import annotations

import gzip
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from qingyu.errors import DataFileError
from qingyu.quantize.texts import sample

__all__ = ["read_sources", "text_of_length", "varied_texts"]

Sources = Mapping[str, Sequence[str]]


def read_sources(path: Path | None) -> dict[str, list[str]]:
    """The texts of a file by source; of the built-in sample where there is no file.

    A line is a source, a tab and a text, or a text alone; ``path`` may end in ``.gz``. Raises ``DataFileError`` when
    the file cannot be read or has no text in it.
    """
    sources: dict[str, list[str]] = {}
    if path is None:
        for entry in sample():
            sources.setdefault(entry.source, []).append(entry.text)
        return sources
    for line in _content(path).split("\n"):
        source, _, text = line.rpartition("\t")
        if text:
            sources.setdefault(source, []).append(text)
    if not sources:
        raise DataFileError(
            f"{path} has no texts",
            expected="lines of text",
            found="none",
            remedy="Give lines of a source, a tab and a text, or of text alone.",
        )
    return sources


def _content(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataFileError(
            f"{path} cannot be read",
            expected="a file of UTF-8 text, or that compressed as .gz",
            found=str(error),
            remedy="Name another file, or none for the built-in sample.",
        ) from error


def text_of_length(own: Sequence[str], length: int, chooser: random.Random) -> str:
    """Texts of one source one after the other, cut at ``length`` characters."""
    text = ""
    while len(text) < length:
        text += chooser.choice(own)
    return text[:length]


def varied_texts(path: Path | None, count: int, *, seed: int = 0) -> list[str]:
    """``count`` texts of 4 to about 700 characters, evenly over the logarithm of their length and over sources.

    ``path`` and errors are those of ``read_sources``.
    """
    sources = read_sources(path)
    chooser = random.Random(seed)
    names = sorted(sources)
    lengths = (round(4 * (700 / 4) ** chooser.random()) for _ in range(count))
    return [
        text_of_length(sources[names[n % len(names)]], length, chooser) for n, length in enumerate(lengths)
    ]
