"""Texts longer than a model reads, cut at the ends of sentences into pieces that it reads whole.

Cut after 。！？；!?; and newlines; a sentence that is itself too long is cut in the middle. Pieces may overlap by the
last sentences of the piece before. Not here: what becomes of the pieces' vectors (``embedder``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["Count", "pieces", "sentences", "spans"]

# Tokens of each text, special ones and the prompt left out; ``None`` for more than the model reads.
Count = Callable[[Sequence[str]], list[int | None]]

SENTENCE = re.compile(r"[^。！？；!?;\n]*[。！？；!?;\n]+|[^。！？；!?;\n]+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end mark; joined they are the text.

    >>> sentences("今天下雨。带伞吗？")
    ['今天下雨。', '带伞吗？']
    """
    return SENTENCE.findall(text)


def pieces(text: str, count: Count, *, most: int, overlap: int = 0) -> list[str]:
    """Consecutive pieces of ``text`` with at most ``most`` tokens each, as few as whole sentences allow.

    With ``overlap`` each piece begins with as many of the last sentences before it as have at most so many tokens
    together. Without, the pieces joined are the text.
    """
    return [text[start:stop] for start, stop in spans(text, count, most=most, overlap=overlap)]


def spans(text: str, count: Count, *, most: int, overlap: int = 0) -> list[tuple[int, int]]:
    """Where the pieces lie that ``pieces`` gives: (start, stop) in characters."""
    parts = _small(sentences(text), count, most)
    made: list[tuple[int, int]] = []
    current: list[tuple[str, int]] = []
    fresh = False  # whether the current piece has anything that the one before it has not
    start = stop = 0
    for sentence, tokens in parts:
        if fresh and sum(length for _, length in current) + tokens > most:
            made.append((start, stop))
            current, fresh = _tail(current, min(overlap, most - tokens)), False
            start = stop - sum(len(part) for part, _ in current)
        current.append((sentence, tokens))
        stop += len(sentence)
        fresh = True
    if fresh:
        made.append((start, stop))
    return made


def _small(parts: Sequence[str], count: Count, most: int) -> list[tuple[str, int]]:
    """The parts with their tokens, those with too many halved until they fit."""
    small: list[tuple[str, int]] = []
    for part, tokens in zip(parts, count(parts), strict=True):
        if tokens is not None and tokens <= most:
            small.append((part, tokens))
        elif len(part) == 1:
            small.append((part, most))  # one character of very many tokens; the model's own cut is left to it
        else:
            middle = len(part) // 2
            small.extend(_small([part[:middle], part[middle:]], count, most))
    return small


def _tail(parts: Sequence[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """As many of the last parts as have ``most`` tokens together."""
    kept: list[tuple[str, int]] = []
    total = 0
    for part in reversed(parts):
        total += part[1]
        if total > most:
            break
        kept.insert(0, part)
    return kept
