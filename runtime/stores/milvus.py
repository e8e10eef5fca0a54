"""Documents in a collection of Milvus: a server or cluster by its address, or Milvus Lite in a file.

The schema and every question are the same for both. What Milvus Lite does not have, an index over tags, is made on
servers only.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from qingyu.models.extras import require
from qingyu.runtime.engine import Floats
from qingyu.runtime.search.contract import VectorSpace
from qingyu.runtime.stores.pieces import Condition, Found, PieceStore, Row, Stub
from qingyu.runtime.stores.reach import check_reachable, is_server, unreachable

__all__ = ["MilvusStore"]

LONGEST_ID = 512  # bytes
LONGEST_TEXT = 65_535  # bytes, Milvus's own limit
MOST_TAGS = 4096
PAGE = 1000
RETURNED = ["document", "text", "start", "stop", "fields"]
# Milvus's name of a metric, and what makes its distance a score: it gives squared Euclidean distances.
METRICS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "cosine": ("COSINE", lambda distance: distance),
    "dot": ("IP", lambda distance: distance),
    "euclidean": ("L2", lambda distance: -math.sqrt(max(distance, 0.0))),
}


class MilvusStore(PieceStore):
    """A collection of Milvus as a ``VectorStore``; open one with ``open``, make one with ``create``."""

    KIND = "milvus"

    @staticmethod
    def _connected(address: str, place: str, timeout: float) -> Any:  # noqa: ANN401
        return _client(address, timeout, place)

    @staticmethod
    def _failures(place: str) -> AbstractContextManager[None]:
        return _failures(place)

    @staticmethod
    def _collections(client: Any) -> list[str]:  # noqa: ANN401
        return list(client.list_collections())

    @staticmethod
    def _make(client: Any, collection: str, space: VectorSpace, facts: str, *, server: bool) -> None:  # noqa: ANN401
        _make(client, collection, space, facts, lite=not server)

    def _note(self) -> object:
        described = self._client.describe_collection(self._collection)
        self._client.load_collection(self._collection)
        return dict(described.get("properties") or {}).get("qingyu") or described.get("description")

    def _check_row(self, row: Row) -> None:
        sizes = (
            ("an id", row.document, LONGEST_ID, "Shorten its id."),
            ("a piece", row.text, LONGEST_TEXT, "Cut documents into pieces: chunk_tokens, --chunk-tokens."),
            ("fields", row.fields, LONGEST_TEXT, "Leave some of its fields out."),
        )
        for what, text, most, remedy in sizes:
            if (size := len(text.encode("utf-8"))) > most:
                raise self._refuse(row, what, most, size, remedy)
        if len(row.tags) > MOST_TAGS:
            raise self._refuse(
                row, "fields in JSON", MOST_TAGS, len(row.tags), "Leave some of its fields out."
            )

    def _upsert(self, rows: Sequence[Row]) -> None:
        with _failures(self.place):
            self._client.upsert(self._collection, [asdict(row) for row in rows])

    def _stubs(self, ids: Sequence[str]) -> Iterable[Stub]:
        with _failures(self.place):
            rows = self._client.query(
                self._collection,
                filter=_is_in("document", ids),
                output_fields=["document", "digest", "pieces"],
            )
        return [Stub(row["document"], row["digest"], row["pieces"]) for row in rows]

    def _remove(self, ids: Collection[str], digest: str | None) -> None:
        expression = _is_in("document", ids) + (
            "" if digest is None else f" and {_is_in('digest', [digest])}"
        )
        with _failures(self.place):
            self._client.delete(self._collection, filter=expression)

    def _nearest(self, query: Floats, k: int, conditions: Sequence[Condition]) -> Iterable[Found]:
        score = METRICS[self._space.metric][1]
        with _failures(self.place):
            hits = self._client.search(
                self._collection,
                data=[query],
                limit=k,
                filter=" and ".join(map(_expression, conditions)),
                output_fields=RETURNED,
            )[0]
        return [Found(score(hit["distance"]), hit["entity"]) for hit in hits]

    def _count(self) -> int:
        with _failures(self.place):
            counted = self._client.query(self._collection, filter="piece == 0", output_fields=["count(*)"])
        return int(counted[0]["count(*)"])

    def _ids(self) -> Iterable[str]:
        with _failures(self.place):
            return [row["document"] for row in self._firsts()]

    def _firsts(self) -> Iterator[Mapping[str, Any]]:
        """The first row of every document; in pages from a server, whose answers are limited in size."""
        asked = {"filter": "piece == 0", "output_fields": ["document"]}
        if not is_server(self.place.removeprefix("milvus+")):
            yield from self._client.query(self._collection, **asked)
            return
        pages = self._client.query_iterator(self._collection, batch_size=PAGE, **asked)
        try:
            while page := pages.next():
                yield from page
        finally:
            pages.close()


def _client(address: str, timeout: float, place: str) -> Any:  # noqa: ANN401
    lite = () if is_server(address) else ("milvus_lite",)
    require("milvus", "pymilvus", *lite)
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs every error that it also raises
    if is_server(address):
        check_reachable(address, place, timeout)
    from pymilvus import MilvusClient

    with _failures(place):
        return MilvusClient(address, token=os.environ.get("MILVUS_TOKEN", ""), timeout=timeout)


def _make(client: Any, collection: str, space: VectorSpace, facts: str, *, lite: bool) -> None:  # noqa: ANN401
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=facts)
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID + 16)
    schema.add_field("document", DataType.VARCHAR, max_length=LONGEST_ID)
    schema.add_field("digest", DataType.VARCHAR, max_length=64)
    for name in ("piece", "pieces", "start", "stop"):
        schema.add_field(name, DataType.INT64)
    for name in ("text", "fields"):
        schema.add_field(name, DataType.VARCHAR, max_length=LONGEST_TEXT)
    schema.add_field(
        "tags", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=MOST_TAGS, max_length=256
    )
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=space.dim)
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type="AUTOINDEX", metric_type=METRICS[space.metric][0])
    indexes.add_index("document", index_type="INVERTED")
    if not lite:
        indexes.add_index("tags", index_type="INVERTED")
    client.create_collection(
        collection,
        schema=schema,
        index_params=indexes,
        # What put has stored is found by the next search, from whatever client.
        consistency_level="Strong",
        properties={"qingyu": facts},
    )


def _expression(condition: Condition) -> str:
    parts = []
    if condition.tags:
        parts.append(f"array_contains_any(tags, {json.dumps(condition.tags, ensure_ascii=False)})")
    if condition.absent is not None:
        parts.append(f"not array_contains(tags, {json.dumps(condition.absent, ensure_ascii=False)})")
    return f"({' or '.join(parts)})"


def _is_in(field: str, values: Collection[str]) -> str:
    return f"{field} in {json.dumps(list(values), ensure_ascii=False)}"


@contextmanager
def _failures(place: str) -> Iterator[None]:
    """Turns what Milvus refuses, and what gRPC says of the network, into ``StoreError``."""
    import grpc
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise unreachable(place, error.message or str(error)) from None
    except (grpc.RpcError, OSError, ConnectionError) as error:
        raise unreachable(place, str(error)) from None
