"""Forking and spawning, each time in a fresh interpreter with a hard time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from qingyu.runtime.spec import Architecture, FileRecord, ModelSpec, sha256_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

COMMON = """
import os, pathlib, sys, threading, time, warnings
import numpy as np
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import ModelSpec

# Python 3.12 warns of every fork beside threads, which is what is tried here.
warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)

def opened(profile="throughput"):
    folder = pathlib.Path(sys.argv[1])
    spec = ModelSpec.from_json((folder / "qingyu.json").read_text())
    return OnnxRuntimeEngine(folder, spec, profile=profile)

batch = TokenBatch(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))

def vector(engine):
    return engine.run(batch, ("pooled",))[0].tobytes()

def child(work):
    '''Fork; the child does the work and leaves by sys.exit, within five seconds. The result is its exit code.'''
    pid = os.fork()
    if pid == 0:
        sys.exit(0 if work() else 3)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graph of a few kilobytes."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    folder = tmp_path_factory.mktemp("model")
    table = np.random.default_rng(3).standard_normal((20, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("ReduceSum", ["states", "axis"], ["pooled"], keepdims=0),
        helper.make_node("Identity", ["attention_mask"], ["unused"]),
    ]
    free = ["rows", "tokens"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, types.INT64, free) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("pooled", types.FLOAT, ["rows", 8])],
        [
            onnx.numpy_helper.from_array(table, "table"),
            onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(content.SerializeToString())
    (folder / "tokenizer.json").write_text("{}")
    names = ("model.onnx", "tokenizer.json")
    records = {n: FileRecord((folder / n).stat().st_size, sha256_of(folder / n)) for n in names}
    spec = ModelSpec(
        name="tiny",
        task="embedding",
        architecture=Architecture("bert", 1, 8, 2, 16, 20, 32, "gelu", 1e-12),
        dim=8,
        max_tokens=32,
        pooling="mean",
        normalize=True,
        lowercase=True,
        graph="model.onnx",
        inputs=("input_ids", "attention_mask"),
        outputs=("pooled",),
        precision="fp32",
        files=records,
    )
    (folder / "qingyu.json").write_text(spec.to_json())
    return folder


def program(model: Path, text: str, *, timeout: float = 60) -> list[str]:
    """The lines that a program prints after ``COMMON``; it must end well and write nothing to stderr."""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(text), str(model)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_child_leaves_after_the_parent_only_imported(model: Path) -> None:
    """With its telemetry on, onnxruntime makes this child hang: the door to the import is what is tested."""
    text = """
        from qingyu.runtime.onnxruntime_engine import import_onnxruntime
        import_onnxruntime()
        print(*[child(lambda: True) for _ in range(10)])
    """
    assert program(model, text) == ["0"] * 10


@pytest.mark.parametrize("profile", ["throughput", "latency", "edge"])
def test_a_child_runs_on_a_session_of_its_own_and_leaves(model: Path, profile: str) -> None:
    text = f"""
        engine = opened({profile!r})
        good, session = vector(engine), engine._session

        def work():
            assert engine._session is None
            same = vector(engine) == good and engine._session is not session
            engine.close()
            return same

        print(*[child(work) for _ in range(10)])
        assert engine._session is session and vector(engine) == good
        engine.close()
    """
    assert program(model, text) == ["0"] * 10


@pytest.mark.parametrize("profile", ["throughput", "latency"])
def test_a_fork_while_other_threads_run_neither_hangs_nor_crashes(model: Path, profile: str) -> None:
    text = f"""
        engine = opened({profile!r})
        good, stop, ran = vector(engine), threading.Event(), []

        def busy():
            while not stop.is_set():
                assert vector(engine) == good
                ran.append(1)

        threads = [threading.Thread(target=busy) for _ in range(3)]
        [thread.start() for thread in threads]
        codes = []
        for _ in range(10):
            before = len(ran)
            codes.append(child(lambda: vector(engine) == good))
            while len(ran) == before:
                time.sleep(0.001)  # the parent's threads run on
        stop.set()
        [thread.join() for thread in threads]
        engine.close()
        print(*codes)
    """
    assert program(model, text) == ["0"] * 10


def test_a_fork_while_another_thread_opens_and_closes_neither_hangs_nor_crashes(model: Path) -> None:
    text = """
        stop, engine = threading.Event(), opened()
        good = vector(engine)

        def busy():
            while not stop.is_set():
                with opened() as other:
                    assert vector(other) == good

        threads = [threading.Thread(target=busy) for _ in range(2)]
        [thread.start() for thread in threads]
        print(*[child(lambda: vector(engine) == good) for _ in range(10)])
        stop.set()
        [thread.join() for thread in threads]
    """
    assert program(model, text) == ["0"] * 10


def test_a_fork_in_the_middle_of_a_run_leaves_the_child_free(model: Path) -> None:
    """The child's engine counts no runs of threads that it does not have, so its close does not wait."""
    text = """
        engine = opened()
        good, entered, leave = vector(engine), threading.Event(), threading.Event()
        real = engine._session

        class Slow:
            def run(self, *arguments):
                entered.set()
                leave.wait(30)
                return real.run(*arguments)

        engine._session = Slow()
        thread = threading.Thread(target=vector, args=(engine,))
        thread.start()
        entered.wait(30)

        def work():
            same = vector(engine) == good
            engine.close()
            return same

        def locked():
            with engine._idle:
                return child(work)

        print(child(work), child(lambda: engine.close() is None), locked())
        leave.set()
        thread.join()
        engine.close()
    """
    assert program(model, text) == ["0", "0", "0"]


def test_a_child_never_destroys_the_session_it_inherited(model: Path) -> None:
    text = """
        engine = opened("latency")

        class Canary:
            def __del__(self):
                os.write(1, b"destroyed ")

        engine.open()
        real, engine._session = engine._session, Canary()

        def work():
            engine.open()
            engine.close()
            return True

        print(child(work), child(lambda: True), flush=True)
        engine._session = None
    """
    # In the parent it is destroyed, once.
    assert program(model, text) == ["0", "0", "destroyed"]


def test_a_fork_that_python_does_not_know_of_is_noticed(model: Path) -> None:
    """A server written in C may fork without running Python's hooks: the process id tells."""
    text = """
        engine = opened()
        good, inherited = vector(engine), engine._session
        engine._pid = -1
        assert vector(engine) == good
        print(engine._session is not inherited, engine._pid == os.getpid())
    """
    assert program(model, text) == ["True", "True"]


def test_children_of_children_run_too(model: Path) -> None:
    text = """
        engine = opened()
        good = vector(engine)
        print(child(lambda: vector(engine) == good and child(lambda: vector(engine) == good) == 0))
    """
    assert program(model, text) == ["0"]


def test_a_closed_engine_stays_closed_in_the_child(model: Path) -> None:
    text = """
        from qingyu.errors import ClosedError
        engine = opened()
        vector(engine)
        engine.close()

        def work():
            try:
                vector(engine)
            except ClosedError:
                return True

        print(child(work))
    """
    assert program(model, text) == ["0"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_gives_the_same_vectors_by_every_start_method(model: Path, method: str) -> None:
    script = model / f"main_{method}.py"
    script.write_text(
        COMMON
        + textwrap.dedent(f"""
        def work(engine):
            return vector(engine)

        if __name__ == "__main__":
            import multiprocessing
            engine = opened()
            good = vector(engine)
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                print(pool.map(work, [engine] * 4) == [good] * 4)
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script), str(model)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)
