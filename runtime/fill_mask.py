"""Fill-mask: which words fit where a text says ``[MASK]``, and how likely a text or a candidate is.

Only the states of masked tokens reach the head of the graph. Several masks in a text are predicted independently of
each other, as transformers' pipeline does. Not here: exporting a checkpoint (``qingyu export --task fill-mask``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import (
    DataFileError,
    InvalidOptionError,
    InvalidTextError,
    TextTooLongError,
    TokenizerError,
)
from qingyu.runtime.batching import ItemBatcher, Prepared, weakly, windows
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.engines import EngineName
from qingyu.runtime.graph_engine import Profile
from qingyu.runtime.memory import Plan
from qingyu.runtime.scores import log_softmax
from qingyu.runtime.scripts import Script
from qingyu.runtime.selfcheck import CheckedEngine
from qingyu.runtime.spec import ModelSpec, Task
from qingyu.runtime.task import OpenOptions, Report, TaskModel, listed
from qingyu.runtime.tokenizer import EncodedText, Tokenizer

__all__ = [
    "CandidateScore",
    "FillMask",
    "FilledText",
    "GoldenFill",
    "Prediction",
    "check_golden",
    "check_results",
]

OUTPUT = "mask_logits"
K = TypeVar("K")

CandidateScore = Literal["left_to_right", "mean_pll", "pll"]


class _Scoring(NamedTuple):
    """Whether the tokens behind one are masked with it, and whether its words' tokens are averaged, not added up."""

    masks_rest: bool
    mean: bool


SCORINGS: Mapping[CandidateScore, _Scoring] = {
    "left_to_right": _Scoring(masks_rest=True, mean=False),
    "mean_pll": _Scoring(masks_rest=False, mean=True),
    "pll": _Scoring(masks_rest=False, mean=False),
}


@dataclass(frozen=True)
class Prediction:
    """One word for one mask.

    ``token`` is the word, ``id`` its number in the vocabulary (of its first token, where it has several). ``score``
    is its probability; what it is for a word of several tokens, ``FillMask.fill`` says. ``text`` is the caller's text
    with the word in the mask's place.
    """

    token: str
    id: int
    score: float
    text: str


@dataclass(frozen=True)
class FilledText:
    """A text, and for each of its masks in order the predictions, best first."""

    text: str
    masks: tuple[tuple[Prediction, ...], ...]


@dataclass(frozen=True)
class _Row:
    """One row to run: of the positions ``chosen`` the probabilities of the ids ``wanted``, or the ``top`` best."""

    ids: Ids
    chosen: tuple[int, ...]
    top: int = 0
    wanted: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class _Masked:
    """A text with masks: its token ids, where the masks are among them, and the text around the masks."""

    content: list[int]
    masks: tuple[int, ...]
    parts: list[str]
    unknown: int
    truncated: bool
    dropped: int

    def with_word(self, mask: int, word: str, token: str) -> str:
        """The text with ``word`` in the place of one mask; the others stand."""
        return token.join(self.parts[: mask + 1]) + word + token.join(self.parts[mask + 1 :])


class _Candidate(NamedTuple):
    word: str
    ids: tuple[int, ...]


class _Ranking(NamedTuple):
    """Candidates and how they are scored."""

    words: list[_Candidate]
    scoring: _Scoring


class _Question(NamedTuple):
    """A token whose log-probability at ``place``, among a text's own tokens, is wanted of one row.

    ``row`` is where a candidate stands in the text and its tokens with those masked that are not to be seen, or
    ``None`` for the text as it is.
    """

    row: tuple[int, tuple[int, ...]] | None
    place: int
    token: int


class _Scored(NamedTuple):
    """A word's ids and log-probability, and how the caller wrote it; ``None`` is an entry of the vocabulary."""

    ids: tuple[int, ...]
    log: float
    word: str | None


class _Best(NamedTuple):
    """Ids and their log-probabilities, float64, for one mask."""

    ids: tuple[int, ...]
    logs: NDArray[np.float64]


_Ready: TypeAlias = Prepared[_Row, list[_Best], list[FilledText]]


class FillMask(TaskModel):
    """Predicts the words behind ``[MASK]`` with one model; thread-safe, fork-safe, and a context manager.

    Open one with ``FillMask.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "fill-mask"

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        super().__init__(folder, spec, tokenizer, engine, steps)
        mask = tokenizer.mask_token
        if mask is None:
            raise TokenizerError(
                f"the tokenizer of {spec.name} has no mask",
                expected="a token [MASK] or <mask>",
                found="neither",
                remedy="Export a checkpoint that was trained with one.",
            )
        #: What stands for a missing word in a text: ``[MASK]``, or ``<mask>`` in models of the RoBERTa kind.
        self.mask_token = mask
        number = tokenizer.id_of(mask)
        assert number is not None  # mask_token is a token of the vocabulary
        self._mask_id = number
        self._batcher: ItemBatcher[_Row, list[_Best]] = ItemBatcher(
            workers=self._workers, token_budget=steps.token_budget, run=weakly(self._run)
        )

    @classmethod
    def open(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        profile: Profile = "throughput",
        threads: int | None = None,
        max_memory_mb: int | None = None,
        unicode_form: Literal["NFKC"] | None = None,
        script: Script | None = None,
        self_check: bool = True,
        engine: EngineName = "auto",
    ) -> FillMask:
        """The model of a folder that was exported for fill-mask; options and errors are those of ``Embedder.open``.

        ``UnsupportedModelError`` for a model folder of another task.
        """
        options = OpenOptions(
            profile, threads, max_memory_mb, "parse", unicode_form, self_check, script, engine
        )
        return cls._opened(name_or_folder, options)

    def fill(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        scoring: CandidateScore = "left_to_right",
        report: Report | None = None,
    ) -> list[FilledText]:
        """For each text, and each mask in it, the ``top_k`` likeliest words, or the best ``top_k`` ``candidates``.

        Scores are probabilities over the whole vocabulary, also with candidates. A candidate of several tokens is put
        in place of the mask, one mask for each token; other masks of the text stay masked. Its score is, by
        ``scoring``,

        - "left_to_right": the product of its tokens' probabilities, each with the ones before it in sight and the
          others masked (Kauf and Ivanova 2023, "A Better Way to Do Masked Language Model Scoring"). Over all words of
          so many tokens these scores add up to 1, as they do over the vocabulary for words of one.
        - "mean_pll": the geometric mean of its tokens' probabilities, each masked alone.
        - "pll": their product, exp of the pseudo-log-likelihood of Salazar et al. 2020, "Masked Language Model
          Scoring". Tokens of one word give each other away, so it favours long words over short ones.

        All three are the probability itself for a candidate of one token.

        Raises ``InvalidTextError`` for a text without a mask, ``TextTooLongError`` where a mask, or a candidate in
        its place, is beyond the tokens that the model reads, and ``InvalidOptionError`` for a candidate that the
        vocabulary does not know.
        """
        return list(
            self.fill_stream(
                listed(texts), top_k=top_k, candidates=candidates, scoring=scoring, report=report
            )
        )

    def fill_stream(
        self,
        texts: Iterable[str],
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        scoring: CandidateScore = "left_to_right",
        report: Report | None = None,
    ) -> Iterator[FilledText]:
        """The same for an iterable of any length, in bounded memory."""
        counted = Report() if report is None else report

        def prepared() -> Iterator[tuple[_Ready, Sequence[_Row]]]:
            for window in windows(texts, self.plan.window):
                ready = self.prepare(
                    window, top_k=top_k, candidates=candidates, scoring=scoring, report=counted
                )
                yield ready, ready.rows

        _check_top_k(top_k)
        for ready, results in self._batcher.run_windows(prepared()):
            yield from ready.finish(results)
        counted.warn()

    def prepare(
        self,
        texts: Sequence[str],
        *,
        top_k: int = 5,
        candidates: Sequence[str] | None = None,
        scoring: CandidateScore = "left_to_right",
        report: Report | None = None,
    ) -> _Ready:
        """What ``fill`` runs for these texts, to be run by somebody else: a scheduler, which mixes callers.

        Options and errors as for ``fill``, but no warning of unknown tokens.
        """
        _check_top_k(top_k)
        counted = Report() if report is None else report
        ranking = None if candidates is None else self._ranking(candidates, scoring)
        first = counted.texts
        # A candidate of several tokens pushes the end of the text on by all but one of them.
        pushed = max((len(word.ids) - 1 for word in ranking.words), default=0) if ranking else 0
        found = [self._masked(text, first + n, pushed) for n, text in enumerate(texts)]
        counted.add([EncodedText(self._ids(m), m.unknown, m.truncated, m.dropped) for m in found])
        rows = [self._rows(masked, first + n, top_k, ranking) for n, masked in enumerate(found)]
        window = _Window(texts, found, [len(own) for own in rows])
        return Prepared(
            [row for own in rows for row in own],
            lambda results: list(self._filled(window, results, top_k, ranking)),
        )

    def pseudo_log_likelihood(
        self, texts: str | Iterable[str], *, per_token: bool = False
    ) -> NDArray[np.float64]:
        """How likely each text is as a whole, natural logarithm, float64 (n,): Salazar et al. 2020, PLL.

        The sum over the text's tokens of each one's log-probability while it alone is masked; as many rows are run
        as there are tokens. ``per_token`` divides it by the number of tokens, to compare texts of different lengths;
        exp of minus that is the text's pseudo-perplexity. 0 for a text without any. Raises ``TextTooLongError`` for
        more than the model reads, and ``InvalidTextError`` for a text that has a mask itself.
        """
        totals: list[float] = []

        def encoded() -> Iterator[tuple[list[int], list[_Row]]]:
            for window in windows(listed(texts), self.plan.window):
                first = len(totals)
                rows = [self._each_masked(text, first + n) for n, text in enumerate(window)]
                yield [len(own) for own in rows], [row for own in rows for row in own]

        for counts, results in self._batcher.run_windows(encoded()):
            logs = iter(results)
            for count in counts:
                total = sum(float(next(logs)[0].logs[0]) for _ in range(count))
                totals.append(total / max(1, count) if per_token else total)
        return np.array(totals, dtype=np.float64)

    def mask_logits(self, batch: TokenBatch) -> Floats:
        """The graph's own numbers, float32 (masks, vocabulary), for the positions ``batch.chosen``."""
        return self._engine.run(batch, (OUTPUT,))[0]

    def _run(self, rows: Sequence[_Row]) -> list[list[_Best]]:
        """What each row asks for, from one micro-batch."""
        batch = TokenBatch.pad(
            [row.ids for row in rows], self._tokenizer.pad_id, chosen=[row.chosen for row in rows]
        )
        logits = self.mask_logits(batch)
        results, start = [], 0
        for row in rows:
            own = logits[start : start + len(row.chosen)]
            # One at a time: a vocabulary in float64 is 170 kB, and 2 MB in XLM-R.
            results.append([_chosen(log_softmax(values), row, n) for n, values in enumerate(own)])
            start += len(row.chosen)
        return results

    def _ids(self, masked: _Masked) -> Ids:
        return self._tokenizer.surrounded(masked.content)[0]

    def _masked(self, text: str, number: int, pushed: int) -> _Masked:
        beginning = self._tokenizer.beginning(text, name=f"text {number}")
        content = beginning.ids
        parts = text.split(self.mask_token)
        room = self._tokenizer.room
        places = tuple(n for n, token in enumerate(content[:room]) if token == self._mask_id)
        if len(parts) == 1:
            raise InvalidTextError(
                f"text {number} has no {self.mask_token}",
                expected=f"{self.mask_token} in the place of a word",
                found=repr(text if len(text) <= 40 else text[:37] + "..."),
                remedy=f"Put {self.mask_token} where a word is to be predicted.",
            )
        if len(places) != len(parts) - 1:
            raise TextTooLongError(
                f"text {number} has a {self.mask_token} beyond what the model reads",
                expected=f"every {self.mask_token} within {self.spec.max_tokens} tokens",
                found=f"{len(places)} of {len(parts) - 1} there",
                remedy="Cut the text around the mask.",
            )
        kept = content[:room]
        unknown = self._tokenizer.unknown_id
        count = 0 if unknown is None else kept.count(unknown)
        read = max(0, room - pushed)
        truncated, dropped = beginning.goes_on(read), beginning.dropped(read)
        return _Masked(content, places, parts, count, truncated, dropped)

    def _ranking(self, candidates: Sequence[str], scoring: CandidateScore) -> _Ranking:
        if scoring not in SCORINGS:
            raise InvalidOptionError(
                "scoring",
                expected=", ".join(map(repr, SCORINGS)),
                found=repr(scoring),
                remedy="Use one of them.",
            )
        if isinstance(candidates, str) or not candidates:
            raise InvalidOptionError(
                "candidates",
                expected="a list of words",
                found=repr(candidates),
                remedy="Leave it out to choose from the whole vocabulary.",
            )
        words = [self._candidate(word) for word in dict.fromkeys(candidates)]
        return _Ranking(words, SCORINGS[scoring])

    def _candidate(self, word: str) -> _Candidate:
        written = tuple(self._tokenizer.content(word, name=f"candidate {word!r}"))
        known = self._tokenizer.id_of(self._tokenizer.in_script(word))
        ids = written if known is None else (known,)
        bad = (self._tokenizer.unknown_id, self._mask_id)
        if not ids or any(token in bad for token in ids):
            raise InvalidOptionError(
                f"candidate {word!r} cannot be ranked",
                expected="a word that the model's vocabulary can write",
                found="no token" if not ids else f"an unknown part or {self.mask_token}",
                remedy="Leave it out, or write it with characters that the model knows.",
            )
        return _Candidate(word, ids)

    def _rows(self, masked: _Masked, number: int, top_k: int, ranking: _Ranking | None) -> list[_Row]:
        """The rows that a text takes: itself, or, to rank candidates, each that their scores are made of, once."""
        if ranking is None:
            ids, before = self._tokenizer.surrounded(masked.content)
            return [_Row(ids, tuple(before + place for place in masked.masks), top=top_k)]
        self._check_room(masked, number, ranking)
        return [
            self._candidate_row(masked.content, row, asked)
            for row, asked in _asked(masked.masks, ranking, self._mask_id).items()
        ]

    def _candidate_row(
        self,
        content: Sequence[int],
        row: tuple[int, tuple[int, ...]] | None,
        asked: Mapping[int, Iterable[int]],
    ) -> _Row:
        if row is not None:
            place, word = row
            content = [*content[:place], *word, *content[place + 1 :]]
        ids, before = self._tokenizer.surrounded(content)
        return _Row(ids, tuple(before + place for place in asked), wanted=tuple(map(tuple, asked.values())))

    def _check_room(self, masked: _Masked, number: int, ranking: _Ranking) -> None:
        longest = max(ranking.words, key=lambda word: len(word.ids))
        if masked.masks[-1] + len(longest.ids) > self._tokenizer.room:
            raise TextTooLongError(
                f"candidate {longest.word!r} does not fit into text {number}",
                expected=f"the candidate within {self.spec.max_tokens} tokens",
                found=f"{len(longest.ids)} tokens from position {masked.masks[-1]} on",
                remedy="Cut the text around the mask.",
            )

    def _one_masked(self, content: Sequence[int], place: int) -> _Row:
        ids, before = self._tokenizer.surrounded(content)
        token = int(ids[before + place])
        ids[before + place] = self._mask_id
        return _Row(ids, (before + place,), wanted=((token,),))

    def _each_masked(self, text: str, number: int) -> list[_Row]:
        content = self._tokenizer.content(text, name=f"text {number}")
        if self._mask_id in content:
            raise InvalidTextError(
                f"text {number} has a {self.mask_token}",
                expected="a whole text",
                found=repr(text[:40]),
                remedy="Use fill() for texts with masks.",
            )
        if len(content) > self._tokenizer.room:
            raise TextTooLongError(
                f"text {number} is too long",
                expected=f"at most {self.spec.max_tokens} tokens",
                found=f"more, in {len(text):,} characters",
                remedy="Split it.",
            )
        return [self._one_masked(content, place) for place in range(len(content))]

    def _filled(
        self,
        window: _Window,
        results: Sequence[list[_Best]],
        top_k: int,
        ranking: _Ranking | None,
    ) -> Iterator[FilledText]:
        start = 0
        for text, masked, count in zip(window.texts, window.masked, window.rows, strict=True):
            own = results[start : start + count]
            start += count
            scored = (
                _whole(own[0])
                if ranking is None
                else _ranked(own, masked.masks, ranking, top_k, self._mask_id)
            )
            masks = tuple(
                tuple(self._prediction(masked, mask, one) for one in scores)
                for mask, scores in enumerate(scored)
            )
            yield FilledText(text, masks)

    def _prediction(self, masked: _Masked, mask: int, one: _Scored) -> Prediction:
        token = self._tokenizer.text_of(one.ids[0]) if one.word is None else one.word
        text = masked.with_word(mask, token.removeprefix("##"), self.mask_token)
        return Prediction(token, int(one.ids[0]), float(np.exp(one.log)), text)


class _Window(NamedTuple):
    """Consecutive texts, and how many rows each of them takes."""

    texts: Sequence[str]
    masked: list[_Masked]
    rows: list[int]


def _chosen(logs: NDArray[np.float64], row: _Row, mask: int) -> _Best:
    """What a row asks for of the log-probabilities (vocabulary,) at one of its masks."""
    if row.wanted:
        wanted = row.wanted[mask]
        return _Best(wanted, logs[list(wanted)])
    count = min(row.top, len(logs))
    best = np.argpartition(-logs, count - 1)[:count]
    best = best[np.lexsort((best, -logs[best]))]  # equal ones by their number
    return _Best(tuple(best.tolist()), logs[best])


def _whole(best: Sequence[_Best]) -> list[list[_Scored]]:
    """For each mask the best of the whole vocabulary."""
    return [
        [_Scored((n,), log, None) for n, log in zip(one.ids, one.logs.tolist(), strict=True)] for one in best
    ]


def _questions(place: int, ids: tuple[int, ...], scoring: _Scoring, mask_id: int) -> list[_Question]:
    """What a candidate's score at a mask is made of, a question for each of its tokens."""
    if len(ids) == 1:
        return [_Question(None, place, ids[0])]
    found = []
    for n, token in enumerate(ids):
        end = len(ids) if scoring.masks_rest else n + 1
        shown = (*ids[:n], *(mask_id for _ in range(n, end)), *ids[end:])
        found.append(_Question((place, shown), place + n, token))
    return found


def _asked(
    masks: Sequence[int], ranking: _Ranking, mask_id: int
) -> dict[tuple[int, tuple[int, ...]] | None, dict[int, dict[int, None]]]:
    """Row -> place -> the tokens in question there; candidates that begin alike share rows."""
    asked: dict[tuple[int, tuple[int, ...]] | None, dict[int, dict[int, None]]] = {}
    for mask in masks:
        for word in ranking.words:
            for question in _questions(mask, word.ids, ranking.scoring, mask_id):
                asked.setdefault(question.row, {}).setdefault(question.place, {})[question.token] = None
    return asked


def _ranked(
    own: Sequence[list[_Best]], masks: Sequence[int], ranking: _Ranking, top_k: int, mask_id: int
) -> list[list[_Scored]]:
    """For each mask the candidates with their log-scores, best first; results are in the order of ``_asked``."""
    logs: dict[_Question, float] = {
        _Question(row, place, token): log
        for (row, places), answers in zip(_asked(masks, ranking, mask_id).items(), own, strict=True)
        for place, best in zip(places, answers, strict=True)
        for token, log in zip(best.ids, best.logs.tolist(), strict=True)
    }

    def score(place: int, word: _Candidate) -> float:
        total = sum(logs[question] for question in _questions(place, word.ids, ranking.scoring, mask_id))
        return total / len(word.ids) if ranking.scoring.mean else total

    scored = ([_Scored(word.ids, score(mask, word), word.word) for word in ranking.words] for mask in masks)
    return [sorted(words, key=lambda one: -one.log)[:top_k] for words in scored]


def _check_top_k(top_k: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise InvalidOptionError(
            "top_k", expected="a number from 1 on", found=repr(top_k), remedy="Give how many words you want."
        )


@dataclass(frozen=True)
class GoldenFill:
    """How a model's fill-mask results compare with published ones.

    ``predictions`` were compared; ``worst`` is the largest difference of a score; ``wrong`` are those whose word was
    not the published one at that rank, or whose score differs by more than ``tolerance``, in words.
    """

    predictions: int
    worst: float
    wrong: tuple[str, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every prediction is the published one."""
        return not self.wrong


def check_golden(
    folder: str | os.PathLike[str], golden_file: str | os.PathLike[str], *, tolerance: float = 1e-4
) -> GoldenFill:
    """The fill-mask model in ``folder`` against published results: same words in the same order, scores alike.

    Each line of ``golden_file`` is a JSON object with ``text``, ``mask_index`` (which of its masks) and
    ``predictions``, best first, each with ``token`` (its number) and ``score``. Raises ``DataFileError`` for a file
    that is not so, and what ``FillMask.open`` and ``fill`` raise.
    """
    results = [_parsed(line, number, golden_file) for number, line in _lines(golden_file)]
    return check_results(folder, results, origin=os.fspath(golden_file), tolerance=tolerance)


def check_results(
    folder: str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    *,
    origin: str,
    tolerance: float = 1e-4,
) -> GoldenFill:
    """The same for results that are already read; ``origin`` names them in errors."""
    rows = [_golden(row, number, origin) for number, row in enumerate(results, start=1)]
    differences: list[float] = []
    wrong: list[str] = []
    with FillMask.open(folder) as model:
        for row in rows:
            found = model.fill(row.text, top_k=len(row.ids))[0].masks[row.mask]
            for rank, (one, number, score) in enumerate(zip(found, row.ids, row.scores, strict=True)):
                differences.append(abs(one.score - score))
                if one.id != number or differences[-1] > tolerance:
                    wrong.append(
                        f"{row.text} rank {rank + 1}: {number} {score:.6f}, found {one.id} {one.score:.6f}"
                    )
    return GoldenFill(len(differences), max(differences, default=0.0), tuple(wrong), tolerance)


class _GoldenRow(NamedTuple):
    text: str
    mask: int
    ids: list[int]
    scores: list[float]


def _lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(
            f"{os.fspath(path)} cannot be read",
            expected="JSON lines in UTF-8",
            found=str(error),
            remedy="Name another file.",
        ) from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _parsed(line: str, number: int, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        row: Mapping[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _no_result(os.fspath(path), number, error) from None
    return row


def _golden(row: Mapping[str, Any], number: int, origin: str) -> _GoldenRow:
    try:
        best = row["predictions"]
        return _GoldenRow(
            str(row["text"]),
            int(row["mask_index"]),
            [int(one["token"]) for one in best],
            [float(one["score"]) for one in best],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _no_result(origin, number, error) from None


def _no_result(origin: str, number: int, error: Exception) -> DataFileError:
    return DataFileError(
        f"{origin}, line {number} is no fill-mask result",
        expected="text, mask_index and predictions with token and score",
        found=f"{type(error).__name__} {error}",
        remedy="Use the file as it was published.",
    )
