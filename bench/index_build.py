"""What an index costs beside embedding: documents a second with `SearchIndex` against those of its `Embedder` alone.

    python -m qingyu.bench.index_build MODEL --texts texts.txt --documents 100000

Blocks of documents take turns: most are embedded, stored and indexed, every ``--every``-th is only embedded. So both
see the same texts, the same machine and the same drift, while the index grows to its full size. Seconds are wall-clock
and of all processors; on a busy machine the second is the one to trust. The graph is written as it would be, and the
last time at the end, all of it counted. Prints one JSON line. Not here: searching (``bench/search.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qingyu.runtime.embedder import Embedder
from qingyu.runtime.search.contract import Document
from qingyu.runtime.search.index import SearchIndex
from qingyu.runtime.search.local import LocalStore

__all__ = ["main", "measure"]

BLOCK = 2000  # documents; enough that windows of the embedder are full


@dataclass
class _Clock:
    """Documents, and the seconds that they took on the wall and on all processors."""

    documents: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    @contextlib.contextmanager
    def running(self, documents: int) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.documents += documents

    def facts(self) -> dict[str, float]:
        return {
            "documents": self.documents,
            "documents_per_second": round(self.documents / self.wall, 1),
            "cpu_ms_per_document": round(1000 * self.cpu / self.documents, 3),
        }


def measure(
    model: Path | str, texts: Sequence[str], *, every: int = 4, block: int = BLOCK
) -> dict[str, object]:
    """Throughput of both, and of the index as a share of the embedder's."""
    embedding, indexing = _Clock(), _Clock()
    with tempfile.TemporaryDirectory() as folder, Embedder.open(model) as embedder:
        embedder.embed(texts[:64])
        with SearchIndex.create(Path(folder) / "kb", embedder) as index:
            for number, start in enumerate(range(0, len(texts), block)):
                part = texts[start : start + block]
                if number % every == 0:
                    with embedding.running(len(part)):
                        for _ in embedder.embed_stream(part):
                            pass
                else:
                    with indexing.running(len(part)):
                        index.update(Document(str(start + n), text) for n, text in enumerate(part))
                _say(start + len(part), embedding, indexing)
            assert isinstance(index.store, LocalStore)
            with indexing.running(0):
                index.store.flush()
            size = {name: index.store.facts[name] for name in ("graph_entries", "graph_bytes")}
            database = (Path(folder) / "kb" / "documents.sqlite").stat().st_size
        return {
            "model": embedder.spec.name,
            "precision": embedder.spec.precision,
            "dim": embedder.dim,
            "characters_per_document": round(sum(map(len, texts)) / len(texts), 1),
            "embedding": embedding.facts(),
            "indexing": indexing.facts(),
            "share_by_cpu": round(embedding.cpu / embedding.documents * indexing.documents / indexing.cpu, 4),
            "share_by_wall": round(
                embedding.wall / embedding.documents * indexing.documents / indexing.wall, 4
            ),
            **{name: int(value) for name, value in size.items()},
            "database_bytes": database,
        }


def _say(done: int, embedding: _Clock, indexing: _Clock) -> None:
    """How far it is, on standard error, so that a run that is broken off leaves figures."""
    if embedding.documents and indexing.documents:
        facts = {"done": done, "embedding": embedding.facts(), "indexing": indexing.facts()}
        sys.stderr.write(json.dumps(facts) + "\n")
        sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.index_build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a model folder or name")
    parser.add_argument("--texts", type=Path, required=True, help="one text a line")
    parser.add_argument(
        "--documents", type=int, default=100_000, help="how many to index (default: %(default)s)"
    )
    parser.add_argument(
        "--every", type=int, default=4, help="embed every N-th block only (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    wanted = options.documents * options.every // (options.every - 1)
    with options.texts.open(encoding="utf-8") as lines:
        texts = list(itertools.islice(filter(None, map(str.strip, lines)), wanted))
    sys.stdout.write(
        json.dumps(measure(options.model, texts, every=options.every), ensure_ascii=False) + "\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
