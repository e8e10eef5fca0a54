"""What all tasks share: finding a model folder, opening it, reports, closing, pickling.

Not here: what a task computes (``embedder``, ``fill_mask`` and the others).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import numpy as np

from qingyu.errors import (
    InvalidOptionError,
    InvalidTextError,
    ModelNotFoundError,
    UnknownTokenWarning,
    UnsupportedModelError,
)
from qingyu.runtime.batching import Batcher, ItemBatcher, Workers, windows
from qingyu.runtime.engine import Floats, Ids, TokenBatch
from qingyu.runtime.engines import EngineName, check_engine, choose_engine
from qingyu.runtime.graph_engine import PROFILES, Profile
from qingyu.runtime.home import check_home, qingyu_home
from qingyu.runtime.memory import MEGABYTE, Plan, give_back_freed, plan, resident_bytes
from qingyu.runtime.scripts import Script
from qingyu.runtime.selfcheck import CheckedEngine, SelfCheck
from qingyu.runtime.spec import ModelSpec, Task, check_file, read_spec
from qingyu.runtime.tokenizer import EncodedPair, EncodedText, TokenizedText, Tokenizer
from qingyu.runtime.tuning import TUNED, Tuning, recall
from qingyu.runtime.vectors import unit

__all__ = [
    "BUNDLED",
    "CutText",
    "OpenOptions",
    "Report",
    "TaskModel",
    "TextModel",
    "TokenRow",
    "find_model",
    "listed",
    "open_model",
]

BUNDLED = "qingyu-mini-zh"  # the model that travels in the package

M = TypeVar("M", bound="TaskModel")
T = TypeVar("T", bound="TextModel")

CUT_LISTED = 20  # texts that a report names; it must not grow with a stream
UNKNOWN_LIMIT = 0.1  # above this share of unknown tokens a result says little about its text

# Task -> the module of the class that opens its models, and the class.
OPENED_BY: Mapping[Task, tuple[str, str]] = {
    "embedding": ("qingyu.runtime.embedder", "Embedder"),
    "fill-mask": ("qingyu.runtime.fill_mask", "FillMask"),
    "classification": ("qingyu.runtime.classifier", "Classifier"),
    "tagging": ("qingyu.runtime.token_classifier", "TokenClassifier"),
    "question-answering": ("qingyu.runtime.question_answerer", "QuestionAnswerer"),
    "reranking": ("qingyu.runtime.reranker", "Reranker"),
}


class CutText(NamedTuple):
    """A text that was not read to its end: its number, from 0, and how many characters were left."""

    text: int
    dropped: int


@dataclass
class Report:
    """What a call read: pass one in, read it afterwards. ``tokens`` counts special tokens, too.

    ``truncated`` texts were read in part only, and ``dropped`` characters at their ends not; ``cut`` names the first
    of them. ``split`` texts were read whole, in pieces.
    """

    texts: int = 0
    tokens: int = 0
    unknown: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    cut: list[CutText] = field(default_factory=list)

    @property
    def unknown_rate(self) -> float:
        """The share of tokens that the vocabulary does not know, special tokens [CLS] and [SEP] left out."""
        return self.unknown / max(1, self.tokens - 2 * self.texts)

    def add(self, encoded: Sequence[EncodedText | EncodedPair]) -> None:
        """Count these texts."""
        for number, text in enumerate(encoded, start=self.texts):
            if text.truncated:
                self._add_cut(number, text.dropped)
        self.texts += len(encoded)
        self.tokens += sum(len(text.ids) for text in encoded)
        self.unknown += sum(text.unknown for text in encoded)

    def _add_cut(self, number: int, dropped: int) -> None:
        self.truncated += 1
        self.dropped += dropped
        if len(self.cut) < CUT_LISTED:
            self.cut.append(CutText(number, dropped))

    def replace(self, number: int, whole: EncodedText, pieces: Sequence[EncodedText]) -> None:
        """Count a text's pieces instead of its beginning; ``number`` is the text's, and ``whole`` was truncated."""
        self.tokens += sum(len(piece.ids) for piece in pieces) - len(whole.ids)
        self.unknown += sum(piece.unknown for piece in pieces) - whole.unknown
        self.truncated -= 1
        self.dropped -= whole.dropped
        self.cut = [one for one in self.cut if one.text != number]
        if any(piece.truncated for piece in pieces):
            self._add_cut(number, sum(piece.dropped for piece in pieces))
        self.split += 1

    def include(self, other: Report) -> None:
        """Add the counts of another report; the texts that it names are numbered from its own first, and left."""
        for one in fields(self):
            if one.name != "cut":
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def warn(self) -> None:
        """Issue ``UnknownTokenWarning`` when more than a tenth of the tokens are unknown."""
        if self.unknown_rate > UNKNOWN_LIMIT:
            warnings.warn(
                f"{self.unknown_rate:.0%} of {self.tokens - 2 * self.texts} tokens are unknown to the model's "
                "vocabulary, so the results say little about these texts. Is the text Chinese, and is the model "
                "made for it? `tokenize(text)` of the model shows which tokens are unknown.",
                UnknownTokenWarning,
                stacklevel=3,
            )


def find_model(name_or_folder: str | os.PathLike[str]) -> Path:
    """The model folder at a path, of a bundle file, or of a plain name: in ``$QINGYU_HOME/models``, or the bundled one.

    ``QINGYU_HOME`` is ``~/.cache/qingyu`` unless set. Raises ``ModelNotFoundError`` with the places,
    ``UnsafeFolderError`` for a name in a home that others can write to, and for a bundle file what ``open_bundle``
    raises.
    """
    folder = Path(name_or_folder)
    if folder.is_file():
        # Here, because it brings zipfile and tempfile, which opening a folder does not need.
        from qingyu.runtime.bundle import open_bundle

        return open_bundle(folder)
    if folder.exists():
        return folder
    named = qingyu_home() / "models" / folder
    if re.fullmatch(r"[\w.@-]+", str(name_or_folder)) and named.is_dir():
        check_home(qingyu_home(), "models", str(folder))
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


@dataclass(frozen=True)
class OpenOptions:
    """How a model folder is opened; the meanings are those of ``Embedder.open``."""

    profile: Profile = "throughput"
    threads: int | None = None
    max_memory_mb: int | None = None
    special_tokens: Literal["parse", "text"] = "parse"
    unicode_form: Literal["NFKC"] | None = None
    self_check: bool = True
    script: Script | None = None
    engine: EngineName = "auto"

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for what no model can be opened with."""
        choices = (
            ("profile", self.profile, tuple(PROFILES)),
            ("special_tokens", self.special_tokens, ("parse", "text")),
            ("unicode_form", self.unicode_form, (None, "NFKC")),
            ("script", self.script, (None, *get_args(Script))),
        )
        for option, value, allowed in choices:
            if value not in allowed:
                raise InvalidOptionError(
                    option,
                    expected=f"one of {', '.join(map(repr, allowed))}",
                    found=repr(value),
                    remedy="Use one of them.",
                )
        check_engine(self.engine, profile=self.profile, max_memory_mb=self.max_memory_mb)
        if self.max_memory_mb is not None and self.max_memory_mb < 1:
            raise InvalidOptionError(
                "max_memory_mb",
                expected="at least 1",
                found=str(self.max_memory_mb),
                remedy="Give it in megabytes.",
            )

    def tuning(self, spec: ModelSpec) -> Tuning | None:
        """What `qingyu doctor --measure` found best here, unless these options decide about it."""
        decided = self.threads is not None or self.profile not in TUNED or self.engine != "auto"
        return None if decided else recall(spec).get(self.profile)


class TaskModel:
    """One opened model folder; thread-safe, usable in a forked child, picklable, and a context manager.

    The graph is loaded when first needed; ``close()`` frees it.
    """

    TASK: ClassVar[Task]
    RUNS_OPENVINO: ClassVar[bool] = False
    _batcher: Batcher | ItemBatcher[Any, Any]

    def __init__(
        self, folder: Path, spec: ModelSpec, tokenizer: Tokenizer, engine: CheckedEngine, steps: Plan
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.plan = steps
        self._tokenizer = tokenizer
        self._engine = engine
        self._workers = Workers(steps.workers)
        self._options = OpenOptions()
        self._origin: Path = folder

    @classmethod
    def _opened(cls: type[M], name_or_folder: str | os.PathLike[str], options: OpenOptions) -> M:
        options.check()
        folder = find_model(name_or_folder)
        spec = read_spec(folder)
        cls._check(folder, spec)
        check_file(folder, "tokenizer.json", spec.files["tokenizer.json"])
        tokenizer = Tokenizer.from_file(
            folder / "tokenizer.json",
            max_tokens=spec.max_tokens,
            special_tokens=options.special_tokens,
            unicode_form=options.unicode_form,
            script=options.script,
        )
        tuned = options.tuning(spec)
        runner = choose_engine(
            folder,
            spec,
            engine=options.engine,
            profile=options.profile,
            threads=options.threads if tuned is None else tuned.threads,
            max_memory_mb=options.max_memory_mb,
            runs_openvino=cls.RUNS_OPENVINO,
        )
        engine = CheckedEngine(runner, tokenizer.as_written(), enabled=options.self_check)
        budget = engine.settings.token_budget if tuned is None else tuned.token_budget
        model = cls(folder, spec, tokenizer, engine, _plan(engine, spec, budget, options.max_memory_mb))
        model._options = options
        # What to open again elsewhere: a bundle itself, for it may be unpacked for this process only.
        model._origin = Path(name_or_folder).resolve() if Path(name_or_folder).is_file() else folder
        return model

    @classmethod
    def _check(cls, folder: Path, spec: ModelSpec) -> None:
        """Raise ``UnsupportedModelError`` for a folder that is not for this class."""
        if spec.task != cls.TASK:
            raise UnsupportedModelError(
                f"{folder} is no model for {cls.__name__}",
                expected=f"a model folder of the task {cls.TASK}",
                found=f"the task {spec.task}",
                remedy=f"Open it with {OPENED_BY[spec.task][1]}, or export the checkpoint with --task {cls.TASK}.",
            )

    def tokenize(self, text: str) -> TokenizedText:
        """What the model reads of a text: tokens, ids, and where in the text each stands."""
        return self._tokenizer.tokenize(text)

    @property
    def options(self) -> OpenOptions:
        """How it was opened."""
        return self._options

    @property
    def origin(self) -> Path:
        """What to open it from again, here or in another process: its folder, or the bundle that it is from."""
        return self._origin

    def load(self) -> None:
        """Load the graph, and check the machine, now instead of at the first text."""
        self._engine.open()

    def self_check(self) -> SelfCheck:
        """Run the model's golden texts now, whatever was found before; how close their vectors are.

        Raises nothing for a failure: the next text will.
        """
        return self._engine.self_check()

    def probe(self, text: str) -> Floats:
        """The unit vector, float32 (dim,), that golden texts are compared by: the text run alone."""
        ids = self._tokenizer.as_written().encode([text])[0].ids
        batch = TokenBatch.pad([ids], self._tokenizer.pad_id)
        vector: Floats = unit(self._engine.probe(batch))[0]
        return vector

    def run_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Run rows that ``prepare`` of the task gave, as one micro-batch in this thread; a value for each, in order.

        They may be of several calls. Raises what the engine raises.
        """
        values: Sequence[Any] = self._batcher.run_rows(rows)
        return values

    @property
    def running_spec(self) -> ModelSpec:
        """The manifest of what runs: of the FP32 graph, where the self-check made it take over."""
        return self._engine.spec

    @property
    def engine(self) -> str:
        """What runs the model: "onnxruntime" or "openvino"."""
        return self._engine.library

    def close(self) -> None:
        """Wait for runs under way and free the graph; later calls raise ``ClosedError``."""
        self._workers.close()
        self._engine.close()
        give_back_freed()

    def __enter__(self: M) -> M:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec.name} {self.spec.precision}, {self.folder}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self._origin, self._options)


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A text as a row to run, and what each of its tokens is from."""

    ids: Ids
    tokenized: TokenizedText


class TextModel(TaskModel):
    """A model that reads texts as they are, opened with every option there is."""

    @classmethod
    def open(
        cls: type[T],
        name_or_folder: str | os.PathLike[str],
        *,
        profile: Profile = "throughput",
        threads: int | None = None,
        max_memory_mb: int | None = None,
        special_tokens: Literal["parse", "text"] = "parse",
        unicode_form: Literal["NFKC"] | None = None,
        script: Script | None = None,
        self_check: bool = True,
        engine: EngineName = "auto",
    ) -> T:
        """The model of a folder that was exported for this class.

        Options and errors are those of ``Embedder.open``, and ``UnsupportedModelError`` for any other folder.
        """
        return cls._opened(
            name_or_folder,
            OpenOptions(
                profile, threads, max_memory_mb, special_tokens, unicode_form, self_check, script, engine
            ),
        )

    def _token_windows(
        self, texts: Iterable[str], report: Report
    ) -> Iterator[tuple[tuple[list[str], list[TokenRow]], list[TokenRow]]]:
        """Windows of texts with their rows, and the rows again as what is run; counted in ``report``."""
        for window in windows(texts, self.plan.window):
            rows = [self._token_row(text, report) for text in window]
            yield (window, rows), rows

    def _token_row(self, text: str, report: Report) -> TokenRow:
        tokenized = self._tokenizer.tokenize(text)
        unknown = self._tokenizer.unknown_id
        count = 0 if unknown is None else tokenized.ids.count(unknown)
        ids = np.array(tokenized.ids, dtype=np.int64)
        report.add([EncodedText(ids, count, tokenized.truncated, tokenized.dropped)])
        return TokenRow(ids, tokenized)


def _reopen(kind: type[TaskModel], folder: Path, options: OpenOptions) -> TaskModel:
    return kind._opened(folder, options)


def open_model(folder: Path, options: OpenOptions | None = None) -> TaskModel:
    """The model of a folder, whatever its task; raises what the ``open`` of its class raises."""
    module, name = OPENED_BY[read_spec(folder).task]
    kind: type[TaskModel] = getattr(import_module(module), name)
    return kind._opened(folder, OpenOptions() if options is None else options)


def listed(texts: str | Iterable[str]) -> list[str]:
    """The texts as a list, one ``str`` as a list of one; ``InvalidTextError`` for what cannot be iterated."""
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


def _plan(engine: CheckedEngine, spec: ModelSpec, token_budget: int, max_memory_mb: int | None) -> Plan:
    free = None
    if max_memory_mb is not None:
        # What weights and kernels take is measured, not estimated, and not before the first run.
        engine.run(TokenBatch.pad([np.zeros(2, dtype=np.int64)], 0), spec.outputs[:1])
        free = max_memory_mb * MEGABYTE - resident_bytes() - engine.unread_bytes()
    return plan(
        spec.architecture,
        max_tokens=spec.max_tokens,
        workers=engine.workers,
        token_budget=token_budget,
        free_bytes=free,
        heads=engine.heads_at_once,
    )
