"""Recall against latency of an index in a folder, beside faiss, hnswlib and milvus-lite on the same vectors.

    python -m qingyu.bench.search --work FOLDER                  # 100,000 vectors of 512 dimensions
    python -m qingyu.bench.search --work FOLDER --full           # 1,000,000
    python -m qingyu.bench.search --work FOLDER --vectors-file vectors.npy   # real ones

Vectors are made in clusters, as embeddings of texts lie; queries are others of the same clusters, and the right answers
come from comparing with all vectors in float32. Each contender builds in a process of its own, once: what is in FOLDER
is used again. Then each opens what it built, in a new process each round, in turns, and answers the same queries one
by one with one thread at several search widths. For qingyu an answer includes the documents: ids, texts and fields.

Prints one JSON line a contender and width, and writes FOLDER/results.jsonl and, with matplotlib, FOLDER/curve.svg.
Needs faiss-cpu, hnswlib and pymilvus with milvus-lite for those contenders; one that is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.runtime.cpu import choose_threads
from qingyu.runtime.engine import Floats, Ids
from qingyu.runtime.search.contract import Document, EmbeddedDocument, VectorSpace
from qingyu.runtime.search.local import LocalStore
from qingyu.runtime.vectors import unit

__all__ = ["CONTENDERS", "exact_answers", "main", "make_vectors"]

Search = Callable[[Floats, int], Sequence[int]]  # a query (dim,) and a width to its k nearest

K = 10
DIM = 512
NEIGHBOURS = 16  # of an HNSW graph, for all contenders alike
BUILD_WIDTH = 64
WIDTHS = (16, 32, 64, 128, 256, 512)
PER_CLUSTER = 200  # vectors; so that the ten nearest are of the query's own cluster, but not all of it
SPREAD = 0.8  # length of the noise beside a unit centre: the nearest neighbour has a cosine of about 0.66
BLOCK = 10_000


@dataclass(frozen=True)
class Contender:
    """How one library builds an index of a (n, dim) array in a folder, and opens it again to be searched."""

    package: str
    build: Callable[[Floats, Path], None]
    open: Callable[[Path, int], contextlib.AbstractContextManager[Search]]


def make_vectors(path: Path, count: int, dim: int, *, queries: int, seed: int = 0) -> None:
    """Write ``count`` unit vectors, clustered, and beside them ``queries`` others (queries.npy)."""
    random = np.random.default_rng(seed)
    centres = unit(random.normal(size=(max(1, count // PER_CLUSTER), dim)).astype(np.float32))

    def near(number: int) -> Floats:
        noise = random.normal(size=(number, dim)).astype(np.float32) * np.float32(SPREAD / np.sqrt(dim))
        return unit(centres[random.integers(0, len(centres), number)] + noise)

    np.save(path.with_name("queries.npy"), near(queries))
    temporary = path.with_suffix(".tmp")
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, dim))
    for start in range(0, count, BLOCK):
        array[start : start + BLOCK] = near(min(BLOCK, count - start))
    array.flush()
    temporary.rename(path)


def exact_answers(vectors: Floats, queries: Floats, k: int = K) -> Ids:
    """The ``k`` nearest of each query by inner product, from all vectors in float32."""
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    names = np.zeros((len(queries), k), dtype=np.int64)
    for start in range(0, len(vectors), BLOCK):
        scores = queries @ vectors[start : start + BLOCK].T
        top = np.argpartition(-scores, min(k, scores.shape[1] - 1), axis=1)[:, :k]
        both = np.concatenate([best, np.take_along_axis(scores, top, axis=1)], axis=1)
        named = np.concatenate([names, top + start], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best, names = np.take_along_axis(both, order, axis=1), np.take_along_axis(named, order, axis=1)
    return names


# The contenders.


def _build_qingyu(vectors: Floats, folder: Path) -> None:
    space = VectorSpace("bench", "bench", vectors.shape[1])
    with LocalStore.create(folder / "kb", space) as store:
        for start in range(0, len(vectors), BLOCK):
            part = np.ascontiguousarray(vectors[start : start + BLOCK])
            store.put(
                [
                    EmbeddedDocument.whole(Document(str(start + n), f"文档 {start + n}"), vector)
                    for n, vector in enumerate(part)
                ]
            )
        store.flush()


@contextlib.contextmanager
def _open_qingyu(folder: Path, dim: int) -> Iterator[Search]:
    with LocalStore.open(folder / "kb") as store:
        yield lambda query, width: [int(hit.id) for hit in store.search(query, k=K, width=width)]


def _build_faiss(vectors: Floats, folder: Path) -> None:
    import faiss

    faiss.omp_set_num_threads(choose_threads(None))
    index: Any = faiss.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_WIDTH
    for start in range(0, len(vectors), BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    faiss.write_index(index, str(folder / "index"))


@contextlib.contextmanager
def _open_faiss(folder: Path, dim: int) -> Iterator[Search]:
    import faiss

    faiss.omp_set_num_threads(1)
    index: Any = faiss.read_index(str(folder / "index"))

    def search(query: Floats, width: int) -> Sequence[int]:
        index.hnsw.efSearch = width
        found: list[int] = index.search(query[None], K)[1][0].tolist()
        return found

    yield search


def _build_hnswlib(vectors: Floats, folder: Path) -> None:
    import hnswlib

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=NEIGHBOURS, ef_construction=BUILD_WIDTH)
    for start in range(0, len(vectors), BLOCK):
        index.add_items(
            np.ascontiguousarray(vectors[start : start + BLOCK]), num_threads=choose_threads(None)
        )
    index.save_index(str(folder / "index"))


@contextlib.contextmanager
def _open_hnswlib(folder: Path, dim: int) -> Iterator[Search]:
    import hnswlib

    index = hnswlib.Index("ip", dim)
    index.load_index(str(folder / "index"))
    index.set_num_threads(1)

    def search(query: Floats, width: int) -> Sequence[int]:
        index.set_ef(max(width, K))
        found: list[int] = index.knn_query(query, k=K)[0][0].tolist()
        return found

    yield search


def _build_milvus(vectors: Floats, folder: Path) -> None:
    """All vectors first and then the graph: with an index there from the start, storing takes ten times as long."""
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(str(folder / "milvus.db"))
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
    client.create_collection("kb", schema=schema)
    for start in range(0, len(vectors), BLOCK // 10):
        part = vectors[start : start + BLOCK // 10]
        client.insert("kb", [{"id": start + n, "vector": vector} for n, vector in enumerate(np.array(part))])
    client.flush("kb")
    indexes = client.prepare_index_params()
    graph = {"M": NEIGHBOURS, "efConstruction": BUILD_WIDTH}
    indexes.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
    client.create_index("kb", indexes)
    client.close()


@contextlib.contextmanager
def _open_milvus(folder: Path, dim: int) -> Iterator[Search]:
    from pymilvus import MilvusClient

    client = MilvusClient(str(folder / "milvus.db"))
    client.load_collection("kb")

    def search(query: Floats, width: int) -> Sequence[int]:
        wide = {"metric_type": "IP", "params": {"ef": width}}
        (found,) = client.search("kb", [query.tolist()], limit=K, search_params=wide)
        return [one["id"] for one in found]

    yield search
    client.close()


CONTENDERS: Mapping[str, Contender] = {
    "qingyu": Contender("usearch", _build_qingyu, _open_qingyu),
    "faiss": Contender("faiss", _build_faiss, _open_faiss),
    "hnswlib": Contender("hnswlib", _build_hnswlib, _open_hnswlib),
    "milvus-lite": Contender("milvus_lite", _build_milvus, _open_milvus),
}


# A process of each.


def _build(name: str, work: Path) -> dict[str, Any]:
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)  # what a build that was broken off left
    folder.mkdir()
    vectors: Floats = np.load(work / "vectors.npy", mmap_mode="r")
    wall, cpu = time.perf_counter(), time.process_time()
    CONTENDERS[name].build(vectors, folder)
    return {
        "build_seconds": round(time.perf_counter() - wall, 1),
        "build_cpu_seconds": round(time.process_time() - cpu, 1),
        "bytes": _bytes(folder),
        "graph_bytes": sum(path.stat().st_size for path in folder.rglob("*.usearch")) or None,
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _resident() -> dict[str, float]:
    """Resident memory of this process in MB: what is its own, and what are pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in status if line.endswith(" kB")}
    return {"own_mb": kilobytes["RssAnon"] / 1024, "file_mb": kilobytes["RssFile"] / 1024}


def _search(name: str, work: Path, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    queries: Floats = np.load(work / "queries.npy")
    answers: NDArray[np.int64] = np.load(work / "answers.npy")
    with CONTENDERS[name].open(work / name, queries.shape[1]) as warm:
        warm(queries[0], widths[0])  # imports, and what a library does once
    before = _resident()
    start = time.perf_counter()
    with CONTENDERS[name].open(work / name, queries.shape[1]) as search:
        opened = time.perf_counter() - start
        search(queries[0], widths[0])
        first = time.perf_counter() - start
        for width in widths:
            yield {
                "contender": name,
                "width": width,
                **_measured(search, queries, answers, width),
                "open_ms": round(1000 * opened, 2),
                "open_and_first_ms": round(1000 * first, 2),
                **{key: round(value - before[key], 1) for key, value in _resident().items()},
            }


def _measured(search: Search, queries: Floats, answers: NDArray[np.int64], width: int) -> dict[str, float]:
    for query in queries[:50]:
        search(query, width)
    seconds, right = [], 0
    for query, wanted in zip(queries, answers, strict=True):
        start = time.perf_counter()
        found = search(query, width)
        seconds.append(time.perf_counter() - start)
        right += len(set(found) & set(wanted.tolist()))
    return {
        "recall": round(right / answers.size, 4),
        "p50_ms": round(1000 * statistics.median(seconds), 4),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 4),
    }


def _child(work: Path, what: str, name: str) -> list[dict[str, Any]]:
    """The lines that this module prints in a process of its own for one contender."""
    command = [sys.executable, "-m", "qingyu.bench.search", "--work", str(work), "--child", what, name]
    threads = str(choose_threads(None) if what == "build" else 1)  # numpy's products count as well
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "GRPC_VERBOSITY": "NONE",
    }
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode != 0:
        sys.stderr.write(f"{name}: {what} failed with {done.returncode}\n")
        return []
    return [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]


def _prepare(options: argparse.Namespace) -> None:
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    path = work / "vectors.npy"
    if options.vectors_file is not None and not path.exists():
        given: Floats = unit(np.load(options.vectors_file))
        np.save(work / "queries.npy", given[-options.queries :])
        np.save(path, given[: -options.queries])
    if not path.exists():
        make_vectors(path, options.vectors, DIM, queries=options.queries)
    if not (work / "answers.npy").exists():
        np.save(
            work / "answers.npy", exact_answers(np.load(path, mmap_mode="r"), np.load(work / "queries.npy"))
        )


def _built(work: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    built = {}
    for name in names:
        note = work / f"{name}.json"
        if not note.exists() and (made := _child(work, "build", name)):
            note.write_text(json.dumps(made[0]), encoding="utf-8")
        if note.exists():
            built[name] = json.loads(note.read_text(encoding="utf-8"))
    return built


def _middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the rounds."""
    middle = dict(rounds[0])
    for key, value in rounds[0].items():
        if isinstance(value, float):
            middle[key] = round(statistics.median(one[key] for one in rounds), 4)
    return middle


def _draw(path: Path, lines: Sequence[dict[str, Any]], title: str) -> None:
    if find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "qingyu"  # the same figures give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(line["contender"] for line in lines):
        own = [line for line in lines if line["contender"] == name]
        axes.plot([line["recall"] for line in own], [line["p50_ms"] for line in own], marker="o", label=name)
    axes.set(xlabel="recall@10", ylabel="median of one search, ms", yscale="log", title=title)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, required=True, help="folder for vectors, indexes and results")
    parser.add_argument("--vectors", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="a million vectors")
    parser.add_argument(
        "--vectors-file", type=Path, help="a .npy of float32 (n, dim) instead; the last are the queries"
    )
    parser.add_argument("--queries", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of searching (default: %(default)s)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="(default: %(default)s)")
    parser.add_argument("--build-only", action="store_true", help="build, and search another time")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        what, name = options.child
        lines = [_build(name, options.work)] if what == "build" else _search(name, options.work, WIDTHS)
        for line in lines:
            print(json.dumps(line), flush=True)
        return 0
    options.vectors = 1_000_000 if options.full else options.vectors
    names = [
        name for name in options.contenders.split(",") if find_spec(CONTENDERS[name].package) is not None
    ]
    _prepare(options)
    built = _built(options.work, names)
    if options.build_only:
        return 0
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for name in list(built)[:: 1 if number % 2 == 0 else -1]:
            for line in _child(options.work, "search", name):
                found.setdefault((name, line["width"]), []).append(line)
    count = len(np.load(options.work / "vectors.npy", mmap_mode="r"))
    order = list(CONTENDERS)
    merged = [_middle(rounds) for rounds in found.values()]
    merged.sort(key=lambda line: (order.index(line["contender"]), line["width"]))
    lines = [{"vectors": count, **line, **built[line["contender"]]} for line in merged]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (options.work / "results.jsonl").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    _draw(options.work / "curve.svg", lines, f"{count:,} vectors, one thread")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
