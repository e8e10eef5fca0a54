"""Search over documents by meaning, and by words: from vectors to answers.

``contract`` says what a store of vectors is; it needs nothing but numpy. The store on the device needs the extra
``search``, which is asked for when an index is opened.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qingyu.runtime.search.contract import Document, Hit, VectorStore
    from qingyu.runtime.search.index import SearchIndex
    from qingyu.runtime.search.local import LocalStore

__all__ = ["Document", "Hit", "LocalStore", "SearchIndex", "VectorStore"]

_LAZY = {"Document": "contract", "Hit": "contract", "LocalStore": "local", "SearchIndex": "index"}
_LAZY |= {"VectorStore": "contract"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the named module holds
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
