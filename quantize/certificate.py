"""The fidelity certificate: a quantized model measured against its FP32 original on given texts.

Plain cosine hides loss where a model's cosines are compressed into a narrow band, so the same is also measured
after subtracting the mean FP32 vector from both, and as the overlap of the ten nearest neighbours.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu import __version__
from qingyu.runtime.cpu import cpu_flags, cpu_model
from qingyu.runtime.vectors import unit

__all__ = ["BANDS", "Certificate", "Cosines", "compare", "neighbour_overlap"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Upper bounds of text length in tokens. Short texts average their rounding errors over fewer tokens.
BANDS = (16, 64, 256, 1 << 20)
NEIGHBOURS = 10


@dataclass(frozen=True)
class Cosines:
    """Cosine between each text's FP32 and quantized vector: mean, 1st percentile and minimum over ``texts``."""

    texts: int
    mean: float
    percentile_1: float
    minimum: float


@dataclass(frozen=True)
class Certificate:
    """What a quantized model lost, on which texts, and where it was measured.

    ``bands`` maps an upper bound of tokens to the cosines of the texts up to it (and above the bound before).
    ``top_10_overlap`` is the mean share of a text's ten nearest neighbours that stay among its ten nearest,
    ``None`` below 20 texts. ``environment`` names versions and CPU.
    """

    cosine: Cosines
    centred_cosine: Cosines
    bands: Mapping[str, Cosines]
    top_10_overlap: float | None
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The certificate as plain JSON values, figures rounded to six decimals."""
        rounded = _rounded(dataclasses.asdict(self))
        assert isinstance(rounded, dict)
        return rounded


def compare(reference: Floats, candidate: Floats, tokens: Sequence[int]) -> Certificate:
    """The certificate of vectors (n, dim), n at least 1, of texts with so many ``tokens`` each."""
    mean = unit(reference).mean(axis=0, dtype=np.float64).astype(np.float32)
    plain = _row_cosines(reference, candidate)
    centred = _row_cosines(unit(reference) - mean, unit(candidate) - mean)
    lengths = np.asarray(tokens)
    bands = {}
    lower = 0
    for upper in BANDS:
        inside = (lengths > lower) & (lengths <= upper)
        if inside.any():
            bands[f"{lower + 1}-{upper}" if upper < BANDS[-1] else f"over {lower}"] = _summary(plain[inside])
        lower = upper
    return Certificate(
        cosine=_summary(plain),
        centred_cosine=_summary(centred),
        bands=bands,
        top_10_overlap=neighbour_overlap(reference, candidate),
        environment=environment(),
    )


def neighbour_overlap(reference: Floats, candidate: Floats, *, neighbours: int = NEIGHBOURS) -> float | None:
    """The mean share of each text's nearest neighbours that both sets of vectors agree on; ``None`` if too few."""
    if len(reference) < 2 * neighbours:
        return None
    a, b = (_nearest(unit(vectors), neighbours) for vectors in (reference, candidate))
    shared = [len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True)]
    return float(np.mean(shared)) / neighbours


def _nearest(vectors: Floats, neighbours: int) -> NDArray[np.intp]:
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, neighbours, axis=1)[:, :neighbours]


def _row_cosines(a: Floats, b: Floats) -> Doubles:
    # In float64: the differences of interest are near the rounding of float32.
    cosines: Doubles = np.einsum("nd,nd->n", *(_unit64(vectors) for vectors in (a, b)))
    return cosines


def _unit64(vectors: Floats) -> Doubles:
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


def environment() -> dict[str, Any]:
    """Versions and CPU that figures were measured with."""
    packages = ("onnxruntime", "tokenizers", "numpy")
    return {
        "engine": "onnxruntime",
        "versions": {"qingyu": __version__, **{package: version(package) for package in packages}},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cpu_flags": list(cpu_flags()),
    }


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON values
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
