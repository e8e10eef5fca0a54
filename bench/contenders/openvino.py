"""OpenVINO with NNCF's static INT8, used directly and well: sorted batches, an asynchronous queue, throughput hint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.bench.contenders.contract import (
    TOKENS,
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

GRAPH = "model.xml"
CALIBRATION = 128
ROWS = 16  # faster than 8, 32 and 64 on the machine of docs/benchmarks.md
STEP = 64
LONGEST = 384  # tokens of a calibration text, as sentence-transformers has it


def _tokenizer(files: Files) -> Any:  # noqa: ANN401 - tokenizers' class
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(files.int8 / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(files.max_tokens)
    return tokenizer


def _prepare(files: Files) -> None:
    import nncf
    import numpy as np
    import openvino

    from qingyu.quantize.texts import calibration_texts

    require_checkpoint(files)
    tokenizer = _tokenizer(files)

    def feeds(text: str) -> dict[str, Any]:
        """Padded to a few lengths: kernels are compiled for each."""
        ids = tokenizer.encode(text).ids[:LONGEST]
        padded = np.zeros((1, -(-len(ids) // STEP) * STEP), dtype=np.int64)
        padded[0, : len(ids)] = ids
        return {
            "input_ids": padded,
            "attention_mask": (np.arange(padded.shape[1]) < len(ids))[None].astype(np.int64),
        }

    def write(folder: Path) -> None:
        model = openvino.convert_model(str(files.fp32 / "model.onnx" if files.fp32 else ""))
        texts = nncf.Dataset(calibration_texts(CALIBRATION), feeds)
        model = nncf.quantize(model, texts, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
        openvino.save_model(model, str(folder / GRAPH))

    write_once(files.own, write)


def _open(files: Files, threads: int) -> Opened:
    import numpy as np
    import openvino

    core = openvino.Core()
    bulk = core.compile_model(
        str(files.own / GRAPH),
        "CPU",
        {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(threads),
            "INFERENCE_NUM_THREADS": str(threads),
        },
    )
    queue = openvino.AsyncInferQueue(bulk, threads)
    lone: list[Any] = []
    tokenizer = _tokenizer(files)

    def single() -> Any:  # noqa: ANN401 - an infer request
        """All threads for one text, compiled when first needed, so that bulk work does not pay for it."""
        if not lone:
            hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
            lone.append(core.compile_model(str(files.own / GRAPH), "CPU", hints).create_infer_request())
        return lone[0]

    def batches(ids: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        # Few texts are shared out among the streams, too.
        most = min(ROWS, -(-len(ids) // threads))
        for rows in sorted_batches([len(one) for one in ids], rows=most):
            tokens = max(len(ids[row]) for row in rows)
            padded = np.zeros((len(rows), tokens), dtype=np.int64)
            mask = np.zeros_like(padded)
            for place, row in enumerate(rows):
                padded[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1
            yield rows, {"input_ids": padded, "attention_mask": mask}

    def embed(texts: Sequence[str]) -> Floats:
        ids = [one.ids for one in tokenizer.encode_batch_fast(list(texts))]
        vectors = np.empty((len(ids), files.dim), dtype=np.float32)

        def done(request: Any, rows: list[int]) -> None:  # noqa: ANN401 - an infer request
            vectors[rows] = request.get_tensor("pooled").data

        if len(ids) == 1:
            rows, feed = next(batches(ids))
            single().infer(feed)
            done(single(), rows)
        else:
            queue.set_callback(done)
            for rows, feed in batches(ids):
                queue.start_async(feed, rows)
            queue.wait_all()
        unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    return Opened(embed)


CONTENDERS = {
    "openvino-nncf-int8": Contender(
        name="openvino-nncf-int8",
        title="OpenVINO by hand, NNCF INT8",
        precision="int8",
        needs=("openvino", "tokenizers", "numpy"),
        distributions=("openvino", "tokenizers"),
        how=f"`nncf.quantize` with its transformer preset; {ROWS} rows or {TOKENS} tokens sorted by length, an "
        "`AsyncInferQueue` with a "
        "stream for each core; the latency hint for one text",
        open=_open,
        prepare=_prepare,
        prepare_needs=("nncf",),
        prepare_distributions=("nncf",),
        compiles_shapes=True,
    )
}
