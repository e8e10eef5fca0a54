"""The terms that a text is found by: pairs of neighbouring Chinese characters, and words of other scripts.

Chinese has no spaces; two characters are most often a word or the border of two, and need no dictionary. The last
character of a run is a term of its own, so that every single character begins a term, and can be searched by it.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable, Iterator

from qingyu.errors import InvalidOptionError, MissingExtraError

__all__ = ["TOKENIZERS", "Words", "query_of", "terms_for"]

Words = Callable[[str], Iterator[str]]

HAN = "㐀-䶿一-鿿豈-﫿々〇\U00020000-\U0003ffff"
RUN = re.compile(rf"(?P<han>[{HAN}]+)|[^\W_{HAN}]+")
MOST_TERMS = 256  # of one query: a longer one is a document, and every term costs a look-up


def bigrams(text: str) -> Iterator[str]:
    """The terms of a text in their order, full width and capitals folded.

    >>> list(bigrams("重置密码，iPhone 15"))
    ['重置', '置密', '密码', '码', 'iphone', '15']
    """
    for match in RUN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match[0]
        if match["han"] is None:
            yield run
        else:
            yield from map(operator.add, run, run[1:])
            yield run[-1]


def jieba_words(text: str) -> Iterator[str]:
    """The words that jieba's search mode cuts a text into, short ones within long ones, too."""
    from jieba import cut_for_search

    for word in cut_for_search(unicodedata.normalize("NFKC", text).casefold()):
        yield from RUN_OF_LETTERS.findall(word)


RUN_OF_LETTERS = re.compile(r"[^\W_]+")
TOKENIZERS: dict[str, Words] = {"bigrams": bigrams, "jieba": jieba_words}


def terms_for(name: str) -> Words:
    """The function that cuts texts into terms; raises ``InvalidOptionError``, or ``MissingExtraError``."""
    if name not in TOKENIZERS:
        raise InvalidOptionError(
            "words", expected=f"one of {', '.join(TOKENIZERS)}", found=repr(name), remedy="Use one of them."
        )
    if name == "jieba":
        _quiet_jieba()
    return TOKENIZERS[name]


def _quiet_jieba() -> None:
    """Import jieba without what it prints, and without the warnings of its own code."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import jieba
        except ImportError:
            raise MissingExtraError(
                "jieba is not installed",
                expected="the package jieba, which cuts Chinese into words",
                found="no such package",
                remedy='Run: pip install "qingyu[jieba]", or leave --words out.',
            ) from None
    jieba.setLogLevel(logging.WARNING)


def query_of(text: str, words: Words) -> str:
    """The FTS5 query for pieces that have any of the terms of a text; empty where it has none.

    The last term of a run of Chinese is one character, which says little after its pair: it is searched by only
    where it is alone, and then as the beginning of any pair.
    """
    terms = list(dict.fromkeys(words(text)))
    single = [term for term in terms if len(term) == 1 and re.match(f"[{HAN}]", term)]
    longer = [term for term in terms if term not in single]
    if longer:
        return " OR ".join(f'"{term}"' for term in longer[:MOST_TERMS])
    return " OR ".join(f'"{term}" *' for term in single[:MOST_TERMS])
