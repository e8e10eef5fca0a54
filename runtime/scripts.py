"""Traditional Chinese read as simplified, or the reverse, on request: OpenCC before the tokenizer (extra ``opencc``).

Only OpenCC's ``t2s`` and ``s2t`` are used. They put one character in the place of one, so that character n of what the
model reads is character n of the caller's text, and every span stays true; a text that comes back with another length
is an error. Not here: words of a region (軟體 for 软件), which have other lengths, and width and compatibility forms,
which ``unicode_form="NFKC"`` folds.

The one module of the runtime that imports a fifth package, and only when a model is opened with ``script``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Literal, get_args

from qingyu.errors import InvalidOptionError, MissingExtraError

__all__ = ["REACH", "Script", "converter"]

Script = Literal["simplified", "traditional"]
CONFIGURATIONS = {"simplified": "t2s", "traditional": "s2t"}
REMEDY = 'Run: pip install "qingyu[opencc]"'
# Characters after a place that can decide what becomes of it; OpenCC's longest phrase (1.4.2) has 15.
REACH = 64

# Kangxi radicals and their supplement, which PDF files are full of, as the characters that they look like. NFKC folds
# them, too, but after the conversion, which knows characters only.
RADICALS = {
    number: form
    for number in range(0x2E80, 0x2FE0)
    if (form := unicodedata.normalize("NFKC", chr(number))) != chr(number)
}


def converter(script: Script, *, fold: bool = False) -> Callable[[str], str]:
    """A function from a text to the same in ``script``, character for character; thread-safe.

    What is not Chinese, or in that script already, stays as it is. ``fold`` takes radicals for characters. Raises
    ``InvalidOptionError`` for another script, and ``MissingExtraError`` without a usable OpenCC.
    """
    if script not in get_args(Script):
        raise InvalidOptionError(
            "script",
            expected='"simplified", "traditional" or None',
            found=repr(script),
            remedy="Use one of them.",
        )
    try:
        from opencc import OpenCC

        convert = OpenCC(CONFIGURATIONS[script]).convert
    except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
        raise MissingExtraError(
            "the extra 'opencc' is not installed",
            expected="the package opencc",
            found=f"{type(error).__name__}: {error}",
            remedy=REMEDY,
        ) from None

    def converted(text: str) -> str:
        if text.isascii():
            return text
        found = str(convert(text.translate(RADICALS) if fold else text))
        if len(found) != len(text):
            raise MissingExtraError(
                "the installed opencc does not keep characters in their places",
                expected=f"{len(text)} characters",
                found=f"{len(found)}",
                remedy='Run: pip install --upgrade "qingyu[opencc]"',
            )
        return found

    return converted
