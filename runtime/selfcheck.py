"""Trusts a model on a machine only after the model's golden texts gave their vectors there.

onnxruntime picks its kernels by the CPU that it finds, and some have computed wrongly (microsoft/onnxruntime#6004,
#14642, #26324), which no hash shows. So before the first vector is given out, the manifest's golden texts are
embedded and compared with the FP32 vectors of the machine that made the model. What is allowed is a multiple of
what INT8 lost there (``qingyu.quantize.golden``): an honest kernel loses the same again, whatever its rounding.

A pass is remembered in a small file under ``$QINGYU_HOME/selfcheck``, for this CPU, these library versions and these
files. A failure is written there too, for people to read, and never believed: it is checked again each time, so that
a machine recovers as soon as its cause is gone. Where nothing can be written, every process checks for itself.

Not here: making golden vectors, and testing the kernels alone (``qingyu.runtime.selftest``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qingyu.errors import FallbackWarning, GraphError, KernelError, UnsafeFolderError
from qingyu.runtime.cpu import cpu_flags, cpu_model
from qingyu.runtime.engine import Floats, TokenBatch
from qingyu.runtime.graph_engine import GraphEngine, Settings
from qingyu.runtime.home import distrusted, own_folder, qingyu_home
from qingyu.runtime.spec import Golden, ModelSpec, decode_vector
from qingyu.runtime.tokenizer import Tokenizer

__all__ = ["CheckedEngine", "SelfCheck", "probe", "qingyu_home"]

Result = Literal["passed", "fallback", "failed", "none"]

MEMO_FORMAT = 1
MEMO_LIMIT = 1 << 16  # bytes; a memo has about one thousand


@dataclass(frozen=True)
class SelfCheck:
    """What the golden texts gave.

    ``result``: "passed"; "fallback" when the model's FP32 graph is in use because its own graph failed, and passed;
    "failed", and no vector is given out; or "none" for a manifest without golden texts. ``cosines``: of each text's
    vector with the golden one, NaN where the graph gave none. ``seconds``: what it took, without loading the graph.
    """

    result: Result
    cosines: tuple[float, ...] = ()
    least_cosine: float | None = None
    seconds: float = 0.0


class CheckedEngine:
    """An ``Engine`` that gives nothing before its machine passed the self-check; thread-safe and fork-safe.

    Threads that ask meanwhile wait for the one that checks. A forked child inherits what was found, and takes up the
    check where none was finished. ``enabled=False`` leaves the check to ``self_check``.
    """

    def __init__(self, engine: GraphEngine, tokenizer: Tokenizer, *, enabled: bool = True) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._always = not enabled or engine.spec.golden is None
        self._trusted = self._always
        self._fallen_back = False
        self._lock = threading.Lock()
        _ENGINES.add(self)

    @property
    def spec(self) -> ModelSpec:
        """The manifest of the graph in use, with the precision of the fallback where that took over."""
        return self._engine.spec

    @property
    def settings(self) -> Settings:
        """Those of the profile."""
        return self._engine.settings

    @property
    def library(self) -> str:
        """The library that runs the graph."""
        return self._engine.library

    @property
    def workers(self) -> int:
        """How many threads should call ``run`` at once."""
        return self._engine.workers

    @property
    def heads_at_once(self) -> int:
        """How many heads' attention scores a run holds at once."""
        return self._engine.heads_at_once

    def unread_bytes(self) -> int:
        """Of the memory that the loaded graph may take, what it has not taken yet."""
        return self._engine.unread_bytes()

    def open(self) -> None:
        """Load the graph and check the machine now, if that has not been done.

        Raises ``KernelError`` and what ``GraphEngine.open`` raises; ``FallbackWarning`` when the model's FP32
        graph takes over.
        """
        self._checked().open()

    def run(self, batch: TokenBatch, outputs: Sequence[str]) -> list[Floats]:
        """The named outputs for one micro-batch; raises what ``open`` and ``GraphEngine.run`` raise."""
        return self._checked().run(batch, outputs)

    def probe(self, batch: TokenBatch) -> Floats:
        """What golden texts are compared by, float32 (rows, dim): see ``probe`` below; raises what ``run`` raises."""
        return probe(self._checked(), batch)

    def close(self) -> None:
        """Wait for runs under way, then free the graph. May be called twice."""
        with self._lock:
            self._engine.close()

    def self_check(self) -> SelfCheck:
        """Check now, whatever is remembered, and raise nothing for a failure; the next ``run`` will.

        Raises what ``GraphEngine.open`` raises.
        """
        golden = self._engine.spec.golden
        if golden is None:
            return SelfCheck("none")
        with self._lock:
            found = self._examine(self._engine, golden)
            self._trusted = self._always or found.result == "passed"
            if self._fallen_back and found.result == "passed":
                return dataclasses.replace(found, result="fallback")
            return found

    def _checked(self) -> GraphEngine:
        if not self._trusted:
            with self._lock:
                if not self._trusted:
                    self._establish()
        return self._engine

    def _establish(self) -> None:
        """Trust the engine, or the fallback in its place, or raise ``KernelError``."""
        spec = self._engine.spec
        assert spec.golden is not None
        found = self._recall_or_examine(self._engine, spec.golden)
        if found.result == "failed":
            if (
                self._fallen_back
                or spec.fallback is None
                or not (self._engine.folder / spec.fallback).is_file()
            ):
                raise _kernel_error(self._engine, found)
            self._fall_back(spec, spec.golden, spec.fallback, found)
        self._trusted = True

    def _fall_back(self, spec: ModelSpec, golden: Golden, fallback: str, failed: SelfCheck) -> None:
        error = _kernel_error(self._engine, failed)
        other = self._engine.with_spec(
            dataclasses.replace(
                spec, graph=fallback, edge=None, precision="fp32", recipe=None, weight_bits=None
            )
        )
        try:
            found = self._recall_or_examine(other, golden)
            if found.result == "failed":
                raise _kernel_error(other, found)
            # Before the change: whoever makes the warning an error gets no vector.
            warnings.warn(
                f"{error.problem} ({error.found}, expected {error.expected}), so its FP32 graph {fallback} is used. "
                "It needs more memory and time.",
                FallbackWarning,
                stacklevel=2,
            )
        except BaseException:
            other.close()
            raise
        # Not closed: after a failed ``self_check`` other threads may be in it; the last to leave frees it.
        self._engine, self._fallen_back = other, True

    def _recall_or_examine(self, engine: GraphEngine, golden: Golden) -> SelfCheck:
        engine.open()
        memo = _Memo.of(engine)
        if memo is not None and memo.passed():
            return SelfCheck("passed", least_cosine=golden.least_cosine)
        return self._examine(engine, golden)

    def _examine(self, engine: GraphEngine, golden: Golden) -> SelfCheck:
        engine.open()
        found = _compare(engine, self._tokenizer, golden)
        memo = _Memo.of(engine)
        if memo is not None:
            memo.write(found)
        return found


def _compare(engine: GraphEngine, tokenizer: Tokenizer, golden: Golden) -> SelfCheck:
    """Each text run alone, so that what is compared does not depend on a recipe's treatment of batches."""
    start = time.perf_counter()
    cosines = tuple(
        _cosine(engine, tokenizer, text, decode_vector(vector, engine.spec.dim))
        for text, vector in zip(golden.texts, golden.vectors, strict=True)
    )
    passed = all(cosine >= golden.least_cosine for cosine in cosines)  # NaN is not
    seconds = time.perf_counter() - start
    return SelfCheck("passed" if passed else "failed", cosines, golden.least_cosine, seconds)


def probe(engine: GraphEngine, batch: TokenBatch) -> Floats:
    """What a model is known by, float32 (rows, dim): its vectors, or the first token's states in models with a head."""
    for whole in ("pooled", "chosen_states"):  # of a graph with masks the first token's, as none is chosen
        if whole in engine.spec.outputs:
            return engine.run(batch, (whole,))[0]
    return np.ascontiguousarray(engine.run(batch, ("token_states",))[0][:, 0])


def _cosine(engine: GraphEngine, tokenizer: Tokenizer, text: str, golden: Sequence[float]) -> float:
    batch = TokenBatch.pad([tokenizer.encode([text])[0].ids], tokenizer.pad_id)
    try:
        pooled = probe(engine, batch)[0].astype(np.float64)
    except GraphError:
        return math.nan  # kernels that fail, or give what is no number
    expected = np.array(golden)
    lengths = float(np.linalg.norm(pooled)) * float(np.linalg.norm(expected))
    return float(pooled @ expected) / lengths if lengths > 0 else math.nan


def _kernel_error(engine: GraphEngine, found: SelfCheck) -> KernelError:
    """What the golden texts gave, on which CPU: what a report of the fault needs."""
    least = min(found.cosines, key=lambda cosine: -math.inf if math.isnan(cosine) else cosine)
    flags, cpu = " ".join(cpu_flags()) or "unknown", cpu_model() or "an unknown CPU"
    return KernelError(
        f"this machine computes wrong vectors with {engine.folder / engine.file}",
        expected=f"cosine of at least {found.least_cosine:.6f} with each golden vector",
        found=f"{least:.6f} with {engine.library} {engine.version()} on {cpu}, flags {flags}",
        remedy="Use the FP32 model or another version of onnxruntime, and see what `qingyu doctor` says.",
    )


@dataclass(frozen=True)
class _Memo:
    """The file that says how the check of these facts ended; the facts are in it, so no other can be taken for it."""

    path: Path
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, engine: GraphEngine) -> _Memo | None:
        """The memo of one graph file on this machine; ``None`` where there is no home of ours to keep it in."""
        folder = qingyu_home() / "selfcheck"
        if not folder.is_absolute() or distrusted(qingyu_home(), "selfcheck"):
            return None
        facts = _facts(engine)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "replace")).hexdigest()
        return cls(folder / f"{digest}.json", facts)

    def passed(self) -> bool:
        """Whether a pass of just these facts is on file. Anything unreadable or damaged is no pass."""
        try:
            if not self.path.is_file() or self.path.stat().st_size > MEMO_LIMIT:
                return False
            document = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        known = {"format": MEMO_FORMAT, "facts": self.facts, "result": "passed"}
        return isinstance(document, dict) and {key: document.get(key) for key in known} == known

    def write(self, found: SelfCheck) -> None:
        """Put the result on file, whole or not at all; where that cannot be done the next process checks again."""
        document = {
            "format": MEMO_FORMAT,
            "facts": self.facts,
            "result": found.result,
            "cosines": [None if math.isnan(cosine) else round(cosine, 6) for cosine in found.cosines],
            "milliseconds": round(1e3 * found.seconds, 1),
        }
        text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        with contextlib.suppress(OSError, UnsafeFolderError), _beside(self.path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
            temporary.replace(self.path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name of this thread's own in the same folder, gone at the end."""
    own_folder(path.parent.parent, path.parent.name)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _facts(engine: GraphEngine) -> dict[str, Any]:
    """All that may change a vector: the machine, the libraries, the files, and what is expected of them."""
    import tokenizers

    from qingyu import __version__

    spec, file = engine.spec, engine.file
    golden = json.dumps(dataclasses.asdict(spec.golden), sort_keys=True) if spec.golden is not None else ""
    return {
        "machine": os.uname().machine if hasattr(os, "uname") else "",
        "cpu": cpu_model(),
        "flags": list(cpu_flags()),
        "qingyu": __version__,
        engine.library: engine.version(),
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
        "file": file,
        "graph": spec.files[file].sha256,
        "session": {} if spec.edge is None or file != spec.edge.file else dict(spec.edge.session),
        "tokenizer": spec.files["tokenizer.json"].sha256,
        "golden": hashlib.sha256(golden.encode("utf-8", "replace")).hexdigest(),
    }


# A lock that another thread held at a fork would stay taken in the child for ever.
_ENGINES: weakref.WeakSet[CheckedEngine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_ENGINES):
        engine._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
