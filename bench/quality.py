"""What an embedding model is worth on Chinese text, beside its teacher and the obvious baselines.

    python -m qingyu.bench.quality MODEL --data DATA [--teacher MODEL --checkpoint FOLDER --cut MODEL]

Prints one JSON line a contender: Spearman's correlation on sts-b-zh/dev.tsv, recall@1 and @10 from question to
passage (cmrc2018) and from title to abstract (csl), all times 100, and cosines of related and unrelated pairs.
DATA is the folder that holds those three. Baselines: character TF-IDF, and, with --checkpoint, the mean of that
checkpoint's token embeddings. ``--cut`` is one more model folder, such as the teacher cut to fewer layers and not
trained.

Needs the extra ``train`` (scikit-learn). Not here: speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.models.export.weights import open_weights
from qingyu.models.extras import require
from qingyu.quantize.evaluation import RetrievalSet, SimilaritySet, recall_at, spearman
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.vectors import unit

__all__ = ["Contender", "main", "measure"]

Matrix = NDArray[np.float32]
Embed = Callable[[Sequence[str], str], Matrix]

SETS = ("cmrc2018", "csl")
RELATED = 4.0  # STS-B labels from here on (of 5) mean "the same but for details"


@dataclass(frozen=True)
class Contender:
    """A name, what it is, and a function from texts and their role ("query" or "passage") to unit vectors."""

    name: str
    note: str
    embed: Embed


def measure(contender: Contender, data: Path) -> dict[str, Any]:
    """The figures of one contender, times 100 but for the cosines."""
    similarity = SimilaritySet.read(data / "sts-b-zh" / "dev.tsv")
    first, second = (contender.embed(part, "query") for part in (similarity.first, similarity.second))
    cosines = (first * second).sum(axis=1)
    figures: dict[str, Any] = {
        "contender": contender.name,
        "note": contender.note,
        "sts-b-dev": round(100 * spearman(cosines, np.asarray(similarity.labels)), 1),
    }
    for name in SETS:
        retrieval = RetrievalSet.read(data / name)
        queries = contender.embed(retrieval.queries, "query")
        corpus = contender.embed(retrieval.corpus, "passage")
        for k in (1, 10):
            recall = recall_at(k, queries, corpus, retrieval.relevant)
            figures[f"{name}-recall@{k}"] = round(100 * recall, 1)
    related = cosines[np.asarray(similarity.labels) >= RELATED]
    unrelated = _unrelated(first, second)
    figures["related"] = _spread(related)
    figures["unrelated"] = _spread(unrelated)
    figures["overlap"] = round(100 * float((unrelated >= np.quantile(related, 0.05)).mean()), 2)
    return figures


def _unrelated(first: Matrix, second: Matrix) -> Matrix:
    """Cosines of each sentence with one of another pair."""
    shift = len(first) // 2
    cosines: Matrix = (first * np.roll(second, shift, axis=0)).sum(axis=1)
    return cosines


def _spread(cosines: Matrix) -> dict[str, float]:
    quantiles = {"p5": 0.05, "median": 0.5, "p95": 0.95}
    return {name: round(float(np.quantile(cosines, share)), 3) for name, share in quantiles.items()}


def model_folder(path: Path, note: str) -> Contender:
    """A model folder, run by our runtime with its own prompts."""
    embedder = Embedder.open(path)

    def embed(texts: Sequence[str], role: str) -> Matrix:
        return embedder.embed(texts, prompt=role if role in embedder.spec.prompts else None, normalize=True)

    return Contender(f"{embedder.spec.name} {embedder.spec.precision}", note, embed)


def token_mean(checkpoint: Path) -> Contender:
    """The mean of a checkpoint's token embeddings, with neither layers nor positions."""
    from tokenizers import Tokenizer

    weights = open_weights(checkpoint)
    table = next(weights[name] for name in weights if name.endswith("word_embeddings.weight"))
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def embed(texts: Sequence[str], role: str) -> Matrix:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        means = [table[one.ids].mean(axis=0) if one.ids else np.zeros(table.shape[1]) for one in encoded]
        return unit(np.asarray(means, dtype=np.float32))

    return Contender("token mean", f"mean of {checkpoint.name}'s token embeddings", embed)


def character_tfidf(data: Path) -> Contender:
    """TF-IDF over one and two characters, fitted on the passages and sentences it is measured on."""
    require("train", "sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, max_features=20_000)
    similarity = SimilaritySet.read(data / "sts-b-zh" / "dev.tsv")
    corpora = [RetrievalSet.read(data / name).corpus for name in SETS]
    vectorizer.fit([*similarity.first, *similarity.second, *(text for corpus in corpora for text in corpus)])

    def embed(texts: Sequence[str], role: str) -> Matrix:
        return np.asarray(vectorizer.transform(list(texts)).toarray(), dtype=np.float32)

    return Contender("character TF-IDF", "1-2 characters, 20,000 features, fitted on the test texts", embed)


def _contenders(options: argparse.Namespace) -> Iterator[Contender]:
    yield model_folder(options.model, "the model")
    if options.teacher is not None:
        yield model_folder(options.teacher, "its teacher")
    if options.cut is not None:
        yield model_folder(options.cut, "the teacher cut to the same layers and tokens, not trained")
    if options.checkpoint is not None:
        yield token_mean(options.checkpoint)
    yield character_tfidf(options.data)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qingyu.bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of sts-b-zh, cmrc2018 and csl")
    parser.add_argument("--teacher", type=Path, metavar="MODEL", help="the teacher's model folder")
    parser.add_argument(
        "--cut", type=Path, metavar="MODEL", help="the student's model folder before training"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="the teacher's checkpoint")
    options = parser.parse_args(arguments)
    for contender in _contenders(options):
        print(json.dumps(measure(contender, options.data), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
