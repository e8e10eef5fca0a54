"""CTranslate2's BERT encoder in INT8, with texts sorted by length and one worker a core, as one would by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from qingyu.bench.contenders.contract import (
    BATCH,
    Contender,
    Files,
    Opened,
    require_checkpoint,
    sorted_batches,
    write_once,
)

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]


def _prepare(files: Files) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import ctranslate2

    checkpoint = require_checkpoint(files)

    def write(folder: Path) -> None:
        converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
        converter.convert(str(folder), quantization="int8", force=True)

    write_once(files.own, write)


def _open(files: Files, threads: int) -> Opened:
    import ctranslate2
    import numpy as np
    from tokenizers import Tokenizer

    encoder = ctranslate2.Encoder(
        str(files.own), device="cpu", compute_type="int8", inter_threads=threads, intra_threads=1
    )
    tokenizer = Tokenizer.from_file(str(files.int8 / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(files.max_tokens)
    pool = ThreadPoolExecutor(threads)

    def embed(texts: Sequence[str]) -> Floats:
        ids = [one.ids for one in tokenizer.encode_batch_fast(list(texts))]
        vectors = np.empty((len(ids), files.dim), dtype=np.float32)

        def run(rows: list[int]) -> None:
            states = np.array(encoder.forward_batch([ids[row] for row in rows]).last_hidden_state)
            lengths = np.array([len(ids[row]) for row in rows])
            vectors[rows] = _pool(states, lengths, files.pooling)

        # Few texts are shared out among the workers, too.
        batches = sorted_batches([len(one) for one in ids], rows=min(BATCH, -(-len(ids) // threads)))
        if len(batches) == 1:
            run(batches[0])
        else:
            list(pool.map(run, batches))
        return vectors

    def _pool(states: Floats, lengths: Floats, pooling: str) -> Floats:
        if pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = np.arange(states.shape[1]) < lengths[:, None]
            pooled = (states * mask[..., None]).sum(axis=1) / lengths[:, None]
        unit: Floats = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit

    return Opened(embed)


CONTENDERS = {
    "ctranslate2-int8": Contender(
        name="ctranslate2-int8",
        title="CTranslate2 INT8",
        precision="int8",
        needs=("ctranslate2", "tokenizers"),
        distributions=("ctranslate2", "tokenizers"),
        how='its converter with `quantization="int8"`, `Encoder.forward_batch`, 32 rows sorted by length, '
        "a worker of one thread for each core",
        open=_open,
        prepare=_prepare,
        prepare_needs=("transformers", "torch"),
        prepare_distributions=("transformers", "torch"),
    )
}
