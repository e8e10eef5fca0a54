"""The ceiling: how many integer operations a second this machine does in matrix products alone, and a model's need.

A linear layer of a BERT does hidden x outputs multiplications and as many additions a token. All of a layer's are
four of hidden x hidden (query, key, value, output) and two of hidden x inner, so that a token of bge-small-zh needs
2 x 4 x (4 x 512 x 512 + 2 x 512 x 2048) = 25.2 million operations. Attention's own products (4 x tokens x hidden a
layer and token) are not counted: they are not integer products in any contender. Padding is not work done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from qingyu.bench.contenders.contract import installed
from qingyu.models.extras import require

if TYPE_CHECKING:
    from qingyu.runtime.spec import Architecture

__all__ = ["Ceiling", "operations_per_token", "products"]

ROWS = 256  # tokens of one product: what one of our micro-batches has, and as fast as any other number
SECONDS = 0.25  # of one shape in one measurement

Call = Callable[[], object]


def operations_per_token(sizes: Architecture) -> int:
    """Multiplications and additions in the linear layers of all layers, for one token."""
    return 2 * sizes.layers * sum(inputs * outputs for inputs, outputs in products(sizes))


def products(sizes: Architecture) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear layer of one layer."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    return [(hidden, hidden)] * 4 + [(hidden, inner), (inner, hidden)]


class Ceiling:
    """The products of one model's shapes, ready to be timed in ``threads`` threads by each engine that is installed."""

    def __init__(self, sizes: Architecture, threads: int) -> None:
        require("quantize", "onnx")
        self.shapes = products(sizes)
        self.threads = threads
        self._calls: Mapping[str, Mapping[tuple[int, int], list[Call]]] = {
            engine: {shape: make(*shape, threads) for shape in sorted(set(self.shapes))}
            for engine, make in _makers().items()
        }

    def measure(self) -> dict[str, float]:
        """GOPS of each engine: all threads at once, each one product after the other."""
        work = sum(2 * ROWS * inputs * outputs for inputs, outputs in self.shapes)
        found = {}
        with ThreadPoolExecutor(self.threads) as pool:
            for engine, calls in self._calls.items():
                seconds = {shape: _seconds(own, pool) for shape, own in calls.items()}
                total = sum(seconds[shape] for shape in self.shapes)
                found[engine] = round(self.threads * work / total / 1e9, 1)
        return found


def _seconds(calls: Sequence[Call], pool: ThreadPoolExecutor) -> float:
    """The median time of one call while each thread makes its own."""

    def run(call: Call) -> float:
        times = []
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return statistics.fmean(pool.map(run, calls))


def _makers() -> dict[str, Callable[[int, int, int], list[Call]]]:
    makers: dict[str, Callable[[int, int, int], list[Call]]] = {"onnxruntime": _onnxruntime}
    if installed("openvino"):
        makers["openvino"] = _openvino
    return makers


def _operands(inputs: int, outputs: int) -> tuple[Any, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    left = random.integers(0, 256, (ROWS, inputs)).astype(np.uint8)
    return left, random.integers(-127, 128, (inputs, outputs)).astype(np.int8)


def _onnxruntime(inputs: int, outputs: int, threads: int) -> list[Call]:
    """MatMulInteger of bytes in the calling thread: weights pre-packed, operands and result never copied."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from qingyu.runtime.onnxruntime_engine import (
        PROVIDERS,
        import_onnxruntime,
        product_entries,
        session_options,
    )

    left, right = _operands(inputs, outputs)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])],
        "ceiling",
        [helper.make_tensor_value_info("left", TensorProto.UINT8, [ROWS, inputs])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, [ROWS, outputs])],
        [numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=1, entries=product_entries("int8"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(PROVIDERS))

    def call() -> Call:
        binding = session.io_binding()
        binding.bind_ortvalue_input("left", onnxruntime.OrtValue.ortvalue_from_numpy(left))
        result = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((ROWS, outputs), dtype=np.int32))
        binding.bind_ortvalue_output("product", result)
        return partial(session.run_with_iobinding, binding)

    return [call() for _ in range(threads)]


def _openvino(inputs: int, outputs: int, threads: int) -> list[Call]:
    """The same product as OpenVINO's models have it: FP32 rounded to bytes, multiplied by oneDNN, and FP32 again."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    left, right = _operands(inputs, outputs)
    tokens = ops.parameter([ROWS, inputs], np.float32)
    low, high = np.float32(0), np.float32(255)
    rounded = ops.fake_quantize(tokens, low, high, low, high, 256)
    scale = np.full((outputs, 1), 127, dtype=np.float32)
    constant = ops.constant(right.T.astype(np.float32))
    weights = ops.fake_quantize(constant, -scale, scale, -scale, scale, 255)
    product = ops.matmul(rounded, weights, False, True)
    settings = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": str(threads)}
    compiled = openvino.Core().compile_model(openvino.Model([product], [tokens]), "CPU", settings)

    def call() -> Call:
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(left.astype(np.float32)))
        infer: Call = request.infer
        return infer

    return [call() for _ in range(threads)]
