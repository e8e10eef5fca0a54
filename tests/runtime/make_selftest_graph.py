"""Writes runtime/selftest.onnx from the cases of qingyu.runtime.selftest.

    python tests/runtime/make_selftest_graph.py runtime/selftest.onnx

Run it after a change of the cases; a test compares the file with what this gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qingyu.runtime import selftest

MICROSOFT = "com.microsoft"
ELEMENT = {"MatMulInteger": TensorProto.INT32, "MatMulIntegerToFloat": TensorProto.FLOAT}


def selftest_graph() -> bytes:
    """The graph: for each case a product of an input by constant weights, and an output."""
    constants = {"zero": np.uint8(selftest.ZERO_POINT), "one": np.float32(1)}
    nodes, inputs, outputs = [], {}, []
    for case in selftest.CASES:
        left, right, scales = (f"{prefix}_{case.operands}" for prefix in ("a", "b", "scales"))
        constants[right] = selftest.weights(case)
        operands, domain = [left, right, "zero"], ""
        if case.operator == "MatMulIntegerToFloat":
            constants[scales] = selftest.column_scales(case)
            operands, domain = [left, right, "one", scales, "zero"], MICROSOFT
        nodes.append(helper.make_node(case.operator, operands, [case.name], domain=domain))
        inputs[left] = helper.make_tensor_value_info(left, TensorProto.UINT8, ["rows_" + left, case.depth])
        shape = ["rows_" + left, case.columns]
        outputs.append(helper.make_tensor_value_info(case.name, ELEMENT[case.operator], shape))
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "selftest", list(inputs.values()), outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(selftest_graph())
