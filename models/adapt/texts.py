"""Texts to distil on: whole ones, sentences, passages of every length and variants of short texts, made from one list.

A corpus of paragraphs teaches a student neither short queries nor long documents; so sentences are cut out of
the paragraphs, and neighbouring paragraphs are joined. Short texts of one kind may be few; variants of them, with
words of others in the place of their own, show the student what the teacher makes of a changed word (as the data
augmentation of TinyBERT, Jiao et al. 2020, with the corpus' own words). Not here: reading files, and labelled data.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from qingyu.errors import InputError, InvalidOptionError, InvalidTextError

__all__ = ["LEAST_TEXTS", "training_texts"]

SENTENCE = re.compile(r"[^。！？!?；;\n]+[。！？!?；;]*")
SENTENCE_CHARACTERS = (6, 120)
PASSAGE_CHARACTERS = (100, 800)  # 512 tokens are some 800 Chinese characters
VARIED_CHARACTERS = 60  # longer texts change little with a word
LEAST_TEXTS = 64  # below this there is nothing to hold out, and nothing to rank


def training_texts(
    texts: Sequence[str],
    *,
    sentences: float = 0.4,
    passages: float = 0.1,
    variants: float = 0.0,
    words: Callable[[str], Sequence[str]] = list,
    limit: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Different texts in a random order: the given ones, and sentences, passages and variants made of them.

    ``sentences``, ``passages`` and ``variants`` are how many to make of each, as shares of the given texts; fewer
    come where the texts hold fewer. A sentence has 6 to 120 characters and is part of a longer text; a passage joins
    neighbours in the list up to a length drawn evenly over the logarithm of 100 to 800 characters; a variant is a
    given text of up to 60 characters with one to three of its ``words`` (the function's parts of it, characters by
    default) left out or replaced by another's, or the first half of one with the second half of another. ``limit``
    keeps the first so many. The same arguments give the same list.

    Raises ``InvalidTextError`` for what is not a ``str``, ``InputError`` for fewer than 64 different texts,
    ``InvalidOptionError`` for a negative share or limit.
    """
    _check(texts, {"sentences": sentences, "passages": passages, "variants": variants}, limit)
    source = random.Random(seed)
    given = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    cut = list(_sentences(given))
    chosen = source.sample(cut, min(len(cut), round(sentences * len(given))))
    joined = [_passage(given, source) for _ in range(round(passages * len(given)))]
    varied = _variants(given, round(variants * len(given)), words, source)
    every = list(dict.fromkeys([*given, *chosen, *joined, *varied]))
    if len(every) < LEAST_TEXTS:
        raise InputError(
            "too few texts to train on",
            expected=f"at least {LEAST_TEXTS} different ones",
            found=str(len(every)),
            remedy="Give more text: tens of thousands of sentences make a useful model.",
        )
    source.shuffle(every)
    return every[:limit]


def _check(texts: Sequence[str], shares: Mapping[str, float], limit: int | None) -> None:
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidTextError(
                f"text {position}", expected="a str", found=type(text).__name__, remedy="Pass texts as str."
            )
    for name, share in shares.items():
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


def _variants(
    texts: Sequence[str], count: int, words: Callable[[str], Sequence[str]], source: random.Random
) -> Iterator[str]:
    short = [text for text in texts if len(text) <= VARIED_CHARACTERS]
    if count == 0 or len(short) < 2:
        return
    for _ in range(count):
        own, other = (list(words(text)) for text in source.sample(short, 2))
        yield "".join(source.choice(CHANGES)(own, other, source)).strip()


def _replaced(own: list[str], other: list[str], source: random.Random) -> list[str]:
    taken = source.randint(1, 3)
    at, there = source.randrange(len(own)), source.randrange(len(other))
    return [*own[:at], *other[there : there + taken], *own[at + taken :]]


def _dropped(own: list[str], other: list[str], source: random.Random) -> list[str]:
    at = source.randrange(len(own))
    rest = [*own[:at], *own[at + source.randint(1, 3) :]]
    return rest or own


def _crossed(own: list[str], other: list[str], source: random.Random) -> list[str]:
    return [*own[: (len(own) + 1) // 2], *other[len(other) // 2 :]]


CHANGES = (_replaced, _replaced, _dropped, _crossed)  # a changed word twice as often as the others
