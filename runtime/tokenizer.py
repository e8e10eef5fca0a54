"""The front end: Chinese text to token ids, exactly as the reference tokenizer of the model gives them.

All normalization that belongs to the model (lower-casing, cleaning, splitting at Han characters) is in the
model folder's tokenizer.json. Added here: prompts, truncation, the window cut for long texts
(``qingyu.runtime.windows``), NFKC and another script on request, counts of unknown tokens, and typed errors.
Not here: padding (``TokenBatch``), and the words of warnings (the tasks).

Calls of the ``tokenizers`` library are one text at a time: ``encode_batch`` starts threads of its own, which
compete with the model's workers and make a forked child print a warning or hang. Measured on the two sets of
texts in the tests (CPU microseconds a token, tokenizers 0.22.2, one core of an AMD EPYC):

    ===================== ============ =================== ===============================
    tokenizer, texts      ``encode``   ``encode_batch``    ``encode_batch_fast`` (no offsets)
    ===================== ============ =================== ===============================
    BERT, sentences       0.93         1.14                1.34
    BERT, documents       0.75         0.81                0.65
    Unigram, sentences    0.78         0.78                0.59
    Unigram, documents    0.70         0.73                0.55
    ===================== ============ =================== ===============================

The model itself takes 67 microseconds a token, so the choice is about threads, not speed. ``encode`` holds
the interpreter lock, for half a millisecond per text at most, as the window cut bounds what it is given.
"""

from __future__ import annotations

import copy
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidOptionError, InvalidTextError, MissingExtraError, TokenizerError
from qingyu.runtime.scripts import REACH, Script, converter
from qingyu.runtime.windows import LIMIT, Head, Part, Rules, View, encode_head, rules_for

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

__all__ = [
    "EncodedPair",
    "EncodedText",
    "PairTemplate",
    "SpecialTokens",
    "TokenizedText",
    "Tokenizer",
    "UnicodeForm",
    "longest_first",
]

SpecialTokens = Literal["parse", "text"]
UnicodeForm = Literal["NFKC"]

FILE_LIMIT = 64 << 20  # bytes; the largest in use, XLM-R's quarter million pieces, has 17 MB
_REMEDY = "Export the model again, from a checkpoint that you trust."
_PADDING = ("[PAD]", "<pad>")
_MASKS = ("[MASK]", "<mask>")
# What a text may hold and a broken tokenizer.json may fail at: nothing, a word, Han, a character of no vocabulary.
_PROBES = ("", "a", "a 中文。", "\x00 é ａ", "\U0010fffd")


@dataclass(frozen=True, eq=False)  # an array has no single truth value
class EncodedText:
    """Token ids of one text, ready for the model.

    ``ids``: int64, shape (tokens,), special tokens included, at most ``max_tokens``. ``unknown``: how many of
    them are the unknown token. ``truncated``: whether text was left over, and ``dropped``: how many characters.
    """

    ids: NDArray[np.int64]
    unknown: int
    truncated: bool
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """Token ids and token types of a text with another, ready for the model; fields as in ``EncodedText``.

    ``types``: int64 (tokens,). ``dropped`` counts characters of both.
    """

    ids: NDArray[np.int64]
    types: NDArray[np.int64]
    unknown: int
    truncated: bool
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class Beginning:
    """The start of a text as ids without special tokens, one more than the model reads where it has as many."""

    ids: list[int]
    parts: Sequence[Part]
    characters: int
    limited: bool

    def goes_on(self, kept: int) -> bool:
        """Whether the text has more than its first ``kept`` tokens."""
        return self.limited or kept < len(self.ids)

    def dropped(self, kept: int) -> int:
        """How many characters stand behind those of the first ``kept`` tokens; 0 where these are all."""
        return self.characters - _end(self.parts, kept) if self.goes_on(kept) else 0


@dataclass(frozen=True)
class TokenizedText:
    """The same for people: one entry per token in every field.

    ``offsets`` are (start, end) positions in the ``str`` that was passed, so ``text[start:end]`` is what the
    token was made from, before normalization. Tokens that stand for no text of the caller, the special
    tokens put around it and the prompt, have (0, 0). ``special`` marks the tokens put around the text, and
    not those that were typed in it.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    truncated: bool
    dropped: int = 0


class Tokenizer:
    """Token ids of any text, equal to the reference's. Thread-safe, fork-safe, and starts no threads.

    ``pad_id`` is the id that the file names for padding, or of ``[PAD]`` or ``<pad>``, or 0: the attention
    mask hides it in any case. ``unknown_id`` is ``None`` for tokenizers that know every character. ``mask_token``
    is ``[MASK]`` or ``<mask>``, ``None`` for tokenizers with neither.
    """

    pad_id: int
    unknown_id: int | None
    mask_token: str | None
    max_tokens: int

    def __init__(self, backend: Backend, *, max_tokens: int, window: int | None = None) -> None:
        """``backend`` without truncation and padding; ``window`` in characters is for tests."""
        self.max_tokens = max_tokens
        self._backend = backend
        self._prefix, self._suffix = _template(backend)
        self._room = max_tokens - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            least = len(self._prefix) + len(self._suffix) + 1
            _refuse_option("max_tokens", f"at least {least}, as special tokens count", max_tokens)
        self.unknown_id = _unknown_id(backend)
        self.pad_id = next((i for i in map(backend.token_to_id, _PADDING) if i is not None), 0)
        self.mask_token = next((token for token in _MASKS if backend.token_to_id(token) is not None), None)
        self._convert: Callable[[str], str] | None = None
        # Chinese has about 1 character a token in BERT, 1.5 in XLM-R. A window too small costs a second
        # one; a window too large is tokenized in vain.
        self._window = window or self._room + self._room // 2 + 64

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        max_tokens: int,
        special_tokens: SpecialTokens = "parse",
        unicode_form: UnicodeForm | None = None,
        script: Script | None = None,
    ) -> Tokenizer:
        """The tokenizer of a model folder's tokenizer.json.

        ``special_tokens``: a typed ``[MASK]`` is the special token (``"parse"``, as in the reference) or the
        characters that it is written with (``"text"``). ``unicode_form="NFKC"`` makes full-width letters,
        compatibility ideographs and the like their ordinary forms first; the reference does not. Nor does it
        convert texts to another ``script`` before, which leaves prompts as they are.

        Raises ``TokenizerError`` for a file that cannot be read or used, whatever is in it,
        ``InvalidOptionError``, and ``MissingExtraError`` for ``script`` without its extra.
        """
        if special_tokens not in get_args(SpecialTokens):
            _refuse_option("special_tokens", '"parse" or "text"', special_tokens)
        if unicode_form not in (None, *get_args(UnicodeForm)):
            _refuse_option("unicode_form", '"NFKC" or None', unicode_form)
        convert = None if script is None else converter(script, fold=unicode_form is not None)
        content = _read(path)
        with _converted(f"{path} is not a usable tokenizer"):
            backend, pad_id = _open(content)
            if unicode_form is not None:
                _prepend_nfkc(backend)
            backend.encode_special_tokens = special_tokens == "text"
            for probe in _PROBES:
                backend.encode(probe)
            tokenizer = cls(backend, max_tokens=max_tokens)
        if pad_id is not None:
            tokenizer.pad_id = pad_id
        tokenizer._convert = convert
        return tokenizer

    def as_written(self) -> Tokenizer:
        """The same tokenizer for texts that are to be read in the script that they are written in."""
        other = copy.copy(self)
        other._convert = None
        return other

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that can occur, which a model's embedding table must reach."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, texts: Sequence[str], *, prompt: str = "", first: int = 0) -> list[EncodedText]:
        """Ids of each text, with ``prompt`` put before it as it stands; errors count texts from ``first``.

        Raises ``InvalidTextError`` before any work if a text is not valid, and ``TokenizerError`` if the
        tokenizer breaks down on one.
        """
        _check_texts(texts, prompt, first)
        with _converted("the tokenizer failed on a text"):
            return [self._encode(text, prompt) for text in texts]

    def tokenize(self, text: str, *, prompt: str = "") -> TokenizedText:
        """The tokens that ``encode`` gives, with where each came from; raises the same errors."""
        _check_texts([text], prompt)
        with _converted("the tokenizer failed on a text"):
            head = self._head(text, prompt)
            content = [token for part in head.parts for token in _described(part, len(prompt))]
        kept = content[: self._room]
        before = [(self._name(number), number, (0, 0)) for number in self._prefix]
        after = [(self._name(number), number, (0, 0)) for number in self._suffix]
        rows = [*before, *kept, *after]
        truncated = head.limited or len(content) > self._room
        return TokenizedText(
            tokens=tuple(row[0] for row in rows),
            ids=tuple(row[1] for row in rows),
            offsets=tuple(row[2] for row in rows),
            special=(True,) * len(before) + (False,) * len(kept) + (True,) * len(after),
            truncated=truncated,
            dropped=len(text) - (kept[-1][2][1] if kept else 0) if truncated else 0,
        )

    def whole(self, text: str, *, name: str = "the text") -> TokenizedText:
        """All tokens of a text of any length, without special tokens; time and memory grow with the text."""
        _check_text(text, name)
        with _converted(f"the tokenizer failed on {name}"):
            read = self.in_script(text)
            rows = list(_described(Part(self._bare(read), View(read, 0, len(read))), 0))
        return TokenizedText(
            tokens=tuple(row[0] for row in rows),
            ids=tuple(row[1] for row in rows),
            offsets=tuple(row[2] for row in rows),
            special=(False,) * len(rows),
            truncated=False,
        )

    def in_script(self, text: str) -> str:
        """The text in the script that is read: as it is, unless another was asked for."""
        return text if self._convert is None else self._convert(text)

    @property
    def room(self) -> int:
        """How many tokens of a text fit beside the special ones."""
        return self._room

    def content(self, text: str, *, name: str = "the text") -> list[int]:
        """Ids of the start of a text without special tokens, at least ``room`` + 1 of them where it has as many.

        Errors call the text ``name``; raises what ``encode`` raises.
        """
        return self.beginning(text, name=name).ids

    def beginning(self, text: str, *, name: str = "the text") -> Beginning:
        """The same with what it is made of."""
        _check_text(text, name)
        with _converted(f"the tokenizer failed on {name}"):
            head = self._head(text)
            ids = [number for part in head.parts for number in part.encoding.ids]
        return Beginning(ids, head.parts, len(text), head.limited)

    def surrounded(self, content: Sequence[int]) -> tuple[NDArray[np.int64], int]:
        """Ids with special tokens around the first ``room`` of ``content``, and how many stand before them."""
        ids = [*self._prefix, *content[: self._room], *self._suffix]
        return np.array(ids, dtype=np.int64), len(self._prefix)

    def id_of(self, token: str) -> int | None:
        """The id of an entry of the vocabulary."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def text_of(self, number: int) -> str:
        """A single token as text, as the reference decodes it."""
        with _converted("the tokenizer failed on a token"):
            return str(self._backend.decode([number], skip_special_tokens=False))

    @cached_property
    def pair_template(self) -> PairTemplate:
        """Where the post-processor puts two texts; ``TokenizerError`` where it cannot."""
        with _converted("the tokenizer cannot encode pairs"):
            return PairTemplate.of(self._backend)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, first: int = 0) -> list[EncodedPair]:
        """Ids and types of each pair, the longer text cut first, as in the reference; errors count from ``first``."""
        template = self.pair_template
        room = self.max_tokens - template.added
        if room < 2:
            _refuse_option(
                "max_tokens", f"at least {template.added + 2}, as special tokens count", self.max_tokens
            )
        found = []
        for number, (text, other) in enumerate(pairs, start=first):
            a = self.beginning(text, name=f"the first text of pair {number}")
            b = self.beginning(other, name=f"the second text of pair {number}")
            kept = longest_first(len(a.ids), len(b.ids), room)
            ids, types = template.join(a.ids[: kept[0]], b.ids[: kept[1]])
            unknown = 0 if self.unknown_id is None else int((ids == self.unknown_id).sum())
            dropped = a.dropped(kept[0]) + b.dropped(kept[1])
            truncated = a.goes_on(kept[0]) or b.goes_on(kept[1])
            found.append(EncodedPair(ids, types, unknown, truncated, dropped))
        return found

    def _encode(self, text: str, prompt: str) -> EncodedText:
        head = self._head(text, prompt)
        content = [number for part in head.parts for number in part.encoding.ids]
        ids = [*self._prefix, *content[: self._room], *self._suffix]
        unknown = 0 if self.unknown_id is None else ids.count(self.unknown_id)
        truncated = head.limited or len(content) > self._room
        dropped = len(prompt) + len(text) - _end(head.parts, self._room) if truncated else 0
        return EncodedText(np.array(ids, dtype=np.int64), unknown, truncated, min(dropped, len(text)))

    def _head(self, text: str, prompt: str = "") -> Head:
        """The start of a text in the script that is to be read, with ``prompt`` as it is before it.

        OpenCC goes from left to right by the longest phrase, so the start of a text is converted alike with and without
        what stands more than ``REACH`` characters behind it.
        """
        if self._convert is None:
            return self._head_as_written(prompt + text)
        size = LIMIT if self._rules is not None else len(text)
        while size < len(text):
            start = prompt + self._convert(text[: size + REACH])[:size]
            head = self._head_as_written(start)
            if not head.parts or head.parts[-1].view.stop < len(start):
                return head
            size *= 4  # more of it is needed
        return self._head_as_written(prompt + self._convert(text))

    def _head_as_written(self, text: str) -> Head:
        if len(text) <= self._window or self._rules is None:
            return Head([Part(self._bare(text), View(text, 0, len(text)))], limited=False)
        # One token more than fits tells whether the text was truncated.
        return encode_head(text, self._room + 1, self._bare, self._rules, self._window)

    @cached_property
    def _rules(self) -> Rules | None:
        return rules_for(self._backend)

    def _bare(self, text: str) -> Encoding:
        return self._backend.encode(text, add_special_tokens=False)

    def _name(self, number: int) -> str:
        return self._backend.id_to_token(number) or ""


def _end(parts: Sequence[Part], count: int) -> int:
    """The position in the tokenized text behind its first ``count`` tokens, or behind all of them."""
    end = 0
    for part in parts:
        offsets = part.encoding.offsets[:count]
        count -= len(offsets)
        end = part.view.origin(offsets[-1][1]) if offsets else end
    return end


def _described(part: Part, skipped: int) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Token, id and offsets of a part, counted from ``skipped`` characters into the tokenized text."""
    encoding, origin = part.encoding, part.view.origin
    for token, number, (start, end) in zip(encoding.tokens, encoding.ids, encoding.offsets, strict=True):
        yield token, number, (max(0, origin(start) - skipped), max(0, origin(end) - skipped))


def _check_texts(texts: Sequence[str], prompt: str, first: int = 0) -> None:
    if isinstance(texts, str):
        raise InvalidTextError(
            "texts is one str",
            expected="a sequence of str",
            found=f"a str of {len(texts)} characters",
            remedy="Put it in a list.",
        )
    _check_text(prompt, "the prompt")
    for index, text in enumerate(texts, start=first):
        _check_text(text, f"text {index}")


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise InvalidTextError(
            f"{name} is not text",
            expected="str",
            found=type(text).__name__,
            remedy="Decode bytes, and replace missing values, before embedding.",
        )
    if text.isascii():
        return
    # In pieces, so that ten megabytes need no copy of ten megabytes.
    for start in range(0, len(text), 1 << 16):
        found = _surrogate(text[start : start + (1 << 16)])
        if found is not None:
            position = start + found
            raise InvalidTextError(
                f"{name} is not Unicode text",
                expected="no lone surrogates",
                found=f"U+{ord(text[position]):04X} at position {position}",
                remedy='Decode the source again, or use text.encode("utf-8", "replace").decode().',
            )


def _surrogate(text: str) -> int | None:
    """The position of the first lone surrogate; encoding finds it faster than a regular expression."""
    try:
        text.encode("utf-16-le")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _read(path: Path) -> bytes:
    """The bytes of a regular file of at most ``FILE_LIMIT``; a pipe or device is not even opened."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            _refuse_file(path, "a file", "a folder" if stat.S_ISDIR(status.st_mode) else "a special file")
        if status.st_size > FILE_LIMIT:
            _refuse_file(path, f"at most {FILE_LIMIT} bytes", f"{status.st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        _refuse_file(path, "a readable file", error.strerror or type(error).__name__)


def _refuse_file(path: Path, expected: str, found: str) -> NoReturn:
    raise TokenizerError(f"{path} cannot be read", expected=expected, found=found, remedy=_REMEDY)


def _refuse_option(name: str, expected: str, found: object) -> NoReturn:
    raise InvalidOptionError(
        f"{name} is out of range", expected=expected, found=repr(found), remedy=f"Change {name}."
    )


@contextmanager
def _converted(problem: str) -> Iterator[None]:
    """Whatever ``tokenizers`` raises, as ``TokenizerError``.

    Its panics are ``BaseException`` of a class that cannot be imported, hence known by name.
    """
    try:
        yield
    except (InvalidOptionError, MissingExtraError, TokenizerError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise TokenizerError(
            problem, expected="what `tokenizers` can use", found=found, remedy=_REMEDY
        ) from None


def _open(content: bytes) -> tuple[Backend, int | None]:
    """The library's tokenizer without its truncation and padding, and the id it would have padded with."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_buffer(content)
    padding = backend.padding or {}
    backend.no_truncation()
    backend.no_padding()
    return backend, backend.token_to_id(str(padding.get("pad_token", "")))


def _prepend_nfkc(backend: Backend) -> None:
    from tokenizers import normalizers

    own = backend.normalizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *([] if own is None else [own])])


def _template(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids put before and after every text by the post-processor, learnt from a probe."""
    whole = backend.encode("a 中文。")
    content = backend.encode("a 中文。", add_special_tokens=False).ids
    inside = [number for number, sequence in enumerate(whole.sequence_ids) if sequence is not None]
    start, stop = (inside[0], inside[-1] + 1) if inside else (0, 0)
    if not content or whole.ids[start:stop] != content:
        raise TokenizerError(
            "the post-processor cannot be used",
            expected="special tokens before and after the text, and the text once between",
            found=f"tokens {whole.tokens[:8]}",
            remedy=_REMEDY,
        )
    return whole.ids[:start], whole.ids[stop:]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts keep in ``room`` tokens, the longer cut first, as the tokenizers library does it.

    >>> longest_first(3, 100, 20), longest_first(100, 100, 21)
    ((3, 17), (10, 11))
    """
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)


@dataclass(frozen=True)
class PairTemplate:
    """The ids, each with its token type, before, between and after two texts, and the types of the texts."""

    before: tuple[tuple[int, int], ...]
    between: tuple[tuple[int, int], ...]
    after: tuple[tuple[int, int], ...]
    types: tuple[int, int]

    @property
    def added(self) -> int:
        """How many tokens are put around the texts."""
        return len(self.before) + len(self.between) + len(self.after)

    @classmethod
    def of(cls, backend: Backend) -> PairTemplate:
        """The template of a tokenizer's post-processor, learnt from a probe."""
        whole = backend.encode("中", "文")
        rows = list(zip(whole.ids, whole.type_ids, strict=True))
        of_first = [n for n, sequence in enumerate(whole.sequence_ids) if sequence == 0]
        of_second = [n for n, sequence in enumerate(whole.sequence_ids) if sequence == 1]
        if not of_first or not of_second or of_first[-1] > of_second[0]:
            raise TokenizerError(
                "the post-processor cannot join two texts",
                expected="the first text once, and after it the second",
                found=f"tokens {whole.tokens[:8]}",
                remedy=_REMEDY,
            )
        return cls(
            before=tuple(rows[: of_first[0]]),
            between=tuple(rows[of_first[-1] + 1 : of_second[0]]),
            after=tuple(rows[of_second[-1] + 1 :]),
            types=(rows[of_first[0]][1], rows[of_second[0]][1]),
        )

    def join(
        self, first: Sequence[int], second: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and types, int64 (tokens,), of two texts given as ids."""
        a, b = self.types
        rows = [
            *self.before,
            *((number, a) for number in first),
            *self.between,
            *((number, b) for number in second),
            *self.after,
        ]
        joined = np.array(rows, dtype=np.int64)
        return joined[:, 0], joined[:, 1]


def _unknown_id(backend: Backend) -> int | None:
    """The id that the model gives to a private-use character, unless its vocabulary holds that too."""
    tokens = backend.model.tokenize(_PROBES[-1])
    if len(tokens) != 1 or backend.token_to_id(_PROBES[-1]) is not None:
        return None
    return int(tokens[0].id)
