"""The fidelity certificate: a quantized model measured against its FP32 original on given texts.

Plain cosine hides loss where a model's cosines are compressed into a narrow band, so the same is also measured
after subtracting the mean FP32 vector from both, and as the overlap of the ten nearest neighbours.

Not here: embedding the texts (``qingyu.quantize.fidelity``), the sets that task quality is measured on
(``qingyu.quantize.evaluation``), and what is good enough (the gate).
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu import __version__
from qingyu.errors import InputError, ManifestError, MismatchError
from qingyu.quantize.evaluation import Change
from qingyu.quantize.speed import Speed
from qingyu.runtime.cpu import cpu_flags, cpu_model
from qingyu.runtime.spec import ModelSpec, decode
from qingyu.runtime.vectors import unit

__all__ = [
    "BANDS",
    "Certificate",
    "Cosines",
    "Difference",
    "Environment",
    "Size",
    "TextCosines",
    "Texts",
    "certificate_rows",
    "check_same_model",
    "compare",
    "cosine_rows",
    "differences",
    "environment",
    "environment_rows",
    "figure_rows",
    "neighbour_overlap",
    "text_cosines",
]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Upper bounds of text length in tokens. Short texts average their rounding errors over fewer tokens.
BANDS = (16, 64, 256, 1 << 20)
NEIGHBOURS = 10
BLOCK = 512  # rows of the neighbour matrix held at once: 10 MB among 5,000 texts

# Kernels of other CPUs moved the lowest cosine of six texts by 1.4e-4 at most; differences() allows three times that.
OTHER_CPU = 5e-4


@dataclass(frozen=True)
class Cosines:
    """Cosine between each text's FP32 and quantized vector: mean, 1st percentile and minimum over ``texts``."""

    texts: int
    mean: float
    percentile_1: float
    minimum: float


@dataclass(frozen=True)
class Texts:
    """How many texts, and the SHA-256 over them in their order, each preceded by its length."""

    count: int
    sha256: str

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """The record of these texts."""
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data))  # so that ["ab"] and ["a", "b"] differ
            digest.update(data)
        return cls(len(texts), digest.hexdigest())


@dataclass(frozen=True)
class Size:
    """Bytes of the two graph files. ``reference_sha256`` tells which FP32 file was measured against."""

    reference_bytes: int
    candidate_bytes: int
    reference_sha256: str

    @property
    def ratio(self) -> float:
        """How many times smaller the candidate is."""
        return self.reference_bytes / self.candidate_bytes


@dataclass(frozen=True)
class Environment:
    """Engine, versions and CPU that figures were measured with."""

    engine: str
    versions: Mapping[str, str]
    python: str
    machine: str
    cpu: str
    cpu_flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a quantized model lost, on which texts, and where it was measured.

    ``bands`` maps a range of text lengths in tokens to the cosines of the texts in it, ``centred_bands`` to the
    centred ones. ``top_10_overlap`` is the mean share of a text's ten nearest neighbours that stay among its ten
    nearest, ``None`` below 20 texts. ``recall_change`` is recall@10 on retrieval sets, ``spearman_change``
    Spearman's correlation on similarity sets; empty, like ``None`` elsewhere, is not measured.
    """

    cosine: Cosines
    centred_cosine: Cosines
    bands: Mapping[str, Cosines]
    centred_bands: Mapping[str, Cosines] = field(default_factory=dict)
    top_10_overlap: float | None
    texts: Texts | None = None
    recall_change: tuple[Change, ...] = ()
    spearman_change: tuple[Change, ...] = ()
    size: Size | None = None
    speed: Speed | None = None
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain JSON values, figures rounded to six decimals; ``from_json`` reads it."""
        rounded = _rounded(dataclasses.asdict(self))
        assert isinstance(rounded, dict)
        return rounded

    @classmethod
    def from_json(cls, document: object, *, origin: str = "the certificate") -> Certificate:
        """A certificate from parsed JSON; ``ManifestError`` names ``origin`` and the field that is wrong."""
        try:
            certificate = decode(cls, document, origin=origin)
        except ManifestError as error:
            raise _invalid(error.problem, error.expected, error.found) from None
        for part in _parts(certificate):
            _check(part, origin)
        return certificate


@dataclass(frozen=True)
class TextCosines:
    """For each text, float64 (n,): its cosine to FP32, and the same after subtracting the mean FP32 vector."""

    plain: Doubles
    centred: Doubles


@dataclass(frozen=True)
class Difference:
    """One figure that differs between a stored certificate and a recomputed one."""

    figure: str
    stored: float
    recomputed: float


def compare(reference: Floats, candidate: Floats, tokens: Sequence[int]) -> Certificate:
    """The certificate of vectors (n, dim) of texts with so many ``tokens`` each: cosines and overlap.

    Raises ``InputError`` when the FP32 vectors are all the same, which nothing can be centred on.
    """
    cosines = text_cosines(reference, candidate)
    return Certificate(
        cosine=_summary(cosines.plain),
        centred_cosine=_summary(cosines.centred),
        bands=_by_band(cosines.plain, tokens),
        centred_bands=_by_band(cosines.centred, tokens),
        top_10_overlap=neighbour_overlap(reference, candidate),
        environment=environment(),
    )


def text_cosines(reference: Floats, candidate: Floats) -> TextCosines:
    """Each text's cosine between its vectors (n, dim) in both models, plain and centred."""
    # In float64: the differences of interest are near the rounding of float32.
    a, b = _unit64(reference), _unit64(candidate)
    centred = a - a.mean(axis=0)
    if len(a) == 0 or np.abs(centred).max() < 1e-6:
        raise InputError(
            "texts that the model cannot tell apart",
            expected="at least 2 texts with different FP32 vectors",
            found=f"{len(a)} texts with the same",
            remedy="Give texts like those that the model will read.",
        )
    return TextCosines(_row_cosines(a, b), _row_cosines(centred, b - a.mean(axis=0)))


def neighbour_overlap(reference: Floats, candidate: Floats, *, neighbours: int = NEIGHBOURS) -> float | None:
    """The mean share of each text's nearest neighbours that both sets of vectors agree on; ``None`` if too few."""
    if len(reference) < 2 * neighbours:
        return None
    a, b = unit(reference), unit(candidate)
    shared = 0
    for start in range(0, len(a), BLOCK):
        pairs = zip(*(_nearest(vectors, start, neighbours) for vectors in (a, b)), strict=True)
        shared += sum(len(np.intersect1d(x, y)) for x, y in pairs)
    return shared / (len(a) * neighbours)


def check_same_model(reference: ModelSpec, candidate: ModelSpec) -> None:
    """Raise ``MismatchError`` unless ``reference`` is FP32 and both are the same model but for its weights.

    Compared are the architecture, dimensions, longest text, pooling, normalization, prompts and tokenizer.json.
    Other weights of the same shape show in the cosines.
    """
    if reference.precision != "fp32":
        raise MismatchError(
            f"{reference.name} cannot be the reference",
            expected="an FP32 model folder",
            found=f"{reference.precision}, recipe {reference.recipe}",
            remedy="Name the FP32 folder that the other was made from.",
        )
    for name in _IDENTITY:
        _same(reference, candidate, name, *(getattr(spec, name) for spec in (reference, candidate)))
    for part in dataclasses.fields(reference.architecture):
        sizes = (getattr(spec.architecture, part.name) for spec in (reference, candidate))
        _same(reference, candidate, f"architecture.{part.name}", *sizes)
    hashes = (spec.files["tokenizer.json"].sha256 for spec in (reference, candidate))
    _same(reference, candidate, "sha256 of tokenizer.json", *hashes)


def differences(
    stored: Certificate, recomputed: Certificate, *, tolerance: float = OTHER_CPU
) -> list[Difference]:
    """The plain cosines of two certificates that are further apart than ``tolerance``.

    The default is what another CPU's kernels may do. Only certificates of the same ``texts`` can be compared so.
    """
    found = []
    for name in ("mean", "percentile_1", "minimum"):
        was, now = (getattr(certificate.cosine, name) for certificate in (stored, recomputed))
        if abs(was - now) > tolerance:
            found.append(Difference(f"cosine {name}", was, now))
    return found


def certificate_rows(certificate: Certificate) -> list[tuple[str, str]]:
    """The certificate in words, a (label, figures) for each line, for terminals and reports alike."""
    cosines = [
        (label, f"mean {mean}, 1st percentile {percentile}, minimum {minimum} ({texts} texts)")
        for label, texts, mean, percentile, minimum in cosine_rows(certificate)
    ]
    return [*cosines, *figure_rows(certificate), *environment_rows(certificate.environment)]


def cosine_rows(certificate: Certificate) -> list[tuple[str, str, str, str, str]]:
    """The cosines alone, in the columns label, texts, mean, 1st percentile, minimum."""
    groups = [("cosine to FP32", certificate.cosine), ("centred cosine to FP32", certificate.centred_cosine)]
    for label, bands in (("cosine", certificate.bands), ("centred cosine", certificate.centred_bands)):
        groups += [(f"{label}, {name} tokens", cosines) for name, cosines in bands.items()]
    return [_cosine_row(label, cosines) for label, cosines in groups]


def figure_rows(certificate: Certificate) -> list[tuple[str, str]]:
    """What was measured beside cosines, a (label, figures) for each line."""
    overlap = certificate.top_10_overlap
    kept = "not measured (fewer than 20 texts)" if overlap is None else f"{overlap:.1%}"
    changes = (
        *(("recall@10", "queries", change) for change in certificate.recall_change),
        *(("Spearman", "pairs", change) for change in certificate.spearman_change),
    )
    return [
        ("top-10 neighbours kept", kept),
        *(
            (f"{name} on {change.measured_on}", _change_in_words(change, items))
            for name, items, change in changes
        ),
        *_cost_rows(certificate),
    ]


def environment_rows(facts: Environment) -> list[tuple[str, str]]:
    """What it was measured with, a (label, facts) for each line."""
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    return [
        ("engine", f"{facts.engine} ({versions}, Python {facts.python})"),
        ("CPU", f"{facts.cpu or 'unknown'} ({facts.machine})"),
        ("CPU flags", " ".join(facts.cpu_flags) or "unknown"),
    ]


def environment(engine: str = "onnxruntime") -> Environment:
    """What figures measured in this process, by this engine, are measured with."""
    packages = (engine, "tokenizers", "numpy")
    return Environment(
        engine=engine,
        versions={"qingyu": __version__, **{package: version(package) for package in packages}},
        python=platform.python_version(),
        machine=platform.machine(),
        cpu=cpu_model(),
        cpu_flags=cpu_flags(),
    )


def _by_band(cosines: Doubles, tokens: Sequence[int]) -> dict[str, Cosines]:
    lengths = np.asarray(tokens)
    bands = {}
    lower = 0
    for upper in BANDS:
        inside = (lengths > lower) & (lengths <= upper)
        if inside.any():
            bands[f"{lower + 1}-{upper}" if upper < BANDS[-1] else f"over {lower}"] = _summary(
                cosines[inside]
            )
        lower = upper
    return bands


def _nearest(vectors: Floats, start: int, neighbours: int) -> NDArray[np.intp]:
    """The positions of the nearest neighbours, unordered, of the rows of one block."""
    cosines = vectors[start : start + BLOCK] @ vectors.T
    rows = np.arange(len(cosines))
    cosines[rows, start + rows] = -np.inf  # a text is no neighbour of itself
    return np.argpartition(-cosines, neighbours, axis=1)[:, :neighbours]


def _row_cosines(a: Doubles, b: Doubles) -> Doubles:
    cosines: Doubles = np.einsum("nd,nd->n", *(_unit64(vectors) for vectors in (a, b)))
    return np.clip(cosines, -1.0, 1.0)


def _unit64(vectors: Floats | Doubles) -> Doubles:
    wide = vectors.astype(np.float64)
    lengths: Doubles = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.maximum(lengths, 1e-30)


def _summary(cosines: Doubles) -> Cosines:
    return Cosines(
        texts=len(cosines),
        mean=float(cosines.mean()),
        percentile_1=float(np.percentile(cosines, 1)),
        minimum=float(cosines.min()),
    )


_IDENTITY = (
    "task",
    "dim",
    "max_tokens",
    "pooling",
    "normalize",
    "prompts",
    "default_prompt",
    "labels",
    "scores",
)


def _same(reference: ModelSpec, candidate: ModelSpec, what: str, wanted: object, found: object) -> None:
    if wanted != found:
        raise MismatchError(
            f"{candidate.name} and {reference.name} are not the same model",
            expected=f"{what} {wanted!r}",
            found=repr(found),
            remedy="Name the FP32 folder that the other was made from.",
        )


def _cosine_row(label: str, cosines: Cosines) -> tuple[str, str, str, str, str]:
    mean, percentile, minimum = (
        f"{value:.5f}" for value in (cosines.mean, cosines.percentile_1, cosines.minimum)
    )
    return label, f"{cosines.texts:,}", mean, percentile, minimum


def _change_in_words(change: Change, items: str) -> str:
    return (
        f"{change.reference:.2f} -> {change.candidate:.2f} ({change.points:+.2f} points, "
        f"{change.items:,} {items})"
    )


def _cost_rows(certificate: Certificate) -> Iterator[tuple[str, str]]:
    if (size := certificate.size) is not None:
        megabytes = f"{size.reference_bytes / 1e6:.1f} -> {size.candidate_bytes / 1e6:.1f} MB"
        yield "size of the graph", f"{megabytes} ({size.ratio:.2f} times smaller)"
    if (speed := certificate.speed) is not None:
        rounds = f"{speed.least:.2f}-{speed.most:.2f} in {speed.rounds} rounds of {speed.texts:,} texts"
        workers = f"{speed.workers} worker{'s' if speed.workers != 1 else ''}"
        yield "speed", f"{speed.ratio:.2f} times FP32 ({rounds}, {workers})"
    if (texts := certificate.texts) is not None:
        yield "measured on", f"{texts.count:,} texts, sha256 {texts.sha256[:16]}"


# Least and most of each number that JSON may hold; a cosine rounded to six decimals stays within 1.
_COSINE, _COUNT, _POINTS = (-1.0, 1.0), (1, 1 << 53), (-100.0, 100.0)
_LIMITS: Mapping[type, Mapping[str, tuple[float, float]]] = {
    Cosines: {"texts": _COUNT, "mean": _COSINE, "percentile_1": _COSINE, "minimum": _COSINE},
    Texts: {"count": _COUNT},
    Change: {"items": _COUNT, "reference": _POINTS, "candidate": _POINTS},
    Size: {"reference_bytes": _COUNT, "candidate_bytes": _COUNT},
    Speed: {
        **dict.fromkeys(("ratio", "least", "most"), (1e-6, 1e6)),
        **dict.fromkeys(("rounds", "texts", "workers", "token_budget"), _COUNT),
    },
    Certificate: {"top_10_overlap": (0.0, 1.0)},
}
_HASHES: Mapping[type, str] = {Texts: "sha256", Size: "reference_sha256"}


def _check(part: object, origin: str) -> None:
    """Refuse numbers beyond their limits, and hashes that are none."""
    for name, (least, most) in _LIMITS.get(type(part), {}).items():
        value = getattr(part, name)
        if value is not None and not least <= value <= most:
            raise _invalid(f"{origin}: {name}", f"{least:g} to {most:g}", repr(value))
    name = _HASHES.get(type(part), "")
    if name and re.fullmatch(r"[0-9a-f]{64}", getattr(part, name)) is None:
        raise _invalid(f"{origin}: {name}", "64 hexadecimal digits", repr(getattr(part, name))[:80])


def _parts(value: object) -> Iterator[object]:
    """Every dataclass within a certificate, itself included."""
    if dataclasses.is_dataclass(value):
        yield value
        inside: Sequence[object] = [getattr(value, part.name) for part in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        inside = list(value.values())
    else:
        inside = value if isinstance(value, tuple) else ()
    for item in inside:
        yield from _parts(item)


def _invalid(problem: str, expected: str, found: str) -> ManifestError:
    return ManifestError(problem, expected=expected, found=found, remedy="Quantize the model again.")


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON values
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
