"""EmbedAnything (Rust, onnxruntime) with the INT8 graph of sentence-transformers' path.

It takes models from a hub only; a local one is put where its hub client keeps what it has fetched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.bench.contenders.contract import Contender, Files, Opened, write_once

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]

REPOSITORY = "local/model"
REVISION = "0" * 40


def _prepare(files: Files) -> None:
    from dataclasses import replace

    from qingyu.bench.contenders.fastembed import CONTENDERS as MAKERS

    made = replace(files, own=files.own.with_name("fastembed-int8"))
    maker = MAKERS["fastembed-int8"]
    if maker.prepare is not None:
        maker.prepare(made)

    def write(folder: Path) -> None:
        repository = folder / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION, encoding="ascii")
        shutil.copytree(made.own, repository / "snapshots" / REVISION)

    write_once(files.own, write)


def _open(files: Files, threads: int) -> Opened:
    os.environ.update(HF_HOME=str(files.own), HF_HUB_CACHE=str(files.own / "hub"))
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import numpy as np
    from embed_anything import EmbeddingModel, TextEmbedConfig, WhichModel, embed_query

    model = EmbeddingModel.from_pretrained_onnx(
        WhichModel.Bert, hf_model_id=REPOSITORY, path_in_repo="model.onnx"
    )
    config = TextEmbedConfig(batch_size=32)

    def embed(texts: Sequence[str]) -> Floats:
        found = embed_query(list(texts), embedder=model, config=config)
        return np.array([one.embedding for one in found], dtype=np.float32)

    return Opened(embed)


CONTENDERS = {
    "embed-anything-int8": Contender(
        name="embed-anything-int8",
        title="EmbedAnything, ONNX INT8",
        precision="int8",
        needs=("embed_anything",),
        distributions=("embed-anything",),
        how="`from_pretrained_onnx` with sentence-transformers' INT8 file in the cache of its hub client",
        open=_open,
        prepare=_prepare,
        prepare_needs=("sentence_transformers", "optimum.onnxruntime"),
        prepare_distributions=("sentence-transformers", "optimum-onnx[onnxruntime]"),
    )
}
