"""Plain onnxruntime as a first script would use it: our own INT8 graph, 32 texts a batch in the order given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qingyu.bench.contenders.contract import Contender, Files, Opened, batches_in_order

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]


def _open(files: Files, threads: int) -> Opened:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(files.int8 / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    tokenizer = Tokenizer.from_file(str(files.int8 / "tokenizer.json"))
    tokenizer.enable_truncation(files.max_tokens)
    tokenizer.enable_padding()  # the pad token's id makes no difference behind the mask

    def run(texts: Sequence[str]) -> Floats:
        encoded = tokenizer.encode_batch(list(texts))
        feeds = {
            "input_ids": np.array([one.ids for one in encoded]),
            "attention_mask": np.array([one.attention_mask for one in encoded]),
        }
        pooled: Floats = session.run(["pooled"], feeds)[0]
        unit: Floats = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit

    def embed(texts: Sequence[str]) -> Floats:
        return np.concatenate([run([texts[n] for n in rows]) for rows in batches_in_order(len(texts))])

    return Opened(embed)


CONTENDERS = {
    "onnxruntime-naive-int8": Contender(
        name="onnxruntime-naive-int8",
        title="onnxruntime by hand, our INT8 graph",
        precision="int8",
        needs=("onnxruntime", "tokenizers", "numpy"),
        distributions=("onnxruntime", "tokenizers"),
        how="`InferenceSession.run` on batches of 32 in the order given, padded to the longest, default fusions",
        open=_open,
    )
}
