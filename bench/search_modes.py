"""Searching by meaning, by words and by both, on a set of questions and passages: recall, reciprocal rank and time.

    python -m qingyu.bench.search_modes MODEL --data cmrc2018 [--index PLACE]

DATA is a folder of queries.jsonl, corpus.jsonl and qrels.tsv. The passages are indexed in PLACE, a folder (default: a
temporary one) or the address of a store, and each query is searched in each mode that it has, in turns. Prints one
JSON line a mode: recall@1 and @10 and MRR@10, times 100, and the median milliseconds of a search, the query's embedding
included where it is embedded. Not here: other sizes (``bench/search.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qingyu.quantize.evaluation import RetrievalSet
from qingyu.quantize.measures import AT, retrieval_measures
from qingyu.runtime.search.contract import Document, TextStore
from qingyu.runtime.search.database import FILE
from qingyu.runtime.search.index import MODES, SearchIndex
from qingyu.runtime.stores import is_uri, store_exists

__all__ = ["main", "measure"]


def measure(index: SearchIndex, retrieval: RetrievalSet) -> Iterator[dict[str, object]]:
    """The figures of each mode; the index must hold the set's passages under their positions."""
    modes = MODES if isinstance(index.store, TextStore) else MODES[:1]
    seconds: Mapping[str, list[float]] = {mode: [] for mode in modes}
    found: Mapping[str, list[list[int]]] = {mode: [] for mode in modes}
    for query in retrieval.queries:
        for mode in modes:
            start = time.perf_counter()
            hits = index.search(query, k=AT, mode=mode)
            seconds[mode].append(time.perf_counter() - start)
            places = [int(hit.id) for hit in hits]
            found[mode].append(places + [-1] * (AT - len(places)))
    grades = retrieval.grades or [dict.fromkeys(relevant, 1) for relevant in retrieval.relevant]
    for mode in modes:
        measures = retrieval_measures(np.array(found[mode]), grades)
        kept = {name: round(100 * measures[name], 2) for name in ("recall@1", "recall@10", f"MRR@{AT}")}
        milliseconds = round(1000 * statistics.median(seconds[mode]), 3)
        yield {"set": retrieval.name, "mode": mode, "queries": len(grades), **kept, "median_ms": milliseconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.search_modes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a model folder or name")
    parser.add_argument("--data", type=Path, required=True, help="folder of the set")
    parser.add_argument("--index", help="keep the index here: a folder, or the address of a store")
    options = parser.parse_args(arguments)
    retrieval = RetrievalSet.read(options.data)
    with contextlib.ExitStack() as stack:
        place = options.index or f"{stack.enter_context(tempfile.TemporaryDirectory())}/kb"
        there = store_exists(place) if is_uri(place) else (Path(place) / FILE).exists()
        opened = (
            SearchIndex.open(place, options.model, writable=True)
            if there
            else SearchIndex.create(place, options.model)
        )
        index = stack.enter_context(opened)
        index.build(Document(str(n), text) for n, text in enumerate(retrieval.corpus))
        for line in measure(index, retrieval):
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
