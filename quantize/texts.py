"""Texts to calibrate and measure on: a built-in Chinese sample, and what any such list must be.

The sample has about 600 texts of many kinds, 4 to 512 tokens long, evenly spread over the logarithm of their
length. The NOTICE file names where they are from. Not here: reading a user's file of texts (the command line
does), and cutting texts to a model's maximum.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from qingyu.errors import InputError, InvalidOptionError, InvalidTextError

__all__ = ["SAMPLE", "SampleText", "calibration_texts", "checked_texts", "sample"]

SAMPLE = "calibration_zh.jsonl.gz"


@dataclass(frozen=True)
class SampleText:
    """One text of the built-in sample, the source it is from (as in NOTICE) and its kind."""

    source: str
    kind: str
    text: str


@cache
def sample() -> tuple[SampleText, ...]:
    """The built-in sample, always in the same order: by source, kind and length."""
    packed = resources.files("qingyu.quantize").joinpath(SAMPLE).read_bytes()
    return tuple(SampleText(**json.loads(line)) for line in gzip.decompress(packed).splitlines())


def calibration_texts(count: int | None = None, *, seed: int = 0) -> list[str]:
    """``count`` different texts of the built-in sample, its short and its long ones alike; ``None`` is all.

    The same seed gives the same texts in the same order, and fewer texts are the first of more. Lengths are
    stratified: of any few texts in a row, one is from each doubling of the length in characters.

    Raises ``InvalidOptionError`` for a count below 1 or above the size of the sample.

    >>> calibration_texts(10, seed=3) == calibration_texts(20, seed=3)[:10]
    True
    """
    texts = [entry.text for entry in sample()]
    if count is not None and not 1 <= count <= len(texts):
        raise InvalidOptionError(
            "count of calibration texts",
            expected=f"1 to {len(texts)}",
            found=str(count),
            remedy="Give a file of your own texts for more.",
        )
    return _stratified(texts, random.Random(seed))[:count]


def checked_texts(texts: Sequence[str], *, least: int) -> list[str]:
    """``texts`` as a list, once it is known that ``least`` of them are different and not blank.

    Raises ``InvalidOptionError`` when ``texts`` is itself a ``str``, ``InvalidTextError`` for anything in it
    that is not one, and ``InputError`` for no texts, one text repeated, and too few different ones.
    """
    if isinstance(texts, str):
        raise InvalidOptionError(
            "texts", expected="a list of texts", found="one str", remedy="Put it in a list."
        )
    found = list(texts)
    for position, text in enumerate(found):
        if not isinstance(text, str):
            raise InvalidTextError(
                f"text {position}", expected="a str", found=type(text).__name__, remedy="Pass texts as str."
            )
    different = len({text for text in found if text.strip()})
    if different < least:
        raise InputError(
            "too few texts to calibrate and measure on",
            expected=f"at least {least} different texts that are not blank",
            found=_described(found, different),
            remedy="Give texts like those that the model will read, or use the built-in sample.",
        )
    return found


def _described(texts: Sequence[str], different: int) -> str:
    if not texts:
        return "none"
    if len(set(texts)) == 1 and len(texts) > 1:
        return f"one text, {len(texts)} times"
    return f"{different} different among {len(texts)}"


def _stratified(texts: Sequence[str], source: random.Random) -> list[str]:
    """All texts, a random one from each doubling of the length in turn for as long as each has any left."""
    strata: dict[int, list[str]] = {}
    for text in texts:
        strata.setdefault(len(text).bit_length(), []).append(text)
    for stratum in strata.values():
        source.shuffle(stratum)
    turns = itertools.zip_longest(*(strata[doubling] for doubling in sorted(strata)))
    return [text for turn in turns for text in turn if text is not None]
