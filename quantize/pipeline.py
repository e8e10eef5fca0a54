"""From an FP32 model folder to a quantized one: a recipe, a certificate, a gate, and only then a folder.

Not here: how a recipe computes (``recipes``), what is measured and how (``certificate``, ``fidelity``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.errors import FidelityError, InvalidOptionError, UnsupportedModelError
from qingyu.models.extras import require
from qingyu.quantize.texts import calibration_texts, checked_texts
from qingyu.runtime.spec import MANIFEST, ModelSpec, check_file, read_spec

if TYPE_CHECKING:
    from qingyu.models.export.graph import GraphPlan, Weights
    from qingyu.quantize.certificate import Certificate
    from qingyu.quantize.evaluation import RetrievalSet, SimilaritySet
    from qingyu.quantize.fidelity import Measured, Reference
    from qingyu.quantize.layers import LayerError
    from qingyu.quantize.recipes import Recipe
    from qingyu.quantize.report import PassedOver
    from qingyu.quantize.statistics import Statistics
    from qingyu.runtime.engines import EngineName

__all__ = ["AUTO", "FALLBACK", "Gate", "Outcome", "PreparedSource", "quantize", "verify"]

AUTO = "auto"  # as a recipe: try them from the fastest to the safest
FALLBACK = "model.fp32.onnx"
STATISTICS_TEXTS = 128  # maxima of activations change little beyond; more only takes longer
LAYER_TEXTS = 16
# Layers kept in FP32 when no recipe passes: doubled until it does, and no more than half of a 12-layer BERT's 72.
KEPT_FLOAT = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Gate:
    """The least cosines to FP32, over all texts (``mean``) and of the worst text (``minimum``)."""

    mean: float = 0.99
    minimum: float = 0.97

    def missed(self, certificate: Certificate) -> str | None:
        """What a certificate falls short of, in words; ``None`` when it passes."""
        cosine = certificate.cosine
        reached = (("mean", cosine.mean, self.mean), ("worst", cosine.minimum, self.minimum))
        short = [
            f"{name} cosine {value:.5f} is below {least}" for name, value, least in reached if value < least
        ]
        return " and ".join(short) or None


@dataclass(frozen=True)
class Outcome:
    """The spec of the folder that was written, what was measured, and the recipes that did not pass before it."""

    spec: ModelSpec
    measured: Measured
    passed_over: tuple[PassedOver, ...] = ()


def quantize(
    model: Path,
    output: Path,
    *,
    recipe: str = "rowwise",
    texts: Sequence[str] | None = None,
    calibration: Sequence[str] | None = None,
    gate: Gate | None = None,
    retrieval: Sequence[RetrievalSet] = (),
    similarity: Sequence[SimilaritySet] = (),
    weight_bits: int | None = None,
    smoothing: float | None = None,
    edge: bool = False,
    fallback: bool = False,
    openvino: bool = False,
    report: Path | None = None,
    speed_rounds: int = 5,
    overwrite: bool = False,
    progress: bool = False,
) -> Outcome:
    """Write the FP32 model folder ``model`` quantized to ``output``, if it passes the gate.

    ``recipe`` is a name in ``RECIPES`` or "auto": the first that passes, from the fastest to the most faithful, and
    at last with the most sensitive layers left in FP32. ``texts`` are measured on, ``calibration`` sets scales; both
    are the built-in sample unless given. ``weight_bits=7`` is for CPUs without VNNI. ``edge`` adds a memory-mapped
    file for the profile of that name, ``fallback`` the FP32 graph for machines that fail the self-check.
    ``openvino`` adds a file for the engine of that name, which passes the same gate and has its own certificate.
    ``report`` is an HTML file, written also for a model that is refused. ``speed_rounds=0`` leaves out the speed.

    ``output`` appears whole or not at all and ``model`` is not touched. Raises ``FidelityError`` when the gate is
    missed, ``MissingExtraError``, ``InputError``, ``UnsupportedModelError``, ``CorruptFileError``, ``OutputError``.
    """
    require("quantize", "onnx")
    if openvino:
        require("openvino", "openvino")
    from qingyu.models.export.folder import check_output, new_folder
    from qingyu.quantize.fidelity import Reference
    from qingyu.runtime.embedder import Embedder

    source = PreparedSource(model, calibration, weight_bits=weight_bits, smoothing=smoothing)
    _check_embedding(source.spec)
    measured_on = checked_texts(calibration_texts() if texts is None else texts, least=2)
    check_output(output, model, overwrite=overwrite)
    with Embedder.open(model) as fp32, new_folder(output) as folder:
        reference = Reference.of(fp32, measured_on, retrieval=retrieval, similarity=similarity)
        trial = _Trials(source, reference, folder, gate or Gate(), speed_rounds, progress)
        accepted = trial.run(recipe)
        if report is not None:
            trial.write_report(report, accepted)
        if accepted is None:
            raise trial.refusal()
        spec = _finish(folder, source, reference, accepted, edge=edge, fallback=fallback)
        if openvino:
            from qingyu.quantize.openvino import write_openvino

            spec = write_openvino(folder, spec, source, reference, trial.gate, rounds=speed_rounds)
    return Outcome(spec, accepted.measured, tuple(trial.passed_over))


def verify(
    candidate: Path,
    reference: Path,
    texts: Sequence[str],
    *,
    retrieval: Sequence[RetrievalSet] = (),
    similarity: Sequence[SimilaritySet] = (),
    engine: EngineName = "onnxruntime",
    speed_rounds: int = 5,
    progress: bool = False,
) -> Measured:
    """The certificate of a quantized folder against its FP32 folder, computed anew on this machine.

    ``engine`` runs the quantized one. Raises ``MismatchError`` when they are not of the same model, ``InputError`` for
    texts that tell nothing.
    """
    from qingyu.quantize.fidelity import Reference
    from qingyu.runtime.embedder import Embedder

    checked = checked_texts(texts, least=2)
    with Embedder.open(reference) as fp32, Embedder.open(candidate, engine=engine) as quantized:
        from qingyu.quantize.certificate import check_same_model

        check_same_model(fp32.spec, quantized.spec)
        measured_with = Reference.of(fp32, checked, retrieval=retrieval, similarity=similarity)
        return measured_with.measure(quantized, rounds=speed_rounds, progress=progress)


class PreparedSource:
    """The FP32 folder, read once, and the statistics of its activations, collected when a recipe needs them."""

    def __init__(
        self,
        model: Path,
        calibration: Sequence[str] | None,
        *,
        weight_bits: int | None,
        smoothing: float | None,
    ) -> None:
        self.model = model
        self.spec = _readable(model)
        self.weight_bits = weight_bits
        self.smoothing = smoothing
        chosen = calibration_texts(STATISTICS_TEXTS) if calibration is None else calibration
        self.calibration = checked_texts(chosen, least=2)

    @cached_property
    def plan(self) -> GraphPlan:
        """What the FP32 graph was written from, without what no result is made of."""
        from qingyu.models.export.graph import narrowed, read_plan

        return narrowed(read_plan(self.model / self.spec.graph))

    @cached_property
    def weights(self) -> Mapping[str, Weights]:
        """The folded weights of the FP32 graph."""
        from qingyu.models.export.graph import read_weights

        return read_weights(self.model / self.spec.graph)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the inputs of linear layers, on the calibration texts."""
        from qingyu.quantize.statistics import collect

        return collect(self.model, self.calibration)

    def graph(self, recipe: Recipe, *, keep_float: Sequence[str] = (), hidden_states: bool = False) -> bytes:
        """The quantized graph."""
        from qingyu.quantize.recipes import write_quantized

        whole = dataclasses.replace(self.plan, hidden_states=True, token_states=True)
        return write_quantized(
            recipe,
            whole if hidden_states else self.plan,
            self.weights,
            statistics=self.statistics if recipe.needs_statistics else None,
            smoothing=recipe.smoothing if self.smoothing is None else self.smoothing,
            weight_bits=self.weight_bits,
            keep_float=keep_float,
        )

    def fallback(self) -> bytes:
        """The FP32 graph with the inputs and outputs of the quantized one."""
        from qingyu.models.export.graph import FloatLinear, write_graph

        return write_graph(self.plan, self.weights, FloatLinear())

    def write(self, folder: Path, recipe: Recipe, *, keep_float: tuple[str, ...] = ()) -> ModelSpec:
        """Put the quantized model in ``folder``, instead of all that was in it; its spec, without a certificate."""
        from qingyu.models.export.folder import write_manifest
        from qingyu.models.export.graph import output_names

        for file in folder.iterdir():
            file.unlink()
        (folder / self.spec.graph).write_bytes(self.graph(recipe, keep_float=keep_float))
        (folder / "tokenizer.json").write_bytes((self.model / "tokenizer.json").read_bytes())
        draft = dataclasses.replace(
            self.spec,
            outputs=output_names(self.plan),
            precision=recipe.precision,
            recipe=recipe.name,
            weight_bits=self.weight_bits or recipe.weight_bits,
            float_layers=keep_float,
            golden=None,
            edge=None,
            openvino=None,
        )
        return write_manifest(folder, draft)


@dataclass(frozen=True)
class _Trial:
    """One recipe that was written and measured, ``missed`` being what it falls short of."""

    recipe: Recipe
    keep_float: tuple[str, ...]
    spec: ModelSpec
    measured: Measured
    missed: str | None

    @property
    def label(self) -> str:
        kept = f", {len(self.keep_float)} layers in FP32" if self.keep_float else ""
        return self.recipe.name + kept


class _Trials:
    """Writes recipes one after the other into the same temporary folder until one passes the gate."""

    def __init__(
        self,
        source: PreparedSource,
        reference: Reference,
        folder: Path,
        gate: Gate,
        speed_rounds: int,
        progress: bool,
    ) -> None:
        self.source, self.reference, self.folder, self.gate = source, reference, folder, gate
        self.speed_rounds, self.progress = speed_rounds, progress
        self.tried: list[_Trial] = []

    @property
    def passed_over(self) -> list[PassedOver]:
        from qingyu.quantize.report import PassedOver

        return [PassedOver(t.label, t.missed, t.measured.certificate) for t in self.tried if t.missed]

    def run(self, name: str) -> _Trial | None:
        """The first trial that passes, its files standing in the folder; ``None`` when none does."""
        for recipe, keep_float in self._candidates(name):
            trial = self._try(recipe, keep_float)
            self.tried.append(trial)
            if trial.missed is None:
                return trial
        return None

    def _candidates(self, name: str) -> Iterator[tuple[Recipe, tuple[str, ...]]]:
        from qingyu.quantize.recipes import AUTO as IN_ORDER
        from qingyu.quantize.recipes import RECIPES

        if name != AUTO and name not in RECIPES:
            raise InvalidOptionError(
                "recipe",
                expected=f"one of {', '.join((AUTO, *RECIPES))}",
                found=repr(name),
                remedy="Use one of them.",
            )
        names = IN_ORDER if name == AUTO else (name,)
        for each in names:
            yield RECIPES[each], ()
        if name == AUTO:
            yield from self._with_float_layers(RECIPES["rowwise"])

    def _with_float_layers(self, recipe: Recipe) -> Iterator[tuple[Recipe, tuple[str, ...]]]:
        from qingyu.quantize.sensitivity import sensitive_layers

        source = self.source
        gains = sensitive_layers(
            source.model,
            recipe,
            source.statistics,
            smoothing=source.smoothing,
            weight_bits=source.weight_bits,
        )
        ranked = [name for name, _ in gains]
        for count in KEPT_FLOAT:
            if count < len(ranked):
                yield recipe, tuple(ranked[:count])

    def _try(self, recipe: Recipe, keep_float: tuple[str, ...]) -> _Trial:
        from qingyu.runtime.embedder import Embedder

        spec = self.source.write(self.folder, recipe, keep_float=keep_float)
        with Embedder.open(self.folder) as quantized:
            measured = self.reference.measure(quantized, rounds=self.speed_rounds, progress=self.progress)
        return _Trial(recipe, keep_float, spec, measured, self.gate.missed(measured.certificate))

    def refusal(self) -> FidelityError:
        """The error for a gate that nothing passed."""
        best = max(self.tried, key=lambda trial: trial.measured.certificate.cosine.mean)
        tried = "" if len(self.tried) == 1 else f" (the best of {len(self.tried)} tried)"
        return FidelityError(
            f"{best.spec.name} quantized by {best.label} is too far from FP32",
            expected=f"cosine of at least {self.gate.mean} on average and {self.gate.minimum} at worst",
            found=f"{best.missed}{tried}; nothing was written",
            remedy="Use a more faithful recipe (--recipe auto tries all), or allow more loss with --min-cosine.",
        )

    def write_report(self, path: Path, accepted: _Trial | None) -> None:
        """The HTML report of what was accepted, or of the best that was refused."""
        from qingyu.quantize.report import write_report

        shown = accepted or max(self.tried, key=lambda trial: trial.measured.certificate.cosine.mean)
        certificate = shown.measured.certificate
        limits = f"mean {self.gate.mean}, worst {self.gate.minimum}"
        reached = f"mean {certificate.cosine.mean:.5f}, worst {certificate.cosine.minimum:.5f}"
        write_report(
            path,
            spec=shown.spec,
            certificate=certificate,
            cosines=shown.measured.cosines,
            verdict=f"Cosine to FP32: {reached}; asked for: {limits}.",
            passed=accepted is not None,
            layers=self._layer_errors(shown),
            passed_over=[over for over in self.passed_over if over.recipe != shown.label],
        )

    def _layer_errors(self, trial: _Trial) -> list[LayerError]:
        from qingyu.quantize.layers import graph_with_hidden_states, layer_errors, single_batches

        fp32 = graph_with_hidden_states(self.source.model / self.source.spec.graph)
        candidate = self.source.graph(trial.recipe, keep_float=trial.keep_float, hidden_states=True)
        batches = single_batches(self.reference.embedder, self.reference.texts[:LAYER_TEXTS])
        return layer_errors(fp32, candidate, batches)


def _check_embedding(spec: ModelSpec) -> None:
    if spec.task != "embedding":
        raise UnsupportedModelError(
            f"{spec.name} gives no embeddings",
            expected="a model folder of the task embedding",
            found=f"the task {spec.task}",
            remedy="Use quantize_task, as the command `qingyu quantize` does.",
        )


def _readable(model: Path) -> ModelSpec:
    spec = read_spec(model)
    if spec.precision != "fp32":
        raise UnsupportedModelError(
            f"{model} is already quantized",
            expected="an FP32 model folder",
            found=f"{spec.precision}, recipe {spec.recipe}",
            remedy="Quantize the FP32 folder that it was made from.",
        )
    for name, record in spec.files.items():
        check_file(model, name, record)
    return spec


def _finish(
    folder: Path, source: PreparedSource, reference: Reference, trial: _Trial, *, edge: bool, fallback: bool
) -> ModelSpec:
    """Add certificate, golden texts, and the files asked for; the manifest as it will stay."""
    from qingyu.models.export.folder import write_manifest
    from qingyu.quantize.edge import write_edge
    from qingyu.quantize.golden import make_golden
    from qingyu.runtime.embedder import Embedder

    with Embedder.open(folder) as quantized:
        golden = make_golden(quantized, reference.embedder)
    spec = dataclasses.replace(trial.spec, certificate=trial.measured.certificate.to_json(), golden=golden)
    if edge:
        spec = write_edge(folder, spec)
    if fallback:
        (folder / FALLBACK).write_bytes(source.fallback())
        spec = dataclasses.replace(spec, fallback=FALLBACK)
    (folder / MANIFEST).unlink()
    return write_manifest(folder, spec)
