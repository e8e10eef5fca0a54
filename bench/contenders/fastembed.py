"""fastembed with a custom model from a local folder: the INT8 graph that sentence-transformers' path makes."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.bench.contenders.contract import Contender, Files, Opened, require_checkpoint, write_once

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]

GRAPH = "model.onnx"
NAME = "local/model"


def _prepare(files: Files) -> None:
    from qingyu.bench.contenders.sentence_transformers import CONTENDERS as MAKERS

    require_checkpoint(files)
    made = dataclasses.replace(files, own=files.own.with_name("st-onnx-int8"))
    maker = MAKERS["st-onnx-int8"]
    if maker.prepare is not None:
        maker.prepare(made)

    def write(folder: Path) -> None:
        shutil.copy(next((made.own / "onnx").glob("model_qint8_*.onnx")), folder / GRAPH)
        for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (made.own / name).is_file():
                shutil.copy(made.own / name, folder / name)
        # With the checkpoint's lower-casing in it, which fastembed would not do by itself.
        shutil.copy(files.int8 / "tokenizer.json", folder / "tokenizer.json")

    write_once(files.own, write)


def _open(files: Files, threads: int) -> Opened:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model=NAME,
        pooling=PoolingType.CLS if files.pooling == "cls" else PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=NAME),
        dim=files.dim,
        model_file=GRAPH,
    )
    model = TextEmbedding(NAME, specific_model_path=str(files.own), threads=threads)

    def embed(texts: Sequence[str]) -> Floats:
        return np.stack(list(model.embed(list(texts)))).astype(np.float32)

    def stream(texts: Sequence[str]) -> Iterator[Floats]:
        for vector in model.embed(texts):
            yield vector[None].astype(np.float32)

    return Opened(embed, stream)


CONTENDERS = {
    "fastembed-int8": Contender(
        name="fastembed-int8",
        title="fastembed, custom model, ONNX INT8",
        precision="int8",
        needs=("fastembed", "onnxruntime"),
        distributions=("fastembed",),
        how="`add_custom_model` and `TextEmbedding(specific_model_path=...)` with sentence-transformers' INT8 file",
        open=_open,
        prepare=_prepare,
        prepare_needs=("sentence_transformers", "optimum.onnxruntime"),
        prepare_distributions=("sentence-transformers", "optimum-onnx[onnxruntime]"),
    )
}
