from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qingyu.errors import CorruptFileError, GraphError, ManifestError, OutputError
from qingyu.quantize.edge import EDGE_FILE, LEAST_COSINE, add_edge, write_edge
from qingyu.runtime import onnxruntime_engine
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.spec import MANIFEST, FileRecord, read_spec, sha256_of

onnx = pytest.importorskip("onnx")

TEXTS = ["今天天气真好", "外面阳光明媚", "怎么修改登录密码", "人工智能正在改变医疗、教育和交通" * 4, "a", ""]


@pytest.fixture(params=["fp32", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    source = request.getfixturevalue({"fp32": "tiny_model", "int8": "tiny_int8"}[request.param])
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def edge(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny FP32 model with an edge file."""
    shutil.copytree(tiny_model, tmp_path / "edge")
    add_edge(tmp_path / "edge")
    return tmp_path / "edge"


def embed(folder: Path, **options: Any) -> Any:
    with Embedder.open(folder, **options) as embedder:
        return embedder.embed(TEXTS)


def replace_edge_file(folder: Path, content: bytes) -> None:
    """Put another edge file in place, with a true record of it."""
    (folder / EDGE_FILE).write_bytes(content)
    spec = read_spec(folder)
    record = FileRecord(len(content), sha256_of(folder / EDGE_FILE))
    spec = dataclasses.replace(spec, files={**spec.files, EDGE_FILE: record})
    (folder / MANIFEST).write_text(spec.to_json(), encoding="utf-8")


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that onnxruntime is given from now on."""
    import onnxruntime

    names: list[str] = []
    session = onnxruntime.InferenceSession

    def noted(path: str, *rest: Any, **more: Any) -> Any:
        names.append(Path(path).name)
        return session(path, *rest, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    return names


def test_the_edge_file_gives_the_vectors_of_the_graph(folder: Path) -> None:
    before = embed(folder, profile="edge")
    spec = add_edge(folder)
    after = embed(folder, profile="edge")
    cosines = np.sum(before.astype(np.float64) * after, axis=1)
    assert cosines.min() >= LEAST_COSINE
    if spec.precision == "fp32":
        assert np.abs(before - after).max() <= 1e-6


def test_only_the_edge_profile_opens_it(edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = opened_files(monkeypatch)
    for profile in ("edge", "throughput", "latency"):
        embed(edge, profile=profile)
    assert names == [EDGE_FILE, "model.onnx", "model.onnx"]


def test_the_edge_profile_works_without_an_edge_file(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = opened_files(monkeypatch)
    embed(tiny_model, profile="edge")
    assert names == ["model.onnx"]


def test_int8_on_a_cpu_that_saturates_takes_the_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact products can only be asked for there. The edge file is still written, and compared, as everywhere."""
    names = opened_files(monkeypatch)
    monkeypatch.setattr(onnxruntime_engine, "saturates_byte_products", lambda: True)
    spec = add_edge(folder)
    assert [name.startswith(f".{EDGE_FILE}") for name in names] == [False, False, True]
    embed(folder, profile="edge")
    assert names[3:] == (["model.onnx"] if spec.precision == "int8" else [EDGE_FILE])


def test_the_manifest_records_the_file_and_its_options(folder: Path) -> None:
    spec = add_edge(folder)
    assert spec == read_spec(folder)
    assert spec.files[EDGE_FILE] == FileRecord(
        (folder / EDGE_FILE).stat().st_size, sha256_of(folder / EDGE_FILE)
    )
    assert spec.edge is not None
    assert spec.edge.session["session.use_memory_mapped_ort_model"] == "1"
    # FP32 products need packed weights; integer ones are fast enough without.
    assert ("session.disable_prepacking" in spec.edge.session) == (spec.precision == "int8")


def test_writing_it_touches_no_other_file(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spec = write_edge(folder, read_spec(folder))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {EDGE_FILE}
    assert {name: after[name] for name in before} == before
    assert spec.files.keys() == before.keys() - {MANIFEST} | {EDGE_FILE}


def test_it_can_be_written_again(edge: Path) -> None:
    first = read_spec(edge)
    assert add_edge(edge).edge == first.edge
    embed(edge, profile="edge")


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:16],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"<html>" * 1000,
        lambda content: bytes(len(content)),
        *[lambda content, n=n: flip(content, n * len(content) // 8) for n in range(8)],
        lambda content: flip(content, len(content) - 1),
    ],
)
def test_a_damaged_edge_file_is_refused_by_its_hash(edge: Path, damage: Callable[[bytes], bytes]) -> None:
    (edge / EDGE_FILE).write_bytes(damage((edge / EDGE_FILE).read_bytes()))
    with Embedder.open(edge, profile="edge") as embedder, pytest.raises(CorruptFileError, match=EDGE_FILE):
        embedder.embed(TEXTS)
    embed(edge)  # the graph is as good as it was


def test_one_that_is_missing_is_refused(edge: Path) -> None:
    (edge / EDGE_FILE).unlink()
    with pytest.raises(CorruptFileError, match="nothing there"):
        Embedder.open(edge, profile="edge")


def test_one_that_is_replaced_while_it_is_loaded_is_refused(
    edge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (edge / EDGE_FILE).read_bytes()
    check = onnxruntime_engine.check_file

    def replaced(*arguments: Any) -> None:
        check(*arguments)
        (edge / "new").write_bytes(content)
        (edge / "new").replace(edge / EDGE_FILE)

    monkeypatch.setattr(onnxruntime_engine, "check_file", replaced)
    with (
        Embedder.open(edge, profile="edge") as embedder,
        pytest.raises(CorruptFileError, match="replaced while"),
    ):
        embedder.embed(TEXTS)


def test_one_that_is_replaced_by_renaming_later_does_no_harm(edge: Path) -> None:
    with Embedder.open(edge, profile="edge") as embedder:
        before = embedder.embed(TEXTS)
        (edge / "new").write_bytes(b"something else")
        (edge / "new").replace(edge / EDGE_FILE)
        np.testing.assert_array_equal(embedder.embed(TEXTS), before)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"<html>" * 1000, b"\x18\0\0\0ORTM" + b"\xff" * 400])
def test_garbage_with_a_true_hash_is_a_graph_error(edge: Path, content: bytes) -> None:
    replace_edge_file(edge, content)
    with Embedder.open(edge, profile="edge") as embedder, pytest.raises(GraphError, match=EDGE_FILE):
        embedder.embed(TEXTS)


def test_an_onnx_graph_under_its_name_is_refused(edge: Path) -> None:
    """So the checks on ONNX graphs, as against external data, cannot be passed by the name of the file."""
    replace_edge_file(edge, (edge / "model.onnx").read_bytes())
    with Embedder.open(edge, profile="edge") as embedder, pytest.raises(GraphError):
        embedder.embed(TEXTS)


def test_the_edge_file_of_another_model_is_refused(edge: Path, tmp_path: Path) -> None:
    spec = read_spec(edge)
    sizes = dataclasses.replace(spec.architecture, hidden_size=spec.dim * 2)
    other = dataclasses.replace(spec, dim=spec.dim * 2, architecture=sizes)
    (edge / MANIFEST).write_text(other.to_json(), encoding="utf-8")
    with Embedder.open(edge, profile="edge") as embedder, pytest.raises(GraphError, match="not the graph"):
        embedder.embed(TEXTS)


def test_external_data_is_not_converted(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(1 << 16))
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.raw_data)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    spec = read_spec(folder)
    record = FileRecord((folder / "model.onnx").stat().st_size, sha256_of(folder / "model.onnx"))
    spec = dataclasses.replace(spec, files={**spec.files, "model.onnx": record})
    with pytest.raises(GraphError, match="wants weights from another file"):
        write_edge(folder, spec)
    assert not (folder / EDGE_FILE).exists()


def test_a_damaged_graph_is_not_converted(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(flip(content, len(content) // 2))
    with pytest.raises(CorruptFileError):
        write_edge(folder, read_spec(folder))
    assert not (folder / EDGE_FILE).exists()


def test_an_edge_file_with_other_vectors_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine

    run = OnnxRuntimeEngine.run

    def other(engine: OnnxRuntimeEngine, batch: Any, outputs: Any) -> Any:
        values = run(engine, batch, outputs)
        return values if engine.file == "model.onnx" else [value[..., ::-1] for value in values]

    monkeypatch.setattr(OnnxRuntimeEngine, "run", other)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(GraphError, match="differs from it"):
        write_edge(folder, read_spec(folder))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_full_disk_is_an_output_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match="found 1000 bytes free of"):
        write_edge(folder, read_spec(folder))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_an_output_error(folder: Path) -> None:
    folder.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            write_edge(folder, read_spec(folder))
    finally:
        folder.chmod(0o755)


def test_a_write_that_fails_leaves_the_folder_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, _target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        add_edge(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"file": "other.ort"}, "a record of other.ort"),
        ({"file": "../model.ort"}, "a record of ../model.ort"),
        ({"file": ""}, "a record of"),
        ({"file": None}, "edge.file"),
        ({"session": {"session.load_model_format": "ONNX"}}, "edge.session"),
        ({"session": {"ep.context_enable": "1"}}, "edge.session"),
        ({"session": {"session.disable_prepacking": "2"}}, "edge.session.session.disable_prepacking"),
        ({"session": {"session.disable_prepacking": 1}}, "edge.session.session.disable_prepacking"),
        ({"session": []}, "edge.session"),
    ],
)
def test_a_hostile_manifest_is_refused(edge: Path, fields: dict[str, Any], where: str) -> None:
    document = json.loads((edge / MANIFEST).read_text(encoding="utf-8"))
    document["edge"].update(fields)
    (edge / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ManifestError, match=where):
        Embedder.open(edge, profile="edge")
