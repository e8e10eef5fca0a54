"""Sentence embeddings: encode -> run -> pool, for one text, a list, or a stream of any length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from qingyu.errors import InvalidOptionError, TextTooLongError
from qingyu.runtime.batching import Batcher, Prepared, weakly, windows
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.engines import EngineName
from qingyu.runtime.graph_engine import Profile
from qingyu.runtime.long_text import Count, pieces, spans
from qingyu.runtime.memory import Plan
from qingyu.runtime.progress import progress_bar
from qingyu.runtime.scripts import Script
from qingyu.runtime.selfcheck import CheckedEngine
from qingyu.runtime.spec import ModelSpec, Task
from qingyu.runtime.task import BUNDLED, OpenOptions, Report, TaskModel, find_model, listed
from qingyu.runtime.tokenizer import EncodedText, TokenizedText, Tokenizer
from qingyu.runtime.vectors import cosine, unit
from qingyu.runtime.windows import is_plain

__all__ = ["BUNDLED", "Block", "Embedder", "Report", "find_model"]

# At most, of a plain character: one for each byte of it, in the vocabularies that have bytes.
TOKENS_PER_CHARACTER = 3

LongText = Literal["truncate", "error", "mean", "max"]
_Ready: TypeAlias = Prepared[EncodedText, Floats, Floats]


class Block(NamedTuple):
    """Consecutive texts of a stream and their vectors, float32 (len(texts), dim)."""

    texts: list[str]
    vectors: Floats


@dataclass(frozen=True)
class _Pieces:
    """A text that is too long: its place in a window, and its pieces."""

    place: int
    encoded: Sequence[EncodedText]


@dataclass(frozen=True)
class _Long:
    """What to do with texts that are too long."""

    rule: LongText
    overlap: int

    def check(self, spec: ModelSpec) -> None:
        if self.rule not in (*CUT, *COMBINED):
            raise InvalidOptionError(
                "long_text",
                expected="'truncate', 'error', 'mean' or 'max'",
                found=repr(self.rule),
                remedy="Use one of them.",
            )
        if not 0 <= self.overlap <= spec.max_tokens // 2:
            raise InvalidOptionError(
                "overlap",
                expected=f"0 to {spec.max_tokens // 2} tokens",
                found=str(self.overlap),
                remedy="Half of what the model reads is the most that makes sense.",
            )


class Embedder(TaskModel):
    """Turns texts into vectors with one model; thread-safe, usable in a forked child, and a context manager.

    Open one with ``Embedder.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task] = "embedding"
    RUNS_OPENVINO: ClassVar[bool] = True

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        super().__init__(folder, spec, tokenizer, engine, steps)
        self._special: dict[str, int] = {}  # prompt -> tokens beside those of a text
        self._batcher = Batcher(
            run=weakly(self._pooled),
            workers=self._workers,
            dim=spec.dim,
            token_budget=steps.token_budget,
            pad_id=tokenizer.pad_id,
        )

    @classmethod
    def open(
        cls,
        name_or_folder: str | os.PathLike[str] = BUNDLED,
        *,
        profile: Profile = "throughput",
        threads: int | None = None,
        max_memory_mb: int | None = None,
        special_tokens: Literal["parse", "text"] = "parse",
        unicode_form: Literal["NFKC"] | None = None,
        script: Script | None = None,
        self_check: bool = True,
        engine: EngineName = "auto",
    ) -> Embedder:
        """An embedder for a model folder or a bundle (the model in the package if none is named).

        Its files are checked against the hashes in its manifest.

        ``profile``: "throughput" runs several micro-batches at once, one thread each; "latency" uses all threads
        for one micro-batch; "edge" takes the least memory. ``threads``: ``None`` is what affinity and the
        container's CPU quota allow. ``max_memory_mb``: the resident memory that this process may reach while
        embedding; it decides workers and token budget, and loads the graph at once. ``special_tokens="text"``
        reads a typed ``[MASK]`` as plain text instead of the special token. ``unicode_form="NFKC"`` folds
        full-width and compatibility forms before tokenizing, ``script="simplified"`` (or "traditional") reads
        Chinese in that script, whatever it is written in (extra ``opencc``); the reference does neither.
        ``self_check=False`` trusts this machine's arithmetic: else the model's golden texts are embedded before the
        first vector on a machine, which takes milliseconds, and ``KernelError`` raised or, where the folder has an
        FP32 graph too, ``FallbackWarning`` issued when their vectors are wrong. ``engine``: "onnxruntime"; "openvino",
        for folders made with ``qingyu quantize --openvino``; or "auto", which takes OpenVINO where it is installed and
        was measured faster on a CPU like this one (see ``qingyu.runtime.engines``).

        Raises ``ModelNotFoundError``, ``ManifestError``, ``CorruptFileError``, ``TokenizerError``,
        ``GraphError``, ``InvalidOptionError``, ``MissingExtraError`` or ``MemoryBudgetError``,
        ``UnsupportedModelError`` for a model of another task or without a file for the engine asked for, and for a
        bundle ``BundleError``, too.
        """
        return cls._opened(
            name_or_folder,
            OpenOptions(
                profile, threads, max_memory_mb, special_tokens, unicode_form, self_check, script, engine
            ),
        )

    @property
    def dim(self) -> int:
        """How many values a vector has."""
        return self.spec.dim

    def embed(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        long_text: LongText = "truncate",
        overlap: int = 0,
        report: Report | None = None,
        progress: bool = False,
    ) -> Floats:
        """The vectors of the texts in their order, float32 (n, dim); (1, dim) for one text, (0, dim) for none.

        ``prompt``: ``None`` is the model's default; "query" and "passage" (and any name in ``spec.prompts``) are
        the model's own; any other string is put before each text as it is. ``dim`` keeps the first values of
        models trained for it. ``normalize`` gives length 1, after the cut; ``None`` does what the model's
        reference does. ``long_text="truncate"`` reads the first ``spec.max_tokens`` tokens, "error" raises
        ``TextTooLongError``; "mean" and "max" read all of a longer text, in pieces of whole sentences that overlap by
        at most ``overlap`` tokens, and give the mean of the pieces' unit vectors, weighted by their tokens, or the
        largest of each value. ``report`` is added up to, ``progress`` draws a bar on a terminal.

        Raises ``InvalidTextError`` for what is not Unicode text and ``UnknownTokenWarning`` above 10 % unknown.
        """
        given = listed(texts)
        counted = Report() if report is None else report
        blocks = self._blocks(given, prompt, dim, normalize, _Long(long_text, overlap), counted)
        if progress:
            blocks = progress_bar(((len(block.texts), block) for block in blocks), total=len(given))
        vectors = [block.vectors for block in blocks]
        counted.warn()
        width = self.spec.dim if dim is None else dim
        return np.concatenate(vectors) if vectors else np.empty((0, width), dtype=np.float32)

    def embed_stream(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        long_text: LongText = "truncate",
        overlap: int = 0,
        report: Report | None = None,
    ) -> Iterator[Block]:
        """Blocks of (texts, vectors) in order, from an iterable of any length, in bounded memory.

        At most two windows (2,048 texts or 2 million characters each) are held. An error in the iterable is
        raised as it is; closing the iterator early drops what has not begun. Options as for ``embed``.
        """
        counted = Report() if report is None else report
        yield from self._blocks(texts, prompt, dim, normalize, _Long(long_text, overlap), counted)
        counted.warn()

    def prepare(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        long_text: LongText = "truncate",
        overlap: int = 0,
        report: Report | None = None,
    ) -> _Ready:
        """What ``embed`` runs for these texts, to be run by somebody else: a scheduler, which mixes callers.

        Options and errors as for ``embed``, but no warning of unknown tokens.
        """
        long = _Long(long_text, overlap)
        long.check(self.spec)
        return self._prepared(
            texts,
            self.spec.prompt_text(prompt),
            self.spec.width(dim),
            self.spec.normalize if normalize is None else normalize,
            long,
            Report() if report is None else report,
        )

    def similarity(
        self, a: str | Iterable[str], b: str | Iterable[str], *, prompt: str | None = None
    ) -> Floats:
        """Cosine similarities, float32 (len(a), len(b))."""
        return cosine(self.embed(a, prompt=prompt), self.embed(b, prompt=prompt))

    def tokenize(self, text: str, *, prompt: str | None = None) -> TokenizedText:
        """What the model reads of a text: tokens, ids, and where in the text each stands."""
        return self._tokenizer.tokenize(text, prompt=self.spec.prompt_text(prompt))

    def spans(
        self, text: str, *, prompt: str | None = None, most: int | None = None, overlap: int = 0
    ) -> list[tuple[int, int]]:
        """Where the pieces of a text lie that the model reads whole: (start, stop) in characters, in their order.

        Pieces are of whole sentences, as ``long_text="mean"`` makes them, with at most ``most`` tokens each (``None``:
        all that the model reads), ``prompt`` and special tokens left out; neighbours share at most ``overlap`` tokens.
        """
        count, room = self._counter(self.spec.prompt_text(prompt))
        limit = room if most is None else most
        if not 1 <= limit <= room or not 0 <= overlap <= limit // 2:
            raise InvalidOptionError(
                "pieces of a text",
                expected=f"1 to {room} tokens, and an overlap of at most half of them",
                found=f"{limit} tokens and an overlap of {overlap}",
                remedy=f"{self.spec.name} reads {self.spec.max_tokens} tokens, special ones and the prompt included.",
            )
        if TOKENS_PER_CHARACTER * len(text) < limit and is_plain(text):
            return [(0, len(text))]
        whole = count([text])[0]
        if whole is not None and whole <= limit:
            return [(0, len(text))]
        return spans(text, count, most=limit, overlap=overlap)

    def __repr__(self) -> str:
        return f"<Embedder {self.spec.name} {self.spec.precision}, {self.spec.dim} dimensions, {self.folder}>"

    def _blocks(
        self,
        texts: Iterable[str],
        prompt: str | None,
        dim: int | None,
        normalize: bool | None,
        long: _Long,
        report: Report,
    ) -> Iterator[Block]:
        prefix = self.spec.prompt_text(prompt)
        width = self.spec.width(dim)
        to_unit = self.spec.normalize if normalize is None else normalize
        long.check(self.spec)

        def prepared() -> Iterator[tuple[tuple[list[str], _Ready], Sequence[EncodedText]]]:
            for window in windows(texts, self.plan.window):
                ready = self._prepared(window, prefix, width, to_unit, long, report)
                yield (window, ready), ready.rows

        for (window, ready), pooled in self._batcher.run_windows(prepared()):
            yield Block(window, ready.finish(pooled))  # type: ignore[arg-type] # an array is its rows

    def _prepared(
        self, texts: Sequence[str], prefix: str, width: int, to_unit: bool, long: _Long, report: Report
    ) -> _Ready:
        whole = self._encode(texts, prefix, long.rule, report)
        split = self._split(texts, whole, prefix, long, report)

        def finish(pooled: Sequence[Floats]) -> Floats:
            vectors = np.asarray(pooled, dtype=np.float32).reshape(-1, self.spec.dim)
            cut = _joined(vectors, split, long.rule)[:, :width]
            return unit(cut) if to_unit else np.ascontiguousarray(cut)

        return Prepared(_flat(whole, split), finish)

    def _encode(self, texts: Sequence[str], prefix: str, rule: LongText, report: Report) -> list[EncodedText]:
        first = report.texts
        encoded = self._tokenizer.encode(texts, prompt=prefix, first=first)
        report.add(encoded)
        if rule == "error":
            for position, text in enumerate(encoded):
                if text.truncated:
                    raise TextTooLongError(
                        f"text {first + position} is too long",
                        expected=f"at most {self.spec.max_tokens} tokens",
                        found=f"more, in {len(texts[position]):,} characters",
                        remedy='Split it, or pass long_text="truncate" to read only its beginning.',
                    )
        return encoded

    def _split(
        self, texts: Sequence[str], whole: Sequence[EncodedText], prefix: str, long: _Long, report: Report
    ) -> list[_Pieces]:
        """The pieces of the texts that are too long, by their place; none where long texts are cut."""
        if long.rule not in COMBINED:
            return []
        count, room = self._counter(prefix)
        first = report.texts - len(texts)  # they were counted whole
        split = []
        for place, encoded in enumerate(whole):
            if encoded.truncated:
                parts = pieces(texts[place], count, most=room, overlap=long.overlap)
                read = self._tokenizer.encode(parts, prompt=prefix)
                report.replace(first + place, encoded, read)
                split.append(_Pieces(place, read))
        return split

    def _counter(self, prefix: str) -> tuple[Count, int]:
        """What counts the tokens of texts, and how many of them the model reads beside prompt and special ones."""
        special = self._special.get(prefix)
        if special is None:
            special = self._special[prefix] = len(self._tokenizer.encode([""], prompt=prefix)[0].ids)

        def count(parts: Sequence[str]) -> list[int | None]:
            encoded = self._tokenizer.encode(parts, prompt=prefix)
            return [None if one.truncated else len(one.ids) - special for one in encoded]

        return count, self.spec.max_tokens - special

    def run_token_states(self, rows: Sequence[EncodedText]) -> list[Floats]:
        """Run rows that ``prepare`` gave as one micro-batch: of each the last layer's states, float32 (tokens, hidden).

        Special tokens are among them. Raises what the engine raises.
        """
        batch = TokenBatch.pad([row.ids for row in rows], self._tokenizer.pad_id)
        states = self._engine.run(batch, ("token_states",))[0]
        # A copy, since a view would keep the whole micro-batch alive.
        return [own[: len(row.ids)].copy() for own, row in zip(states, rows, strict=True)]

    def _pooled(self, batch: TokenBatch) -> Floats:
        return self._engine.run(batch, ("pooled",))[0]


def _flat(whole: Sequence[EncodedText], split: Sequence[_Pieces]) -> list[EncodedText]:
    """What is run: every text, the long ones as their first piece, and the other pieces behind them all."""
    flat = list(whole)
    for one in split:
        flat[one.place] = one.encoded[0]
    return [*flat, *(piece for one in split for piece in one.encoded[1:])]


def _joined(pooled: Floats, split: Sequence[_Pieces], rule: LongText) -> Floats:
    """One vector a text again."""
    extra = sum(len(one.encoded) - 1 for one in split)
    vectors: Floats = pooled[: len(pooled) - extra]
    start = len(vectors)
    for one in split:
        end = start + len(one.encoded) - 1
        own = unit(np.concatenate([vectors[one.place][None], pooled[start:end]]))
        vectors[one.place] = COMBINED[rule](own, np.array([len(piece.ids) for piece in one.encoded]))
        start = end
    return vectors


def _weighted_mean(vectors: Floats, tokens: Ids) -> Floats:
    mean: Floats = (tokens @ vectors / tokens.sum()).astype(np.float32)
    return mean


def _largest(vectors: Floats, tokens: Ids) -> Floats:
    largest: Floats = vectors.max(axis=0)
    return largest


CUT = ("truncate", "error")
COMBINED: Mapping[str, Callable[[Floats, Ids], Floats]] = {"mean": _weighted_mean, "max": _largest}
