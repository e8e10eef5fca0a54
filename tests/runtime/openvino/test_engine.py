"""OpenVINO gives a model's vectors, checks what the other engine checks, and sends nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import ClosedError, CorruptFileError, FidelityError, GraphError, KernelError
from qingyu.models.export import export
from qingyu.quantize import Gate, quantize
from qingyu.runtime.cpu import saturates_byte_products
from qingyu.runtime.spec import FileRecord, read_spec, sha256_of

pytest.importorskip("openvino", reason="runs models by OpenVINO")

TEXTS = [
    "今天天气真好",
    "外面阳光明媚",
    "股票大跌",
    "怎么修改登录密码",
    "我们",
    "人工智能正在改变医疗和教育" * 3,
]


@pytest.fixture(scope="module", params=["mean", "cls"])
def folder(request, tiny_checkpoint, tmp_path_factory):
    """A quantized folder with a file for OpenVINO."""
    place = tmp_path_factory.mktemp("openvino")
    export(tiny_checkpoint, place / "fp32", pooling=request.param)
    quantize(place / "fp32", place / "int8", texts=TEXTS, openvino=True, fallback=True, speed_rounds=1)
    return place / "int8"


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def least(a, b):
    return float((a * b).sum(1).min())


def test_vectors_are_close_to_fp32_and_do_not_depend_on_neighbours(folder):
    with Embedder.open(folder.parent / "fp32") as model:
        wanted = model.embed(TEXTS)
    with Embedder.open(folder, engine="openvino") as model:
        assert model.engine == "openvino"
        found = model.embed(TEXTS)
        alone = np.concatenate([model.embed([text]) for text in TEXTS])
        shuffled = model.embed(TEXTS[::-1])[::-1]
        assert model.self_check().result == "passed"
    # Without VNNI OpenVINO's products of a byte saturate, which the certificate of such a machine tells.
    assert least(wanted, found) > (0.98 if saturates_byte_products() else 0.99)
    assert least(alone, found) > 0.99999
    assert least(shuffled, found) > 0.99999


def test_the_manifest_has_a_certificate_of_its_own(folder):
    record = read_spec(folder).openvino
    certificate = record.certificate
    assert certificate["environment"]["engine"] == "openvino"
    assert "openvino" in certificate["environment"]["versions"]
    assert certificate["size"]["candidate_bytes"] == (folder / record.file).stat().st_size
    assert certificate["cosine"]["mean"] > 0.99
    assert record.speed > 0
    assert read_spec(folder).certificate["environment"]["engine"] == "onnxruntime"


def test_many_threads_and_lengths_give_the_vectors_of_one(folder):
    with Embedder.open(folder, engine="openvino") as model:
        texts = ["今天天气真好" * (1 + n % 9) for n in range(40)]
        wanted = model.embed(texts)
        found = {}

        def work(number):
            found[number] = model.embed(texts)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert sorted(found) == [0, 1, 2, 3]
        assert min(least(wanted, vectors) for vectors in found.values()) > 0.99999


def test_an_embedder_is_picklable_and_closes(folder):
    with Embedder.open(folder, engine="openvino") as model:
        wanted = model.embed(TEXTS)
        with pickle.loads(pickle.dumps(model)) as again:
            assert again.engine == "openvino"
            assert least(wanted, again.embed(TEXTS)) > 0.99999
    with pytest.raises(ClosedError):
        model.embed(TEXTS)


def test_a_forked_child_loads_the_model_anew_and_ends(folder):
    code = f"""
import os, sys
from qingyu import Embedder
model = Embedder.open({str(folder)!r}, engine="openvino")
wanted = model.embed(["今天天气真好"])
child = os.fork()
if child == 0:
    same = float((model.embed(["今天天气真好"]) * wanted).sum())
    sys.exit(0 if same > 0.99999 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


def test_nothing_is_written_at_home_and_no_socket_is_opened(folder, tmp_path):
    code = f"""
import socket, sys
def refuse(*arguments): raise AssertionError("a socket")
socket.socket.connect = socket.socket.sendto = refuse
from qingyu import Embedder
with Embedder.open({str(folder)!r}, engine="openvino") as model:
    model.embed(["今天天气真好"])
    assert model.engine == "openvino"
assert sys.modules.get("openvino_telemetry") is None
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "QINGYU_HOME": str(tmp_path / "own")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []


def test_a_flipped_bit_is_refused(copy):
    path = copy / "model.openvino.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with Embedder.open(copy, engine="openvino") as model, pytest.raises(CorruptFileError, match="is damaged"):
        model.embed(TEXTS)


def rewrite(folder, content=None, **changes):
    """The folder with another file for OpenVINO, whose hash is right, or another record of it."""
    path = folder / "model.openvino.onnx"
    if content is not None:
        path.write_bytes(content)
    document = json.loads((folder / "qingyu.json").read_text(encoding="utf-8"))
    record = FileRecord(path.stat().st_size, sha256_of(path))
    document["files"][path.name] = {"bytes": record.bytes, "sha256": record.sha256}
    document["openvino"].update(changes)
    (folder / "qingyu.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\xff" * 99])
def test_a_file_that_is_no_graph_is_refused(copy, content):
    rewrite(copy, content)
    with Embedder.open(copy, engine="openvino") as model, pytest.raises(GraphError):
        model.embed(TEXTS)


def test_a_graph_other_than_the_manifest_says_is_refused(copy):
    import onnx

    graph = onnx.load(copy / "model.openvino.onnx")
    del graph.graph.output[:]
    value = next(node.output[0] for node in graph.graph.node if node.op_type == "Reshape")
    graph.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    rewrite(copy, graph.SerializeToString())
    with Embedder.open(copy, engine="openvino") as model, pytest.raises(GraphError, match="outputs"):
        model.embed(TEXTS)


def test_a_machine_that_computes_otherwise_is_refused_or_falls_back(copy):
    rewrite(copy, least_cosine=0.99999)  # which 8 bits do not reach
    with (
        Embedder.open(copy, engine="openvino") as model,
        pytest.warns(match="so its FP32 graph model.fp32.onnx is used"),
    ):
        vectors = model.embed(TEXTS)
    with Embedder.open(copy.parent / "model", engine="onnxruntime") as other:
        assert least(vectors, other.embed(TEXTS)) > 0.99
    (copy / "model.fp32.onnx").unlink()
    with (
        Embedder.open(copy, engine="openvino") as model,
        pytest.raises(KernelError, match="with openvino 20"),
    ):
        model.embed(TEXTS)


def test_a_file_that_misses_the_gate_is_not_written(folder, tmp_path):
    gate = Gate(mean=0.9999999, minimum=0.9)
    with pytest.raises(FidelityError):
        quantize(
            folder.parent / "fp32",
            tmp_path / "x",
            texts=TEXTS,
            recipe="fp16",
            openvino=True,
            gate=gate,
            speed_rounds=0,
        )
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_have_no_file_for_openvino(tiny_checkpoint, tmp_path):
    from qingyu.errors import UnsupportedModelError

    export(tiny_checkpoint, tmp_path / "states", hidden_states=True)
    with pytest.raises(UnsupportedModelError, match="or leave out --openvino"):
        quantize(tmp_path / "states", tmp_path / "x", texts=TEXTS, openvino=True, speed_rounds=0)


@pytest.mark.parametrize(("tokens", "padded"), [(1, 1), (32, 32), (33, 34), (65, 68), (511, 512), (512, 512)])
def test_buckets_are_few_and_at_most_a_sixteenth_longer(tokens, padded):
    from qingyu.runtime.openvino.engine import bucket

    assert bucket(tokens) == padded
    lengths = range(1, 513)
    assert len({bucket(n) for n in lengths}) <= 100
    assert all(n <= bucket(n) <= n * 17 / 16 for n in lengths)
