"""``qingyu quantize``: an FP32 model folder becomes an INT8 one, measured against it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qingyu.cli.common import new_command
from qingyu.cli.table import render
from qingyu.cli.text_input import add_file_arguments, read_texts

__all__ = ["add", "certificate_table", "run"]

EXAMPLE = "qingyu quantize out/e5 out/e5-int8 --texts sentences.txt"


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(
        commands, "quantize", "make an INT8 model folder and measure it against FP32", EXAMPLE
    )
    parser.add_argument("model", metavar="FOLDER", type=Path, help="FP32 model folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="INT8 model folder to make")
    parser.add_argument(
        "--texts", required=True, metavar="FILE", help="texts to measure on, - for standard input"
    )
    add_file_arguments(parser)
    parser.add_argument(
        "--max-texts",
        type=int,
        default=2000,
        metavar="N",
        help="measure on the first N (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Quantize, and print the certificate."""
    from qingyu.quantize import quantize

    texts = list(
        islice(read_texts(options.texts, form=options.format, field=options.field), options.max_texts)
    )
    spec = quantize(options.model, options.output, texts=texts, overwrite=options.overwrite)
    certificate = dict(spec.certificate or {})
    if options.json:
        print(json.dumps(certificate, ensure_ascii=False))
        return 0
    print(f"{options.output}: {spec.name}, {spec.recipe}, {spec.files[spec.graph].bytes / 1e6:.1f} MB\n")
    print(certificate_table(certificate))
    return 0


def certificate_table(certificate: Mapping[str, Any]) -> str:
    """The certificate as a table for people."""
    groups = {
        "all texts": certificate["cosine"],
        "all, centred": certificate["centred_cosine"],
        **{f"{tokens} tokens": cosines for tokens, cosines in certificate["bands"].items()},
    }
    rows = [
        [name, str(c["texts"]), f"{c['mean']:.5f}", f"{c['percentile_1']:.5f}", f"{c['minimum']:.5f}"]
        for name, c in groups.items()
    ]
    table = render(["cosine to FP32", "texts", "mean", "1st pct", "min"], rows, right=frozenset({1, 2, 3, 4}))
    overlap = certificate["top_10_overlap"]
    shown = "not measured (fewer than 20 texts)" if overlap is None else f"{overlap:.3f}"
    return f"{table}\n\ntop-10 neighbours kept: {shown}"
