"""Task quality of an embedding model: recall on a retrieval set, Spearman's correlation on a similarity set.

Made to compare a quantized model with its FP32 original on the same set; a set is read from files that the user
has. Not here: other measures and tasks (``measures``, ``probes``), and downloading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import DataFileError, InvalidOptionError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.vectors import unit

__all__ = [
    "Change",
    "RetrievalSet",
    "SimilaritySet",
    "name_of",
    "read_columns",
    "recall_at",
    "recall_of",
    "spearman",
    "spearman_of",
]

Doubles = NDArray[np.float64]

RECALL_AT = 10
BLOCK = 512  # queries scored at once: 512 x 100,000 passages are 200 MB

REPAIR = "Repair the file."


@dataclass(frozen=True)
class Change:
    """One measure, times 100, of the FP32 model and of the candidate on the set ``measured_on``.

    ``items`` is how many queries or pairs the measure is a mean over or a correlation of.
    """

    measured_on: str
    items: int
    reference: float
    candidate: float

    @property
    def points(self) -> float:
        """Candidate minus reference: negative where the candidate is worse."""
        return self.candidate - self.reference


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, passages, and for each query the positions of its relevant passages, at least one.

    ``grades`` holds for each query the ``rel`` of its relevant passages, by position; empty: all are 1.
    """

    name: str
    queries: tuple[str, ...]
    corpus: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]
    grades: tuple[Mapping[int, int], ...] = field(default=(), compare=False)

    @classmethod
    def read(cls, folder: Path) -> RetrievalSet:
        """The set in a folder of queries.jsonl, corpus.jsonl and qrels.tsv, named after the folder.

        The .jsonl files hold one object a line with ``id`` (a string or a whole number) and ``text``; qrels.tsv
        has the header query_id, doc_id, rel, and a ``rel`` above 0 means relevant. A query without a relevant
        passage is left out, since its recall is not defined. Raises ``DataFileError``.
        """
        queries = _read_texts(folder / "queries.jsonl")
        corpus = _read_texts(folder / "corpus.jsonl")
        place = {name: position for position, name in enumerate(corpus)}
        grades: dict[str, dict[int, int]] = {name: {} for name in queries}
        for query, passage, grade in _read_qrels(folder / "qrels.tsv", queries, corpus):
            grades[query][place[passage]] = grade
        kept = [name for name in queries if grades[name]]
        if not kept:
            _refuse(
                folder / "qrels.tsv", "a relevant passage for at least one query", "none", "Add judgements."
            )
        return cls(
            name=folder.resolve().name,
            queries=tuple(queries[name] for name in kept),
            corpus=tuple(corpus.values()),
            relevant=tuple(frozenset(grades[name]) for name in kept),
            grades=tuple(grades[name] for name in kept),
        )


@dataclass(frozen=True)
class SimilaritySet:
    """Pairs of sentences and a label for each, larger for more alike; only the order of labels counts."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    labels: tuple[float, ...]

    @classmethod
    def read(cls, path: Path, *, name: str | None = None) -> SimilaritySet:
        """The pairs of a TSV file with columns sentence1, sentence2 and label in its header line, or of JSON lines.

        ``name`` is by default that of the file's folder and its stem: ``sts-b-zh/dev``. Raises
        ``DataFileError``, also for labels that are all the same, to which nothing can correlate.
        """
        rows = list(read_columns(path, ("sentence1", "sentence2", "label")))
        labels = tuple(_label(path, number, cells[2]) for number, cells in rows)
        if len(set(labels)) < 2:
            _refuse(path, "at least two different labels", f"{len(set(labels))}", "Give graded pairs.")
        return cls(
            name=name or name_of(path),
            first=tuple(cells[0] for _, cells in rows),
            second=tuple(cells[1] for _, cells in rows),
            labels=labels,
        )


def recall_of(embedder: Embedder, retrieval: RetrievalSet, *, k: int = RECALL_AT) -> float:
    """Recall@k of a model on a set, 0 to 1.

    Queries are embedded with the model's "query" prompt and passages with its "passage" prompt, where it has
    them, and otherwise with its default.
    """
    queries = embedder.embed(retrieval.queries, prompt=_prompt(embedder, "query"))
    corpus = embedder.embed(retrieval.corpus, prompt=_prompt(embedder, "passage"))
    return recall_at(k, queries, corpus, retrieval.relevant)


def recall_at(k: int, queries: Floats, corpus: Floats, relevant: Sequence[frozenset[int]]) -> float:
    """The share of a query's relevant passages among its ``k`` nearest by cosine, mean over queries.

    ``queries`` (n, dim), ``corpus`` (m, dim); ``relevant`` holds for each query positions in ``corpus``. Of
    passages with equal cosine the earlier counts as nearer. Raises ``InvalidOptionError`` for k below 1.
    """
    if k < 1:
        raise InvalidOptionError(
            "k of recall@k", expected="at least 1", found=str(k), remedy="Use 10, as is usual."
        )
    near, passages = unit(queries), unit(corpus).T
    total = 0.0
    for start in range(0, len(near), BLOCK):
        scores = near[start : start + BLOCK] @ passages
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        for row, wanted in zip(best.tolist(), relevant[start : start + BLOCK], strict=True):
            total += len(wanted.intersection(row)) / len(wanted)
    return total / len(near)


def spearman_of(embedder: Embedder, pairs: SimilaritySet, *, prompt: str | None = None) -> float:
    """Spearman's correlation of a model's cosines with the labels of a set, -1 to 1.

    ``prompt`` as in ``Embedder.embed``; both sentences get the same.
    """
    first, second = (embedder.embed(texts, prompt=prompt) for texts in (pairs.first, pairs.second))
    cosines = np.einsum("nd,nd->n", unit(first), unit(second), dtype=np.float64)
    return spearman(cosines, np.asarray(pairs.labels))


def spearman(a: Doubles, b: Doubles) -> float:
    """Spearman's rank correlation of two series of equal length, ties given their mean rank.

    0 where one of them is constant, for which it is not defined. Equals ``scipy.stats.spearmanr``.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0])), 6)
    0.866025
    """
    x, y = (_mean_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread > 0 else 0.0


def _mean_ranks(values: Doubles) -> Doubles:
    """Ranks from 1, equal values all with the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ranks: Doubles = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _prompt(embedder: Embedder, name: str) -> str | None:
    return name if name in embedder.spec.prompts else None


def _refuse(
    path: Path, expected: str, found: str, remedy: str = REPAIR, *, line: int | None = None
) -> NoReturn:
    where = f"{path}" if line is None else f"{path}, line {line}"
    raise DataFileError(f"{where} cannot be used", expected=expected, found=found, remedy=remedy)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at LF alone (U+2028 may stand in a text); a closing CR and a leading BOM go."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(path, "UTF-8", f"byte 0x{data[error.start]:02x}", line=data.count(b"\n", 0, error.start) + 1)
    except OSError as error:
        _refuse(path, "a readable file", error.strerror or type(error).__name__, "Check the path.")
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def _read_texts(path: Path) -> dict[str, str]:
    """Texts by id, in the order of the file; blank lines are skipped."""
    texts: dict[str, str] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        name, text = _id_and_text(path, number, line)
        if name in texts:
            _refuse(path, "an id of its own for each line", f"{name!r} again", line=number)
        texts[name] = text
    if not texts:
        _refuse(path, "at least one text", "an empty file")
    return texts


def _id_and_text(path: Path, number: int, line: str) -> tuple[str, str]:
    row = _object(path, number, line)
    name, text = row.get("id"), row.get("text")
    if isinstance(name, bool) or not isinstance(name, str | int):
        _refuse(path, "a string or whole number as 'id'", _shown(row, "id"), line=number)
    if not isinstance(text, str):
        _refuse(path, "a string as 'text'", _shown(row, "text"), line=number)
    return str(name), text


def _object(path: Path, number: int, line: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse(path, "a JSON object", str(error), line=number)
    if not isinstance(row, dict):
        _refuse(path, "a JSON object", type(row).__name__, line=number)
    return row


def _shown(row: Mapping[str, object], field: str) -> str:
    return repr(row[field])[:80] if field in row else "no such field"


def name_of(path: Path) -> str:
    """A set's name: that of the file's folder, and its stem."""
    return f"{path.resolve().parent.name}/{path.stem}"


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The numbered rows of a TSV file with a header line, or of JSON lines, by its name: the cells of ``columns``.

    Blank lines are skipped. Raises ``DataFileError``.
    """
    if path.name.endswith((".jsonl", ".ndjson")):
        yield from _object_cells(path, columns)
        return
    lines = _lines(path)
    header = next(lines)[1].split("\t")
    if any(header.count(column) != 1 for column in columns):
        _refuse(path, f"a header line with {', '.join(columns)}", ", ".join(header)[:80] or "nothing", line=1)
    places = [header.index(column) for column in columns]
    for number, line in lines:
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            _refuse(path, f"{len(header)} cells", str(len(cells)), line=number)
        yield number, [cells[place] for place in places]


def _object_cells(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        row = _object(path, number, line)
        for column in columns:
            value = row.get(column)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                _refuse(path, f"a string or number as {column!r}", _shown(row, column), line=number)
        yield number, [str(row[column]) for column in columns]


def _read_qrels(
    path: Path, queries: Mapping[str, str], corpus: Mapping[str, str]
) -> Iterator[tuple[str, str, int]]:
    """(query, passage, grade) for each judgement of relevance."""
    for number, (query, passage, grade) in read_columns(path, ("query_id", "doc_id", "rel")):
        for name, known, where in ((query, queries, "queries.jsonl"), (passage, corpus, "corpus.jsonl")):
            if name not in known:
                _refuse(path, f"an id of {where}", repr(name)[:80], line=number)
        try:
            value = int(grade)
        except ValueError:
            _refuse(path, "a whole number as rel", repr(grade)[:80], line=number)
        if value > 0:
            yield query, passage, value


def _label(path: Path, number: int, cell: str) -> float:
    try:
        label = float(cell)
    except ValueError:
        label = math.nan
    if not math.isfinite(label):
        _refuse(path, "a number as label", repr(cell)[:80], line=number)
    return label
