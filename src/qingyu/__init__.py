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
    from qingyu.runtime.async_embedder import AsyncEmbedder
    from qingyu.runtime.classifier import Classifier
    from qingyu.runtime.embedder import Embedder
    from qingyu.runtime.fill_mask import FillMask
    from qingyu.runtime.hidden_states import HiddenStates
    from qingyu.runtime.question_answerer import QuestionAnswerer
    from qingyu.runtime.reranker import Reranker
    from qingyu.runtime.spec import ModelSpec
    from qingyu.runtime.token_classifier import TokenClassifier

__all__ = [
    "AsyncEmbedder",
    "Classifier",
    "Embedder",
    "FillMask",
    "HiddenStates",
    "ModelSpec",
    "QuestionAnswerer",
    "Reranker",
    "TokenClassifier",
    "__version__",
    "errors",
]

__version__ = "0.1.0"

_LAZY = {
    "AsyncEmbedder": "qingyu.runtime.async_embedder",
    "Classifier": "qingyu.runtime.classifier",
    "Embedder": "qingyu.runtime.embedder",
    "FillMask": "qingyu.runtime.fill_mask",
    "HiddenStates": "qingyu.runtime.hidden_states",
    "ModelSpec": "qingyu.runtime.spec",
    "QuestionAnswerer": "qingyu.runtime.question_answerer",
    "Reranker": "qingyu.runtime.reranker",
    "TokenClassifier": "qingyu.runtime.token_classifier",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the named module holds
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
