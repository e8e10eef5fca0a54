"""sentence-transformers: the torch model in FP32 and bfloat16, and its own ways to ONNX INT8 and OpenVINO INT8."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.bench.contenders.contract import Contender, Files, Opened, require_checkpoint, write_once

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]

# Its quantization presets by what the CPU must have, the best first.
PRESETS = (("avx512_vnni", "avx512_vnni"), ("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "arm64"))
CALIBRATION = 300  # its own default
OWN_OPTIONS = ("max_seq_length", "do_lower_case")  # of sentence_bert_config.json, whatever the backend


def _quiet() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import transformers

    transformers.logging.set_verbosity_error()


def _opened(model: Any, files: Files) -> Opened:  # noqa: ANN401 - sentence-transformers' class
    model.max_seq_length = files.max_tokens

    def embed(texts: Sequence[str]) -> Floats:
        vectors: Floats = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return vectors

    return Opened(embed)


def _open_torch(files: Files, threads: int, *, dtype: str) -> Opened:
    _quiet()
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    checkpoint = require_checkpoint(files)
    model = SentenceTransformer(
        str(checkpoint), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}, local_files_only=True
    )
    return _opened(model, files)


def _preset() -> str:
    from qingyu.runtime.cpu import cpu_flags

    flags = set(cpu_flags())
    return next((preset for flag, preset in PRESETS if flag in flags), "avx2")


@contextlib.contextmanager
def _for_other_backends(checkpoint: Path) -> Iterator[str]:
    """The checkpoint without options for torch's class, such as ``add_pooling_layer``, that optimum's refuse."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in checkpoint.resolve().iterdir():
            (folder / file.name).symlink_to(file)
        options = folder / "sentence_bert_config.json"
        if options.exists():
            kept = json.loads(options.read_text(encoding="utf-8"))
            options.unlink()
            options.write_text(json.dumps({key: kept[key] for key in kept if key in OWN_OPTIONS}))
        yield name


def _prepare_onnx(files: Files) -> None:
    _quiet()
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    checkpoint = require_checkpoint(files)

    def write(folder: Path) -> None:
        with _for_other_backends(checkpoint) as source:
            model = SentenceTransformer(source, backend="onnx", device="cpu", model_kwargs={"export": True})
            model.save_pretrained(str(folder))
            export_dynamic_quantized_onnx_model(model, _preset(), str(folder))

    write_once(files.own, write)


def _open_onnx(files: Files, threads: int) -> Opened:
    _quiet()
    import onnxruntime
    from sentence_transformers import SentenceTransformer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    kwargs = {
        "file_name": f"onnx/model_qint8_{_preset()}.onnx",
        "provider": "CPUExecutionProvider",
        "session_options": options,
    }
    model = SentenceTransformer(str(files.own), backend="onnx", device="cpu", model_kwargs=kwargs)
    return _opened(model, files)


def _prepare_openvino(files: Files) -> None:
    """As its documentation does, but calibrated on Chinese texts instead of an English set from a hub."""
    _quiet()
    from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

    from qingyu.quantize.texts import calibration_texts

    checkpoint = require_checkpoint(files)

    def write(folder: Path) -> None:
        texts = folder / "calibration"
        texts.mkdir()
        lines = [text.replace("\n", " ") for text in calibration_texts(CALIBRATION)]
        (texts / "train.txt").write_text("\n".join(lines), encoding="utf-8")
        with _for_other_backends(checkpoint) as source:
            model = SentenceTransformer(
                source, backend="openvino", device="cpu", model_kwargs={"export": True}
            )
            model.save_pretrained(str(folder))
            export_static_quantized_openvino_model(
                model,
                None,
                str(folder),
                dataset_name=str(texts),
                dataset_config_name="default",
                dataset_split="train",
                column_name="text",
            )

    write_once(files.own, write)


def _open_openvino(files: Files, threads: int) -> Opened:
    _quiet()
    from sentence_transformers import SentenceTransformer

    kwargs = {
        "file_name": "openvino/openvino_model_qint8_quantized.xml",
        "ov_config": {"INFERENCE_NUM_THREADS": str(threads)},
    }
    model = SentenceTransformer(str(files.own), backend="openvino", device="cpu", model_kwargs=kwargs)
    return _opened(model, files)


LIBRARY = "sentence_transformers"

CONTENDERS = {
    "st-torch-fp32": Contender(
        name="st-torch-fp32",
        title="sentence-transformers, torch FP32",
        precision="fp32",
        needs=(LIBRARY, "torch"),
        distributions=("sentence-transformers", "torch"),
        how="`SentenceTransformer(folder).encode(texts)`, its default batches of 32 sorted by length",
        open=partial(_open_torch, dtype="float32"),
    ),
    "st-torch-bf16": Contender(
        name="st-torch-bf16",
        title="sentence-transformers, torch bfloat16",
        precision="bf16",
        needs=(LIBRARY, "torch"),
        distributions=("sentence-transformers", "torch"),
        how='the same with `model_kwargs={"dtype": torch.bfloat16}`',
        open=partial(_open_torch, dtype="bfloat16"),
    ),
    "st-onnx-int8": Contender(
        name="st-onnx-int8",
        title="sentence-transformers, ONNX INT8",
        precision="int8",
        needs=(LIBRARY, "optimum.onnxruntime", "onnxruntime"),
        distributions=("sentence-transformers", "optimum-onnx", "onnxruntime"),
        how='`backend="onnx"`, the file of `export_dynamic_quantized_onnx_model` for this CPU',
        open=_open_onnx,
        prepare=_prepare_onnx,
    ),
    "st-openvino-int8": Contender(
        name="st-openvino-int8",
        title="sentence-transformers, OpenVINO INT8",
        precision="int8",
        needs=(LIBRARY, "optimum.intel", "openvino"),
        distributions=("sentence-transformers", "optimum-intel", "openvino", "nncf"),
        how='`backend="openvino"`, the file of `export_static_quantized_openvino_model`, calibrated on Chinese texts',
        open=_open_openvino,
        prepare=_prepare_openvino,
        prepare_needs=("nncf", "datasets"),
        prepare_distributions=("datasets",),
        compiles_shapes=True,
    ),
}
