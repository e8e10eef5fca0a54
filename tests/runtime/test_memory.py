"""The memory model against measured peaks, and budgets that a whole process keeps."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import qingyu
from qingyu.errors import MemoryBudgetError
from qingyu.runtime.memory import (
    LOADING_BYTES,
    MEGABYTE,
    WINDOW_BYTES,
    WINDOWS,
    Plan,
    activation_bytes,
    plan,
    resident_bytes,
    unread_bytes,
    window_bytes,
)
from qingyu.runtime.spec import Architecture, read_spec

SMALL = Architecture("bert", 4, 512, 8, 2048, 21128, 512, "gelu", 1e-12)
SHAPES = [SMALL, Architecture("bert", 12, 384, 12, 1536, 34340, 512, "gelu", 1e-12)]


def planned(free: int, *, sizes=SMALL, workers=4, budget=4096, max_tokens=512) -> Plan:
    return plan(sizes, max_tokens=max_tokens, workers=workers, token_budget=budget, free_bytes=free)


def test_without_a_memory_budget_the_plan_is_what_was_asked_for():
    assert plan(SMALL, max_tokens=512, workers=3, token_budget=100, free_bytes=None) == Plan(3, 100)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("max_tokens", [64, 512])
def test_every_rectangle_of_a_plan_fits_at_once_in_all_workers(sizes, max_tokens):
    smallest = activation_bytes(sizes, 1, max_tokens) + WINDOW_BYTES
    for free in np.linspace(smallest, 40 * smallest, 60).astype(int).tolist():
        steps = planned(free, sizes=sizes, max_tokens=max_tokens)
        for tokens in (1, 2, 7, 63, 100, 257, 511, 512):
            if tokens <= max_tokens:
                rows = max(1, steps.token_budget // tokens)
                taken = steps.workers * activation_bytes(sizes, rows, tokens)
                assert taken <= free - WINDOW_BYTES, (free, steps, tokens)


def test_more_memory_never_plans_less_and_at_last_all_that_was_asked_for():
    smallest = activation_bytes(SMALL, 1, 512) + WINDOW_BYTES
    plans = [planned(smallest + n * 7 * MEGABYTE) for n in range(200)]
    assert plans[0] == Plan(1, 512)
    assert plans[-1] == Plan(4, 4096)
    assert all(a.workers <= b.workers for a, b in pairwise(plans))
    # With as many workers as before, the token budget does not fall either.
    pairs = [(a, b) for a, b in pairwise(plans) if a.workers == b.workers]
    assert all(a.token_budget <= b.token_budget for a, b in pairs)


def test_a_budget_asked_for_below_the_longest_text_is_kept():
    assert planned(1 << 40, budget=256) == Plan(4, 256)


def test_a_token_takes_no_less_in_a_longer_text():
    """On this rests that only rows of the longest text need to be looked at."""
    for sizes in SHAPES:
        each = [activation_bytes(sizes, 1, tokens) / tokens for tokens in range(1, 513)]
        assert each == sorted(each)


def test_a_budget_too_small_is_refused_with_the_figure_that_is_missing():
    needed = activation_bytes(SMALL, 1, 512) + window_bytes(WINDOWS[-1])
    with pytest.raises(MemoryBudgetError) as caught:
        planned(needed - 5 * MEGABYTE)
    text = "the memory budget is too small: expected 39 MB beside the loaded model, for texts of 512 tokens, "
    assert str(caught.value) == f"{text}found 33 MB. Raise max_memory_mb by 6 or use a smaller model."
    assert planned(needed) == Plan(1, 512, WINDOWS[-1])
    with pytest.raises(MemoryBudgetError, match=r"found none\. Raise max_memory_mb by 50 "):
        planned(-10 * MEGABYTE)
    assert LOADING_BYTES == MEGABYTE  # in both figures


def test_where_usual_windows_do_not_fit_one_text_at_a_time_is_run_in_the_largest_that_do():
    longest = activation_bytes(SMALL, 1, 512)
    for texts in WINDOWS[1:]:
        assert planned(longest + window_bytes(texts)) == Plan(1, 512, texts)
        assert planned(longest + window_bytes(texts), budget=256) == Plan(1, 256, texts)
    assert planned(longest + WINDOW_BYTES - 1).window < planned(longest + WINDOW_BYTES).window
    assert window_bytes(WINDOWS[0]) == WINDOW_BYTES


def test_scores_of_a_few_heads_at_a_time_take_their_share():
    for sizes in SHAPES:
        wide = 10 * sizes.hidden_size
        assert activation_bytes(sizes, 2, 512, heads=2) == 4 * 2 * 512 * max(
            wide + 3 * 2 * 512, 9 * sizes.hidden_size + 5 * sizes.intermediate_size // 2
        )
        assert activation_bytes(sizes, 2, 512, heads=99) == activation_bytes(sizes, 2, 512)


def test_what_a_mapped_file_may_still_take_is_what_was_not_read(tmp_path):
    path = tmp_path / "a file"
    path.write_bytes(bytes(8 * MEGABYTE))
    assert unread_bytes(path) == 8 * MEGABYTE
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs /proc/self/smaps")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        read = sum(mapped[n] for n in range(0, 3 * MEGABYTE, 4096))
        assert read == 0
        assert 4 * MEGABYTE <= unread_bytes(path) <= 5 * MEGABYTE


def test_resident_memory_is_that_of_this_process():
    before = resident_bytes()
    held = np.ones(64 * MEGABYTE, dtype=np.uint8)
    assert 60 * MEGABYTE < resident_bytes() - before < 80 * MEGABYTE
    assert held.nbytes == 64 * MEGABYTE


# Peaks are VmHWM: what getrusage gives begins with the peak of the process that starts the child.
PROGRAM_START = """
import ctypes, faulthandler, json, random, sys
from pathlib import Path

faulthandler.dump_traceback_later(150, exit=True)  # a child that hangs says where

def memory(field):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))
"""

RECTANGLES = """
import numpy as np
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import PROFILES, OnnxRuntimeEngine
from qingyu.runtime.spec import read_spec
import dataclasses

folder = Path(sys.argv[1])
spec = read_spec(folder)
engine = OnnxRuntimeEngine(folder, spec, threads=1)
engine.settings = dataclasses.replace(engine.settings, token_budget=1 << 20)  # nothing is given back
random = np.random.default_rng(1)

def batch(rows, tokens):
    ids = random.integers(200, 8000, (rows, tokens))
    return TokenBatch(ids, np.ones_like(ids))

engine.run(batch(1, 2), ("pooled",))
batches = [batch(*map(int, shape.split("x"))) for shape in sys.argv[2:]]
ctypes.CDLL(None).malloc_trim(0)  # or the run would be served from what loading freed
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS:")
for one in batches:
    engine.run(one, ("pooled",))
print(json.dumps(memory("VmHWM:") - before))
"""

EMBEDDING = """
from qingyu import Embedder
from qingyu.errors import MemoryBudgetError

words = "今天气真好外面阳光明媚股票大跌怎么修改登录密码人工智能正在变医疗教育和交通"
random = random.Random(3)
count, long = int(sys.argv[3]), int(sys.argv[4])
lengths = [int(min(900, random.lognormvariate(3.4, 1.1))) + 1 for _ in range(count)] + [700] * long
random.shuffle(lengths)
texts = ["".join(random.choices(words, k=length)) for length in lengths]
try:
    embedder = Embedder.open(sys.argv[1], max_memory_mb=int(sys.argv[2]), threads=2)
except MemoryBudgetError as error:
    print(json.dumps({"refused": str(error)}))
    raise SystemExit
loading = memory("VmHWM:")
Path("/proc/self/clear_refs").write_text("5")
embedder.embed(texts)
steps = embedder.plan
print(json.dumps({"loading": loading, "peak": memory("VmHWM:"), "plan": [steps.workers, steps.token_budget]}))
"""


def measured(program: str, *arguments: object):
    if not Path("/proc/self/clear_refs").exists() or shutil.which("ldd") is None:
        pytest.skip("needs Linux, whose kernel tells the peak of a process, and glibc")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(qingyu.__file__).parents[1]),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", PROGRAM_START + program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def e5_int8(e5_model, tmp_path_factory):
    from qingyu.quantize import quantize

    folder = tmp_path_factory.mktemp("models") / "e5-int8"
    quantize(e5_model, folder, texts=["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码"])
    return folder


@pytest.fixture(scope="session")
def bge_shape(shared_models, tmp_path_factory):
    """A model folder of the true bge-small-zh-v1.5 shape; what the weights are is no matter of memory."""
    pytest.importorskip("onnx")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    from qingyu.models.export import export

    checkpoint = tmp_path_factory.mktemp("checkpoints") / "bge"
    shutil.copytree(
        shared_models / "bge-small-zh-v1.5",
        checkpoint,
        ignore=shutil.ignore_patterns("golden"),
        copy_function=shutil.copyfile,
    )
    checkpoint.chmod(0o755)  # copied with the folder, which may be read-only
    save_file(
        bert_weights(json.loads((checkpoint / "config.json").read_text())), checkpoint / "model.safetensors"
    )
    folder = tmp_path_factory.mktemp("models") / "bge"
    export(checkpoint, folder)
    return folder


def bert_weights(config):
    random = np.random.default_rng(7)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    shapes = {f"embeddings.{name}_embeddings.weight": (config[size], hidden) for name, size in tables.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        linear = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (hidden, hidden)}
        linear |= {"intermediate.dense": (wide, hidden), "output.dense": (hidden, wide)}
        for name, shape in linear.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            shapes[f"{prefix}.{name}.bias"] = shape[:1]
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    weights = {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    for norm in norms:
        weights[f"{norm}.weight"] = np.ones(hidden, dtype=np.float32)
        weights[f"{norm}.bias"] = np.zeros(hidden, dtype=np.float32)
    return weights


MODELS = ("e5_model", "e5_int8", "bge_shape")
CORNERS = (("1x16",), ("4x128",), ("16x32",), ("64x8",), ("1x512",))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shapes", CORNERS, ids="-".join)
def test_a_run_of_the_usual_size_takes_no_more_than_the_formula(model, shapes, request):
    folder = request.getfixturevalue(model)
    grown = measured(RECTANGLES, folder, *shapes) * MEGABYTE
    rows, tokens = map(int, shapes[0].split("x"))
    # A twentieth of a megabyte: pages of Python itself, seen where a run takes next to nothing.
    assert grown <= activation_bytes(read_spec(folder).architecture, rows, tokens) + MEGABYTE // 20


MIXED = ("64x32", "4x512", "300x7", "5x401", "8x256", "11x180", "4x512")


@pytest.mark.parametrize("model", MODELS)
def test_runs_of_changing_shapes_take_up_to_the_formula_and_not_much_less(model, request):
    """2,048 tokens each, and the holes that changing shapes leave in onnxruntime's arena."""
    folder = request.getfixturevalue(model)
    grown = measured(RECTANGLES, folder, *MIXED) * MEGABYTE
    bound = activation_bytes(read_spec(folder).architecture, 4, 512)
    assert grown <= bound <= 1.5 * grown


@pytest.mark.parametrize(
    ("model", "budget", "workers"),
    [("e5_model", 400, 2), ("e5_int8", 225, 1), ("e5_int8", 600, 2)],
)
def test_a_process_stays_within_its_memory_budget(model, budget, workers, request):
    """Loading included, on 200 mixed texts and 20 of more than 512 tokens."""
    found = measured(EMBEDDING, request.getfixturevalue(model), budget, 200, 20)
    assert found["plan"][0] == workers
    assert max(found["loading"], found["peak"]) <= budget


@pytest.mark.parametrize("model", ["tiny_model", "tiny_int8", "e5_int8"])
def test_the_figure_in_a_refusal_is_enough_and_little_more(model, request):
    folder = request.getfixturevalue(model)
    measured(EMBEDDING, folder, 1000, 1, 0)  # the self-check is made once on a machine, and takes memory
    refused = measured(EMBEDDING, folder, 20, 10, 1)["refused"]
    missing = re.search(r"found none\. Raise max_memory_mb by (\d+) or", refused)
    assert missing
    smallest = 20 + int(missing[1])
    found = measured(EMBEDDING, folder, smallest, 100, 10)
    assert found["peak"] <= smallest
    assert "refused" in measured(EMBEDDING, folder, smallest - 3, 10, 1)
