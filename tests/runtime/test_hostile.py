"""Model folders made to do harm, and processes short of everything: each ends in one of our errors."""

from __future__ import annotations

import ast
import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qingyu.runtime
from qingyu.errors import CorruptFileError, ManifestError, QingyuError
from qingyu.runtime.cpu import saturates_byte_products
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.spec import ModelSpec

MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def edge(tiny_int8, tmp_path_factory):
    from qingyu.quantize.edge import add_edge

    folder = tmp_path_factory.mktemp("edge") / "tiny"
    shutil.copytree(tiny_int8, folder)
    add_edge(folder)
    return folder


def in_child(program: str, *arguments: object, timeout: float = 120) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trial(work: str, *arguments: object) -> dict[str, object]:
    command = [sys.executable, "-W", "ignore", "-m", "qingyu.bench.reliability_child", work]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("file", ["model.onnx", "model.ort"])
def test_damaged_files_are_refused_by_their_hash_and_crash_nothing_without_it(file, edge, tmp_path):
    """The 300 mutants of the scorecard's first row, in small."""
    shutil.copytree(edge, tmp_path / "m")
    # A CPU whose products saturate is given the graph, and the edge file is never opened there.
    end = "loaded" if file == "model.ort" and saturates_byte_products() else "refused"
    assert trial("mutants", tmp_path / "m", file, 9, "false") == {"ends": {end: 9}, "signals": []}
    assert trial("mutants", tmp_path / "m", file, 9, "true")["signals"] == []


def test_mutated_tokenizers_are_refused_or_read_and_no_panic_gets_out(edge, tmp_path):
    shutil.copytree(edge, tmp_path / "m")
    found = trial("tokenizers", tmp_path / "m", 40)
    assert found["bad"] == []
    assert found["ends"]["refused"] > 5


PLANTED = """
import pickle, sys
opened, classes = [], []
def watch(event, arguments):
    if event == "open":
        opened.append(str(arguments[0]))
    if event == "pickle.find_class":
        classes.append(arguments)
sys.addaudithook(watch)
from qingyu import Embedder
for profile in ("throughput", "edge"):
    with Embedder.open(sys.argv[1], profile=profile) as embedder:
        embedder.embed("今天")
print([name for name in opened if name.endswith((".bin", ".pt", ".pkl", ".npz", ".py"))
       and sys.argv[1] in name], classes)
"""


def test_pickles_and_code_beside_a_model_are_never_opened(edge, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(edge, folder)
    harm = b"cos\nsystem\n(S'touch harm'\ntR."
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "golden.npz", "__init__.py", "tokenizer.py"):
        (folder / name).write_bytes(harm)
    assert in_child(PLANTED, folder) == "[] []\n"
    assert not (folder / "harm").exists()


LARGE = """
import sys
from pathlib import Path
from qingyu import Embedder
from qingyu.errors import CorruptFileError
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
from qingyu.runtime.embedder import find_model
before = resident()
try:
    Embedder.open(sys.argv[1]).load()
except CorruptFileError as error:
    print(type(error).__name__, resident() - before < 64)
"""


@pytest.mark.parametrize("kind", ["sparse", "device", "directory"])
@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_files_without_end_are_refused_unread(kind, name, edge, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(edge, folder)
    (folder / name).unlink()
    if kind == "sparse":
        with (folder / name).open("wb") as stream:
            stream.truncate(2 << 30)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    assert in_child(LARGE, folder) == "CorruptFileError True\n"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(["../x", "/etc/passwd", "model.onnx", "\0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(value: object) -> list[tuple[object, object]]:
    pairs = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [(value, key) for key, _ in pairs] + [place for _, inner in pairs for place in places(inner)]


@MANY
@given(data=st.data())
def test_any_change_to_a_manifest_gives_a_spec_or_a_manifest_error(data, edge):
    document = copy.deepcopy(json.loads((edge / "qingyu.json").read_text(encoding="utf-8")))
    for _ in range(data.draw(st.integers(1, 3))):
        every = places(document)
        parent, key = every[data.draw(st.integers(0, len(every) - 1))]
        if data.draw(st.booleans()):
            parent[key] = data.draw(JSON)
        else:
            del parent[key]
    try:
        spec = ModelSpec.from_json(json.dumps(document))
    except ManifestError:
        return
    assert all("/" not in name and ".." not in name for name in spec.files)


@MANY
@given(st.text() | st.binary(max_size=100).map(lambda data: data.decode("latin-1")))
def test_any_text_as_a_manifest_is_a_manifest_error(text):
    with pytest.raises(ManifestError):
        ModelSpec.from_json(text)


CHANGES = {
    "remove": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "halve": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flip": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "grow": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "away": lambda path: (path.unlink(), path.symlink_to("/nonexistent")),
    "html": lambda path: path.write_text("<html>"),
    "pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(["qingyu.json", "tokenizer.json", "model.onnx"]),
        st.sampled_from(sorted(CHANGES)),
        min_size=1,
    )
)
def test_any_damage_to_a_folder_is_one_of_our_errors(tmp_path_factory, edge, changes):
    folder = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(edge, folder)
    for name, change in changes.items():
        CHANGES[change](folder / name)
    with pytest.raises(QingyuError) as caught:
        Embedder.open(folder).load()
    assert caught.value.remedy
    shutil.rmtree(folder)


FEW_FILES = """
import os, resource, sys
from qingyu import Embedder
from qingyu.errors import QingyuError
embedder = Embedder.open(sys.argv[1])
embedder.load()
embedder.close()
most = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (most - 1, most - 1))
try:
    Embedder.open(sys.argv[1]).load()
    print("opened")
except QingyuError as error:
    print(type(error).__name__)
"""


def test_no_more_open_files_are_one_of_our_errors(edge):
    assert in_child(FEW_FILES, edge) in ("CorruptFileError\n", "ManifestError\n", "ModelNotFoundError\n")


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from qingyu import Embedder
from qingyu.errors import MemoryBudgetError
with Embedder.open(sys.argv[1]) as other:  # what is imported and started for any model is there
    other.embed("今天")
# Reading a tokenizer.json comes first: where memory runs out in it, its Rust library ends the process.
embedder = Embedder.open("qingyu-mini-zh")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
try:
    embedder.load()
    print("opened")
except (MemoryBudgetError, MemoryError) as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(embedder.embed("今天").shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits are reliable on Linux only")
def test_too_little_memory_for_the_graph_is_one_of_our_errors_and_the_process_goes_on(edge):
    assert in_child(LITTLE_MEMORY, edge) == "MemoryBudgetError\n(1, 384)\n"


def test_nothing_in_the_runtime_reads_the_clock_on_the_wall():
    """A clock that jumps cannot end a wait early or late: all waiting is by the monotonic one. Logs tell the time."""
    wall = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
    found = []
    for path in Path(qingyu.runtime.__file__).parent.rglob("*.py"):
        if path.name == "telemetry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in wall and owner in ("time", "datetime", "datetime.datetime", "date"):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_opening_and_closing_many_times_leaves_little_behind(edge):
    """In small what the scorecard does 10,000 times; a session left behind each time would be 100 MB."""
    found = trial("leaks", edge, 40, 1000)
    assert found["open_kb_per_100"] < 5000
    assert found["call_kb_per_100"] < 60


SWAPS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from qingyu import Embedder
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024
def opened():
    new = Embedder.open("qingyu-mini-zh")
    new.embed(["今天天气真好，我们去公园散步，然后看电影。" * 6] * 4)
    return new
old, after = None, []
for _ in range(12):
    with ThreadPoolExecutor(1) as pool:  # another thread each time, as in a server
        new = pool.submit(opened).result()
    if old is not None:
        old.close()
    old = new
    after.append(resident())
print(after[-1] - after[2], after)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library gives memory back in its own way"
)
def test_models_that_are_replaced_again_and_again_leave_their_memory(tmp_path):
    """Each is opened before the one before it is closed; with what glibc keeps of them it was 102 MB."""
    grown = in_child(SWAPS)
    assert int(grown.split()[0]) < 64, grown


def test_a_folder_that_only_its_owner_reads_is_one_of_our_errors(edge, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    folder = tmp_path / "model"
    shutil.copytree(edge, folder)
    (folder / "model.onnx").chmod(0)
    with pytest.raises(CorruptFileError):
        Embedder.open(folder).load()
