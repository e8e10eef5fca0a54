"""What ``qingyu quantize`` and ``qingyu verify`` share: their measuring options and the certificate as text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.cli.table import facts, render
from qingyu.cli.text_input import add_file_arguments, read_texts
from qingyu.errors import InvalidOptionError

if TYPE_CHECKING:
    from qingyu.quantize.certificate import Certificate
    from qingyu.quantize.evaluation import RetrievalSet, SimilaritySet
    from qingyu.quantize.tasks import TaskCertificate

__all__ = [
    "add_gate",
    "add_measuring",
    "as_text",
    "first_texts",
    "refuse_embedding_options",
    "retrieval_sets",
    "similarity_sets",
    "task_as_text",
    "texts_of",
]


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add --texts and its format, --max-texts, --retrieval, --similarity, --speed-rounds."""
    parser.add_argument(
        "--texts",
        metavar="FILE",
        help="texts to measure on, - for standard input (default: the built-in sample)",
    )
    add_file_arguments(parser)
    parser.add_argument(
        "--max-texts",
        type=int,
        default=2000,
        metavar="N",
        help="measure on the first N (default: %(default)s)",
    )
    parser.add_argument(
        "--retrieval",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="measure recall@10 on a folder of queries.jsonl, corpus.jsonl, qrels.tsv; repeatable",
    )
    parser.add_argument(
        "--similarity",
        action="append",
        default=[],
        type=Path,
        metavar="TSV",
        help="measure Spearman on a file with the columns sentence1, sentence2, label; repeatable",
    )
    parser.add_argument(
        "--speed-rounds",
        type=int,
        default=5,
        metavar="N",
        help="interleaved rounds; 0: no speed (default: %(default)s)",
    )


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Add --min-cosine, --min-worst-cosine and --min-agreement."""
    parser.add_argument(
        "--min-cosine",
        type=_cosine,
        default=0.99,
        metavar="X",
        help="least mean cosine (default: %(default)s)",
    )
    parser.add_argument(
        "--min-worst-cosine",
        type=_cosine,
        default=0.97,
        metavar="X",
        help="least cosine of the worst text (default: %(default)s)",
    )
    parser.add_argument(
        "--min-agreement",
        type=_cosine,
        default=0.95,
        metavar="X",
        help="of models with a head (fill-mask, classification and so on): least share of decisions that are the "
        "same as in FP32 (default: %(default)s)",
    )


def _cosine(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between -1 and 1")
    return value


def texts_of(options: argparse.Namespace) -> list[str] | None:
    """The first ``--max-texts`` of the file; ``None`` without ``--texts``."""
    if options.max_texts < 2:
        raise InvalidOptionError(
            "--max-texts",
            expected="at least 2",
            found=str(options.max_texts),
            remedy="Measure on more texts.",
        )
    if options.texts is None:
        return None
    texts = read_texts(options.texts, form=options.format, field=options.field)
    return first_texts(texts, options.max_texts, f"--texts {options.texts} (--max-texts changes that)")


def first_texts(texts: Iterator[str], most: int, source: str) -> list[str]:
    """The first ``most`` texts, and a line on standard error where there are more."""
    kept = list(islice(texts, most))
    if next(texts, None) is not None:
        print(f"only the first {most:,} texts are used of {source}", file=sys.stderr)
    return kept


def retrieval_sets(options: argparse.Namespace) -> list[RetrievalSet]:
    """The sets of ``--retrieval``."""
    from qingyu.quantize.evaluation import RetrievalSet

    return [RetrievalSet.read(folder) for folder in options.retrieval]


def similarity_sets(options: argparse.Namespace) -> list[SimilaritySet]:
    """The sets of ``--similarity``."""
    from qingyu.quantize.evaluation import SimilaritySet

    return [SimilaritySet.read(path) for path in options.similarity]


def refuse_embedding_options(options: argparse.Namespace, task: str) -> None:
    """Raise ``InvalidOptionError`` for what is measured on embeddings only."""
    given = [
        name for name in ("retrieval", "similarity", "report", "openvino") if getattr(options, name, None)
    ]
    if given:
        raise InvalidOptionError(
            f"--{given[0]}",
            expected="a model for embeddings",
            found=f"one for {task}",
            remedy="Leave the option out.",
        )


def task_as_text(certificate: TaskCertificate) -> str:
    """The certificate of a model with a head, a line for each figure."""
    from qingyu.quantize.tasks import task_rows

    return facts(dict(task_rows(certificate)))


def as_text(certificate: Certificate) -> str:
    """The certificate as a table of cosines and lines of other figures."""
    from qingyu.quantize.certificate import cosine_rows, figure_rows

    header = ["", "texts", "mean", "1st pct", "worst"]
    table = render(header, cosine_rows(certificate), right=frozenset({1, 2, 3, 4}))
    return f"{table}\n\n{facts(dict(figure_rows(certificate)))}"
