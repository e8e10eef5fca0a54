"""Documents in a collection of Qdrant: a server by its address, or qdrant-client's own local mode in a folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from qingyu.models.extras import require
from qingyu.runtime.engine import Floats
from qingyu.runtime.search.contract import VectorSpace
from qingyu.runtime.stores.pieces import Condition, Found, PieceStore, Row, Stub
from qingyu.runtime.stores.reach import check_reachable, is_server, unreachable

__all__ = ["QdrantStore"]

PAGE = 1000
KEYS = uuid.UUID(
    "7be3ac5f-5a0d-4e7e-9a53-0d4c2f3f5a11"
)  # points have UUIDs for names; ours are made of keys under this
# Qdrant's name of a metric, and what makes its score one: of Euclidean distances the smaller is the nearer.
METRICS = {"cosine": ("Cosine", 1), "dot": ("Dot", 1), "euclidean": ("Euclid", -1)}


class QdrantStore(PieceStore):
    """A collection of Qdrant as a ``VectorStore``; open one with ``open``, make one with ``create``.

    The collection's metadata holds its vector space, which needs a server of version 1.16 or later.
    """

    KIND = "qdrant"

    @staticmethod
    def _connected(address: str, place: str, timeout: float) -> Any:  # noqa: ANN401
        return _client(address, timeout, place)

    @staticmethod
    def _failures(place: str) -> AbstractContextManager[None]:
        return _failures(place)

    @staticmethod
    def _collections(client: Any) -> list[str]:  # noqa: ANN401
        return [one.name for one in client.get_collections().collections]

    @staticmethod
    def _make(client: Any, collection: str, space: VectorSpace, facts: str, *, server: bool) -> None:  # noqa: ANN401
        _make(client, collection, space, facts, local=not server)

    def _note(self) -> object:
        metadata = self._client.get_collection(self._collection).config.metadata
        return (metadata or {}).get("qingyu")

    def _upsert(self, rows: Sequence[Row]) -> None:
        from qdrant_client import models

        points = []
        for row in rows:
            payload = asdict(row)
            vector = payload.pop("vector")
            points.append(
                models.PointStruct(id=str(uuid.uuid5(KEYS, row.key)), vector=vector.tolist(), payload=payload)
            )
        with _failures(self.place):
            self._client.upsert(self._collection, points, wait=True)

    def _stubs(self, ids: Sequence[str]) -> Iterable[Stub]:
        with _failures(self.place):
            return [
                Stub(row["document"], row["digest"], row["pieces"])
                for row in self._rows(_is_in("document", ids), ["document", "digest", "pieces"])
            ]

    def _rows(self, condition: Any, fields: list[str]) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401
        from qdrant_client import models

        after = None
        while True:
            points, after = self._client.scroll(
                self._collection,
                scroll_filter=models.Filter(must=[condition]),
                limit=PAGE,
                offset=after,
                with_payload=fields,
            )
            yield from (point.payload for point in points)
            if after is None:
                return

    def _remove(self, ids: Collection[str], digest: str | None) -> None:
        from qdrant_client import models

        conditions = [_is_in("document", ids), *([] if digest is None else [_is_in("digest", [digest])])]
        with _failures(self.place):
            chosen = models.FilterSelector(filter=models.Filter(must=conditions))
            self._client.delete(self._collection, points_selector=chosen, wait=True)

    def _nearest(self, query: Floats, k: int, conditions: Sequence[Condition]) -> Iterable[Found]:
        from qdrant_client import models

        sign = METRICS[self._space.metric][1]
        with _failures(self.place):
            points = self._client.query_points(
                self._collection,
                query=query.tolist(),
                limit=k,
                query_filter=models.Filter(must=[_filter(one) for one in conditions]) if conditions else None,
                with_payload=True,
            ).points
        return [Found(sign * point.score, point.payload) for point in points]

    def _count(self) -> int:
        from qdrant_client import models

        first = models.Filter(must=[models.FieldCondition(key="piece", match=models.MatchValue(value=0))])
        with _failures(self.place):
            return int(self._client.count(self._collection, count_filter=first, exact=True).count)

    def _ids(self) -> Iterable[str]:
        from qdrant_client import models

        first = models.FieldCondition(key="piece", match=models.MatchValue(value=0))
        with _failures(self.place):
            return [row["document"] for row in self._rows(first, ["document"])]


def _client(address: str, timeout: float, place: str) -> Any:  # noqa: ANN401
    require("qdrant", "qdrant_client")
    if is_server(address):
        check_reachable(address, place, timeout)
    from qdrant_client import QdrantClient

    with _failures(place):
        if not is_server(address):
            return QdrantClient(path=address)
        # That versions differ is for the server to say, when it is asked something that it does not know.
        return QdrantClient(
            url=address,
            api_key=os.environ.get("QDRANT_API_KEY"),
            timeout=int(timeout),
            check_compatibility=False,
        )


def _make(client: Any, collection: str, space: VectorSpace, facts: str, *, local: bool) -> None:  # noqa: ANN401
    from qdrant_client import models

    client.create_collection(
        collection,
        vectors_config=models.VectorParams(size=space.dim, distance=METRICS[space.metric][0]),
        metadata={"qingyu": facts},
    )
    if not local:  # which has no indexes over payloads, and warns that it has none
        for name, kind in (
            ("document", "keyword"),
            ("digest", "keyword"),
            ("tags", "keyword"),
            ("piece", "integer"),
        ):
            client.create_payload_index(collection, field_name=name, field_schema=kind, wait=True)


def _filter(condition: Condition) -> Any:  # noqa: ANN401
    from qdrant_client import models

    either = [_is_in("tags", condition.tags)] if condition.tags else []
    if condition.absent is not None:
        either.append(models.Filter(must_not=[_is_in("tags", [condition.absent])]))
    return models.Filter(should=either)


def _is_in(field: str, values: Collection[str]) -> Any:  # noqa: ANN401
    from qdrant_client import models

    return models.FieldCondition(key=field, match=models.MatchAny(any=list(values)))


@contextmanager
def _failures(place: str) -> Iterator[None]:
    """Turns what Qdrant refuses, and what is said of the network, into ``StoreError``."""
    import httpx
    from qdrant_client.http.exceptions import ApiException

    try:
        yield
    except (ApiException, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise unreachable(place, str(error).strip().partition("\n")[0]) from None
