"""What a fine-tuned head is worth on labelled texts that it has not seen, beside the obvious baseline.

    python -m qingyu.bench.heads out/sentiment-int8 --test dev.tsv --train train.tsv
    python -m qingyu.bench.heads out/names-int8 --test cluener_dev.jsonl

Prints one JSON line a contender. A classifier: accuracy and macro-averaged F1 on the columns text and label, and with
--train those of logistic regression on character TF-IDF (1 to 3 characters), fitted on that file. A tagger: F1 over
whole entities, kind and both ends right, on JSON lines as ``qingyu adapt tag`` takes them.

The baseline needs the extra ``train`` (scikit-learn).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qingyu.errors import DataFileError, UnsupportedModelError
from qingyu.models.extras import require
from qingyu.runtime.classifier import Classifier
from qingyu.runtime.spec import read_spec
from qingyu.runtime.task import find_model
from qingyu.runtime.token_classifier import TokenClassifier

__all__ = ["class_figures", "entity_figures", "main", "read_entities", "read_labelled"]

Span = tuple[int, int, str]


def class_figures(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the labels that are wanted, times 100.

    >>> class_figures(["好", "好", "坏"], ["好", "坏", "坏"])
    {'accuracy': 66.7, 'f1': 66.7}
    """
    labels = sorted(set(wanted))
    pairs = list(zip(found, wanted, strict=True))
    scores = [
        _f1(
            sum(one == label == other for one, other in pairs),
            sum(one == label for one in found),
            sum(one == label for one in wanted),
        )
        for label in labels
    ]
    right = sum(one == other for one, other in pairs)
    return {"accuracy": _percent(right / len(pairs)), "f1": _percent(sum(scores) / len(labels))}


def entity_figures(found: Sequence[set[Span]], wanted: Sequence[set[Span]]) -> dict[str, Any]:
    """Precision, recall and F1 over whole entities of all texts, times 100, and F1 of each kind."""
    counts: Counter[tuple[str, str]] = Counter()
    for one, other in zip(found, wanted, strict=True):
        for name, spans in (("found", one), ("wanted", other), ("right", one & other)):
            counts.update((name, kind) for *_, kind in spans)
    kinds = sorted({kind for name, kind in counts if name == "wanted"})
    total = {
        name: sum(n for (own, _), n in counts.items() if own == name) for name in ("right", "found", "wanted")
    }
    return {
        "precision": _percent(total["right"] / max(1, total["found"])),
        "recall": _percent(total["right"] / max(1, total["wanted"])),
        "f1": _percent(_f1(total["right"], total["found"], total["wanted"])),
        "by_kind": {
            kind: _percent(_f1(*(counts[name, kind] for name in ("right", "found", "wanted"))))
            for kind in kinds
        },
    }


def _f1(right: int, found: int, wanted: int) -> float:
    return 2 * right / (found + wanted) if found + wanted else 0.0


def _percent(share: float) -> float:
    return round(100 * share, 1)


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """The columns text and label of a TSV file with a header line."""
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    names = header.split("\t")
    if not {"text", "label"} <= set(names):
        raise DataFileError(
            f"{path} cannot be measured on",
            expected="the columns text and label",
            found=", ".join(names),
            remedy="Name the columns in the first line.",
        )
    rows = [line.split("\t") for line in lines]
    return [row[names.index("text")] for row in rows], [row[names.index("label")] for row in rows]


def read_entities(path: Path) -> tuple[list[str], list[set[Span]]]:
    """Texts and their entities as (start, end, kind); the ends of CLUENER's form are inclusive, ours are not."""
    texts, spans = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.append(row["text"])
        spans.append(set(_spans(row)))
    return texts, spans


def _spans(row: dict[str, Any]) -> Iterator[Span]:
    for entity in row.get("entities", ()):
        yield entity["start"], entity["end"], entity["label"]
    for kind, words in row.get("label", {}).items():
        for places in words.values():
            yield from ((start, last + 1, kind) for start, last in places)


def tfidf_regression(train: Path, texts: Sequence[str]) -> list[str]:
    """The labels that logistic regression on character TF-IDF gives to ``texts``."""
    require("train", "sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    known, labels = read_labelled(train)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10, max_iter=1000).fit(vectorizer.fit_transform(known), labels)
    return [str(label) for label in model.predict(vectorizer.transform(list(texts)))]


def _classifier_rows(folder: Path, test: Path, train: Path | None) -> Iterator[dict[str, Any]]:
    texts, wanted = read_labelled(test)
    with Classifier.open(folder) as classifier:
        found = [one.best.label for one in classifier.classify(texts)]
        name = f"{classifier.spec.name} {classifier.spec.precision}"
    yield {"contender": name, "texts": len(texts), **class_figures(found, wanted)}
    if train is not None:
        figures = class_figures(tfidf_regression(train, texts), wanted)
        yield {"contender": "character TF-IDF and logistic regression", "texts": len(texts), **figures}


def _tagger_rows(folder: Path, test: Path) -> Iterator[dict[str, Any]]:
    texts, wanted = read_entities(test)
    with TokenClassifier.open(folder) as tagger:
        found = [
            {(entity.start, entity.end, entity.label) for entity in one.entities} for one in tagger.tag(texts)
        ]
        name = f"{tagger.spec.name} {tagger.spec.precision}"
    yield {"contender": name, "texts": len(texts), **entity_figures(found, wanted)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m qingyu.bench.heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder of a classifier or tagger")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE", help="what to measure on")
    parser.add_argument("--train", type=Path, metavar="FILE", help="what the baseline of a classifier learns")
    options = parser.parse_args(arguments)
    folder = find_model(options.model)
    task = read_spec(folder).task
    if task == "classification":
        rows = _classifier_rows(folder, options.test, options.train)
    elif task == "tagging":
        rows = _tagger_rows(folder, options.test)
    else:
        raise UnsupportedModelError(
            f"{folder} cannot be measured here",
            expected="a model for classification or tagging",
            found=f"one for {task}",
            remedy="Use qingyu.bench.quality for an embedding model.",
        )
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
