"""A checkpoint with fewer tokens: those that a corpus needs, chosen by count, cut out of tokenizer and weights.

Half of a small multilingual model is its table of tokens. Unigram (XLM-R) and WordPiece (BERT) vocabularies can
be cut without any other change: a word whose piece is gone is spelt with shorter ones. Not here: training, which
the shorter spelling needs unless little was cut; byte-pair vocabularies, whose merges depend on each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qingyu.errors import InvalidOptionError, TokenizerError, UnsupportedModelError
from qingyu.models.export.checkpoint import read_checkpoint

__all__ = ["Vocabulary", "chosen_tokens", "read_vocabulary", "vocabulary_words"]

HAN = ("\u3400", "\u9fff")
PRIOR_WEIGHT = 1.0  # of what the vocabulary itself says about a piece, against what the corpus says
CHARACTER_WEIGHT = (
    8.0  # a word that is gone is spelt with its characters; a character that is gone is unknown
)
BATCH = 4096


@dataclass(frozen=True)
class Vocabulary:
    """``tokenizer`` is the document of tokenizer.json, ``pieces`` its tokens by id, added ones included."""

    tokenizer: Mapping[str, Any]
    pieces: Sequence[str]
    special: frozenset[int]

    def keeping(self, kept: Collection[int]) -> str:
        """The text of a tokenizer.json that has only ``kept``, renumbered in their order."""
        new_id = {old: new for new, old in enumerate(sorted(kept))}
        document = json.loads(json.dumps(self.tokenizer))
        document["added_tokens"] = [
            {**token, "id": new_id[token["id"]]}
            for token in document["added_tokens"]
            if token["id"] in new_id
        ]
        _cut_model(document["model"], new_id)
        names = {self.pieces[old]: new for old, new in new_id.items()}
        _renumber(document.get("post_processor"), names)
        if isinstance(document.get("padding"), dict):
            document["padding"]["pad_id"] = names[document["padding"]["pad_token"]]
        text = json.dumps(document, ensure_ascii=False)
        _loaded(text)
        return text


def read_vocabulary(checkpoint: Path) -> Vocabulary:
    """The vocabulary of a checkpoint's tokenizer.json; ``TokenizerError`` or ``UnsupportedModelError``."""
    text = tokenizer_text(checkpoint)
    document = json.loads(text)
    tokenizer = _loaded(text)
    kind = document["model"]["type"]
    if kind not in ("Unigram", "WordPiece"):
        raise UnsupportedModelError(
            f"the vocabulary of {checkpoint} cannot be cut",
            expected="a Unigram or WordPiece vocabulary",
            found=str(kind),
            remedy="Keep the vocabulary whole.",
        )
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    pieces = [tokenizer.id_to_token(number) or "" for number in range(count)]
    special = {token["id"] for token in document["added_tokens"]}
    special.add(
        pieces.index(document["model"]["unk_token"]) if kind == "WordPiece" else document["model"]["unk_id"]
    )
    return Vocabulary(document, pieces, frozenset(special))


def vocabulary_words(checkpoint: Path) -> Callable[[str], list[str]]:
    """A function that gives the stretches of a text that are a token each; together they are the text.

    Raises ``TokenizerError``.
    """
    tokenizer = _loaded(tokenizer_text(checkpoint))
    tokenizer.no_truncation()

    def words(text: str) -> list[str]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        starts = sorted({0, *(start for start, _ in encoding.offsets), len(text)})
        return [text[start:end] for start, end in pairwise(starts)]

    return words


def tokenizer_text(checkpoint: Path) -> str:
    """The text of a checkpoint's tokenizer.json, or of the one that its older tokenizer files stand for."""
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        return read_checkpoint(checkpoint).front_end.tokenizer.decode("utf-8")
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{path} cannot be read",
            expected="a tokenizer.json",
            found=str(error),
            remedy="Download the checkpoint again.",
        ) from None
    return text


def chosen_tokens(
    vocabulary: Vocabulary, texts: Iterable[str], size: int, *, words: Iterable[str] = ()
) -> list[int]:
    """The ids of the ``size`` most useful tokens, ascending: special ones, ASCII characters, then by frequency.

    The frequency of a piece is its share of the corpus' tokens; for a piece with a Han character, the share that
    a Unigram vocabulary's own score gives it is added, so that common words which the corpus happens to lack
    stay. Pieces of one Han character weigh eightfold. Those of ``words`` always stay.

    Raises ``InvalidOptionError`` for a size that is too small for the tokens that must stay.
    """
    pieces = vocabulary.pieces
    if size >= len(pieces):
        return list(range(len(pieces)))
    always = vocabulary.special | {number for number, piece in enumerate(pieces) if _is_character(piece)}
    always |= set(np.flatnonzero(_counts(vocabulary, words)).tolist())
    if size < len(always):
        raise InvalidOptionError(
            "vocabulary size",
            expected=f"{len(always)} to {len(pieces)}",
            found=str(size),
            remedy="Special tokens, ASCII characters and the pieces of given words always stay; allow more.",
        )
    frequency = _counts(vocabulary, texts)
    frequency = frequency / max(1.0, frequency.sum()) + PRIOR_WEIGHT * _prior(vocabulary)
    frequency[[is_han(piece) for piece in pieces]] *= CHARACTER_WEIGHT
    frequency[sorted(always)] = np.inf
    order = np.argsort(-frequency, kind="stable")
    return sorted(int(number) for number in order[:size])


def _counts(vocabulary: Vocabulary, texts: Iterable[str]) -> NDArray[np.float64]:
    tokenizer = _loaded(json.dumps(vocabulary.tokenizer))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts = np.zeros(len(vocabulary.pieces))
    batch: list[str] = []

    def add() -> None:
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            add()
    add()
    return counts


def _prior(vocabulary: Vocabulary) -> NDArray[np.float64]:
    """Unigram scores are log probabilities (Kudo 2018); those of pieces with Han in them, as probabilities."""
    prior = np.zeros(len(vocabulary.pieces))
    if vocabulary.tokenizer["model"]["type"] == "Unigram":
        for number, (piece, score) in enumerate(vocabulary.tokenizer["model"]["vocab"]):
            if any(map(is_han, piece)):
                prior[number] = np.exp(score)
    total = prior.sum()
    return prior / total if total else prior


def is_han(piece: str) -> bool:
    """Whether a piece is one Han character."""
    bare = piece.removeprefix("##")
    return len(bare) == 1 and HAN[0] <= bare <= HAN[1]


def _is_character(piece: str) -> bool:
    bare = piece.removeprefix("##").removeprefix("▁")
    return len(bare) <= 1 and bare.isascii()


def _cut_model(model: dict[str, Any], new_id: Mapping[int, int]) -> None:
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_id]
        model["unk_id"] = new_id[model["unk_id"]]
    else:
        model["vocab"] = {
            piece: new_id[number]
            for piece, number in sorted(model["vocab"].items(), key=lambda item: item[1])
            if number in new_id
        }


def _renumber(processor: Any, names: Mapping[str, int]) -> None:  # noqa: ANN401 - JSON
    """Put the new ids into a post-processor, which names the special tokens it adds."""
    if isinstance(processor, dict):
        for key, value in processor.items():
            if key == "special_tokens" and isinstance(value, dict):
                for token in value.values():
                    token["ids"] = [names[name] for name in token["tokens"]]
            elif key in ("sep", "cls") and isinstance(value, list):
                processor[key] = [value[0], names[value[0]]]
            else:
                _renumber(value, names)
    elif isinstance(processor, list):
        for part in processor:
            _renumber(part, names)


def _loaded(text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the Rust library is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise TokenizerError(
            "the tokenizer cannot be loaded",
            expected="a tokenizer.json that the tokenizers library reads",
            found=str(error),
            remedy="Save it again with a current tokenizers library.",
        ) from None
