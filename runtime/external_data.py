"""Finds weights that an ONNX file wants read from another file, without reading anything.

A graph may name any path for its weights, and onnxruntime versions differ in what they refuse. A model
folder's graph holds its weights itself, so any mention of another file is refused before onnxruntime sees
the bytes. Not here: judging whether the graph is otherwise valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qingyu.errors import GraphError

__all__ = ["refuse_external_data"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf wire types
DEPTH_LIMIT = 100  # protobuf's own limit on nested messages

EXTERNAL_DATA, DATA_LOCATION = 13, 14  # the fields of TensorProto that point elsewhere

# The messages of onnx.proto on the way to a TensorProto: field number -> message. Fields not named here
# cannot hold a tensor.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}


def refuse_external_data(data: bytes, origin: str) -> None:
    """Raise ``GraphError`` when a tensor of the model names another file, or the bytes are not protobuf.

    Source of the encoding: protobuf.dev/programming-guides/encoding, and of the fields: onnx.proto.
    """
    try:
        external = _has_external(memoryview(data), "Model", DEPTH_LIMIT)
    except ValueError as error:
        raise GraphError(
            f"{origin} is not an ONNX graph",
            expected="a protobuf message",
            found=str(error),
            remedy="Export or quantize the model again.",
        ) from None
    if external:
        raise GraphError(
            f"{origin} wants weights from another file",
            expected="weights inside the graph file",
            found="external data",
            remedy="Export the model again into a single file.",
        )


def _has_external(data: memoryview, message: str, depth: int) -> bool:
    if depth == 0:
        raise ValueError("messages nested too deep")
    inner = MESSAGES[message]
    for number, content in _fields(data):
        if message == "Tensor" and number in (EXTERNAL_DATA, DATA_LOCATION):
            # A data_location of 0 says "in this file"; protobuf writers may state it.
            if number == EXTERNAL_DATA or content != 0:
                return True
        elif (
            number in inner
            and isinstance(content, memoryview)
            and _has_external(content, inner[number], depth - 1)
        ):
            return True
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Each field's number with its bytes, or with its number for a varint (0 for fixed-width numbers)."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field numbered 0")
        if wire == VARINT:
            value, place = _varint(data, place)
            yield number, value
        elif wire == BYTES:
            length, place = _varint(data, place)
            yield number, data[place : place + length]
            place += length
        elif wire in (FIXED32, FIXED64):
            place += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if place > len(data):
            raise ValueError("bytes that end within a field")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("bytes that end within a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 64 bits")
