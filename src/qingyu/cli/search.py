"""``qingyu search``: a question in, the documents that answer it out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import add_opening_arguments, new_command, place
from qingyu.errors import InvalidOptionError

if TYPE_CHECKING:
    from qingyu.runtime.search.contract import Hit, Scalar

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu search kb "怎么重置密码" -k 3
qingyu search kb "怎么重置密码" --mode hybrid --filter type=faq --json"""

TEXT_CELLS = 72


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "search", "find the documents of an index that fit a query", EXAMPLE)
    parser.add_argument(
        "folder", metavar="FOLDER", type=place, help="what `qingyu index build` made, or a store"
    )
    parser.add_argument("query", metavar="QUERY", help="what to look for")
    parser.add_argument(
        "-k", type=int, default=5, metavar="N", help="how many documents (default: %(default)s)"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only documents with this value, text or JSON; several of one field: any; of several fields: all",
    )
    parser.add_argument(
        "--mode",
        choices=("vector", "words", "hybrid"),
        default="vector",
        help="by meaning, by words (BM25), or by both, fused (default: %(default)s)",
    )
    parser.add_argument("--rerank", metavar="FOLDER", help="a reranking model that reads the best candidates")
    parser.add_argument(
        "--candidates", type=int, default=50, metavar="N", help="to fuse or to rerank (default: %(default)s)"
    )
    parser.add_argument("--pieces", action="store_true", help="the best pieces, also several of one document")
    parser.add_argument("--query-prompt", metavar="P", help="refused unless it is that of the index")
    parser.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    add_opening_arguments(parser, default="the index's own")
    parser.set_defaults(run=run, model=None, profile="latency")


def run(options: argparse.Namespace) -> int:
    """Print the hits, best first."""
    from qingyu.runtime.reranker import Reranker
    from qingyu.runtime.search.index import SearchIndex

    where = _filter(options.filter)
    resources = {"profile": options.profile, "threads": options.threads}
    with contextlib.ExitStack() as stack:
        index = stack.enter_context(
            SearchIndex.open(
                options.folder,
                options.model,
                query_prompt=options.query_prompt,
                max_memory_mb=options.max_memory_mb,
                **resources,
            )
        )
        reranker = (
            None
            if options.rerank is None
            else stack.enter_context(Reranker.open(options.rerank, **resources))
        )
        hits = index.search(
            options.query,
            k=options.k,
            where=where,
            mode=options.mode,
            reranker=reranker,
            candidates=options.candidates,
            pieces=options.pieces,
        )
        _print(hits, json_lines=options.json or not sys.stdout.isatty())
    return 0


def _print(hits: list[Hit], *, json_lines: bool) -> None:
    from qingyu.cli.table import clip

    for hit in hits:
        if json_lines:
            print(json.dumps(dataclasses.asdict(hit), ensure_ascii=False))
        else:
            print(f"{hit.score:.4f}  {hit.id}  {clip(hit.text, TEXT_CELLS)}")
    if not hits and not json_lines:
        print("nothing found")


def _filter(given: list[str]) -> dict[str, list[Scalar]] | None:
    """FIELD=VALUE, where a value that is JSON is also taken for what it says: 2024 is "2024" and the number."""
    where: dict[str, list[Scalar]] = {}
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise InvalidOptionError(
                "--filter", expected="FIELD=VALUE", found=repr(pair), remedy="For example type=faq"
            )
        values: list[Scalar] = [text]
        with contextlib.suppress(ValueError):
            read = json.loads(text)
            if isinstance(read, (str, int, float, type(None))):
                values.append(read)
        where.setdefault(name, []).extend(values)
    return where or None
