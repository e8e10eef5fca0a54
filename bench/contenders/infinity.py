"""infinity's engine in process, without its server: torch with its own dynamic batching."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qingyu.bench.contenders.contract import Contender, Files, Opened, require_checkpoint

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]


def _open(files: Files, threads: int) -> Opened:
    os.environ.update(HF_HUB_OFFLINE="1", INFINITY_ANONYMOUS_USAGE_STATS="0", DO_NOT_TRACK="1")
    import numpy as np
    import torch
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    torch.set_num_threads(threads)
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=str(require_checkpoint(files)),
            engine="torch",
            device="cpu",
            dtype="float32",
            model_warmup=False,
            bettertransformer=False,
        )
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    def embed(texts: Sequence[str]) -> Floats:
        vectors, _ = loop.run_until_complete(engine.embed(sentences=list(texts)))
        return np.array(vectors, dtype=np.float32)

    return Opened(embed)


CONTENDERS = {
    "infinity-torch": Contender(
        name="infinity-torch",
        title="infinity, torch FP32",
        precision="fp32",
        needs=("infinity_emb", "torch", "sentence_transformers"),
        distributions=("infinity-emb", "sentence-transformers", "torch"),
        how='`AsyncEmbeddingEngine`, `engine="torch"`, in process',
        open=_open,
    )
}
