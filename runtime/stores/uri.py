"""Addresses of stores: ``milvus+http://HOST:19530``, ``milvus+PATH.db``, ``qdrant+http://HOST:6333`` and so on.

``?collection=NAME`` and ``?timeout=SECONDS`` may follow. Keys are not part of an address: MILVUS_TOKEN and
QDRANT_API_KEY are read from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from qingyu.errors import InvalidOptionError
from qingyu.runtime.search.contract import METRICS, VectorSpace

if TYPE_CHECKING:
    from qingyu.runtime.stores.milvus import MilvusStore
    from qingyu.runtime.stores.pieces import PieceStore
    from qingyu.runtime.stores.qdrant import QdrantStore

__all__ = ["create_store", "is_uri", "open_store", "store_exists"]

KINDS = ("milvus", "qdrant")
COLLECTION = "qingyu"
TIMEOUT = 10.0  # seconds, to connect and for each question


@dataclass(frozen=True)
class _Address:
    kind: str
    address: str
    collection: str = COLLECTION
    timeout: float = TIMEOUT


def is_uri(place: object) -> bool:
    """Whether a place is the address of a store, and not a folder."""
    return str(place).startswith(tuple(f"{kind}+" for kind in KINDS))


def open_store(uri: str) -> PieceStore:
    """The store at an address; ``StoreError`` where there is none, or it cannot be reached."""
    place = _parsed(uri)
    return _class_of(place.kind).open(place.address, collection=place.collection, timeout=place.timeout)


def create_store(uri: str, space: VectorSpace, *, facts: Mapping[str, str] | None = None) -> PieceStore:
    """A new store of no documents at an address; ``facts`` are kept as they are."""
    place = _parsed(uri)
    if space.metric not in METRICS:
        raise InvalidOptionError(
            "metric", expected=f"one of {', '.join(METRICS)}", found=repr(space.metric), remedy="Use one."
        )
    return _class_of(place.kind).create(
        place.address, space, facts=facts or {}, collection=place.collection, timeout=place.timeout
    )


def store_exists(uri: str) -> bool:
    """Whether there is a collection at an address, whoever made it; ``StoreError`` where nothing answers."""
    place = _parsed(uri)
    return _class_of(place.kind).exists(place.address, collection=place.collection, timeout=place.timeout)


def _class_of(kind: str) -> type[MilvusStore] | type[QdrantStore]:
    if kind == "milvus":
        from qingyu.runtime.stores.milvus import MilvusStore

        return MilvusStore
    from qingyu.runtime.stores.qdrant import QdrantStore

    return QdrantStore


def _parsed(uri: str) -> _Address:
    found = re.fullmatch(r"(milvus|qdrant)\+([^?]+)(?:\?(.*))?", uri)
    try:
        if found is None:
            raise ValueError(uri)
        options = dict(parse_qsl(found[3] or "", strict_parsing=bool(found[3])))
        collection = options.pop("collection", COLLECTION)
        timeout = float(options.pop("timeout", TIMEOUT))
        if options or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", collection) or not 0 < timeout < 3600:
            raise ValueError(uri)
    except ValueError:
        raise InvalidOptionError(
            "the address of a store",
            expected="KIND+ADDRESS?collection=NAME&timeout=SECONDS with the kind milvus or qdrant, a name of letters, "
            "digits and underscores, and a positive timeout; for example milvus+http://localhost:19530",
            found=repr(uri),
            remedy="Repair it; collection and timeout may be left out.",
        ) from None
    return _Address(found[1], found[2], collection, timeout)
