"""An FP32 model folder compared with results that are known of its true weights.

One check a kind of result; a kind that has none here is reported as not checked, never as passed. Not here: the golden
texts in a manifest, which test a machine, not a model (``qingyu.quantize.golden``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qingyu.errors import MismatchError, UnknownTokenWarning
from qingyu.models.catalogue import Published
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.fill_mask import check_results
from qingyu.runtime.spec import decode_vector

__all__ = ["CHECKS", "Agreement", "check_published"]


@dataclass(frozen=True)
class Agreement:
    """What the comparison gave: ``worst`` of ``count`` results in words, and whether that is enough.

    ``passed`` is ``None`` where this version cannot check results of that kind.
    """

    passed: bool | None
    count: int
    worst: str


def check_published(model: Path, results: Published) -> Agreement:
    """The model's own results beside the published ones.

    Raises ``MismatchError`` for results that cannot be this model's, and what ``Embedder.open`` raises.
    """
    check = CHECKS.get(results.kind)
    if check is None:
        count = max(len(results.texts), len(results.results))
        return Agreement(None, count, f"results of the kind {results.kind!r} cannot be checked yet")
    return check(model, results)


def _embedding(model: Path, results: Published) -> Agreement:
    """Cosines of the vectors of texts embedded alone, without a prompt."""
    with Embedder.open(model, self_check=False) as embedder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownTokenWarning)
        expected = _vectors(results, embedder.dim)
        found = [embedder.embed(text, prompt="", normalize=True)[0] for text in results.texts]
    own = np.array(found, dtype=np.float64)
    cosines = np.einsum("nd,nd->n", own, expected) / np.linalg.norm(expected, axis=1)
    least = float(np.min(cosines))
    return Agreement(
        least >= results.least_cosine,
        len(cosines),
        f"cosine {least:.7f} at worst, at least {results.least_cosine:g} wanted",
    )


def _vectors(results: Published, dim: int) -> np.typing.NDArray[np.float64]:
    try:
        if not results.texts or len(results.texts) != len(results.vectors):
            raise ValueError(f"{len(results.texts)} texts and {len(results.vectors)} vectors")
        return np.array([decode_vector(vector, dim) for vector in results.vectors], dtype=np.float64)
    except ValueError as error:
        raise MismatchError(
            "the published results are not of this model",
            expected=f"a vector of {dim} dimensions for each text",
            found=str(error),
            remedy="Repair the catalogue's golden file.",
        ) from None


def _fill_mask(model: Path, results: Published) -> Agreement:
    """Published words of masks, in their order, with scores within 1e-4."""
    found = check_results(model, results.results, origin=results.source)
    worst = f"scores differ by {found.worst:.1e} at most"
    return Agreement(found.passed, found.predictions, worst if found.passed else found.wrong[0])


CHECKS: Mapping[str, Callable[[Path, Published], Agreement]] = {
    "embedding": _embedding,
    "fill_mask": _fill_mask,
}
