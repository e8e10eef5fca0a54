"""Graphs of other architectures: optimum-onnx and torch write the encoder, and pooling is added to it.

The result keeps the contract of the graph writer: inputs ``input_ids`` and ``attention_mask``, outputs
``token_states`` and ``pooled``. Needs the extra ``optimum``, loaded when used. Not here: all hidden layers.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qingyu.errors import InvalidOptionError, MissingExtraError, UnsupportedModelError
from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.checkpoint import Checkpoint
from qingyu.models.export.graph import INPUTS, FoldedWeights, write_head
from qingyu.models.export.pooling import write_pooling
from qingyu.models.extras import require

if TYPE_CHECKING:
    import onnx

__all__ = ["graph_via_optimum"]

OPSET = 18  # the first with ReduceMax as pooling writes it
STATES = "last_hidden_state"
TOKEN_TYPES = "token_type_ids"
REMEDY = "Use another checkpoint, or a version of optimum-onnx that knows this architecture."


def graph_via_optimum(source: Checkpoint, *, hidden_states: bool) -> tuple[bytes, tuple[str, ...]]:
    """The graph of a checkpoint, by optimum-onnx, and the names of its outputs.

    Raises ``MissingExtraError`` without the extra, ``UnsupportedModelError`` where optimum cannot export the
    architecture, and ``InvalidOptionError`` for ``hidden_states``.
    """
    if hidden_states:
        raise InvalidOptionError(
            "hidden_states",
            expected='false with via="optimum"',
            found="true",
            remedy='Export with via="writer", or without hidden states.',
        )
    require("optimum", "optimum.exporters.onnx", "torch", "transformers")
    with tempfile.TemporaryDirectory(prefix="qingyu-optimum-") as scratch:
        model = _export(source.encoder_folder, Path(scratch))
    _check_interface(source, model)
    _drop_token_types(model)
    _add_outputs(source, model)
    try:
        return bytes(model.SerializeToString()), ("token_states", "pooled")
    except ValueError as error:  # protobuf's answer to 2 GiB
        raise _unsupported(source.folder, "less than 2 GiB", str(error)) from None


def _export(folder: Path, scratch: Path) -> onnx.ModelProto:
    import onnx

    main_export = _main_export()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own tracing
            main_export(
                str(folder),
                scratch,
                task="feature-extraction",
                opset=OPSET,
                library_name="transformers",
                local_files_only=True,
                do_validation=False,
            )
        return onnx.load(scratch / "model.onnx")
    except Exception as error:  # noqa: BLE001 - three libraries, each with errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _unsupported(folder, "an architecture that optimum-onnx exports", lines[0]) from None


def _main_export() -> Callable[..., None]:
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:  # installed, but not with what it needs
        raise MissingExtraError(
            "the extra 'optimum' does not work",
            expected="optimum-onnx, torch and transformers that fit each other",
            found=str(error),
            remedy='Run: pip install "qingyu[optimum]"',
        ) from None
    function: Callable[..., None] = main_export
    return function


def _unsupported(folder: Path, expected: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder} cannot be exported via optimum", expected=expected, found=found, remedy=REMEDY
    )


def _check_interface(source: Checkpoint, model: onnx.ModelProto) -> None:
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    if not set(INPUTS) <= inputs <= {*INPUTS, TOKEN_TYPES} or STATES not in outputs:
        found = f"inputs {', '.join(sorted(inputs))}; outputs {', '.join(sorted(outputs))}"
        expected = f"inputs {', '.join(INPUTS)}; output {STATES}"
        raise _unsupported(source.folder, expected, found)


def _drop_token_types(model: onnx.ModelProto) -> None:
    """Make the token types zeros within the graph, where it asks for them."""
    import onnx

    graph = model.graph
    kept = [value for value in graph.input if value.name != TOKEN_TYPES]
    if len(kept) == len(graph.input):
        return
    del graph.input[:]
    graph.input.extend(kept)
    zero = onnx.numpy_helper.from_array(np.zeros(1, dtype=np.int64), "zero")
    shape = onnx.helper.make_node("Shape", ["input_ids"], ["qingyu_shape"], name="qingyu_shape")
    zeros = onnx.helper.make_node(
        "ConstantOfShape", ["qingyu_shape"], [TOKEN_TYPES], name="qingyu_token_types", value=zero
    )
    graph.node.insert(0, zeros)
    graph.node.insert(0, shape)


def _add_outputs(source: Checkpoint, model: onnx.ModelProto) -> None:
    import onnx

    builder = GraphBuilder(model=model)
    builder.node("Identity", [STATES], output="token_states")
    pooled = write_pooling(builder, source.pooling, "token_states", "attention_mask")
    weights = FoldedWeights(source.architecture, source.weights)
    head = tuple(dense.activation for dense in source.head)
    dim = write_head(builder, head, weights, pooled, source.architecture.hidden_size)
    make = onnx.helper.make_tensor_value_info
    graph = model.graph
    del graph.input[:]
    graph.input.extend(make(name, onnx.TensorProto.INT64, ["rows", "tokens"]) for name in INPUTS)
    del graph.output[:]
    states: list[str | int | None] = ["rows", "tokens", source.architecture.hidden_size]
    graph.output.append(make("token_states", onnx.TensorProto.FLOAT, states))
    graph.output.append(make("pooled", onnx.TensorProto.FLOAT, ["rows", dim]))
