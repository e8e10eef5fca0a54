"""Sentence embeddings: encode -> run -> pool, for one text, a list, or a stream of any length."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np

from qingyu.errors import (
    InvalidOptionError,
    InvalidTextError,
    ModelNotFoundError,
    TextTooLongError,
    UnknownTokenWarning,
)
from qingyu.runtime.batching import Batcher, Workers, windows
from qingyu.runtime.bundle import open_bundle
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.memory import MEGABYTE, Plan, plan, resident_bytes
from qingyu.runtime.onnxruntime_engine import PROFILES, OnnxRuntimeEngine, Profile
from qingyu.runtime.progress import progress_bar
from qingyu.runtime.selfcheck import CheckedEngine, SelfCheck, qingyu_home
from qingyu.runtime.spec import ModelSpec, check_file, read_spec
from qingyu.runtime.tokenizer import EncodedText, TokenizedText, Tokenizer
from qingyu.runtime.vectors import cosine, unit

__all__ = ["BUNDLED", "Block", "Embedder", "Report", "find_model"]

LongText = Literal["truncate", "error"]

BUNDLED = "qingyu-mini-zh"  # the model that travels in the package
UNKNOWN_LIMIT = 0.1  # above this share of unknown tokens a vector says little about its text


class Block(NamedTuple):
    """Consecutive texts of a stream and their vectors, float32 (len(texts), dim)."""

    texts: list[str]
    vectors: Floats


@dataclass
class Report:
    """What a call read: pass one in, read it afterwards. ``tokens`` counts special tokens, too."""

    texts: int = 0
    tokens: int = 0
    unknown: int = 0
    truncated: int = 0

    @property
    def unknown_rate(self) -> float:
        """The share of tokens that the vocabulary does not know, special tokens [CLS] and [SEP] left out."""
        return self.unknown / max(1, self.tokens - 2 * self.texts)

    def add(self, encoded: Sequence[EncodedText]) -> None:
        """Count these texts."""
        self.texts += len(encoded)
        self.tokens += sum(len(text.ids) for text in encoded)
        self.unknown += sum(text.unknown for text in encoded)
        self.truncated += sum(text.truncated for text in encoded)

    def warn(self) -> None:
        """Issue ``UnknownTokenWarning`` when more than a tenth of the tokens are unknown."""
        if self.unknown_rate > UNKNOWN_LIMIT:
            warnings.warn(
                f"{self.unknown_rate:.0%} of {self.tokens - 2 * self.texts} tokens are unknown to the model's "
                "vocabulary, so the vectors say little about these texts. Is the text Chinese, and is the model "
                "made for it? `Embedder.tokenize(text)` shows which tokens are unknown.",
                UnknownTokenWarning,
                stacklevel=3,
            )


def find_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """The model folder at a path, of a bundle file, or of a plain name: in ``$QINGYU_HOME/models``, or the bundled one.

    ``QINGYU_HOME`` is ``~/.cache/qingyu`` unless set. Raises ``ModelNotFoundError`` with the places, and for a
    bundle file what ``open_bundle`` raises.
    """
    folder = Path(name_or_folder)
    if folder.is_file():
        return open_bundle(folder)
    if folder.exists():
        return folder
    named = qingyu_home() / "models" / folder
    if re.fullmatch(r"[\w.@-]+", str(name_or_folder)) and named.is_dir():
        return named
    bundled = Path(__file__).parent / "bundled" / BUNDLED
    if str(name_or_folder) == BUNDLED and bundled.is_dir():
        return bundled
    raise ModelNotFoundError(
        f"no model {str(name_or_folder)!r}",
        expected=f"a model folder at that path or at {named}, or the name {BUNDLED}",
        found="none of them",
        remedy="Make one with `qingyu export CHECKPOINT FOLDER`, or get one with `qingyu pull NAME`.",
    )


class Embedder:
    """Turns texts into vectors with one model; thread-safe, usable in a forked child, and a context manager.

    Open one with ``Embedder.open``. The graph is loaded when first needed; ``close()`` frees it.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.plan = steps
        self._tokenizer = tokenizer
        self._engine = engine
        self._workers = Workers(steps.workers)
        self._options: tuple[Any, ...] = ()
        self._batcher = Batcher(
            run=self._pooled,
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
        self_check: bool = True,
    ) -> Embedder:
        """An embedder for a model folder or a bundle (the model in the package if none is named).

        Its files are checked against the hashes in its manifest.

        ``profile``: "throughput" runs several micro-batches at once, one thread each; "latency" uses all threads
        for one micro-batch; "edge" takes the least memory. ``threads``: ``None`` is what affinity and the
        container's CPU quota allow. ``max_memory_mb``: the resident memory that this process may reach while
        embedding; it decides workers and token budget, and loads the graph at once. ``special_tokens="text"``
        reads a typed ``[MASK]`` as plain text instead of the special token. ``unicode_form="NFKC"`` folds
        full-width and compatibility forms before tokenizing, which the reference does not do. ``self_check=False``
        trusts this machine's arithmetic: else the model's golden texts are embedded before the first vector on a
        machine, which takes milliseconds, and ``KernelError`` raised or, where the folder has an FP32 graph too,
        ``FallbackWarning`` issued when their vectors are wrong.

        Raises ``ModelNotFoundError``, ``ManifestError``, ``CorruptFileError``, ``TokenizerError``,
        ``GraphError``, ``InvalidOptionError`` or ``MemoryBudgetError``; for a bundle ``BundleError``, too.
        """
        _check_options(profile, max_memory_mb, special_tokens, unicode_form)
        folder = find_model(name_or_folder)
        spec = read_spec(folder)
        check_file(folder, "tokenizer.json", spec.files["tokenizer.json"])
        tokenizer = Tokenizer.from_file(
            folder / "tokenizer.json",
            max_tokens=spec.max_tokens,
            special_tokens=special_tokens,
            unicode_form=unicode_form,
        )
        engine = CheckedEngine(
            OnnxRuntimeEngine(folder, spec, profile=profile, threads=threads), tokenizer, enabled=self_check
        )
        embedder = cls(folder, spec, tokenizer, engine, _plan(engine, spec, max_memory_mb))
        embedder._options = (
            _origin(name_or_folder, folder),
            profile,
            threads,
            max_memory_mb,
            special_tokens,
            unicode_form,
            self_check,
        )
        return embedder

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
        report: Report | None = None,
        progress: bool = False,
    ) -> Floats:
        """The vectors of the texts in their order, float32 (n, dim); (1, dim) for one text, (0, dim) for none.

        ``prompt``: ``None`` is the model's default; "query" and "passage" (and any name in ``spec.prompts``) are
        the model's own; any other string is put before each text as it is. ``dim`` keeps the first values of
        models trained for it. ``normalize`` gives length 1, after the cut; ``None`` does what the model's
        reference does. ``long_text="truncate"`` reads the first ``spec.max_tokens`` tokens, "error" raises
        ``TextTooLongError``. ``report`` is added up to, ``progress`` draws a bar on a terminal.

        Raises ``InvalidTextError`` for what is not Unicode text and ``UnknownTokenWarning`` above 10 % unknown.
        """
        listed = _listed(texts)
        counted = Report() if report is None else report
        blocks = self._blocks(listed, prompt, dim, normalize, long_text, counted)
        if progress:
            blocks = progress_bar(((len(block.texts), block) for block in blocks), total=len(listed))
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
        report: Report | None = None,
    ) -> Iterator[Block]:
        """Blocks of (texts, vectors) in order, from an iterable of any length, in bounded memory.

        At most two windows (2,048 texts or 2 million characters each) are held. An error in the iterable is
        raised as it is; closing the iterator early drops what has not begun. Options as for ``embed``.
        """
        counted = Report() if report is None else report
        yield from self._blocks(texts, prompt, dim, normalize, long_text, counted)
        counted.warn()

    def similarity(
        self, a: str | Iterable[str], b: str | Iterable[str], *, prompt: str | None = None
    ) -> Floats:
        """Cosine similarities, float32 (len(a), len(b))."""
        return cosine(self.embed(a, prompt=prompt), self.embed(b, prompt=prompt))

    def tokenize(self, text: str, *, prompt: str | None = None) -> TokenizedText:
        """What the model reads of a text: tokens, ids, and where in the text each stands."""
        return self._tokenizer.tokenize(text, prompt=self._prompt(prompt))

    def load(self) -> None:
        """Load the graph, and check the machine, now instead of at the first text."""
        self._engine.open()

    def self_check(self) -> SelfCheck:
        """Embed the model's golden texts now, whatever was found before; how close their vectors are.

        Raises nothing for a failure: the next text will.
        """
        return self._engine.self_check()

    def close(self) -> None:
        """Wait for runs under way and free the graph; later calls raise ``ClosedError``."""
        self._workers.close()
        self._engine.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Embedder {self.spec.name} {self.spec.precision}, {self.spec.dim} dimensions, {self.folder}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._options

    def _prompt(self, prompt: str | None) -> str:
        name = self.spec.default_prompt if prompt is None else prompt
        if name is None:
            return ""
        if name in self.spec.prompts:
            return self.spec.prompts[name]
        if name in ("query", "passage"):
            raise InvalidOptionError(
                f"{self.spec.name} has no prompt {name!r}",
                expected=f"one of {sorted(self.spec.prompts)}" if self.spec.prompts else "no prompt",
                found=repr(name),
                remedy="Pass the prompt's text itself, or name it at export with --prompt NAME=TEXT.",
            )
        return name

    def _blocks(
        self,
        texts: Iterable[str],
        prompt: str | None,
        dim: int | None,
        normalize: bool | None,
        long_text: LongText,
        report: Report,
    ) -> Iterator[Block]:
        prefix = self._prompt(prompt)
        width = _check_dim(dim, self.spec)
        to_unit = self.spec.normalize if normalize is None else normalize
        if long_text not in ("truncate", "error"):
            raise InvalidOptionError(
                "long_text",
                expected="'truncate' or 'error'",
                found=repr(long_text),
                remedy="Use one of them.",
            )

        def encoded() -> Iterator[tuple[list[str], list[EncodedText]]]:
            for window in windows(texts):
                yield window, self._encode(window, prefix, long_text, report)

        for window, pooled in self._batcher.run_windows(encoded()):
            cut = pooled[:, :width]
            yield Block(window, unit(cut) if to_unit else np.ascontiguousarray(cut))

    def _encode(
        self, texts: Sequence[str], prefix: str, long_text: LongText, report: Report
    ) -> list[EncodedText]:
        first = report.texts
        encoded = self._tokenizer.encode(texts, prompt=prefix, first=first)
        report.add(encoded)
        if long_text == "error":
            for position, text in enumerate(encoded):
                if text.truncated:
                    raise TextTooLongError(
                        f"text {first + position} is too long",
                        expected=f"at most {self.spec.max_tokens} tokens",
                        found=f"more, in {len(texts[position]):,} characters",
                        remedy='Split it, or pass long_text="truncate" to read only its beginning.',
                    )
        return encoded

    def _pooled(self, batch: TokenBatch) -> Floats:
        return self._engine.run(batch, ("pooled",))[0]


def _listed(texts: str | Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise InvalidTextError(
            "texts is not text",
            expected="a str or an iterable of str",
            found=type(texts).__name__,
            remedy="Pass a list of texts.",
        )
    return list(texts)


def _origin(name_or_folder: str | os.PathLike[str], folder: Path) -> Path:
    """What to open again elsewhere: a bundle itself, for it may be unpacked for this process only."""
    return Path(name_or_folder).resolve() if Path(name_or_folder).is_file() else folder


def _reopen(
    folder: Path,
    profile: Profile,
    threads: int | None,
    max_memory_mb: int | None,
    special_tokens: Literal["parse", "text"],
    unicode_form: Literal["NFKC"] | None,
    self_check: bool,
) -> Embedder:
    return Embedder.open(
        folder,
        profile=profile,
        threads=threads,
        max_memory_mb=max_memory_mb,
        special_tokens=special_tokens,
        unicode_form=unicode_form,
        self_check=self_check,
    )


def _check_options(
    profile: str, max_memory_mb: int | None, special_tokens: str, unicode_form: str | None
) -> None:
    choices = (
        ("profile", profile, tuple(PROFILES)),
        ("special_tokens", special_tokens, ("parse", "text")),
        ("unicode_form", unicode_form, (None, "NFKC")),
    )
    for option, value, allowed in choices:
        if value not in allowed:
            raise InvalidOptionError(
                option,
                expected=f"one of {', '.join(map(repr, allowed))}",
                found=repr(value),
                remedy="Use one of them.",
            )
    if max_memory_mb is not None and max_memory_mb < 1:
        raise InvalidOptionError(
            "max_memory_mb", expected="at least 1", found=str(max_memory_mb), remedy="Give it in megabytes."
        )


def _check_dim(dim: int | None, spec: ModelSpec) -> int:
    if dim is None:
        return spec.dim
    if not 1 <= dim <= spec.dim:
        raise InvalidOptionError(
            "dim",
            expected=f"1 to {spec.dim}",
            found=str(dim),
            remedy=f"{spec.name} has {spec.dim} dimensions.",
        )
    return dim


def _plan(engine: CheckedEngine, spec: ModelSpec, max_memory_mb: int | None) -> Plan:
    free = None
    if max_memory_mb is not None:
        engine.open()  # what the weights take is measured, not estimated
        free = max_memory_mb * MEGABYTE - resident_bytes()
    return plan(
        spec.architecture,
        max_tokens=spec.max_tokens,
        workers=engine.workers,
        token_budget=engine.settings.token_budget,
        free_bytes=free,
    )
