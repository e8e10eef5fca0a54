"""Chinese BERT-family models on ordinary CPUs: text in, verified vectors out.

>>> from qingyu import Embedder  # doctest: +SKIP
>>> with Embedder.open("out/e5") as embedder:  # doctest: +SKIP
...     embedder.embed(["今天天气真好"]).shape
(1, 384)

Importing this package loads neither numpy nor onnxruntime nor tokenizers; opening a model does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qingyu import errors

if TYPE_CHECKING:
    from qingyu.runtime.embedder import Embedder
    from qingyu.runtime.fill_mask import FillMask
    from qingyu.runtime.spec import ModelSpec

__all__ = ["Embedder", "FillMask", "ModelSpec", "__version__", "errors"]

__version__ = "0.1.0"

_LAZY = {
    "Embedder": "qingyu.runtime.embedder",
    "FillMask": "qingyu.runtime.fill_mask",
    "ModelSpec": "qingyu.runtime.spec",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the named module holds
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
