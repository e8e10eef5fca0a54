"""Texts to distil on: whole ones, single sentences and passages of every length, made from one list.

A corpus of paragraphs teaches a student neither short queries nor long documents; so sentences are cut out of
the paragraphs, and neighbouring paragraphs are joined. Not here: reading files, and labelled data.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence

from qingyu.errors import InputError, InvalidOptionError, InvalidTextError

__all__ = ["LEAST_TEXTS", "training_texts"]

SENTENCE = re.compile(r"[^。！？!?；;\n]+[。！？!?；;]*")
SENTENCE_CHARACTERS = (6, 120)
PASSAGE_CHARACTERS = (100, 800)  # 512 tokens are some 800 Chinese characters
LEAST_TEXTS = 64  # below this there is nothing to hold out, and nothing to rank


def training_texts(
    texts: Sequence[str],
    *,
    sentences: float = 0.4,
    passages: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Different texts in a random order: the given ones, and sentences and passages made of them.

    ``sentences`` and ``passages`` are how many to make of each, as shares of the given texts; fewer come where
    the texts hold fewer. A sentence has 6 to 120 characters and is part of a longer text; a passage joins
    neighbours in the list up to a length drawn evenly over the logarithm of 100 to 800 characters. ``limit``
    keeps the first so many. The same arguments give the same list.

    Raises ``InvalidTextError`` for what is not a ``str``, ``InputError`` for fewer than 64 different texts,
    ``InvalidOptionError`` for a negative share or limit.
    """
    _check(texts, sentences, passages, limit)
    source = random.Random(seed)
    given = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    cut = list(_sentences(given))
    chosen = source.sample(cut, min(len(cut), round(sentences * len(given))))
    joined = [_passage(given, source) for _ in range(round(passages * len(given)))]
    every = list(dict.fromkeys([*given, *chosen, *joined]))
    if len(every) < LEAST_TEXTS:
        raise InputError(
            "too few texts to train on",
            expected=f"at least {LEAST_TEXTS} different ones",
            found=str(len(every)),
            remedy="Give more text: tens of thousands of sentences make a useful model.",
        )
    source.shuffle(every)
    return every[:limit]


def _check(texts: Sequence[str], sentences: float, passages: float, limit: int | None) -> None:
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidTextError(
                f"text {position}", expected="a str", found=type(text).__name__, remedy="Pass texts as str."
            )
    for name, share in (("sentences", sentences), ("passages", passages)):
        if not 0 <= share <= 10:
            raise InvalidOptionError(
                name, expected="a share from 0 to 10", found=str(share), remedy="0.4 adds 40 % more texts."
            )
    if limit is not None and limit < LEAST_TEXTS:
        raise InvalidOptionError(
            "limit of texts", expected=f"at least {LEAST_TEXTS}", found=str(limit), remedy="Raise it."
        )


def _sentences(texts: Sequence[str]) -> Iterator[str]:
    least, most = SENTENCE_CHARACTERS
    for text in texts:
        parts = [part.strip() for part in SENTENCE.findall(text)]
        if len(parts) > 1:
            yield from (part for part in parts if least <= len(part) <= most)


def _passage(texts: Sequence[str], source: random.Random) -> str:
    least, most = PASSAGE_CHARACTERS
    wanted = math.exp(source.uniform(math.log(least), math.log(most)))
    position = source.randrange(len(texts))
    joined = texts[position]
    while len(joined) < wanted and position + 1 < len(texts):
        position += 1
        joined += texts[position]
    return joined
