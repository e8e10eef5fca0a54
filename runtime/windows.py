"""The window cut: the first tokens of a long text without tokenizing the rest of it.

``tokenizers`` truncates after tokenizing, so ten megabytes of text cost ten seconds and gigabytes for 512
tokens. Here a text is tokenized from its start in windows that end at *safe cuts*: positions where the
tokens before are the same whatever follows. The ids are those of tokenizing everything and then truncating.

Safe cuts are known for two kinds of tokenizer, recognised by their parts:

- BertPreTokenizer + WordPiece (BERT): words never reach across whitespace, ASCII and common Chinese
  punctuation, or a basic Han character. The text after such a cut can be tokenized on its own.
- Metaspace + Unigram (XLM-R): words start at a space. Inside a word, a position that no vocabulary piece
  can span is passed by every segmentation, so the best one up to there does not depend on what follows.

Known difference: where ``LIMIT`` characters (or 16 a token, if more) bring no safe cut, or too few tokens,
the text ends there; that takes a run of rare characters without one space, mark or common Han character.
Not here: other tokenizers (BPE and the like, or added tokens that match normalized text), which are
tokenized whole whatever the length.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

__all__ = ["Cut", "Head", "Part", "Rules", "View", "condense", "encode_head", "is_plain", "rules_for"]

LIMIT = 1 << 15  # characters; the worst windows of that size (emoji in XLM-R) take 0.1 s and 20 MB
RUN = 64  # a run of blanks shorter than this is not worth shortening
PIECE_LIMIT = (
    64  # characters; SentencePiece trains pieces of at most 16, longer ones make spans costly to test
)
CANDIDATES = 256  # positions tried from the end of a window for a cut inside a word

HAN = "一-鿿"
PRINTABLE = "!-~"  # ASCII without the space
MARKS = "、。〈〉《》「」『』【】！（），：；？“”‘’—…"
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
SPACES += "\u2028\u2029\u202f\u205f\u3000"
CONTROLS = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) + "\ufffd"
INVISIBLE = "\xad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\ufeff"
# Characters that BERT reads as parts of a word, whatever the case, accent and width options, and that every
# Unicode table in use knows: a character newer than the tokenizer's own table is dropped by it instead.
WORD = "0-9A-Za-zÀ-ÖØ-öø-ÿΑ-ΡΣ-Ωα-ωА-яぁ-ゖァ-ヺ가-힣\U0001f300-\U0001f320\U0001f400-\U0001f43e\U0001f601-\U0001f610"


class Cut(NamedTuple):
    """A safe position in a window; ``resumable`` if the text from there can be tokenized on its own."""

    position: int
    resumable: bool


class Rules(Protocol):
    """What one kind of tokenizer allows: runs that may be shortened, and where a window may end."""

    @property
    def runs(self) -> re.Pattern[str]:
        """Runs that give the same ids when shortened, each alternative a named group."""
        ...

    @property
    def keep(self) -> Mapping[str, tuple[int, int]]:
        """Group of ``runs`` -> characters kept at its start and end."""
        ...

    def cut(self, text: str) -> Cut | None:
        """A safe cut of a window that is not the end of the text, as far right as is cheap, or ``None``."""
        ...


@dataclass(frozen=True)
class View:
    """``text[start:stop]`` with long runs shortened; same ids as the original."""

    text: str
    start: int
    stop: int
    deleted_at: tuple[int, ...] = ()  # positions in the shortened text ...
    deleted: tuple[int, ...] = ()  # ... and characters missing up to and including each

    def origin(self, position: int) -> int:
        """The position in the original text of one in the shortened text."""
        before = bisect_right(self.deleted_at, position)
        return self.start + position + (self.deleted[before - 1] if before else 0)


class Part(NamedTuple):
    """The encoding of a stretch of text, without special tokens of the post-processor."""

    encoding: Encoding
    view: View


class Head(NamedTuple):
    """Consecutive parts from the start of a text; ``limited`` if the text was ended by ``LIMIT``."""

    parts: list[Part]
    limited: bool


def encode_head(text: str, need: int, encode: Callable[[str], Encoding], rules: Rules, window: int) -> Head:
    """Encodings of the start of ``text`` that hold its first ``need`` tokens, or all of them.

    ``window`` is the number of characters tokenized at once; it grows where it holds no safe cut. They may
    hold more than ``need`` tokens; those are tokens of the text too.
    """
    parts: list[Part] = []
    base, size, limit = 0, window, max(LIMIT, 16 * need)
    while base < len(text):
        view = condense(text, base, min(base + size, len(text)), rules)
        at_end, at_limit = view.stop == len(text), size >= limit
        cut = None if at_end else rules.cut(view.text)
        if cut is None and not (at_end or at_limit):
            size *= 2
            continue
        part = Part(encode(view.text[: cut.position] if cut else view.text), view)
        enough = len(part.encoding) >= need
        if cut is None or enough or (at_limit and not cut.resumable):
            return Head([*parts, part], limited=not (at_end or enough))
        if cut.resumable:
            parts.append(part)
            base, size, need = view.origin(cut.position), window, need - len(part.encoding)
        else:
            size *= 2
    return Head(parts, limited=False)


def condense(text: str, start: int, stop: int, rules: Rules) -> View:
    """``text[start:stop]`` with long runs shortened; a run that reaches ``stop`` is followed to its end."""
    pieces: list[str] = []
    deleted_at: list[int] = []
    deleted: list[int] = []
    position, length, missing = start, 0, 0
    for match in rules.runs.finditer(text, start, stop):
        group = match.lastgroup
        first, last = rules.keep[group] if group else (0, 0)
        end = match.end()
        if end == stop:
            whole = rules.runs.match(text, match.start())
            stop = end = whole.end() if whole else end
        gap = slice(match.start() + first, end - last)
        if gap.start >= gap.stop:
            continue
        pieces.append(text[position : gap.start])
        length += gap.start - position
        missing += gap.stop - gap.start
        deleted_at.append(length)
        deleted.append(missing)
        position = gap.stop
    pieces.append(text[position:stop])
    return View("".join(pieces), start, stop, tuple(deleted_at), tuple(deleted))


@dataclass(frozen=True)
class WordRules:
    """Words end at every boundary character, so each stretch between two boundaries stands alone."""

    runs: re.Pattern[str]
    keep: Mapping[str, tuple[int, int]]
    last_boundary: re.Pattern[str]

    def cut(self, text: str) -> Cut | None:
        """Before the last boundary character, except one that starts the text."""
        match = self.last_boundary.match(text)
        return Cut(match.start(1), resumable=True) if match else None


@dataclass(frozen=True)
class UnigramRules:
    """Words start at a space; inside a word, a position that no piece spans is safe but not resumable."""

    runs: re.Pattern[str]
    keep: Mapping[str, tuple[int, int]]
    last_space: re.Pattern[str]
    inner: frozenset[str]  # characters that stand inside an added token: never cut before one
    backend: Backend = field(repr=False, compare=False)
    _forms: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def cut(self, text: str) -> Cut | None:
        """Before the last space that follows a plain character, or else inside a word."""
        match = self.last_space.match(text)
        if match:
            return Cut(match.start(1), resumable=True)
        reach = self.longest
        last = len(text) - reach - 1
        for position in range(last, max(reach, last - CANDIDATES), -1):
            if text[position] not in self.inner and self._unspanned(text, position):
                return Cut(position, resumable=False)
        return None

    @cached_property
    def longest(self) -> int:
        """Characters of the longest piece; one pass over the vocabulary, when the first long text comes."""
        size = self.backend.get_vocab_size(with_added_tokens=True)
        # Measured: 5-8 ms for 34,340 pieces. `get_vocab` takes twice as long, and a hundred bytes a piece.
        pieces = filter(None, map(self.backend.id_to_token, range(size)))
        longest = max(map(len, pieces), default=0)
        return longest if longest <= PIECE_LIMIT else 1 << 62

    def _unspanned(self, text: str, position: int) -> bool:
        """Whether no piece reaches over ``position``, and none of it can fuse into one unknown token.

        All characters within reach must be plain, and each must normalize to one, so that pieces can be
        looked up. One more on either side keeps combining marks out of reach.
        """
        reach = self.longest
        zone = text[position - reach : position + reach + 1]
        if not _PLAIN.fullmatch(zone):
            return False
        forms = [self._form(character) for character in zone]
        if any(len(form) != 1 for form in forms):
            return False
        written, known = "".join(forms), self.backend.token_to_id
        return known(written[reach]) is not None and all(
            known(written[start:end]) is None
            for start in range(1, reach)
            for end in range(reach + 1, start + reach + 1)
        )

    def _form(self, character: str) -> str:
        """A plain character as the normalizer leaves it; all that are accepted treat such ones singly."""
        form = self._forms.get(character)
        if form is None:
            form = self._forms[character] = _normalized(self.backend, character)
        return form


def is_plain(text: str) -> bool:
    """Whether no normalizer makes more characters of the text than it has."""
    return _PLAIN_OR_BLANK.fullmatch(text) is not None


_PLAIN_OR_BLANK = re.compile(f"[{PRINTABLE}{HAN}{MARKS} \\n]*")
_PLAIN = re.compile(f"[{PRINTABLE}{HAN}{MARKS}]+")


def rules_for(backend: Backend, *, run: int = RUN) -> Rules | None:
    """The rules for this tokenizer, or ``None`` if no safe cuts are known for it.

    ``run`` is the length from which runs of blanks are shortened.
    """
    added = list(backend.get_added_tokens_decoder().values())
    contents = [token.content for token in added]
    if any(token.normalized or token.single_word for token in added):
        return None  # such a token may match, or not, because of text after the cut
    if any(len(content) > RUN or set(content) & {*SPACES, *CONTROLS, *INVISIBLE} for content in contents):
        return None
    normalizers, pre_tokenizers = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    kind = type(backend.model).__name__
    if kind == "WordPiece":
        return _word_rules(backend, normalizers, pre_tokenizers, contents, run)
    if kind == "Unigram":
        return _unigram_rules(backend, normalizers, pre_tokenizers, contents, run)
    return None


_LOCAL = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"}


def _word_rules(
    backend: Backend,
    normalizers: list[dict[str, Any]],
    pre_tokenizers: list[dict[str, Any]],
    contents: list[str],
    run: int,
) -> Rules | None:
    if [part["type"] for part in pre_tokenizers] != ["BertPreTokenizer"]:
        return None
    if any(part["type"] not in _LOCAL | {"BertNormalizer"} for part in normalizers):
        return None
    han = any(part.get("handle_chinese_chars") for part in normalizers)
    # The three marks that canonical composition can turn into a letter-like symbol (with U+0338) end no word.
    inner = {"<", "=", ">", *(character for content in contents for character in content[1:])}
    spaces, dropped = _blanks(backend, SPACES, "a b"), _blanks(backend, CONTROLS + INVISIBLE, "ab")
    boundaries = [c for c in (*spaces, *map(chr, range(0x21, 0x7F)), *MARKS) if c not in inner]
    boundaries = [c for c in boundaries if not (c.isascii() and c.isalnum())]
    named = _class(boundaries) + (HAN if han and not any("一" <= c <= "鿿" for c in inner) else "")
    # Whitespace and dropped characters leave no token, in whatever mixture, once the word has ended.
    runs = {"blank": f"[{_class(spaces)}][{_class((*spaces, *dropped))}]{{{run},}}"} if spaces else {}
    keep = {"blank": (1, 1), "dropped": (1, 0)}
    if dropped:
        runs["dropped"] = f"[{_class(dropped)}]{{{run},}}"
    longest = getattr(backend.model, "max_input_chars_per_word", None)
    if (
        isinstance(longest, int)
        and longest <= LIMIT
        and not any(_WORD.match(content) for content in contents)
    ):
        # A longer word is one unknown token, however long.
        runs["word"] = f"[{WORD}]{{{longest + 2},}}"
        keep["word"] = (longest + 1, 0)
    return WordRules(_alternatives(runs), keep, re.compile(f"(?s).+([{named}])"))


_WORD = re.compile(f"[{WORD}]")


def _unigram_rules(
    backend: Backend,
    normalizers: list[dict[str, Any]],
    pre_tokenizers: list[dict[str, Any]],
    contents: list[str],
    run: int,
) -> Rules | None:
    kinds = [part["type"] for part in pre_tokenizers]
    if kinds not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        return None
    metaspace = pre_tokenizers[-1]
    if metaspace.get("replacement") != "▁" or metaspace.get("split") is not True:
        return None
    if not all(_is_local(part) for part in normalizers) or _normalized(backend, "a b") != "a b":
        return None
    if any(token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # it would take the space that starts the next window
    inner = frozenset(character for content in contents for character in content[1:])
    if " " in inner:
        return None
    spaces, dropped = _blanks(backend, SPACES, "a b"), _blanks(backend, CONTROLS, "ab")
    runs, keep = {}, {"space": (1, 1), "dropped": (1, 0)}
    if kinds[0] == "WhitespaceSplit" or _normalized(backend, f"a{spaces}{spaces}b") in {"a b", "a▁b"}:
        runs["space"] = f"[{_class(spaces)}]{{{run},}}"
    if dropped:
        runs["dropped"] = f"[{_class(dropped)}]{{{run},}}"
    last_space = re.compile(f"(?s).*[{PRINTABLE}{HAN}{MARKS}]( )")
    return UnigramRules(_alternatives(runs), keep, last_space, inner, backend)


def _is_local(part: Mapping[str, Any]) -> bool:
    """Whether a normalizer's output up to a plain character depends on nothing after it."""
    if part["type"] == "Strip":  # only the end of the text, and windows end in a plain character
        return part.get("strip_left") is False
    if part["type"] == "Replace":
        return part.get("pattern") == {"Regex": " {2,}"} and part.get("content") in (" ", "▁")
    return part["type"] in _LOCAL | {"Precompiled"}


def _parts(component: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - any of the library's thirty classes
    """A normalizer or pre-tokenizer as the flat list of its steps, each as in tokenizer.json."""
    if component is None:
        return []
    return list(_flatten(json.loads(component.__getstate__())))


def _flatten(part: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get("normalizers", part.get("pretokenizers", ())):
        yield from _flatten(inner)


def _normalized(backend: Backend, text: str) -> str:
    normalizer = backend.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def _blanks(backend: Backend, candidates: str, becomes: str) -> str:
    """Those candidates that the tokenizer's own normalizer treats as asked, tried between two letters."""
    return "".join(c for c in dict.fromkeys(candidates) if _normalized(backend, f"a{c}b") == becomes)


def _class(characters: Iterable[str]) -> str:
    return "".join(map(re.escape, characters))


def _alternatives(runs: Mapping[str, str]) -> re.Pattern[str]:
    """One pattern of named groups; one that never matches if there are none."""
    return re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in runs.items()) or "(?!)")
