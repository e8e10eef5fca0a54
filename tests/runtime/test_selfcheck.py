from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qingyu.errors import FallbackWarning, GraphError, KernelError, ManifestError
from qingyu.runtime import selfcheck
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import (
    MANIFEST,
    FileRecord,
    Golden,
    ModelSpec,
    decode_vector,
    encode_vector,
    read_spec,
    sha256_of,
)

FALLBACK = "fp32.onnx"
TEXT = "今天天气真好"

Outputs = list[Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that no model was opened on before."""
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def golden(tiny_model: Path) -> Golden:
    from qingyu.quantize.golden import make_golden

    with Embedder.open(tiny_model) as model:
        return make_golden(model, model)


@pytest.fixture
def folder(tiny_model: Path, golden: Golden, tmp_path: Path, home: Path) -> Path:
    """The tiny model with golden texts."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change(tmp_path / "model", golden=golden)
    return tmp_path / "model"


@pytest.fixture
def two_graphs(folder: Path) -> Path:
    """The same with a second graph to fall back to."""
    shutil.copy(folder / "model.onnx", folder / FALLBACK)
    record = FileRecord((folder / FALLBACK).stat().st_size, sha256_of(folder / FALLBACK))
    change(folder, fallback=FALLBACK, files={**read_spec(folder).files, FALLBACK: record})
    return folder


def change(folder: Path, **fields: Any) -> ModelSpec:
    spec = dataclasses.replace(read_spec(folder), **fields)
    (folder / MANIFEST).write_text(spec.to_json(), encoding="utf-8")
    return spec


def break_kernels(
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[Outputs], Outputs],
    files: tuple[str, ...] = ("model.onnx",),
) -> None:
    """Let this machine compute wrongly with these files."""
    run = OnnxRuntimeEngine.run

    def wrong(engine: OnnxRuntimeEngine, batch: Any, outputs: Any) -> Any:
        values = run(engine, batch, outputs)
        return how(values) if engine.file in files else values

    monkeypatch.setattr(OnnxRuntimeEngine, "run", wrong)


def reversed_values(values: Outputs) -> Outputs:
    return [value[..., ::-1] for value in values]


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that golden texts were run on from now on."""
    done: list[str] = []
    compare = selfcheck._compare

    def counted(engine: Any, *rest: Any) -> Any:
        done.append(engine.file)
        return compare(engine, *rest)

    monkeypatch.setattr(selfcheck, "_compare", counted)
    return done


def memos(home: Path) -> list[Path]:
    return sorted((home / "selfcheck").iterdir())


class TestVectorText:
    def test_a_vector_comes_back_as_float16(self) -> None:
        values = np.random.default_rng(1).standard_normal(97).astype(np.float16)
        assert decode_vector(encode_vector(values.tolist()), 97) == tuple(values.tolist())

    def test_the_bytes_are_little_endian(self) -> None:
        assert encode_vector([1.0]) == "ADw="

    @pytest.mark.parametrize(
        "text", ["", "ADw", "ADw=ADw=", "AD w", "ADw\n", "ĀDw=", "ADx=", "\ud800Dw=", "===="]
    )
    def test_what_encode_does_not_write_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"base64|characters|padding|encod"):
            decode_vector(text, 1)


class TestManifest:
    def test_golden_texts_survive_the_manifest(self, folder: Path, golden: Golden) -> None:
        assert read_spec(folder).golden == golden
        assert len(golden.texts) == 4

    @pytest.mark.parametrize(
        ("fields", "where"),
        [
            ({"vectors": ["????"] * 4}, "golden.vectors[0]"),
            ({"vectors": ["AD"] * 4}, "golden.vectors[0]"),
            ({"vectors": ["A" * (1 << 19)] * 4}, "golden.vectors[0]"),
            ({"vectors": [encode_vector([float("nan")] * 32)] * 4}, "golden.vectors[0]"),
            ({"vectors": [encode_vector([float("inf")] + [0.0] * 31)] * 4}, "golden.vectors[0]"),
            ({"vectors": [encode_vector([0.0] * 32)] * 4}, "golden.vectors[0]"),
            ({"vectors": [encode_vector([1.0] * 31)] * 4}, "golden.vectors[0]"),
            ({"vectors": []}, "golden.vectors"),
            ({"vectors": [7] * 4}, "golden.vectors[0]"),
            ({"vectors": None}, "golden.vectors"),
            ({"texts": []}, "golden.texts"),
            ({"texts": ["a"] * 17}, "golden.texts"),
            ({"texts": ["", "b", "c", "d"]}, "golden.texts[0]"),
            ({"texts": ["a", "b" * 2001, "c", "d"]}, "golden.texts[1]"),
            ({"texts": ["a", "\ud800", "c", "d"]}, "golden.texts[1]"),
            ({"least_cosine": 0.1}, "golden.least_cosine"),
            ({"least_cosine": -1}, "golden.least_cosine"),
            ({"least_cosine": 1}, "golden.least_cosine"),
            ({"least_cosine": True}, "golden.least_cosine"),
            ({"least_cosine": "0.9"}, "golden.least_cosine"),
            ({"more": 1}, "golden.more"),
        ],
    )
    def test_a_hostile_field_is_named(self, folder: Path, fields: dict[str, Any], where: str) -> None:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        document["golden"].update(fields)
        (folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(ManifestError, match=re.escape(f"field '{where}'")):
            read_spec(folder)

    @pytest.mark.parametrize("name", ["../other.onnx", "absent.onnx", ""])
    def test_a_fallback_without_a_record_is_refused(self, folder: Path, name: str) -> None:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        document["fallback"] = name
        (folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(ManifestError, match="a record of"):
            read_spec(folder)


class TestPass:
    def test_a_good_model_passes_and_gives_its_vectors(self, folder: Path, tiny_model: Path) -> None:
        with Embedder.open(folder) as checked, Embedder.open(tiny_model) as plain:
            np.testing.assert_array_equal(checked.embed(TEXT), plain.embed(TEXT))
            found = checked.self_check()
        assert found.result == "passed"
        assert len(found.cosines) == 4
        assert min(found.cosines) > 0.999999
        assert found.seconds > 0

    def test_a_model_without_golden_texts_is_not_checked(self, tiny_model: Path, home: Path) -> None:
        with Embedder.open(tiny_model) as embedder:
            embedder.embed(TEXT)
            assert embedder.self_check() == selfcheck.SelfCheck("none")
        assert not home.exists()

    def test_opening_checks_nothing_and_the_first_text_once(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = count_checks(monkeypatch)
        with Embedder.open(folder) as embedder:
            assert done == []
            embedder.embed(TEXT)
            embedder.embed([TEXT] * 40)
            embedder.load()
        assert done == ["model.onnx"]

    def test_loading_checks(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = count_checks(monkeypatch)
        with Embedder.open(folder) as embedder:
            embedder.load()
        assert done == ["model.onnx"]

    def test_folding_widths_passes_too(self, folder: Path) -> None:
        with Embedder.open(folder, unicode_form="NFKC", special_tokens="text") as embedder:
            assert embedder.self_check().result == "passed"

    def test_pickling_keeps_the_option(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        break_kernels(monkeypatch, reversed_values)
        with (
            Embedder.open(folder, self_check=False) as embedder,
            pickle.loads(pickle.dumps(embedder)) as copy,
        ):
            assert copy.embed(TEXT).shape == (1, 32)


class TestMemo:
    def test_a_pass_is_remembered_in_one_file_that_says_what_was_checked(
        self, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = count_checks(monkeypatch)
        for _ in range(3):
            with Embedder.open(folder) as embedder:
                embedder.embed(TEXT)
        assert done == ["model.onnx"]
        (memo,) = memos(home)
        document = json.loads(memo.read_text(encoding="utf-8"))
        assert document["result"] == "passed"
        assert document["facts"]["graph"] == read_spec(folder).files["model.onnx"].sha256

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"{",
            b"\xff",
            b"[" * 60_000,
            b"null",
            b'{"format": 1, "result": "passed"}',
            b'{"format": 1, "result": "passed", "facts": {}}',
            b" " * 70_000,
        ],
    )
    def test_a_damaged_memo_is_ignored_and_rewritten(
        self, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
    ) -> None:
        with Embedder.open(folder) as embedder:
            embedder.load()
        (memo,) = memos(home)
        good = json.loads(memo.read_text(encoding="utf-8"))
        memo.write_bytes(damage)
        done = count_checks(monkeypatch)
        with Embedder.open(folder) as embedder:
            embedder.load()
        assert done == ["model.onnx"]
        assert memos(home) == [memo]
        assert json.loads(memo.read_text(encoding="utf-8"))["facts"] == good["facts"]

    @pytest.mark.parametrize("what", ["cpu_model", "cpu_flags"])
    def test_another_cpu_is_checked_anew(
        self, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        done = count_checks(monkeypatch)
        for value in ("one", "two"):
            monkeypatch.setattr(selfcheck, what, lambda value=value: value)
            with Embedder.open(folder) as embedder:
                embedder.load()
        assert len(done) == len(memos(home)) == 2

    @pytest.mark.parametrize("package", ["onnxruntime", "numpy", "tokenizers", "qingyu"])
    def test_another_version_is_checked_anew(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        with Embedder.open(folder) as embedder:
            embedder.load()
        done = count_checks(monkeypatch)
        monkeypatch.setattr(f"{package}.__version__", "99.0")
        with Embedder.open(folder) as embedder:
            embedder.load()
        assert done == ["model.onnx"]

    def test_other_golden_texts_are_checked_anew(
        self, folder: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Embedder.open(folder) as embedder:
            embedder.load()
        change(folder, golden=dataclasses.replace(golden, vectors=golden.vectors[::-1]))
        with Embedder.open(folder) as embedder, pytest.raises(KernelError):
            embedder.load()

    @pytest.mark.parametrize("place", ["file", "nowhere", "no home"])
    def test_a_home_that_cannot_be_written_is_not_needed(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        (tmp_path / "file").write_text("")
        places = {"file": str(tmp_path / "file"), "nowhere": "/proc/nowhere", "no home": "not/absolute"}
        monkeypatch.setenv("QINGYU_HOME", places[place])
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        done = count_checks(monkeypatch)
        for _ in range(2):
            with Embedder.open(folder) as embedder:
                assert embedder.embed(TEXT).shape == (1, 32)
        assert done == ["model.onnx"] * 2
        assert sorted(tmp_path.iterdir()) == before

    def test_no_half_written_memo_stays(
        self, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_self: Path, _data: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with Embedder.open(folder) as embedder:
            assert embedder.embed(TEXT).shape == (1, 32)
        assert memos(home) == []


class TestFail:
    def test_altered_golden_vectors_are_refused_with_the_cpu_and_the_cosine(
        self, folder: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        first = decode_vector(golden.vectors[0], 32)
        negative = encode_vector([-value for value in first])
        change(folder, golden=dataclasses.replace(golden, vectors=(negative, *golden.vectors[1:])))
        monkeypatch.setattr(selfcheck, "cpu_model", lambda: "Test CPU")
        monkeypatch.setattr(selfcheck, "cpu_flags", lambda: ("avx2", "fma"))
        with Embedder.open(folder) as embedder, pytest.raises(KernelError) as caught:
            embedder.embed(TEXT)
        assert str(caught.value) == (
            f"this machine computes wrong vectors with {folder / 'model.onnx'}: expected cosine of at least "
            f"0.999500 with each golden vector, found -1.000000 with onnxruntime {onnxruntime.__version__} on "
            "Test CPU, flags avx2 fma. Use the FP32 model or another version of onnxruntime, and see what "
            "`qingyu doctor` says."
        )

    def test_wrong_kernels_are_caught_before_the_first_vector(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_kernels(monkeypatch, reversed_values)
        with Embedder.open(folder) as embedder:
            for _ in range(2):
                with pytest.raises(KernelError):
                    embedder.embed(TEXT)
            found = embedder.self_check()
            assert found.result == "failed"
            assert min(found.cosines) < 0.9
            with pytest.raises(KernelError):
                next(embedder.embed_stream([TEXT]))

    def test_a_memory_budget_meets_them_at_open(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        break_kernels(monkeypatch, reversed_values)
        with pytest.raises(KernelError):
            Embedder.open(folder, max_memory_mb=4000)

    def test_kernels_that_fail_on_a_golden_text_are_caught(
        self, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_values: Outputs) -> Outputs:
            raise GraphError("a wrong pooled", expected="finite numbers", found="NaN", remedy="None.")

        break_kernels(monkeypatch, fail)
        with Embedder.open(folder) as embedder, pytest.raises(KernelError, match="found nan with"):
            embedder.embed(TEXT)
        assert json.loads(memos(home)[0].read_text(encoding="utf-8"))["cosines"] == [None] * 4

    def test_vectors_of_zeros_are_caught(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        break_kernels(monkeypatch, lambda values: [0 * value for value in values])
        with Embedder.open(folder) as embedder, pytest.raises(KernelError, match="found nan"):
            embedder.embed(TEXT)

    def test_a_small_error_in_one_direction_is_caught(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A thirtieth of the length off: cosine 0.9994, where an FP32 model may lose 0.0005."""

        def bend(values: Outputs) -> Outputs:
            aside = np.roll(values[0], 1, axis=-1)
            aside -= values[0] * np.sum(aside * values[0]) / np.sum(values[0] ** 2)
            return [values[0] + aside * np.linalg.norm(values[0]) / np.linalg.norm(aside) / 28]

        break_kernels(monkeypatch, bend)
        with Embedder.open(folder) as embedder, pytest.raises(KernelError, match=r"found 0\.9993"):
            embedder.embed(TEXT)

    def test_a_machine_that_recovers_is_trusted_again(
        self, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Embedder.open(folder) as embedder:
            with monkeypatch.context() as broken:
                break_kernels(broken, reversed_values)
                with pytest.raises(KernelError):
                    embedder.embed(TEXT)
                (memo,) = memos(home)
                assert json.loads(memo.read_text(encoding="utf-8"))["result"] == "failed"
            assert embedder.embed(TEXT).shape == (1, 32)
        assert json.loads(memo.read_text(encoding="utf-8"))["result"] == "passed"

    def test_a_forced_check_that_fails_ends_the_trust(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Embedder.open(folder) as embedder:
            embedder.embed(TEXT)
            break_kernels(monkeypatch, reversed_values)
            assert embedder.embed(TEXT).shape == (1, 32)  # nothing tells it yet
            assert embedder.self_check().result == "failed"
            with pytest.raises(KernelError):
                embedder.embed(TEXT)

    def test_it_can_be_switched_off(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        break_kernels(monkeypatch, reversed_values)
        with Embedder.open(folder, self_check=False) as embedder:
            assert embedder.embed(TEXT).shape == (1, 32)
            assert embedder.self_check().result == "failed"
            assert embedder.embed(TEXT).shape == (1, 32)


class TestFallback:
    def test_the_fp32_graph_takes_over_with_a_warning(
        self, two_graphs: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_kernels(monkeypatch, reversed_values)
        with Embedder.open(two_graphs) as embedder, Embedder.open(tiny_model, self_check=False) as plain:
            with pytest.warns(
                FallbackWarning, match=r"wrong vectors with .*its FP32 graph fp32\.onnx is used"
            ):
                vectors = embedder.embed(TEXT)
            np.testing.assert_array_equal(vectors, reversed_values([plain.embed(TEXT)])[0])
            assert embedder.self_check().result == "fallback"
            embedder.embed(TEXT)  # warns once

    def test_a_good_machine_does_not_touch_it(
        self, two_graphs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (two_graphs / FALLBACK).unlink()
        done = count_checks(monkeypatch)
        with Embedder.open(two_graphs) as embedder:
            embedder.embed(TEXT)
        assert done == ["model.onnx"]

    def test_one_that_was_deleted_is_no_fallback(
        self, two_graphs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (two_graphs / FALLBACK).unlink()
        break_kernels(monkeypatch, reversed_values)
        with Embedder.open(two_graphs) as embedder, pytest.raises(KernelError, match=r"model\.onnx"):
            embedder.embed(TEXT)

    def test_one_that_is_wrong_too_is_refused(
        self, two_graphs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_kernels(monkeypatch, reversed_values, ("model.onnx", FALLBACK))
        with Embedder.open(two_graphs) as embedder, pytest.raises(KernelError, match=r"fp32\.onnx"):
            embedder.embed(TEXT)

    def test_a_warning_made_an_error_gives_no_vector(
        self, two_graphs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_kernels(monkeypatch, reversed_values)
        with Embedder.open(two_graphs) as embedder:
            for _ in range(2):
                with pytest.raises(FallbackWarning):
                    embedder.embed(TEXT)

    def test_the_graph_is_tried_again_by_the_next_embedder(
        self, two_graphs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as broken:
            break_kernels(broken, reversed_values)
            with Embedder.open(two_graphs) as embedder, pytest.warns(FallbackWarning):
                embedder.load()
        done = count_checks(monkeypatch)
        with Embedder.open(two_graphs) as embedder:
            embedder.load()
        assert done == ["model.onnx"]


class TestThreadsAndForks:
    def test_many_threads_check_once_and_all_get_vectors(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = count_checks(monkeypatch)
        start = threading.Barrier(8)

        def work(embedder: Embedder) -> Any:
            start.wait()
            return embedder.embed(TEXT)

        with Embedder.open(folder) as embedder, ThreadPoolExecutor(8) as pool:
            vectors = [job.result() for job in [pool.submit(work, embedder) for _ in range(8)]]
        assert done == ["model.onnx"]
        assert all((vector == vectors[0]).all() for vector in vectors)

    def test_many_threads_all_meet_the_failure(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        break_kernels(monkeypatch, reversed_values)
        with Embedder.open(folder) as embedder, ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(embedder.embed, TEXT) for _ in range(8)]
            assert all(isinstance(job.exception(), KernelError) for job in jobs)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.parametrize("state", ["new", "checked", "checking"])
    def test_a_forked_child_gives_the_same_vectors(
        self, folder: Path, state: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Embedder.open(folder) as embedder:
            if state == "checked":
                embedder.load()
            if state == "checking":
                embedder._engine._lock.acquire()  # as if another thread were in the middle of it
            status = in_fork(lambda: embedder.embed(TEXT).shape == (1, 32))
            if state == "checking":
                embedder._engine._lock.release()
            assert status == 0
            assert embedder.embed(TEXT).shape == (1, 32)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_meets_the_failure_too(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_kernels(monkeypatch, reversed_values)

        def refused(embedder: Embedder) -> bool:
            with pytest.raises(KernelError):
                embedder.embed(TEXT)
            return True

        with Embedder.open(folder) as embedder:
            assert refused(embedder)
            assert in_fork(lambda: refused(embedder)) == 0


def in_fork(call: Callable[[], bool]) -> int:
    """The exit status of a child that makes this call: 0 for true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal_after(30)
            status = 0 if call() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def signal_after(seconds: int) -> None:
    import signal

    signal.alarm(seconds)
