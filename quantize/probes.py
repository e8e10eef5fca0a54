"""What simple learners make of a model's vectors: a linear classifier's accuracy, and how clusters agree with labels.

Logistic regression and k-means are scikit-learn's (extra ``evaluate``). Not here: fine-tuning (``models.adapt``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qingyu.errors import DataFileError
from qingyu.models.extras import require
from qingyu.quantize.evaluation import name_of, read_columns
from qingyu.quantize.measures import Figure
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats

__all__ = ["LabelledSet", "ProbeSet", "clustering_figures", "probe", "probe_figures", "v_measure"]

HELD_OUT = 0.2  # of the rows, where there is one file for training and testing
SEEDS = (0, 1, 2)  # of k-means: the mean over several starts


@dataclass(frozen=True)
class LabelledSet:
    """Texts and a label for each."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> LabelledSet:
        """The rows of a TSV file with columns text and label in its header line, or of JSON lines.

        Raises ``DataFileError``, also where there are not two labels.
        """
        rows = [cells for _, cells in read_columns(path, ("text", "label"))]
        made = cls(name_of(path), tuple(text for text, _ in rows), tuple(label for _, label in rows))
        if len(set(made.labels)) < 2:
            raise DataFileError(
                f"{path} cannot be used",
                expected="at least two different labels",
                found=str(len(set(made.labels))),
                remedy="Give texts of several classes.",
            )
        return made

    def sample(self, limit: int | None, *, seed: int = 0) -> LabelledSet:
        """At most ``limit`` of the rows, the same ones each time."""
        if limit is None or limit >= len(self.texts):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.texts))[:limit]).tolist()
        return self._of(chosen)

    def split(self, share: float, *, seed: int = 0) -> tuple[LabelledSet, LabelledSet]:
        """The rows but a share, and that share, at random but the same each time."""
        order = np.random.default_rng(seed).permutation(len(self.texts)).tolist()
        held_out = max(1, round(share * len(order)))
        return self._of(sorted(order[held_out:])), self._of(sorted(order[:held_out]))

    def _of(self, places: Sequence[int]) -> LabelledSet:
        texts = tuple(self.texts[place] for place in places)
        return LabelledSet(self.name, texts, tuple(self.labels[place] for place in places))


@dataclass(frozen=True)
class ProbeSet:
    """Labelled texts to learn on, and others to test on."""

    name: str
    train: LabelledSet
    test: LabelledSet

    @classmethod
    def read(cls, path: Path, *, limit: int | None = None) -> ProbeSet:
        """A folder with train and test (or else dev) files, .tsv or .jsonl; or one file, a fifth of which is held out.

        ``limit`` is the most rows to learn on, and to test on. Raises ``DataFileError``.
        """
        if path.is_dir():
            train, test = (_file_in(path, names) for names in (("train",), ("test", "dev")))
            parts = LabelledSet.read(train), LabelledSet.read(test)
        else:
            parts = LabelledSet.read(path).split(HELD_OUT)
        name = path.resolve().name if path.is_dir() else name_of(path)
        learned, tested = (part.sample(limit) for part in parts)
        return cls(name, learned, tested)


def _file_in(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for suffix in (".tsv", ".jsonl"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise DataFileError(
        f"{folder} cannot be used",
        expected=f"a file {' or '.join(names)}, .tsv or .jsonl",
        found="none of them",
        remedy="Add it, or name one file with all rows.",
    )


def probe(train: Floats, labels: Sequence[str], test: Floats) -> list[str]:
    """The labels that a logistic regression on the vectors ``train`` (n, dim) gives the vectors ``test`` (m, dim)."""
    require("evaluate", "sklearn")
    from sklearn.linear_model import LogisticRegression

    learner = LogisticRegression(max_iter=1000).fit(train, list(labels))
    given: list[str] = learner.predict(test).tolist()
    return given


def probe_figures(embedder: Embedder, labelled: ProbeSet, *, prompt: str | None = None) -> list[Figure]:
    """Accuracy and macro F1 of a logistic regression on a model's vectors; ``prompt`` as in ``Embedder.embed``."""
    require("evaluate", "sklearn")
    from sklearn.metrics import accuracy_score, f1_score

    train, test = (
        embedder.embed(part.texts, prompt=prompt, progress=True) for part in (labelled.train, labelled.test)
    )
    given, wanted = probe(train, labelled.train.labels, test), list(labelled.test.labels)
    values = {"accuracy": accuracy_score(wanted, given), "macro F1": f1_score(wanted, given, average="macro")}
    return [Figure(labelled.name, name, len(wanted), 100 * float(value)) for name, value in values.items()]


def v_measure(vectors: Floats, labels: Sequence[str]) -> float:
    """How well k-means clusters, as many as there are labels, agree with the labels: 0 to 1, the mean of three starts.

    The harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg, 2007).
    """
    require("evaluate", "sklearn")
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    found = [
        v_measure_score(
            list(labels), KMeans(len(set(labels)), n_init=1, random_state=seed).fit_predict(vectors)
        )
        for seed in SEEDS
    ]
    return float(np.mean(found))


def clustering_figures(
    embedder: Embedder, labelled: LabelledSet, *, prompt: str | None = None
) -> list[Figure]:
    """The v-measure of clusters of a model's vectors; ``prompt`` as in ``Embedder.embed``."""
    vectors = embedder.embed(labelled.texts, prompt=prompt, progress=True)
    return [
        Figure(labelled.name, "v-measure", len(labelled.texts), 100 * v_measure(vectors, labelled.labels))
    ]
