from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qingyu.errors import (
    ClosedError,
    CorruptFileError,
    GraphError,
    InvalidOptionError,
    ManifestError,
    MemoryBudgetError,
)
from qingyu.runtime import onnxruntime_engine
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.external_data import MESSAGES
from qingyu.runtime.onnxruntime_engine import PROFILES, OnnxRuntimeEngine, TelemetryWarning
from qingyu.runtime.spec import Architecture, FileRecord, ModelSpec, sha256_of

onnx = pytest.importorskip("onnx")

H, T = onnx.helper, onnx.TensorProto

VOCAB, HIDDEN, DIM = 50, 16, 6
SIZES = Architecture("bert", 1, HIDDEN, 2, 32, VOCAB, 64, "gelu", 1e-12)
BOTH = ("token_states", "pooled")

Change = Callable[[Any], None]


def tiny_graph(change: Change | None = None) -> Any:
    """A graph with the contract's inputs and outputs: an embedding, a product, and a masked sum."""
    rng = np.random.default_rng(7)
    weights = {
        "table": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
        "square": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
        "head": rng.standard_normal((HIDDEN, DIM)).astype(np.float32),
        "axis": np.array([2], np.int64),
        "tokens_axis": np.array([1], np.int64),
    }
    nodes = [
        H.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        H.make_node("MatMul", ["embedded", "square"], ["product"]),
        H.make_node("Tanh", ["product"], ["token_states"]),
        H.make_node("Cast", ["attention_mask"], ["mask"], to=T.FLOAT),
        H.make_node("Unsqueeze", ["mask", "axis"], ["column"]),
        H.make_node("Mul", ["token_states", "column"], ["kept"]),
        H.make_node("ReduceSum", ["kept", "tokens_axis"], ["sum"], keepdims=0),
        H.make_node("MatMul", ["sum", "head"], ["pooled"]),
    ]
    free = ["rows", "tokens"]
    inputs = [H.make_tensor_value_info(name, T.INT64, free) for name in ("input_ids", "attention_mask")]
    outputs = [
        H.make_tensor_value_info("token_states", T.FLOAT, [*free, HIDDEN]),
        H.make_tensor_value_info("pooled", T.FLOAT, ["rows", DIM]),
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = H.make_graph(nodes, "tiny", inputs, outputs, tensors)
    model = H.make_model(graph, opset_imports=[H.make_opsetid("", 17)], ir_version=8)
    if change is not None:
        change(model)
    return model


def write_model(folder: Path, content: bytes | None = None, **fields: Any) -> ModelSpec:
    """Write the graph file and give its spec, with a true hash for whatever the content is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(tiny_graph().SerializeToString() if content is None else content)
    record = FileRecord(path.stat().st_size, sha256_of(path))
    spec = ModelSpec(
        name="tiny",
        task="embedding",
        architecture=SIZES,
        dim=DIM,
        max_tokens=64,
        pooling="mean",
        normalize=True,
        lowercase=True,
        graph="model.onnx",
        inputs=("input_ids", "attention_mask"),
        outputs=BOTH,
        precision="fp32",
        files={"model.onnx": record},
    )
    return dataclasses.replace(spec, **fields)


def some_batch(rows: int = 3, tokens: int = 5, seed: int = 0) -> TokenBatch:
    rng = np.random.default_rng(seed)
    return TokenBatch(rng.integers(0, VOCAB, (rows, tokens)), np.ones((rows, tokens), np.int64))


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return write_model(tmp_path)


@pytest.fixture
def engine(tmp_path: Path, spec: ModelSpec) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(tmp_path, spec) as engine:
        yield engine


def in_child(program: str, *arguments: str, timeout: float = 60, **environment: str) -> str:
    """What a fresh interpreter prints; it must end well and write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**{k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


OPEN_PICKLED = """
import pathlib, pickle, sys
import numpy as np
from qingyu.runtime.engine import TokenBatch
engine = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
batch = TokenBatch(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))
"""


@pytest.fixture
def pickled(engine: OnnxRuntimeEngine, tmp_path: Path) -> str:
    path = tmp_path / "engine.pickle"
    path.write_bytes(pickle.dumps(engine))
    return str(path)


class TestRun:
    @pytest.mark.parametrize("profile", PROFILES)
    def test_outputs_equal_the_same_arithmetic_in_numpy(
        self, tmp_path: Path, spec: ModelSpec, profile: Any
    ) -> None:
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in tiny_graph().graph.initializer}
        batch = TokenBatch.pad([np.array([1, 2, 3]), np.array([4])], pad_id=0)
        states = np.tanh(weights["table"][batch.ids] @ weights["square"])
        pooled = (states * batch.mask[..., None]).sum(1) @ weights["head"]
        with OnnxRuntimeEngine(tmp_path, spec, profile=profile) as engine:
            found = engine.run(batch, BOTH)
        np.testing.assert_allclose(found[0], states, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[1], pooled, rtol=0, atol=1e-5)

    def test_outputs_come_in_the_order_asked_for(self, engine: OnnxRuntimeEngine) -> None:
        pooled, states = engine.run(some_batch(), ("pooled", "token_states"))
        assert (pooled.shape, states.shape) == ((3, DIM), (3, 5, HIDDEN))
        assert {pooled.dtype, states.dtype} == {np.dtype(np.float32)}

    @pytest.mark.parametrize("outputs", [(), ("hidden_state_0",), ("pooled", "logits")])
    def test_outputs_that_the_model_does_not_give_are_refused(
        self, engine: OnnxRuntimeEngine, outputs: tuple[str, ...]
    ) -> None:
        with pytest.raises(InvalidOptionError, match="names among token_states, pooled"):
            engine.run(some_batch(), outputs)

    def test_token_type_ids_are_fed_zeros_where_the_graph_wants_them(self, tmp_path: Path) -> None:
        def add_types(model: Any) -> None:
            model.graph.input.append(H.make_tensor_value_info("token_type_ids", T.INT64, ["rows", "tokens"]))
            model.graph.node[0].input[1] = "shifted"
            model.graph.node.insert(0, H.make_node("Add", ["input_ids", "token_type_ids"], ["shifted"]))

        content = tiny_graph(add_types).SerializeToString()
        names = ("input_ids", "attention_mask", "token_type_ids")
        with OnnxRuntimeEngine(
            tmp_path / "typed", write_model(tmp_path / "typed", content, inputs=names)
        ) as e:
            typed = e.run(some_batch(), BOTH)
        with OnnxRuntimeEngine(tmp_path / "plain", write_model(tmp_path / "plain")) as e:
            plain = e.run(some_batch(), BOTH)
        assert all(np.array_equal(a, b) for a, b in zip(typed, plain, strict=True))

    def test_a_token_id_outside_the_vocabulary_is_a_graph_error(self, engine: OnnxRuntimeEngine) -> None:
        batch = TokenBatch(np.array([[VOCAB]]), np.ones((1, 1), np.int64))
        with pytest.raises(GraphError, match="failed running"):
            engine.run(batch, BOTH)
        assert len(engine.run(some_batch(), BOTH)) == 2

    def test_many_threads_give_the_very_bits_of_one(self, engine: OnnxRuntimeEngine) -> None:
        batches = [some_batch(1 + n % 7, 1 + 3 * n % 60, seed=n) for n in range(50)]
        serial = [engine.run(batch, BOTH) for batch in batches]

        def all_of_them(_worker: int) -> bool:
            found = [engine.run(batch, BOTH) for batch in batches]
            pairs = [(a, b) for f, s in zip(found, serial, strict=True) for a, b in zip(f, s, strict=True)]
            return all(a.tobytes() == b.tobytes() for a, b in pairs)

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(all_of_them, range(16)))

    @pytest.mark.parametrize(("weight", "value"), [("head", np.nan), ("table", np.nan), ("head", np.inf)])
    def test_a_value_that_is_not_finite_is_refused(self, tmp_path: Path, weight: str, value: float) -> None:
        def poison(model: Any) -> None:
            tensor = next(t for t in model.graph.initializer if t.name == weight)
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0] = value
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, weight))

        spec = write_model(tmp_path, tiny_graph(poison).SerializeToString())
        with OnnxRuntimeEngine(tmp_path, spec) as engine, pytest.raises(GraphError, match="NaN or infinity"):
            engine.run(TokenBatch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)), BOTH)

    def test_an_output_of_another_shape_than_declared_is_refused(self, tmp_path: Path) -> None:
        def grow(model: Any) -> None:
            model.graph.node[-1].output[0] = "fixed"
            model.graph.node.append(H.make_node("Concat", ["fixed", "mask"], ["pooled"], axis=1))
            model.graph.output[1].CopyFrom(H.make_tensor_value_info("pooled", T.FLOAT, ["rows", "any"]))

        # No size is known for the axis when the graph is loaded: only the value itself tells.
        engine = OnnxRuntimeEngine(tmp_path, write_model(tmp_path, tiny_graph(grow).SerializeToString()))
        with engine, pytest.raises(GraphError, match=r"expected shape \(3, 6\), found shape \(3, 11\)"):
            engine.run(some_batch(), ("pooled",))


class TestFiles:
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    def test_a_truncated_graph_is_refused_by_its_hash(
        self, tmp_path: Path, spec: ModelSpec, share: float
    ) -> None:
        path = tmp_path / "model.onnx"
        content = path.read_bytes()
        path.write_bytes(content[: max(16 if share == 0.001 else 0, int(len(content) * share))])
        with OnnxRuntimeEngine(tmp_path, spec) as engine, pytest.raises(CorruptFileError, match="is damaged"):
            engine.open()

    def test_fifty_flipped_bits_are_each_refused_by_the_hash(self, tmp_path: Path, spec: ModelSpec) -> None:
        path = tmp_path / "model.onnx"
        content = path.read_bytes()
        engine = OnnxRuntimeEngine(tmp_path, spec)
        for bit in np.random.default_rng(1).integers(0, len(content) * 8, 50).tolist():
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(CorruptFileError, match="sha256"):
                engine.open()
        path.write_bytes(content)
        assert len(engine.run(some_batch(), BOTH)) == 2
        engine.close()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"<!DOCTYPE html><html><body>404</body></html>",
            bytes(4096),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            b"\x1c\x00\x00\x00ORTM" + bytes(64),
            b"PK\x03\x04" + bytes(64),
            b"\x3a\xff\xff\xff\xff\x0f",
            b"\x3a\x02" * 3,
            b"\xff" * 64,
        ],
        ids=["empty", "html", "zeros", "lfs", "ort", "zip", "endless", "cut", "ones"],
    )
    def test_what_is_no_graph_is_refused_even_with_a_true_hash(self, tmp_path: Path, content: bytes) -> None:
        with OnnxRuntimeEngine(tmp_path, write_model(tmp_path, content)) as engine:
            with pytest.raises(GraphError):
                engine.open()
            with pytest.raises(GraphError):  # and again, not a half-open engine
                engine.run(some_batch(), BOTH)

    def test_truncated_graphs_with_a_true_hash_are_refused(self, tmp_path: Path) -> None:
        content = tiny_graph().SerializeToString()
        for size in range(1, len(content), 97):
            engine = OnnxRuntimeEngine(tmp_path, write_model(tmp_path, content[:size]))
            with engine, pytest.raises(GraphError):
                engine.open()

    @pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "dangling link"])
    def test_what_is_not_a_file_is_refused_at_once(self, tmp_path: Path, spec: ModelSpec, kind: str) -> None:
        path = tmp_path / "model.onnx"
        path.unlink()
        make = {
            "missing": lambda: None,
            "directory": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "dangling link": lambda: path.symlink_to("nowhere"),
        }
        make[kind]()
        with pytest.raises(CorruptFileError, match="no graph at"):
            OnnxRuntimeEngine(tmp_path, spec)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_pipe_put_in_the_place_of_the_graph_does_not_hang(
        self, tmp_path: Path, spec: ModelSpec
    ) -> None:
        engine = OnnxRuntimeEngine(tmp_path, spec)
        (tmp_path / "model.onnx").unlink()
        os.mkfifo(tmp_path / "model.onnx")
        with pytest.raises(CorruptFileError, match="not a file"):
            engine.open()
        (tmp_path / "model.onnx").unlink()
        with pytest.raises(CorruptFileError, match="no such file"):
            engine.open()

    def test_an_unreadable_graph_is_a_typed_error(
        self, tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_arguments: object) -> None:
            raise PermissionError(13, "Permission denied")

        engine = OnnxRuntimeEngine(tmp_path, spec)
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(CorruptFileError, match=r"cannot be read.*Permission denied"):
            engine.open()

    def test_a_graph_replaced_while_it_loads_is_refused(
        self, tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def replace(_data: bytes, origin: str) -> None:
            other = tmp_path / "other"
            other.write_bytes(Path(origin).read_bytes())
            other.replace(origin)

        monkeypatch.setattr(onnxruntime_engine, "refuse_external_data", replace)
        with OnnxRuntimeEngine(tmp_path, spec) as engine:
            with pytest.raises(CorruptFileError, match="replaced while it was loaded"):
                engine.open()
            monkeypatch.undo()
            engine.open()

    def test_a_spec_without_the_graph_or_with_unknown_inputs_is_refused(self, tmp_path: Path) -> None:
        spec = write_model(tmp_path)
        for wrong in ({"files": {}}, {"inputs": ("input_ids", "pixel_values")}):
            with pytest.raises(ManifestError, match="cannot be used"):
                OnnxRuntimeEngine(tmp_path, dataclasses.replace(spec, **wrong))

    def test_no_model_is_opened_for_wrong_options(self, tmp_path: Path, spec: ModelSpec) -> None:
        with pytest.raises(InvalidOptionError, match="one of throughput, latency, edge"):
            OnnxRuntimeEngine(tmp_path, spec, profile="fast")  # type: ignore[arg-type]
        with pytest.raises(InvalidOptionError, match="a number from 1"):
            OnnxRuntimeEngine(tmp_path, spec, threads=0)

    def test_a_folder_with_a_chinese_name_and_blanks_works(self, tmp_path: Path) -> None:
        folder = tmp_path / "轻语 模型"
        with OnnxRuntimeEngine(folder, write_model(folder)) as engine:
            assert len(engine.run(some_batch(), BOTH)) == 2


def point_outside(tensor: Any, location: str = "weights.bin") -> None:
    tensor.data_location = T.EXTERNAL
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def in_initializer(location: str) -> Change:
    return lambda model: point_outside(model.graph.initializer[0], location)


def in_constant(model: Any) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros((HIDDEN, DIM), np.float32), "value")
    point_outside(tensor)
    model.graph.node.insert(0, H.make_node("Constant", [], ["unused"], value=tensor))


def in_subgraph(model: Any) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "inner")
    point_outside(tensor)
    out = H.make_tensor_value_info("inner", T.FLOAT, [4])
    branch = H.make_graph([], "branch", [], [out], [tensor])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    node = H.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    model.graph.node.insert(0, node)


def in_sparse(model: Any) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(2, np.float32), "sparse"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.arange(2), "places"))
    sparse.dims.append(4)
    point_outside(sparse.values)


def in_function(model: Any) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "value")
    point_outside(tensor)
    node = H.make_node("Constant", [], ["out"], value=tensor)
    opset = [H.make_opsetid("", 17)]
    model.functions.append(H.make_function("mine", "F", [], ["out"], [node], opset))


def location_only(model: Any) -> None:
    model.graph.initializer[0].data_location = T.EXTERNAL


def entry_only(model: Any) -> None:
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "weights.bin"


TRICKS: dict[str, Change] = {
    "beside": in_initializer("weights.bin"),
    "parent": in_initializer("../weights.bin"),
    "absolute": in_initializer("/etc/passwd"),
    "memory address": in_initializer("*/_ORT_MEM_ADDR_/*"),
    "constant": in_constant,
    "subgraph": in_subgraph,
    "sparse": in_sparse,
    "function": in_function,
    "location only": location_only,
    "entry only": entry_only,
}


class TestGraph:
    @pytest.mark.parametrize("trick", TRICKS)
    def test_external_data_is_refused_wherever_it_hides(self, tmp_path: Path, trick: str) -> None:
        for folder in (tmp_path, tmp_path / "model"):
            folder.mkdir(exist_ok=True)
            (folder / "weights.bin").write_bytes(bytes(VOCAB * HIDDEN * 4))
        folder = tmp_path / "model"
        spec = write_model(folder, tiny_graph(TRICKS[trick]).SerializeToString())
        with OnnxRuntimeEngine(folder, spec) as engine, pytest.raises(GraphError, match="external data"):
            engine.open()

    def test_a_tensor_that_states_it_is_inside_is_let_in(self, tmp_path: Path) -> None:
        def state(model: Any) -> None:
            model.graph.initializer[0].data_location = T.DEFAULT

        with OnnxRuntimeEngine(
            tmp_path, write_model(tmp_path, tiny_graph(state).SerializeToString())
        ) as engine:
            engine.open()

    def test_the_way_to_every_tensor_is_that_of_the_onnx_format(self) -> None:
        """A message that can hold a tensor, and is missing in the table, would be a hole."""

        def holds(message: Any, seen: frozenset[str]) -> bool:
            if message.name == "TensorProto":
                return True
            inner = [f.message_type for f in message.fields if f.message_type is not None]
            return any(holds(m, seen | {message.name}) for m in inner if m.name not in seen)

        short = {"TrainingInfo": "Training"}
        for name, fields in MESSAGES.items():
            proto = {v: k for k, v in short.items()}.get(name, name) + "Proto"
            found = {
                f.number: short.get(f.message_type.name[:-5], f.message_type.name[:-5])
                for f in getattr(onnx, proto).DESCRIPTOR.fields
                if f.message_type is not None and holds(f.message_type, frozenset())
            }
            assert found == dict(fields), name

    @pytest.mark.parametrize(
        ("what", "change"),
        [
            ("inputs", lambda m: rename_input(m)),
            ("inputs", lambda m: m.graph.input.append(H.make_tensor_value_info("x", T.INT64, ["n"]))),
            ("inputs input_ids", lambda m: m.graph.input[0].CopyFrom(info("input_ids", T.INT32, ["r", "t"]))),
            ("inputs input_ids", lambda m: m.graph.input[0].CopyFrom(info("input_ids", T.INT64, [1, "t"]))),
            ("inputs input_ids", lambda m: m.graph.input[0].CopyFrom(info("input_ids", T.INT64, ["r", 128]))),
            ("outputs", lambda m: m.graph.output.pop()),
            ("outputs", lambda m: m.graph.output.append(info("sum", T.FLOAT, ["rows", HIDDEN]))),
            ("outputs pooled", lambda m: as_half(m)),
            ("outputs pooled", lambda m: as_three_axes(m)),
            ("outputs pooled", lambda m: wide_head(m)),
        ],
        ids=["name", "extra", "int32", "one row", "128 tokens", "lacking", "surplus", "half", "rank", "dim"],
    )
    def test_a_graph_other_than_the_manifest_says_is_refused_at_load(
        self, tmp_path: Path, what: str, change: Change
    ) -> None:
        spec = write_model(tmp_path, tiny_graph(change).SerializeToString())
        with OnnxRuntimeEngine(tmp_path, spec) as engine, pytest.raises(GraphError) as refused:
            engine.open()
        assert f"is not the graph that the manifest describes: {what}" in refused.value.problem

    def test_the_message_names_what_was_expected_and_found(self, tmp_path: Path) -> None:
        engine = OnnxRuntimeEngine(tmp_path, write_model(tmp_path, dim=8))
        with engine, pytest.raises(GraphError) as refused:
            engine.open()
        assert str(refused.value) == (
            f"{tmp_path / 'model.onnx'} is not the graph that the manifest describes: outputs pooled: "
            "expected tensor(float) of shape (any, 8), found tensor(float) of shape (any, 6). "
            "Export or quantize the model again."
        )

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.graph.node.append(H.make_node("Mine", ["pooled"], ["x"], domain="my.domain")),
            lambda m: m.opset_import[0].__setattr__("version", 999),
            lambda m: setattr(m, "ir_version", 999),
            lambda m: m.graph.node.pop(2),
            lambda m: setattr(m.graph.node[1], "op_type", "NoSuchOperator"),
            lambda m: m.ClearField("graph"),
        ],
        ids=["custom operator", "future opset", "future ir", "gap", "unknown operator", "no graph"],
    )
    def test_a_graph_that_onnxruntime_refuses_is_a_graph_error(self, tmp_path: Path, change: Change) -> None:
        spec = write_model(tmp_path, tiny_graph(change).SerializeToString())
        with OnnxRuntimeEngine(tmp_path, spec) as engine, pytest.raises(GraphError) as refused:
            engine.open()
        assert refused.value.__context__ is None  # nothing of onnxruntime's comes along

    def test_failures_are_silent_on_stderr(self, tmp_path: Path) -> None:
        change = lambda m: setattr(m.graph.node[1], "op_type", "NoSuchOperator")  # noqa: E731 - one line
        spec = write_model(tmp_path, tiny_graph(change).SerializeToString())
        (tmp_path / "p").write_bytes(pickle.dumps(OnnxRuntimeEngine(tmp_path, spec)))
        program = """
            try:
                engine.open()
            except Exception as error:
                print(type(error).__name__)
        """
        assert in_child(OPEN_PICKLED + textwrap.dedent(program), str(tmp_path / "p")) == "GraphError\n"
        spec = write_model(tmp_path)
        (tmp_path / "p").write_bytes(pickle.dumps(OnnxRuntimeEngine(tmp_path, spec)))
        program = """
            try:
                engine.run(TokenBatch(batch.ids + 1000, batch.mask), ("pooled",))
            except Exception as error:
                print(type(error).__name__)
        """
        assert in_child(OPEN_PICKLED + textwrap.dedent(program), str(tmp_path / "p")) == "GraphError\n"


def info(name: str, kind: int, shape: list[Any]) -> Any:
    return H.make_tensor_value_info(name, kind, shape)


def rename_input(model: Any) -> None:
    model.graph.input[0].name = model.graph.node[0].input[1] = "ids"


def as_half(model: Any) -> None:
    model.graph.node[-1].output[0] = "wide"
    model.graph.node.append(H.make_node("Cast", ["wide"], ["pooled"], to=T.FLOAT16))
    model.graph.output[1].CopyFrom(info("pooled", T.FLOAT16, ["rows", DIM]))


def as_three_axes(model: Any) -> None:
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(H.make_node("Unsqueeze", ["flat", "axis"], ["pooled"]))
    model.graph.output[1].CopyFrom(info("pooled", T.FLOAT, ["rows", DIM, 1]))


def wide_head(model: Any) -> None:
    head = np.ones((HIDDEN, DIM + 1), np.float32)
    model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(head, "head"))
    model.graph.output[1].CopyFrom(info("pooled", T.FLOAT, ["rows", DIM + 1]))


class TestLife:
    def test_the_session_is_made_once_however_many_threads_come_first(
        self, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, load = [], OnnxRuntimeEngine._load

        def count(self: OnnxRuntimeEngine) -> Any:
            made.append(threading.get_ident())
            return load(self)

        monkeypatch.setattr(OnnxRuntimeEngine, "_load", count)
        start = threading.Barrier(16)

        def first(_worker: int) -> bytes:
            start.wait()
            return engine.run(some_batch(), ("pooled",))[0].tobytes()

        with ThreadPoolExecutor(16) as pool:
            assert len(set(pool.map(first, range(16)))) == 1
        assert len(made) == 1

    def test_constructing_reads_nothing(self, tmp_path: Path, spec: ModelSpec) -> None:
        (tmp_path / "model.onnx").write_bytes(b"not looked at")
        OnnxRuntimeEngine(tmp_path, spec).close()

    def test_after_close_every_use_is_a_closed_error(self, engine: OnnxRuntimeEngine) -> None:
        engine.run(some_batch(), BOTH)
        engine.close()
        engine.close()
        for use in (lambda: engine.run(some_batch(), BOTH), engine.open, lambda: pickle.dumps(engine)):
            with pytest.raises(ClosedError, match="tiny was closed"):
                use()

    def test_an_engine_never_opened_closes(self, engine: OnnxRuntimeEngine) -> None:
        engine.close()

    def test_close_waits_for_the_runs_under_way(self, engine: OnnxRuntimeEngine) -> None:
        engine.open()
        entered, leave, events = threading.Event(), threading.Event(), []

        class Slow:
            def run(self, *_arguments: object) -> list[Any]:
                entered.set()
                assert leave.wait(30)
                events.append("run ended")
                return [np.zeros((3, DIM), np.float32)]

        def closing() -> None:
            engine.close()
            events.append("closed")

        engine._session = Slow()
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(engine.run, some_batch(), ("pooled",))
            assert entered.wait(30)
            closers = [pool.submit(closing) for _ in range(2)]
            while not engine._closed:
                pass
            with pytest.raises(ClosedError):
                engine.run(some_batch(), ("pooled",))
            assert events == []
            leave.set()
            running.result(30)
            for closer in closers:
                closer.result(30)
        assert events == ["run ended", "closed", "closed"]
        assert engine._session is None

    def test_close_while_many_run_ends_each_run_well_or_closed(self, tmp_path: Path, spec: ModelSpec) -> None:
        engine = OnnxRuntimeEngine(tmp_path, spec)
        good = engine.run(some_batch(), ("pooled",))[0].tobytes()
        start = threading.Barrier(9)

        def until_closed(_worker: int) -> int:
            start.wait()
            for count in range(10**9):
                try:
                    assert engine.run(some_batch(), ("pooled",))[0].tobytes() == good
                except ClosedError:  # noqa: PERF203 - how the loop ends is what is tested
                    return count
            return -1

        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(until_closed, n) for n in range(8)]
            start.wait()
            engine.close()
            assert all(run.result(30) >= 0 for run in runs)

    def test_close_frees_the_session_even_after_a_kept_error(self, engine: OnnxRuntimeEngine) -> None:
        engine.open()
        freed = threading.Event()

        class Failing:
            def run(self, *_arguments: object) -> list[Any]:
                raise RuntimeError("broken")

            def __del__(self) -> None:
                freed.set()

        engine._session = Failing()
        with pytest.raises(GraphError, match="broken") as kept:
            engine.run(some_batch(), BOTH)
        engine.close()
        assert freed.is_set()
        assert kept.value.found == "broken"

    def test_a_pickled_engine_gives_the_same_elsewhere(
        self, engine: OnnxRuntimeEngine, pickled: str, tmp_path: Path
    ) -> None:
        program = "import os; os.chdir('/'); print(engine.run(batch, ('pooled',))[0].tobytes().hex())"
        batch = TokenBatch(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))
        expected = engine.run(batch, ("pooled",))[0].tobytes().hex()
        assert in_child(OPEN_PICKLED + program, pickled).strip() == expected

    def test_an_engine_for_another_graph_keeps_the_options(self, tmp_path: Path, spec: ModelSpec) -> None:
        (tmp_path / "other.onnx").write_bytes((tmp_path / "model.onnx").read_bytes())
        other = dataclasses.replace(
            spec, graph="other.onnx", files={**spec.files, "other.onnx": spec.files["model.onnx"]}
        )
        with (
            OnnxRuntimeEngine(tmp_path, spec, profile="edge", threads=1) as first,
            first.with_spec(other) as second,
        ):
            assert (first.file, second.file) == ("model.onnx", "other.onnx")
            assert second.settings == PROFILES["edge"]
            np.testing.assert_array_equal(second.run(some_batch(), BOTH)[1], first.run(some_batch(), BOTH)[1])

    def test_pickling_keeps_the_options(self, tmp_path: Path, spec: ModelSpec) -> None:
        with OnnxRuntimeEngine(tmp_path, spec, profile="latency", threads=1) as engine:
            twin = pickle.loads(pickle.dumps(engine))
            assert (twin.settings, twin.threads, twin.spec) == (engine.settings, 1, spec)


class TestMemory:
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("std::bad_alloc"),
            RuntimeError("Failed to allocate memory for requested buffer of size 8589934592"),
        ],
        ids=["bad_alloc", "arena"],
    )
    def test_running_out_of_memory_names_the_remedy(
        self, engine: OnnxRuntimeEngine, error: Exception
    ) -> None:
        class Full:
            def run(self, *_arguments: object) -> list[Any]:
                raise error

        engine.open()
        real, engine._session = engine._session, Full()
        with pytest.raises(MemoryBudgetError, match="max_memory_mb"):
            engine.run(some_batch(), BOTH)
        engine._session = real
        engine.run(some_batch(), BOTH)

    @pytest.mark.skipif(sys.platform != "linux", reason="address space limits are reliable on Linux only")
    def test_a_real_shortage_is_typed_and_leaves_the_engine_usable(self, pickled: str) -> None:
        program = """
            import resource
            from qingyu.errors import MemoryBudgetError
            engine.run(batch, ("pooled",))
            used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            ids = np.ones((20_000, 64), np.int64)
            try:
                engine.run(TokenBatch(ids, np.ones_like(ids)), ("pooled",))
            except MemoryBudgetError:
                print("typed")
            print(engine.run(batch, ("pooled",))[0].shape)
        """
        assert in_child(OPEN_PICKLED + textwrap.dedent(program), pickled) == "typed\n(1, 6)\n"

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_the_memory_of_one_large_batch_is_given_back(self, pickled: str) -> None:
        """200 MB of activations once; without giving back, resident memory would stay that high."""
        program = """
            import psutil
            resident = lambda: psutil.Process().memory_info().rss >> 20
            for _ in range(50):
                engine.run(batch, ("pooled",))
            base = resident()
            ids = np.ones((20_000, 64), np.int64)
            large = TokenBatch(ids, np.ones_like(ids))
            engine.run(large, ("pooled",))
            del large, ids
            for _ in range(50):
                engine.run(batch, ("pooled",))
            print(resident() - base)
        """
        assert int(in_child(OPEN_PICKLED + textwrap.dedent(program), pickled)) < 30


class TestTelemetry:
    def test_importing_the_module_loads_no_onnxruntime(self) -> None:
        program = """
            import sys, qingyu.runtime.onnxruntime_engine
            print(sorted({'onnxruntime', 'tokenizers'} & sys.modules.keys()))
        """
        assert in_child(program) == "[]\n"

    def test_a_run_leaves_nothing_under_home(self, pickled: str, tmp_path: Path) -> None:
        home = tmp_path / "home"
        home.mkdir()
        program = "engine.run(batch, ('pooled',)); import time; time.sleep(0.5); print(os.environ[name])"
        program = "import os; name = 'ORT_DISABLE_TELEMETRY'" + OPEN_PICKLED + program
        assert in_child(program, pickled, HOME=str(home)) == "1\n"
        assert list(home.rglob("*")) == []

    def test_no_socket_is_opened(self, pickled: str, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        probe = ["strace", "-f", "-o", str(trace), "-e", "trace=socket,connect"]
        try:
            subprocess.run([*probe, "true"], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs strace: {error}")
        program = OPEN_PICKLED + "engine.run(batch, ('pooled',)); engine.close()"
        environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        command = [*probe, sys.executable, "-c", program, pickled]
        subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
        assert [
            line for line in trace.read_text().splitlines() if "socket(" in line or "connect(" in line
        ] == []

    def test_a_value_set_by_the_user_stands(self, pickled: str) -> None:
        program = "import os\n" + OPEN_PICKLED + "engine.open(); print(os.environ['ORT_DISABLE_TELEMETRY'])"
        assert in_child(program, pickled, ORT_DISABLE_TELEMETRY="true") == "true\n"

    def test_an_earlier_import_with_telemetry_is_warned_of_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        earlier = type(sys)("onnxruntime")
        earlier.__dict__.update(InferenceSession=object, __version__="1.32.0")
        monkeypatch.setitem(sys.modules, "onnxruntime", earlier)
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "to be restored")
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
        with pytest.warns(TelemetryWarning, match="imported before qingyu without ORT_DISABLE_TELEMETRY=1"):
            assert onnxruntime_engine.import_onnxruntime() is earlier
        assert onnxruntime_engine.import_onnxruntime() is earlier  # a second warning would be an error

    def test_an_earlier_import_of_a_version_without_telemetry_is_no_matter(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        earlier = type(sys)("onnxruntime")
        earlier.__dict__.update(InferenceSession=object, __version__="1.28.1")
        monkeypatch.setitem(sys.modules, "onnxruntime", earlier)
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "to be restored")
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
        assert onnxruntime_engine.import_onnxruntime() is earlier


@pytest.mark.parametrize(
    ("precision", "saturates", "exact"), [("int8", True, True), ("int8", False, False), ("fp32", True, False)]
)
def test_quantized_graphs_ask_for_exact_products_where_the_fast_ones_saturate(
    monkeypatch, precision, saturates, exact
):
    from qingyu.runtime import onnxruntime_engine

    monkeypatch.setattr(onnxruntime_engine, "saturates_byte_products", lambda: saturates)
    entries = onnxruntime_engine.product_entries(precision)
    assert ("session.x64quantprecision" in entries) is exact
