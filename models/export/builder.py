"""A graph under construction: nodes, weights and constants, named and without duplicates.

Not here: what a BERT looks like (``graph.py``). Needs the package onnx when used, not when imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["IR_VERSION", "OPSET", "GraphBuilder"]

OPSET = 20  # the first with Gelu; read by onnxruntime >= 1.17
IR_VERSION = 10
PROTOBUF_LIMIT = (1 << 31) - (
    1 << 20
)  # a protobuf message holds less than 2 GiB; 1 MiB is left for the nodes

Attribute = int | float | str | Sequence[int] | Any  # Any: an onnx.TensorProto, which is untyped here


class GraphBuilder:
    """Collects a graph; every method returns the name of the value it made.

    Weights are copied into the graph as they are added, so a caller that reads them one by one holds one
    at a time. ``graph`` and ``model`` are the onnx messages themselves.
    """

    def __init__(self, *, model: onnx.ModelProto | None = None) -> None:
        """A builder of a new graph, or one that adds to ``model``, whose names it avoids."""
        import onnx

        self.model = (
            onnx.ModelProto(ir_version=IR_VERSION, producer_name="qingyu") if model is None else model
        )
        self.graph = self.model.graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._taken = {tensor.name for tensor in self.graph.initializer}
        for node in self.graph.node:
            self._taken.update((node.name, *node.output))
        self._count = len(self.graph.node)
        self._bytes = 0

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """A named initializer; a second one of the same name is a mistake of the writer."""
        import onnx

        if name in self._taken:
            raise ValueError(f"two initializers named {name}")
        self._bytes += array.nbytes
        if self._bytes > PROTOBUF_LIMIT:
            raise UnsupportedModelError(
                "the model is too large for one ONNX file",
                expected="less than 2 GiB of weights",
                found=f"{self._bytes} bytes at {name}",
                remedy="Use a smaller model: this version writes no external weight files.",
            )
        self._taken.add(name)
        tensor = self.graph.initializer.add()
        tensor.name = name
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.dims.extend(array.shape)
        tensor.raw_data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        return name

    def constant(self, array: NDArray[Any] | np.generic) -> str:
        """A small unnamed value; equal ones are stored once."""
        value = np.asarray(array)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self._free(f"constant_{len(self._constants)}"), value)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        *,
        output: str | None = None,
        domain: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> str:
        """One node with one output, named ``output`` or after the operator."""
        import onnx

        self._count += 1
        name = self._free(f"{operator}_{self._count}")
        result = output or self._free(f"{name}_out")
        made = self.graph.node.add(op_type=operator, name=name, domain=domain, input=inputs, output=[result])
        for key, value in (attributes or {}).items():
            made.attribute.append(onnx.helper.make_attribute(key, value))
        self._taken.update((name, result))
        return result

    def nodes(self, operator: str, inputs: Sequence[str], *, outputs: int) -> list[str]:
        """One node with several outputs."""
        first = self.node(operator, inputs)
        further = [self._free(f"{first}_{number}") for number in range(1, outputs)]
        self.graph.node[-1].output.extend(further)
        self._taken.update(further)
        return [first, *further]

    def finish(
        self,
        inputs: Mapping[str, Sequence[str | int]],
        outputs: Mapping[str, Sequence[str | int]],
        *,
        metadata: Mapping[str, str],
        domains: Sequence[str] = (),
    ) -> bytes:
        """The serialized model: int64 inputs, float32 outputs, shapes with names for the free axes.

        ``domains`` are operator sets beside the standard one, each at version 1.
        """
        import onnx

        make = onnx.helper.make_tensor_value_info
        self.graph.name = "qingyu"
        self.graph.input.extend(make(n, onnx.TensorProto.INT64, list(shape)) for n, shape in inputs.items())
        self.graph.output.extend(make(n, onnx.TensorProto.FLOAT, list(shape)) for n, shape in outputs.items())
        versions = {"": OPSET, **dict.fromkeys(domains, 1)}
        self.model.opset_import.extend(onnx.helper.make_opsetid(*pair) for pair in versions.items())
        for key, value in metadata.items():
            self.model.metadata_props.add(key=key, value=value)
        return bytes(self.model.SerializeToString())

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        return name
