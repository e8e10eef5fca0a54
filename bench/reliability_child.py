"""What the rows of the reliability scorecard do in processes of their own, so that a crash is a figure.

    python -m qingyu.bench.reliability_child WORK ARGUMENTS

``qingyu.bench.reliability`` starts it; WORK is the name of a function here, which prints one JSON line.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from qingyu.errors import QingyuError
from qingyu.runtime import onnxruntime_engine
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.graph_engine import Profile
from qingyu.runtime.onnxruntime_engine import import_onnxruntime
from qingyu.runtime.spec import MANIFEST, FileRecord, read_spec, sha256_of
from qingyu.runtime.tokenizer import Tokenizer
from qingyu.runtime.vectors import cosine

__all__ = ["main"]

WORDS = "今天气真好外面阳光明媚股票大跌怎么修改登录密码人工智能正在变医疗教育和交通"
TEXTS = ("今天天气真好", "怎么修改登录密码？", "iPhone15 Pro 的电池能用多久")
HANG = 20  # seconds after which a child counts as hanging
# Exit codes of forked children.
TYPED, LOADED, LEAKED = 10, 11, 12
ENDS = {TYPED: "refused", LOADED: "loaded", LEAKED: "leaked"}


def memory(field: str) -> float:
    """A size of this process in MB, as the kernel names it: VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forked(work: Callable[[], object]) -> str:
    """How a forked child ends that does this work: refused (one of our errors), loaded, leaked, crashed or hangs."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics are printed by the library itself
        os._exit(_outcome(work))
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return ENDS.get(code, f"crashed ({code})")
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def _outcome(work: Callable[[], object]) -> int:
    try:
        work()
    except QingyuError:
        return TYPED
    except BaseException:  # noqa: BLE001 - a panic is none of Exception's
        return LEAKED
    return LOADED


def mutants(folder: str, file: str, count: str, signed: str) -> dict[str, Any]:
    """Ends of children that open a model of which one file is truncated or has flipped bits.

    ``signed`` is "true" for a manifest that has the hash of the damaged file, as a forger would write it.
    """
    import_onnxruntime()
    place, profile = Path(folder), "edge" if file.endswith(".ort") else "throughput"
    good = (place / file).read_bytes()
    source = random.Random(f"{file} {signed}")
    spec = read_spec(place)
    ends: collections.Counter[str] = collections.Counter()
    signals = []
    for number in range(int(count)):
        (place / file).write_bytes(_damaged(good, number, source))
        if signed == "true":
            record = FileRecord((place / file).stat().st_size, sha256_of(place / file))
            forged = dataclasses.replace(spec, files={**spec.files, file: record})
            (place / MANIFEST).write_text(forged.to_json(), encoding="utf-8")
        end = forked(lambda: _use(place, profile))
        ends[end] += 1
        if end not in ("refused", "loaded"):
            signals.append(f"{number}: {end}")
    (place / file).write_bytes(good)
    (place / MANIFEST).write_text(spec.to_json(), encoding="utf-8")
    return {"ends": dict(ends), "signals": signals}


def _use(place: Path, profile: Any) -> None:  # noqa: ANN401 - a profile's name
    with Embedder.open(place, profile=profile) as embedder:
        embedder.embed(TEXTS)


def _damaged(good: bytes, number: int, source: random.Random) -> bytes:
    """The first seven cut the file off, the others flip one to eight bits anywhere."""
    size = len(good)
    cuts = (0, 16, size // 1000, size // 4, size // 2, size * 99 // 100, size - 1)
    if number < len(cuts):
        return good[: cuts[number]]
    damaged = bytearray(good)
    for _ in range(source.randint(1, 8)):
        place = source.randrange(8 * size)
        damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def tokenizers(folder: str, count: str) -> dict[str, Any]:
    """Ends of children that read a mutated tokenizer.json and encode three texts with what was read."""
    import tokenizers as library

    good = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    words = good["model"]["vocab"]
    good["model"]["vocab"] = words[:200] if isinstance(words, list) else dict(list(words.items())[:200])
    source, ends = random.Random(5), collections.Counter[str]()
    bad: list[str] = []
    path = Path(folder, "mutated.json")
    for number, text in enumerate(_documents(good, int(count), source)):
        path.write_text(text, encoding="utf-8")
        end = forked(lambda: Tokenizer.from_file(path, max_tokens=64).encode(TEXTS))
        ends[end] += 1
        if end not in ("refused", "loaded"):
            bad.append(f"{number}: {end}")
    path.unlink()
    return {"ends": dict(ends), "bad": bad, "tokenizers": library.__version__}


def _documents(good: Any, count: int, source: random.Random) -> Iterator[str]:  # noqa: ANN401 - JSON
    yield "[" * 100_000
    yield "{}"
    yield '{"model": ' * 10_000
    for _ in range(count - 3):
        document = json.loads(json.dumps(good))
        for _ in range(source.randint(1, 3)):
            _mutate(document, source)
        yield json.dumps(document)


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 31,
    1 << 64,
    1e308,
    "",
    "\0",
    "a" * 5000,
    "((",
    [],
    {},
    [[]],
    {"type": "Sequence"},
)


def _mutate(document: Any, source: random.Random) -> None:  # noqa: ANN401 - JSON
    """Change one value somewhere in a document, remove it, or put another part of the document in its place."""
    places = list(_places(document))
    parent, key = source.choice(places)
    other, name = source.choice(places)
    change = source.randrange(4)
    if change == 0:
        del parent[key]
    elif change == 1:
        parent[key] = other[name]
        with contextlib.suppress(ValueError):  # a document within itself is no JSON
            json.dumps(document)
            return
        parent[key] = None
    else:
        parent[key] = source.choice(ODD)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 - JSON
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs)[:12]:
        yield value, key
        if depth < 5:
            yield from _places(inner, depth + 1)


def lifetime(folder: str) -> dict[str, Any]:
    """Import, open, embed, close: what a trace of this process is taken of."""
    with Embedder.open(folder, profile="edge") as embedder:
        found = embedder.embed(TEXTS)
    time.sleep(1.0)  # for whatever would be sent later
    return {"vectors": len(found)}


PIECES = {
    "Chinese": ("今天天气真好，我们去公园散步。", 222_222),
    "letters": ("a", 10_000_000),
    "spaces": (" ", 10_000_000),
    "NUL": ("\0", 10_000_000),
    "English": ("the quick brown fox jumps over ", 322_580),
}


def long_texts(folder: str) -> dict[str, Any]:
    """Processor time and memory of encoding 10 MB of each kind of text; the best time and the most memory of three."""
    found = {}
    for name, (piece, times) in PIECES.items():
        text, milliseconds, grown = piece * times, [], []
        for _ in range(3):
            tokenizer = Tokenizer.from_file(Path(folder, "tokenizer.json"), max_tokens=512)
            tokenizer.encode(["中文"])
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before, start = memory("VmRSS"), time.process_time()
            tokenizer.encode([text])
            milliseconds.append(1e3 * (time.process_time() - start))
            grown.append(memory("VmHWM") - before)
        found[name] = [round(min(milliseconds), 1), round(max(grown), 1)]
    return found


def _mixed(count: int, seed: int = 3) -> list[str]:
    source = random.Random(seed)
    lengths = [min(900, int(source.lognormvariate(3.4, 1.1)) + 1) for _ in range(count)]
    return ["".join(source.choices(WORDS, k=length)) for length in lengths]


def same_vector(folder: str, count: str) -> dict[str, Any]:
    """Vectors of texts alone, together, and shuffled among longer ones: the largest difference, the least cosine."""
    texts = _mixed(int(count))
    order = np.random.default_rng(5).permutation(len(texts))
    with Embedder.open(folder) as embedder:
        alone = np.concatenate([embedder.embed(text) for text in texts])
        together = embedder.embed(texts)
        shuffled = np.empty_like(together)
        shuffled[order] = embedder.embed([texts[n] for n in order] + ["长" * 900] * 8)[: len(texts)]
        precision = embedder.spec.precision
    most, least = 0.0, 1.0
    for other in (together, shuffled):
        most = max(most, float(np.abs(alone - other).max()))
        least = min(least, float(np.diag(cosine(alone.astype(np.float64), other)).min()))
    return {"precision": precision, "max_abs": most, "min_cosine": least}


def self_check(folder: str) -> dict[str, Any]:
    """What the self-check of a machine takes, without loading; the median of nine."""
    with Embedder.open(folder, profile="edge") as embedder:
        found = [embedder.self_check() for _ in range(9)]
    times = sorted(1e3 * one.seconds for one in found)
    return {"result": found[0].result, "texts": len(found[0].cosines), "ms": round(times[4], 1)}


def threads(folder: str, rounds: str) -> dict[str, Any]:
    """16 threads x 200 calls on one embedder, against the same calls in turn: different bits, and relative speed."""
    texts = _mixed(200, seed=8)
    with Embedder.open(folder) as embedder:
        embedder.load()
        expected = [embedder.embed(text).tobytes() for text in texts]
        ratios, different = [], 0
        for _ in range(int(rounds)):
            start = time.perf_counter()
            for _ in range(2):
                for text in texts:
                    embedder.embed(text)
            serial = (time.perf_counter() - start) / 400
            wrong = [0] * 16

            def work(number: int, wrong: list[int] = wrong) -> None:
                order = random.Random(number).sample(range(200), 200)
                wrong[number] = sum(embedder.embed(texts[n]).tobytes() != expected[n] for n in order)

            start = time.perf_counter()
            running = [threading.Thread(target=work, args=(number,)) for number in range(16)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            ratios.append(serial / ((time.perf_counter() - start) / 3200))
            different += sum(wrong)
    return {
        "calls": int(rounds) * 3200,
        "different": different,
        "speed_ratio": round(float(np.median(ratios)), 2),
    }


def forks(folder: str, count: str) -> dict[str, Any]:
    """Children forked from a process with a model in use by another thread: hangs, failures, the slowest exit."""
    embedder = Embedder.open(folder)
    expected = embedder.embed(TEXTS).tobytes()
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            embedder.embed(TEXTS)

    thread = threading.Thread(target=busy)
    thread.start()
    ends: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    for _ in range(int(count)):
        start = time.monotonic()
        ends[_forked_exit(lambda: embedder.embed(TEXTS).tobytes() == expected)] += 1
        slowest = max(slowest, time.monotonic() - start)
    stop.set()
    thread.join()
    embedder.close()
    return {"ends": dict(ends), "slowest_s": round(slowest, 2)}


def _forked_exit(work: Callable[[], bool]) -> str:
    """How a child ends that leaves by ``sys.exit``, as gunicorn's workers do."""
    pid = os.fork()
    if pid == 0:
        sys.exit(0 if work() else 3)
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return f"exit {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def leaks(folder: str, opens: str, calls: str) -> dict[str, Any]:
    """Growth of resident memory in kB for each 100 openings, and each 100 calls, after a tenth of them."""
    found = {}
    found["open_kb_per_100"] = _slope(int(opens), lambda: _use(Path(folder), "edge"))
    with Embedder.open(folder, profile="edge") as embedder:
        found["call_kb_per_100"] = _slope(int(calls), lambda: embedder.embed(TEXTS[0]))
    return {**found, "opens": int(opens), "calls": int(calls)}


def _slope(count: int, work: Callable[[], object]) -> float:
    """By least squares over the resident size after every hundredth part of the work that follows the warm-up."""
    warm, step = max(1, count // 10), max(1, count // 100)
    sizes = []
    for number in range(count):
        work()
        if number >= warm and number % step == 0:
            gc.collect()
            sizes.append((number, memory("VmRSS") * 1024))
    numbers, kilobytes = np.array(sizes).T
    return round(float(np.polyfit(numbers, kilobytes, 1)[0]) * 100, 3)


def after_large(folder: str) -> dict[str, Any]:
    """Resident MB before and after one batch of 512 texts of 64 tokens, each followed by many small ones."""
    with Embedder.open(folder, profile="edge") as embedder:
        for _ in range(200):
            embedder.embed(TEXTS[0])
        base = memory("VmRSS")
        embedder.embed(["今" * 62] * 512)
        peak = memory("VmHWM")
        for _ in range(2000):
            embedder.embed(TEXTS[0])
        return {"base_mb": round(base, 1), "peak_mb": round(peak, 1), "after_mb": round(memory("VmRSS"), 1)}


def quota(folder: str, group: str, threads: str) -> dict[str, Any]:
    """Threads, throttled periods and latency of one text at a time for some seconds, in a cgroup; 0 threads: ours."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    if threads != "0":  # which no option allows beyond the quota
        vars(onnxruntime_engine)["choose_threads"] = lambda requested: int(threads)
    embedder = Embedder.open(folder, profile="latency")
    embedder.load()
    text = "今天天气真好，" * 12
    embedder.embed(text)
    before, times, end = _periods(group), [], time.monotonic() + 4
    while time.monotonic() < end:
        start = time.perf_counter()
        embedder.embed(text)
        times.append(1e3 * (time.perf_counter() - start))
        time.sleep(0.05)  # requests come one by one
    after = _periods(group)
    periods = after[0] - before[0]
    return {
        "threads": embedder._engine._engine.threads,
        "throttled": round((after[1] - before[1]) / max(1, periods), 3),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
    }


def _periods(group: str) -> tuple[int, int]:
    lines = Path(group, "cpu.stat").read_text(encoding="ascii").splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    return stat["nr_periods"], stat["nr_throttled"]


IDLE_BLOCK_SECONDS = 5.0
SETTLED_SECONDS = 0.05  # longer than threads go on looking for work after a run


def idle(folder: str, rate: str, seconds: str, profile: str, characters: str) -> dict[str, Any]:
    """Processor time for each request at a rate, against the same requests without a pause; of none: the share used.

    The machine's speed changes within minutes, so the two are measured in turns: a hundred requests without a pause,
    then five seconds at the rate. What threads use while they wait for more work after a request counts as its cost.

    ``awake_ms`` is that of a request after a pause at that rate in which the processor was kept busy with nothing, so
    that it neither slept nor was given to others: what it needs more than one without a pause is memory that was no
    longer in a cache, and no waking.
    """
    text = "今天天气真好，" * (int(characters) // 7)
    facts = {"rate": float(rate), "profile": profile, "characters": len(text)}
    with Embedder.open(folder, profile=cast("Profile", profile)) as embedder:

        def request() -> None:
            embedder.embed(text)

        for _ in range(20):
            request()
        if not float(rate):
            time.sleep(SETTLED_SECONDS)
            used = _processor_time(lambda: time.sleep(float(seconds)))
            return {**facts, "cpu_percent": round(100 * used / float(seconds), 3)}
        turns = max(1, round(float(seconds) / IDLE_BLOCK_SECONDS))
        pairs = [_idle_turn(request, float(rate)) for _ in range(turns)]
        awake = [_after_busy_pause(request, 1 / float(rate)) for _ in range(30)]
    pure, used = (sum(values) / turns for values in zip(*pairs, strict=True))
    return {
        **facts,
        "pure_ms": round(1e3 * pure, 2),
        "cpu_ms": round(1e3 * used, 2),
        "awake_ms": round(1e3 * sum(awake) / len(awake), 2),
        "turns_times_pure": [round(slow / fast, 2) for fast, slow in pairs],
    }


def _idle_turn(request: Callable[[], None], rate: float) -> tuple[float, float]:
    """Seconds of the processor for one request: of 100 without a pause, and of those of 5 seconds at a rate."""
    count = round(IDLE_BLOCK_SECONDS * rate)

    def without_a_pause() -> None:
        for _ in range(100):
            request()

    def at_the_rate() -> None:
        begin = time.monotonic()
        for number in range(1, count + 1):
            time.sleep(max(0.0, begin + number / rate - time.monotonic()))
            request()
        time.sleep(SETTLED_SECONDS)

    pure = _processor_time(without_a_pause) / 100
    time.sleep(SETTLED_SECONDS)
    return pure, _processor_time(at_the_rate) / count


def _processor_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _after_busy_pause(request: Callable[[], None], seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return _processor_time(request)


def no_room(folder: str, place: str) -> dict[str, Any]:
    """The error of writing a model into a place that is too small for it, and what is left there."""
    from qingyu.runtime.bundle import bundle

    try:
        bundle(Path(folder), Path(place, "model.qingyu"))
    except QingyuError as error:
        kind = type(error).__name__
    else:
        kind = "written"
    return {"error": kind, "left": sorted(path.name for path in Path(place).iterdir())}


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    work.__name__: work
    for work in (
        *(mutants, tokenizers, lifetime, long_texts, same_vector, self_check, threads, forks),
        *(leaks, after_large, quota, idle, no_room),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    name, *rest = sys.argv[1:] if arguments is None else arguments
    sys.stdout.write(json.dumps(WORK[name](*rest), ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
