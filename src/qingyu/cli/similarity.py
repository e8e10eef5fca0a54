"""``qingyu similarity``: how alike texts are."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qingyu.cli.common import (
    add_long_text_arguments,
    add_model_arguments,
    new_command,
    open_embedder,
    print_report,
)
from qingyu.cli.table import clip, render
from qingyu.cli.text_input import add_text_arguments, from_arguments
from qingyu.errors import InvalidOptionError

__all__ = ["add", "run"]

EXAMPLE = 'qingyu similarity --model out/e5 "今天天气真好" "外面阳光明媚" "股票大跌"'
LIMIT = 2000  # texts; the matrix has the square of them


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "similarity", "rank texts by their cosine with the first one", EXAMPLE)
    add_text_arguments(parser)
    add_model_arguments(parser)
    add_long_text_arguments(parser)
    parser.add_argument("--matrix", action="store_true", help="all cosines with all, not only with the first")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print cosines."""
    from qingyu.runtime.embedder import Report
    from qingyu.runtime.vectors import cosine

    texts = _some(options)
    report = Report()
    with open_embedder(options) as embedder:
        vectors = embedder.embed(
            texts,
            prompt=options.prompt,
            long_text=options.long_text,
            overlap=options.overlap,
            report=report,
        )
    matrix = cosine(vectors, vectors)
    rows = matrix if options.matrix else matrix[:1]
    if options.json:
        print(
            json.dumps(
                {"texts": texts, "cosine": [[round(float(x), 6) for x in row] for row in rows]},
                ensure_ascii=False,
            )
        )
    elif options.matrix:
        print(_matrix_table(texts, matrix))
    else:
        print(_ranking(texts, matrix[0]))
    print_report(report, embedder.spec.max_tokens)
    return 0


def _some(options: argparse.Namespace) -> list[str]:
    texts = []
    for text in from_arguments(options)[0]:
        texts.append(text)
        if len(texts) > LIMIT:
            break
    if not 2 <= len(texts) <= LIMIT:
        raise InvalidOptionError(
            "the number of texts",
            expected=f"2 to {LIMIT}",
            found=str(len(texts)) if len(texts) < 2 else "more",
            remedy="Compare larger sets from Python: Embedder.similarity(a, b).",
        )
    return texts


def _ranking(texts: list[str], cosines: Any) -> str:  # noqa: ANN401 - a row of the matrix
    order = sorted(range(1, len(texts)), key=lambda n: -cosines[n])
    rows = [[f"{cosines[n]:.4f}", clip(texts[n], 60)] for n in order]
    return f"{clip(texts[0], 70)}\n\n" + render(["cosine", "text"], rows, right=frozenset({0}))


def _matrix_table(texts: list[str], matrix: Any) -> str:  # noqa: ANN401 - the array of cosines
    header = ["", "text", *(str(n + 1) for n in range(len(texts)))]
    rows = [[str(n + 1), clip(text, 30), *(f"{x:.3f}" for x in matrix[n])] for n, text in enumerate(texts)]
    return render(header, rows, right=frozenset(range(2, len(header))))
