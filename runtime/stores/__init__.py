"""Stores of vectors that run as servers, under the contract of ``qingyu.runtime.search.contract``.

``milvus`` needs the extra of its name (pymilvus, milvus-lite), ``qdrant`` the one of its own (qdrant-client); both are
asked for when a store is opened. Importing this loads neither.
"""

from __future__ import annotations

from qingyu.runtime.stores.uri import create_store, is_uri, open_store, store_exists

__all__ = ["create_store", "is_uri", "open_store", "store_exists"]
