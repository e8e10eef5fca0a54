"""Quantizing models with a head: fill-mask, classification, tagging, question answering, reranking.

What is measured is what such a model is used for, its decisions: how often INT8 and FP32 choose the same. A choice is
a token for a mask, a label for a text, token or (of independent labels) yes or no, the first and the last token of an
answer; of a reranker, which of two texts comes first. Not here: embeddings (``pipeline``), and how recipes compute.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import FidelityError, InputError, ManifestError
from qingyu.models.extras import require
from qingyu.quantize.certificate import Environment, Size, Texts, check_same_model, environment
from qingyu.quantize.pipeline import AUTO, FALLBACK, PreparedSource
from qingyu.quantize.speed import Speed
from qingyu.quantize.texts import calibration_texts, checked_texts
from qingyu.runtime.batching import micro_batches
from qingyu.runtime.engine import Ids, TokenBatch
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.scores import SCORES, softmax
from qingyu.runtime.spec import MANIFEST, ModelSpec, Task, check_file, decode, read_spec
from qingyu.runtime.tokenizer import Tokenizer

__all__ = ["TaskCertificate", "TaskGate", "TaskOutcome", "quantize_task", "task_rows", "verify_task"]

TEXTS = 160  # of the built-in sample: about a thousand decisions of a fill-mask model
TOKEN_BUDGET = 512
MASK_EVERY = 8  # of the tokens of a text, one in this many is masked to measure on
SPEED_BATCHES = 4
QUESTION = 32  # characters of one text that stand for a question about the next
BEST = 5

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class TaskGate:
    """The least share of decisions that INT8 and FP32 must agree on.

    0.95 by default: of a trained fill-mask model 0.98 is expected, but the texts that a model is measured on have
    masks that nothing determines, where the two best words are nearly as likely and any rounding may swap them.
    """

    agreement: float = 0.95

    def missed(self, certificate: TaskCertificate) -> str | None:
        """What a certificate falls short of, in words; ``None`` when it passes."""
        if certificate.agreement >= self.agreement:
            return None
        return f"agreement {certificate.agreement:.4f} is below {self.agreement}"


@dataclass(frozen=True, kw_only=True)
class TaskCertificate:
    """How far a quantized model decides as its FP32 original, on which texts, and where it was measured.

    ``agreement`` is the share of ``decisions`` that are the same. ``top_5_overlap`` is the mean share of the five
    best that both have, ``None`` where there are fewer than ten to choose from. ``mean_difference`` and
    ``largest_difference`` are of scores. ``speed`` is of the graph alone, without tokenizing.
    """

    task: Task
    decisions: int
    agreement: float
    top_5_overlap: float | None
    mean_difference: float
    largest_difference: float
    texts: Texts
    size: Size
    speed: Speed | None = None
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain JSON values, figures rounded to six decimals; ``from_json`` reads it."""
        rounded = _rounded(dataclasses.asdict(self))
        assert isinstance(rounded, dict)
        return rounded

    @classmethod
    def from_json(cls, document: object, *, origin: str = "the certificate") -> TaskCertificate:
        """A certificate from parsed JSON; ``ManifestError`` names ``origin`` and the field that is wrong."""
        found = decode(cls, document, origin=origin)
        for name in ("agreement", "top_5_overlap"):
            value = getattr(found, name)
            if value is not None and not 0 <= value <= 1:
                raise ManifestError(
                    f"{origin}: {name}",
                    expected="0 to 1",
                    found=repr(value),
                    remedy="Quantize the model again.",
                )
        return found


@dataclass(frozen=True)
class TaskOutcome:
    """The spec of the folder that was written, what was measured, and the recipes that did not pass before it."""

    spec: ModelSpec
    certificate: TaskCertificate
    passed_over: tuple[tuple[str, str], ...] = ()


def quantize_task(
    model: Path,
    output: Path,
    *,
    recipe: str = "rowwise",
    texts: Sequence[str] | None = None,
    calibration: Sequence[str] | None = None,
    gate: TaskGate | None = None,
    weight_bits: int | None = None,
    smoothing: float | None = None,
    edge: bool = False,
    fallback: bool = False,
    speed_rounds: int = 5,
    overwrite: bool = False,
) -> TaskOutcome:
    """Write the FP32 folder ``model`` of a model with a head quantized to ``output``, if it passes the gate.

    Options are those of ``quantize``; "auto" tries recipes from the fastest to the most faithful. The word table of
    a fill-mask model stays stored once, as embedding and as decoder. ``output`` appears whole or not at all. Raises
    ``FidelityError`` when the gate is missed, and what ``quantize`` raises.
    """
    require("quantize", "onnx")
    from qingyu.models.export.folder import check_output, new_folder
    from qingyu.quantize.recipes import AUTO as IN_ORDER
    from qingyu.quantize.recipes import recipe_named

    source = PreparedSource(model, calibration, weight_bits=weight_bits, smoothing=smoothing)
    measured_on = checked_texts(calibration_texts(TEXTS) if texts is None else texts, least=2)
    check_output(output, model, overwrite=overwrite)
    limits = gate or TaskGate()
    over: list[tuple[str, str]] = []
    with new_folder(output) as folder:
        for name in IN_ORDER if recipe == AUTO else (recipe,):
            draft = source.write(folder, recipe_named(name))
            certificate = _measure(model, source.spec, folder, draft, measured_on, speed_rounds)
            missed = limits.missed(certificate)
            if missed is None:
                spec = _finish(folder, source, draft, certificate, edge=edge, fallback=fallback)
                return TaskOutcome(spec, certificate, tuple(over))
            over.append((name, missed))
        raise _refusal(source.spec, over, limits)


def verify_task(
    candidate: Path, reference: Path, texts: Sequence[str] | None = None, *, speed_rounds: int = 5
) -> TaskCertificate:
    """The certificate of a quantized folder against its FP32 folder, computed anew on this machine."""
    specs = read_spec(reference), read_spec(candidate)
    check_same_model(*specs)
    measured_on = checked_texts(calibration_texts(TEXTS) if texts is None else texts, least=2)
    return _measure(reference, specs[0], candidate, specs[1], measured_on, speed_rounds)


def task_rows(certificate: TaskCertificate) -> list[tuple[str, str]]:
    """The certificate in words, a (label, figures) for each line."""
    overlap = certificate.top_5_overlap
    rows = [
        ("same decision as FP32", f"{certificate.agreement:.2%} of {certificate.decisions:,}"),
        ("best five kept", "not measured" if overlap is None else f"{overlap:.2%}"),
        (
            "difference of scores",
            f"mean {certificate.mean_difference:.2g}, largest {certificate.largest_difference:.2g}",
        ),
        (
            "size of the graph",
            f"{certificate.size.reference_bytes / 1e6:.1f} -> {certificate.size.candidate_bytes / 1e6:.1f} MB",
        ),
    ]
    if (speed := certificate.speed) is not None:
        spread = f"{speed.least:.2f}-{speed.most:.2f} in {speed.rounds} rounds"
        rows.append(("speed of the graph", f"{speed.ratio:.2f} times FP32 ({spread})"))
    texts = certificate.texts
    return [*rows, ("measured on", f"{texts.count:,} texts, sha256 {texts.sha256[:16]}")]


@dataclass(frozen=True)
class _Input:
    """One row to measure on."""

    ids: Ids
    types: Ids | None = None
    chosen: tuple[int, ...] = ()


def _inputs(folder: Path, spec: ModelSpec, texts: Sequence[str]) -> list[_Input]:
    """The texts as a model of this task reads them: with masks, in pairs, or as they are."""
    check_file(folder, "tokenizer.json", spec.files["tokenizer.json"])
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", max_tokens=spec.max_tokens)
    if spec.task == "fill-mask":
        return [row for text in texts for row in _with_masks(tokenizer, text)]
    if spec.task in ("question-answering", "reranking"):
        pairs = [(text[:QUESTION], other) for text, other in zip(texts, [*texts[1:], texts[0]], strict=True)]
        return [_Input(pair.ids, pair.types) for pair in tokenizer.encode_pairs(pairs)]
    return [_Input(text.ids) for text in tokenizer.encode(texts)]


def _with_masks(tokenizer: Tokenizer, text: str) -> Iterator[_Input]:
    content = tokenizer.content(text)[: tokenizer.room]
    mask = tokenizer.id_of(tokenizer.mask_token or "")
    places = range(min(MASK_EVERY, len(content)) // 2, len(content), MASK_EVERY)
    if mask is None or not places:
        return
    ids, before = tokenizer.surrounded(content)
    chosen = tuple(before + place for place in places)
    ids[list(chosen)] = mask
    yield _Input(ids, chosen=chosen)


def _batches(inputs: Sequence[_Input], spec: ModelSpec) -> list[TokenBatch]:
    groups = [
        [inputs[n] for n in group] for group in micro_batches([len(row.ids) for row in inputs], TOKEN_BUDGET)
    ]
    return [
        TokenBatch.pad(
            [row.ids for row in rows],
            0,  # masked out
            types=[np.zeros_like(row.ids) if row.types is None else row.types for row in rows],
            chosen=[row.chosen for row in rows] if spec.task == "fill-mask" else None,
        )
        for rows in groups
    ]


@dataclass
class _Sums:
    """What is added up over batches."""

    decisions: int = 0
    agreed: float = 0
    overlaps: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    largest: float = 0.0
    scores: list[tuple[float, float]] = field(default_factory=list)

    def add(self, wanted: Doubles, found: Doubles) -> None:
        """Count decisions given by scores, float64 (n, choices); of two with one column, rows are compared later."""
        difference = np.abs(wanted - found)
        self.differences.append(float(difference.mean()))
        self.largest = max(self.largest, float(difference.max()))
        if wanted.shape[1] == 1:
            self.scores += zip(wanted[:, 0].tolist(), found[:, 0].tolist(), strict=True)
            return
        self.decisions += len(wanted)
        self.agreed += int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
        if wanted.shape[1] >= 2 * BEST:
            best = (np.argpartition(-scores, BEST - 1, axis=1)[:, :BEST] for scores in (wanted, found))
            self.overlaps += [len(np.intersect1d(a, b)) / BEST for a, b in zip(*best, strict=True)]

    def add_order(self) -> None:
        """Count each two rows of one score as a decision: which comes first."""
        wanted, found = (np.array(column) for column in zip(*self.scores, strict=True))
        first, second = np.triu_indices(len(wanted), 1)
        same = np.sign(wanted[first] - wanted[second]) == np.sign(found[first] - found[second])
        self.decisions += len(same)
        self.agreed += int(same.sum())


def _measure(
    reference: Path,
    was: ModelSpec,
    candidate: Path,
    now: ModelSpec,
    texts: Sequence[str],
    rounds: int,
) -> TaskCertificate:
    batches = _batches(_inputs(reference, was, texts), was)
    sums = _Sums()
    with OnnxRuntimeEngine(reference, was) as fp32, OnnxRuntimeEngine(candidate, now) as quantized:
        for batch in batches:
            for wanted, found in zip(_decisions(fp32, batch), _decisions(quantized, batch), strict=True):
                sums.add(wanted, found)
        speed = _speed(fp32, quantized, batches, rounds) if rounds else None
    if sums.scores:
        sums.add_order()
    if not sums.decisions:
        raise InputError(
            "texts that give nothing to decide",
            expected="texts of several characters",
            found=f"{len(texts)} texts without",
            remedy="Give texts like those that the model will read.",
        )
    graphs = was.files[was.graph], now.files[now.graph]
    return TaskCertificate(
        task=was.task,
        decisions=sums.decisions,
        agreement=sums.agreed / sums.decisions,
        top_5_overlap=float(np.mean(sums.overlaps)) if sums.overlaps else None,
        mean_difference=float(np.mean(sums.differences)),
        largest_difference=sums.largest,
        texts=Texts.of(texts),
        size=Size(graphs[0].bytes, graphs[1].bytes, graphs[0].sha256),
        speed=speed,
        environment=environment(),
    )


def _decisions(engine: OnnxRuntimeEngine, batch: TokenBatch) -> Iterator[Doubles]:
    """The scores of a batch, float64, each row a decision; one array, or of answers two for each text."""
    spec = engine.spec
    output = next(name for name in spec.outputs if name.endswith("logits"))
    logits = engine.run(batch, (output,))[0]
    if spec.task == "question-answering":
        for row, mask in zip(logits, batch.mask, strict=True):
            yield softmax(np.ascontiguousarray(row[mask == 1].T))
    elif spec.task == "tagging":
        yield softmax(logits[batch.mask == 1])
    elif spec.task == "classification" and spec.scores == "sigmoid":
        yes = SCORES["sigmoid"](logits).reshape(-1, 1)
        yield np.concatenate([1 - yes, yes], axis=1)
    else:
        yield SCORES[spec.scores](logits)


def _speed(
    reference: OnnxRuntimeEngine, candidate: OnnxRuntimeEngine, batches: Sequence[TokenBatch], rounds: int
) -> Speed:
    """Times of the same batches, the two engines taking turns, each one run at a time."""
    sample = batches[:: max(1, len(batches) // SPEED_BATCHES)][:SPEED_BATCHES]
    ratios = [_seconds(reference, sample) / _seconds(candidate, sample) for _ in range(rounds)]
    return Speed(
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        rounds=rounds,
        texts=sum(len(batch.ids) for batch in sample),
        workers=1,
        token_budget=TOKEN_BUDGET,
    )


def _seconds(engine: OnnxRuntimeEngine, batches: Sequence[TokenBatch]) -> float:
    start = time.perf_counter()
    for batch in batches:
        engine.run(batch, engine.spec.outputs[1:2])
    return time.perf_counter() - start


def _finish(
    folder: Path,
    source: PreparedSource,
    draft: ModelSpec,
    certificate: TaskCertificate,
    *,
    edge: bool,
    fallback: bool,
) -> ModelSpec:
    """Add certificate, golden texts, and the files asked for; the manifest as it will stay."""
    from qingyu.models.export.folder import write_manifest
    from qingyu.quantize.edge import write_edge
    from qingyu.quantize.golden import make_golden
    from qingyu.runtime.task import open_model

    with open_model(folder) as quantized, open_model(source.model) as fp32:
        golden = make_golden(quantized, fp32)
    spec = dataclasses.replace(draft, certificate=certificate.to_json(), golden=golden)
    if edge:
        spec = write_edge(folder, spec)
    if fallback:
        (folder / FALLBACK).write_bytes(source.fallback())
        spec = dataclasses.replace(spec, fallback=FALLBACK)
    (folder / MANIFEST).unlink()
    return write_manifest(folder, spec)


def _refusal(spec: ModelSpec, over: Sequence[tuple[str, str]], gate: TaskGate) -> FidelityError:
    tried = "; ".join(f"{name}: {missed}" for name, missed in over)
    return FidelityError(
        f"{spec.name} quantized is too far from FP32",
        expected=f"the same decision in {gate.agreement:.0%} of cases",
        found=f"{tried}; nothing was written",
        remedy="Use a more faithful recipe (--recipe auto tries all), or allow more with --min-agreement.",
    )


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON values
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
