"""The rows of the reliability scorecard: what is promised, how it is tried, what the figure must be.

Not here: the command line and the document (``reliability``), and what runs in child processes
(``reliability_child``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qingyu.bench import cold_start, memory_budgets, sandbox
from qingyu.errors import OperatorError
from qingyu.runtime.graph_engine import PROFILES
from qingyu.runtime.serverless.app_bundle import Machine, bundle_app

__all__ = ["ROWS", "Found", "Row", "Setting", "missing"]

SECONDS = 1800
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")


@dataclass(frozen=True)
class Setting:
    """What the rows are tried with.

    ``model`` is an INT8 folder with an edge file, ``tiny`` a very small one, ``fp32`` one of float32 or ``None``,
    ``scratch`` a folder to work in, ``checkout`` where tests/ lies, and ``wheels`` a folder of aarch64 wheels, if any.
    """

    model: Path
    tiny: Path
    fp32: Path | None
    scratch: Path
    checkout: Path
    wheels: Path | None = None
    quick: bool = False


@dataclass(frozen=True)
class Found:
    """A row's result: the figure as text, whether the bar is met (``None``: not tried, and why), and facts."""

    figure: str
    met: bool | None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the scorecard. ``kind``: a gate fails when its bar is not met; a report is for people."""

    number: int
    promise: str
    how: str
    bar: str
    kind: Literal["gate", "report"]
    run: Callable[[Setting], Found]


ROWS: dict[int, Row] = {}


def row(
    number: int, promise: str, how: str, bar: str, kind: Literal["gate", "report"] = "gate"
) -> Callable[[Callable[[Setting], Found]], Callable[[Setting], Found]]:
    """Registers a function as a row."""

    def register(run: Callable[[Setting], Found]) -> Callable[[Setting], Found]:
        ROWS[number] = Row(number, promise, how, bar, kind, run)
        return run

    return register


def missing(reason: str) -> Found:
    """The result of a row that cannot be tried here."""
    return Found(f"not tried: {reason}", None)


def child(work: str, *arguments: object, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """What a function of ``reliability_child`` prints."""
    command = [*prefix, sys.executable, "-W", "ignore", "-m", "qingyu.bench.reliability_child", work]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise OperatorError(
            f"the trial {work} did not end",
            expected="a result",
            found="".join(last) or "nothing",
            remedy="See above.",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tests(setting: Setting, *names: str) -> Found:
    """The result of tests of this checkout: all must pass, and at least one must run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(
        command, cwd=setting.checkout, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    last = [
        line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error|skipped)", line)
    ][-1:]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", "".join(last))}
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no tests ran"
    passed = counts.get("passed", 0)
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    return Found(f"tests: {text}", None if not passed and not wrong else not wrong, {"tests": counts})


@row(
    1,
    "A damaged model never loads",
    "300 mutants (7 truncations, then 1 to 8 flipped bits anywhere), half of the ONNX graph and half of the .ort file, "
    "each opened by a child process; and again with the damaged file's own hash in the manifest",
    "300 refused, 0 crashed, 0 loaded; with a forged hash 0 signals",
)
def damaged_models(setting: Setting) -> Found:
    half = 15 if setting.quick else 150
    facts = {}
    for signed in ("false", "true"):
        for file in ("model.onnx", "model.ort"):
            copy = setting.scratch / "mutants"
            shutil.copytree(setting.model if signed == "false" else setting.tiny, copy)
            facts[f"{file}, {'forged hash' if signed == 'true' else 'as it is'}"] = child(
                "mutants", copy, file, half, signed
            )
            shutil.rmtree(copy)
    honest = [one["ends"] for name, one in facts.items() if "as it is" in name]
    forged = [one["ends"] for name, one in facts.items() if "forged" in name]
    refused = sum(ends.get("refused", 0) for ends in honest)
    loaded = sum(ends.get("loaded", 0) for ends in honest)
    crashed = 2 * half - refused - loaded
    signals = sum(len(one["signals"]) for name, one in facts.items() if "forged" in name)
    past = {end: sum(ends.get(end, 0) for ends in forged) for end in ("refused", "loaded")}
    figure = (
        f"{refused} refused, {crashed} crashed, {loaded} loaded; forged hash: {past['refused']} refused, "
        f"{past['loaded']} loaded, {signals} signals"
    )
    return Found(figure, (refused, crashed, loaded, signals) == (2 * half, 0, 0, 0), facts)


@row(
    2,
    "A hostile model folder reads nothing outside itself",
    "tests of external data, links, pickles, archives and paths; 300 mutated tokenizer.json in child processes",
    "0 escapes, 0 panics leaked",
)
def hostile_folders(setting: Setting) -> Found:
    copy = setting.scratch / "tokenizers"
    shutil.copytree(setting.tiny, copy)
    mutated = child("tokenizers", copy, 40 if setting.quick else 300)
    shutil.rmtree(copy)
    found = tests(
        setting,
        "tests/runtime/test_onnxruntime_engine.py::TestGraph",
        "tests/runtime/test_tokenizer.py",
        "tests/runtime/test_bundle.py",
        "tests/runtime/test_hostile.py",
        "tests/models/test_weights.py",
    )
    figure = f"{found.figure}; mutated tokenizers: {_counted(mutated['ends'])}"
    return Found(figure, bool(found.met) and not mutated["bad"], {**found.facts, "mutated": mutated})


def _counted(ends: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))


@row(
    3,
    "Nothing leaves the machine",
    "strace of all threads of a process that imports, opens, embeds, waits a second and closes",
    "0 sockets, 0 files written outside the cache",
)
def traced(setting: Setting) -> Found:
    if shutil.which("strace") is None:
        return missing("needs strace")
    trace, home = setting.scratch / "trace", setting.scratch / "home"
    prefix = [
        "strace",
        "-f",
        "-o",
        str(trace),
        "-e",
        "trace=socket,connect,openat,open,creat,mkdir,rename,unlink",
    ]
    with _environment(QINGYU_HOME=str(home), HOME=str(setting.scratch / "user"), PYTHONDONTWRITEBYTECODE="1"):
        os.environ.pop("ORT_DISABLE_TELEMETRY", None)
        child("lifetime", setting.model, prefix=prefix)
    lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    sockets = [line for line in lines if re.search(r"\b(socket|connect)\(", line)]
    writes = [
        line for line in lines if re.search(r"O_WRONLY|O_RDWR|O_CREAT|\b(creat|mkdir|rename|unlink)\(", line)
    ]
    outside = [
        line for line in writes if str(home) not in line and "/dev/null" not in line and " = -1 " not in line
    ]
    figure = f"{len(sockets)} sockets, {len(outside)} files written outside the cache"
    return Found(figure, not sockets and not outside, {"calls": len(lines), "outside": outside[:5]})


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@row(
    4,
    "The cache survives kills",
    "`qingyu pull` from a loopback hub, killed (kill -9) after a random time; then run again, and the model opened",
    "100 of 100 good restarts",
)
def killed_pulls(setting: Setting) -> Found:
    count = 5 if setting.quick else 100
    found = _in_checkout(setting, KILLS, str(count))
    if isinstance(found, Found):
        return found
    figure = f"{found['good']} of {count} good restarts; {found['killed']} were killed before their end"
    return Found(figure, found["good"] == count and found["killed"] > 0, found)


# Needs tests/support/hub.py, the loopback hub, and so a checkout. $1 is how many.
KILLS = """
import importlib.util, json, os, pathlib, random, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
checkout, tiny, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
spec = importlib.util.spec_from_file_location("support_hub", checkout / "tests" / "support" / "hub.py")
module = importlib.util.module_from_spec(spec)
sys.modules["support_hub"] = module
spec.loader.exec_module(module)
server = module.Hub("someone/tiny-zh", tiny)
for name in ("HF_ENDPOINT", "QINGYU_MIRROR", "MODELSCOPE_ENDPOINT"):
    os.environ[name] = server.url
os.environ |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "NO_PROXY": "127.0.0.1"}
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "QINGYU_CATALOGUE"):
    os.environ.pop(name, None)
pull = [sys.executable, "-W", "ignore", "-m", "qingyu", "pull", "someone/tiny-zh", "--recipe", "fp32"]
def run(home, **more):
    return subprocess.Popen(pull, env={**os.environ, "QINGYU_HOME": home}, stdout=-3, stderr=-1, text=True)
source = random.Random(11)
with tempfile.TemporaryDirectory() as home:
    start = time.monotonic()
    first = run(home)
    first.communicate()
    whole = time.monotonic() - start
    assert first.returncode == 0
probe = "import sys; from qingyu import Embedder; print(Embedder.open('tiny-zh').embed('今天').shape)"
def restart(number, delay):
    with tempfile.TemporaryDirectory() as home:
        process = run(home)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        again = run(home)
        error = again.communicate()[1]
        opened = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", probe], env={**os.environ, "QINGYU_HOME": home},
            capture_output=True, text=True,
        )
        parts = [str(p) for p in pathlib.Path(home).rglob("*.part")]
        sound = again.returncode == 0 and opened.stdout.startswith("(1,") and not parts
        said = None if sound else [number, error[-300:], opened.stderr[-300:], parts]
        return process.returncode == -signal.SIGKILL, said
delays = [source.uniform(0.2, 1.0) * whole for _ in range(count)]
with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # each has a home of its own
    found = list(pool.map(restart, range(count), delays))
killed = sum(one for one, _ in found)
trouble = [said for _, said in found if said is not None]
good = count - len(trouble)
server.close()
print(json.dumps({"good": good, "killed": killed, "seconds_of_one": round(whole, 2), "trouble": trouble[:3]}))
"""


def _in_checkout(setting: Setting, program: str, *arguments: str) -> dict[str, Any] | Found:
    if not (setting.checkout / "tests" / "support" / "hub.py").is_file():
        return missing("needs a checkout, whose tests hold the loopback hub")
    from qingyu.bench.tiny import tiny_checkpoint

    checkpoint = setting.scratch / "tiny-checkpoint"
    if not checkpoint.is_dir():
        tiny_checkpoint(checkpoint)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        str(setting.checkout),
        str(checkpoint),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        return Found(f"did not end: {done.stderr.strip().splitlines()[-1]}", False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@row(
    5,
    "N processes can start cold together",
    "8 processes pull one model at once from a loopback hub; again with file locks that do nothing",
    "8 of 8 succeed, 1 full copy",
)
def cold_together(setting: Setting) -> Found:
    return tests(
        setting,
        "tests/models/test_cache.py::test_eight_processes_at_once_give_one_good_copy",
        "tests/cli/test_pull.py::test_eight_pulls_at_once_all_succeed_and_one_makes_the_model",
    )


@row(
    6,
    "Full or read-only disks give a clear error",
    "a model written to a tmpfs of 1 MB; tests of full disks and unwritable places; functions in a read-only root",
    "all typed, 0 partial files",
)
def full_disks(setting: Setting) -> Found:
    found = tests(
        setting,
        "tests/models/test_sources.py::test_a_full_disk_is_said_and_leaves_nothing",
        "tests/models/test_sources.py::test_a_disk_that_refuses_in_the_middle_is_said_and_leaves_nothing",
        "tests/models/test_cache.py::test_a_home_that_cannot_be_written_is_one_typed_error",
        "tests/quantize/test_pipeline.py::test_a_full_disk_is_said_and_leaves_nothing",
        "tests/quantize/test_edge.py::test_a_full_disk_is_an_output_error",
        "tests/bench/test_sandbox.py",
    )
    if sandbox.why_not() is not None:
        return Found(f"{found.figure}; no tmpfs could be mounted", found.met, found.facts)
    place = setting.scratch / "small"
    place.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size=1m none "{place}" && exec "$@"'
    real = child("no_room", setting.model, place, prefix=["unshare", "--mount", "sh", "-c", mount, "sh"])
    figure = f"{found.figure}; on a full tmpfs {real['error']}, {len(real['left'])} files left"
    met = found.met is not False and real == {"error": "OutputError", "left": []}
    return Found(figure, met, {**found.facts, "tmpfs": real})


@row(
    7,
    "Tokens equal the reference for every Han character and 100,000 fuzzed strings",
    "three tokenizers against those of transformers: every Han character alone and between letters, mixed texts, and "
    "random strings over all planes",
    "0 differences (the 256 named ones are of BERT's own Python code)",
)
def tokens(setting: Setting) -> Found:
    return tests(setting, "tests/runtime/test_tokenizer_reference.py")


@row(
    8,
    "Any text is safe in bounded time",
    "10 MB of Chinese, letters, spaces, NUL and English words; processor time and peak of memory of encoding",
    "Chinese < 50 ms; every kind < 32 MB",
)
def long_texts(setting: Setting) -> Found:
    found = child("long_texts", setting.model)
    figure = ", ".join(f"{kind} {ms:g} ms {mb:g} MB" for kind, (ms, mb) in found.items())
    met = found["Chinese"][0] < 50 and all(mb < 32 for _, mb in found.values())
    return Found(figure, met, found)


@row(
    9,
    "Streams are constant-memory",
    "a stream of 1,000,000 short texts; peak of resident memory after 10,000 and at the end",
    "growth < 20 MB",
)
def streams(setting: Setting) -> Found:
    count = 20_000 if setting.quick else 1_000_000
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "qingyu.bench.stream_memory",
        str(setting.tiny),
        "--texts",
        str(count),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=True)
    found = json.loads(done.stdout)
    figure = f"{count:,} texts: {found['growth_mb']} MB more than after 10,000 ({found['peak_mb']} MB)"
    return Found(figure, found["growth_mb"] < 20, found)


@row(
    10,
    "Same text, same vector",
    "texts of 1 to 900 characters alone, together, and shuffled among longer ones",
    "FP32: within 1e-6; INT8: cosine >= 0.9999",
)
def same_vector(setting: Setting) -> Found:
    count = 60 if setting.quick else 400
    int8 = child("same_vector", setting.model, count)
    facts = {"int8": int8}
    figure, met = f"INT8 {int8['min_cosine']:.7f}", int8["min_cosine"] >= 0.9999
    fp32 = child("same_vector", setting.fp32, count) if setting.fp32 is not None else None
    if fp32 is not None:
        facts["fp32"] = fp32
        figure, met = f"FP32 {fp32['max_abs']:.1e}; {figure}", met and fp32["max_abs"] <= 1e-6
    return Found(figure, met, facts)


@row(
    11,
    "Same vector on every CPU class",
    "`python -m qingyu.bench.emulate --pairs`, whose figures are in cpus.json: emulated CPUs, and 500 pairs of STS-B",
    "mean cosine to FP32 >= 0.999; Spearman within 0.2 points of this machine's",
)
def cpu_classes(setting: Setting) -> Found:
    path = setting.checkout / "docs" / "cpus.json"
    if not path.is_file():
        return missing("needs docs/cpus.json of a checkout")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    cosines = [one["mean_to_fp32"] for one in rows if one["cpu"] != "native"]
    cpus = {one["cpu"] for one in rows} - {"native"}
    if not all(cosines):
        return Found("a CPU could not be emulated", False)
    figure = f"least mean cosine {min(cosines):.5f} on {len(cpus)} emulated CPUs"
    changes = _spearman_changes(rows)
    figure += (
        f"; Spearman changes by {max(changes):.2f} points at most on {len(changes)} of them"
        if changes
        else ""
    )
    return Found(f"{figure}, from docs/cpus.json", min(cosines) >= 0.999 and max(changes, default=0.0) <= 0.2)


def _spearman_changes(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """In points, from the same model here; of the rows that have pairs."""
    measured = [one for one in rows if one.get("spearman") is not None]
    here = {one["model"]: one["spearman"] for one in measured if one["cpu"] == "native"}
    return [100 * abs(one["spearman"] - here[one["model"]]) for one in measured if one["cpu"] != "native"]


@row(
    12,
    "The runtime notices a CPU that computes wrongly",
    "tests with altered kernels and golden vectors; processor time of the self-check, without loading",
    "caught; < 30 ms",
)
def wrong_cpu(setting: Setting) -> Found:
    found = tests(setting, "tests/runtime/test_selfcheck.py", "tests/runtime/test_selftest.py")
    cost = child("self_check", setting.model)
    figure = f"{found.figure}; self-check of {cost['texts']} texts {cost['ms']:g} ms"
    return Found(figure, bool(found.met) and cost["ms"] < 30, {**found.facts, "self_check": cost})


@row(
    13,
    "Fork-safe under gunicorn",
    "gunicorn --preload with a loaded model, 2 workers: requests, HUP, requests, TERM, 20 times; forks in a process "
    "whose other thread embeds",
    "0 hangs, 0 crashes, exit < 2 s",
)
def forks(setting: Setting) -> Found:
    repeats = 3 if setting.quick else 20
    plain = child("forks", setting.model, repeats)
    try:
        gunicorn = version("gunicorn")
    except PackageNotFoundError:
        return missing("needs gunicorn")
    runs = [_gunicorn(setting) for _ in range(repeats)]
    slowest = max(run["exit_s"] for run in runs)
    bad = [run for run in runs if run["trouble"]]
    figure = (
        f"gunicorn {gunicorn}: {repeats - len(bad)} of {repeats} sound, slowest exit {slowest:.2f} s; "
        f"forks: {_counted(plain['ends'])}, slowest {plain['slowest_s']} s"
    )
    met = not bad and slowest < 2 and plain["ends"] == {"exit 0": repeats} and plain["slowest_s"] < 2
    return Found(figure, met, {"trouble": [run["trouble"] for run in bad], "forks": plain})


GUNICORN_APP = """
from qingyu.runtime.serverless.handlers import fc_handler as application, prepare
prepare()
"""


def _gunicorn(setting: Setting) -> dict[str, Any]:
    """One life of a server that loads its model before it forks: how long it took to end, and what went wrong."""
    place = setting.scratch / "gunicorn"
    place.mkdir(exist_ok=True)
    (place / "app.py").write_text(GUNICORN_APP, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "gunicorn",
        "--preload",
        "-w",
        "2",
        "--log-level",
        "warning",
    ]
    command += [
        "--bind",
        f"127.0.0.1:{port}",
        "--chdir",
        str(place),
        "--graceful-timeout",
        "10",
        "app:application",
    ]
    environment = {**os.environ, "QINGYU_MODEL": str(setting.model), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    server = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    trouble: list[str] = []
    try:
        for change in (None, signal.SIGHUP):
            if change is not None:
                server.send_signal(change)
                time.sleep(0.5)
            trouble += [text for text in (_ask(port) for _ in range(4)) if text]
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=20)
        took = time.monotonic() - start
    except subprocess.TimeoutExpired:
        took = 20.0
        trouble.append("hangs")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        said = server.communicate()[1]
    ends = server.returncode in (0, -signal.SIGKILL)
    trouble += [] if ends else [f"exit {server.returncode}: {said[-200:]}"]
    trouble += [
        line for line in said.splitlines() if "SIGSEGV" in line or "SIGABRT" in line or "SIGKILL" in line
    ]
    return {"exit_s": took, "trouble": trouble}


def _ask(port: int) -> str | None:
    """What was wrong with an answer; ``None`` for a good one. A server that is not up yet is asked again."""
    body = json.dumps({"inputs": ["今天天气真好"]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/embed", body, {"content-type": "application/json"}
    )
    deadline = time.monotonic() + 30
    found = _ask_once(request)
    while found is not None and time.monotonic() < deadline:
        time.sleep(0.1)
        found = _ask_once(request)
    return found


def _ask_once(request: urllib.request.Request) -> str | None:
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return None if answer.status == 200 else f"status {answer.status}"
    except OSError as error:
        return f"no answer: {error}"


@row(
    14,
    "Thread-safe",
    "16 threads x 200 calls on one embedder, three times; against the same calls in turn",
    "0 different bits; speed >= 0.9 of serial",
)
def threads(setting: Setting) -> Found:
    found = child("threads", setting.model, 1 if setting.quick else 3)
    figure = f"{found['different']} of {found['calls']:,} vectors differ; {found['speed_ratio']} times serial speed"
    return Found(figure, found["different"] == 0 and found["speed_ratio"] >= 0.9, found)


@row(
    20,
    "Obeys container limits",
    "a cgroup v1 with a quota of 0.5, 1 and 1.5 CPUs: threads, throttled periods, latency against two threads",
    "1, 1 and 2 threads; throttled < 20 % of periods",
)
def quotas(setting: Setting) -> Found:
    group = CPU_GROUPS / f"qingyu-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("50000", encoding="ascii")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        return missing(f"needs a writable cgroup v1 CPU controller: {error.strerror}")
    facts: dict[str, Any] = {}
    try:
        for share in (0.5, 1.0, 1.5):
            (group / "cpu.cfs_quota_us").write_text(str(int(share * 100_000)), encoding="ascii")
            facts[f"{share:g} CPU"] = child("quota", setting.model, group, 0)
            facts[f"{share:g} CPU, 2 threads"] = child("quota", setting.model, group, 2)
    finally:
        time.sleep(0.2)
        group.rmdir()
    ours = [facts[f"{share} CPU"] for share in ("0.5", "1", "1.5")]
    chosen = [one["threads"] for one in ours]
    throttled = [one["throttled"] for one in ours]
    naive = [facts[f"{share} CPU, 2 threads"]["p99_ms"] for share in ("0.5", "1", "1.5")]
    figure = (
        f"threads {chosen}, throttled {throttled}, p99 {[one['p99_ms'] for one in ours]} ms "
        f"(two threads: {naive} ms)"
    )
    return Found(figure, chosen == [1, 1, 2] and all(one < 0.2 for one in throttled), facts)


@row(
    21,
    "Memory as documented",
    "budgets of 64 to 256 MB with the edge profile: peak against budget; resident memory after one large batch; tests "
    "of the formula on three models",
    "at least 3 of the 5 budgets accepted; <= 1.0 of them; base + 30 MB",
)
def memory(setting: Setting) -> Found:
    rows = [memory_budgets.row_of(setting.model, budget) for budget in (64, 96, 128, 192, 256)]
    taken = [one for one in rows if "refused" not in one]
    after = child("after_large", setting.model)
    found = tests(setting, "tests/runtime/test_memory.py")
    kept = [str(one["budget_mb"]) for one in taken]
    refused = [str(one["budget_mb"]) for one in rows if "refused" in one]
    ratio = max((one["peak_mb"] / one["budget_mb"] for one in taken), default=0.0)
    grown = after["after_mb"] - after["base_mb"]
    figure = (
        f"peak {ratio:.2f} of the budget at most ({', '.join(kept)} MB kept, {', '.join(refused)} refused); "
        f"after the large batch base + {grown:.0f} MB; {found.figure}"
    )
    met = len(taken) >= 3 and ratio <= 1 and grown <= 30 and found.met is not False
    return Found(figure, met, {"budgets": rows, "after_large": after, **found.facts})


@row(
    22,
    "Fast cold start",
    "20 fresh processes, warm page cache, from start to first vector; private memory over that of the imports",
    "median <= 250 ms and <= 40 MB private with the edge profile",
    "report",
)
def cold(setting: Setting) -> Found:
    found = cold_start.measure(setting.model, profile="edge", runs=5 if setting.quick else 20)
    total = found["total_ms"]
    figure = f"median {total['median']} ms, p95 {total['p95']} ms, {found['private_mb']} MB private"
    return Found(figure, total["median"] <= 250 and found["private_mb"] <= 40, found)


@row(
    23,
    "Fits the small platforms",
    "`qingyu bundle-app` for each target, of the model in the package; functions then run in a read-only sandbox",
    "<= 130 MB unzipped",
)
def bundles(setting: Setting) -> Found:
    sizes: dict[str, float] = {}
    facts: dict[str, Any] = {}
    sound = True
    for target in ("lambda", "scf", "fc", "pi"):
        place = setting.scratch / f"bundle-{target}"
        wheels = setting.wheels if target == "pi" else None
        machine = Machine("aarch64", (3, 11)) if wheels is not None else None
        made = bundle_app(setting.model, place, target, wheels=wheels, machine=machine)
        sizes[f"{target} ({made.machine.name})"] = round(made.unpacked_bytes / 1e6, 1)
        if made.handler is not None and sandbox.why_not() is None:
            facts[target] = sandbox.measure(place)
            sound = sound and facts[target]["sound"]
        shutil.rmtree(place)
    figure = ", ".join(f"{target} {size} MB" for target, size in sizes.items())
    figure += f"; {len(facts)} of 3 functions ran in the sandbox"
    return Found(figure, sound and max(sizes.values()) <= 130, {"mb": sizes, "sandbox": facts})


@row(
    24,
    "Cheap when idle",
    "with each profile 1 and 10 texts of 30 tokens a second for 30 seconds in one process, in turns with the same "
    "texts without a pause; again with 128 tokens; and none",
    "<= 1.3 times pure compute; < 0.1 % of a CPU at 0",
)
def idle(setting: Setting) -> Found:
    seconds = 5 if setting.quick else 30
    sizes = (28, 126)  # characters: two tokens less
    rests = [child("idle", setting.model, 0, seconds, profile, sizes[0]) for profile in PROFILES]
    rows = [
        child("idle", setting.model, rate, seconds, profile, size)
        for size in sizes
        for profile in PROFILES
        for rate in (1, 10)
    ]
    figure = "; ".join(f"{size + 2} tokens: {_times_pure(rows, size)}" for size in sizes)
    resting = max(one["cpu_percent"] for one in rests)
    met = max(map(_ratio, rows)) <= 1.3 and resting < 0.1
    figure = f"times pure compute at 1/s and at 10/s: {figure}; {resting:g} % of a CPU at rest"
    return Found(figure, met, {"rates": [*rests, *rows]})


def _times_pure(rows: Sequence[Mapping[str, Any]], characters: int) -> str:
    some = [one for one in rows if one["characters"] == characters]
    ratios = {name: [_ratio(one) for one in some if one["profile"] == name] for name in PROFILES}
    return ", ".join(f"{name} {slow:.2f} and {fast:.2f}" for name, (slow, fast) in ratios.items())


def _ratio(one: Mapping[str, Any]) -> float:
    return float(one["cpu_ms"] / one["pure_ms"])
