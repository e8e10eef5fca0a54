"""One model on this machine in less than a minute: the best threads and token budget, throughput, latency, memory.

    python -m qingyu.bench.on_device out/bge-int8

Prints one JSON line; `qingyu bench` prints the same as a table. Settings take turns, round by round, so that a drift
of the machine falls on all of them alike. Not here: other libraries (``compare``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingyu.bench.batching import with_budget
from qingyu.bench.rounds import medians, ratios_to
from qingyu.bench.summary import percentile
from qingyu.bench.texts import read_sources
from qingyu.bench.workloads import WORKLOADS
from qingyu.errors import InvalidOptionError, UnknownTokenWarning
from qingyu.runtime.cpu import available_cpus, cpu_flags, cpu_model
from qingyu.runtime.embedder import Embedder, Report
from qingyu.runtime.graph_engine import settings_of
from qingyu.runtime.tuning import Tuning

__all__ = ["LEAST_SECONDS", "is_disturbed", "main", "measure", "tunings_of"]

BUDGETS = (128, 256, 512, 1024, 2048)
LEAST_SECONDS = 5.0
ROUND_SHARE = 0.01  # of the time that there is: one setting in one round, about
LEAST_ROUNDS = 3
# A setting is worth keeping only if it beats the default by more than rounds differ by anyway.
WORTH = 1.03
MOST_FOREIGN = 8.0  # percent
QUERIES = 200
ROUND_QUERIES = 20

MEMORY = """
import json, sys
import psutil
from qingyu import Embedder
embedder = Embedder.open(sys.argv[1], profile=sys.argv[2])
texts = json.load(sys.stdin)
embedder.embed(texts[0])
opened = psutil.Process().memory_info().rss
embedder.embed(texts)
print(json.dumps([opened, psutil.Process().memory_info().rss]))
"""


@dataclass(frozen=True)
class _Setting:
    threads: int
    budget: int

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.budget} tokens"


def measure(model: str, *, seconds: float = 40.0) -> dict[str, Any]:
    """Everything about one embedding model, in about ``seconds``, and what others used of the machine meanwhile.

    Raises what ``Embedder.open`` raises, and ``InvalidOptionError`` for fewer than 5 seconds.
    """
    if seconds < LEAST_SECONDS:
        raise InvalidOptionError(
            "option seconds",
            expected=f"at least {LEAST_SECONDS:g}",
            found=f"{seconds:g}",
            remedy="Less tells nothing.",
        )
    with warnings.catch_warnings():
        # A lone query may well have an unknown token.
        warnings.simplefilter("ignore", UnknownTokenWarning)
        before = _ticks()
        found = _measure(model, seconds)
        return {**found, "foreign_percent": _foreign(before, _ticks())}


def _measure(model: str, seconds: float) -> dict[str, Any]:
    sources = read_sources(None)
    texts = WORKLOADS["mixed"].sample(sources, 2000)
    with Embedder.open(model) as embedder:
        default = _Setting(embedder.plan.workers, embedder.plan.token_budget)
        facts = {
            "model": embedder.spec.name,
            "precision": embedder.spec.precision,
            "folder": str(embedder.folder),
            "cpu": cpu_model() or "unknown",
            "flags": list(cpu_flags()),
            "cpus": available_cpus(),
        }
        chosen = _as_many_as_take(embedder, texts, ROUND_SHARE * seconds)
        report = Report()
        embedder.embed(chosen, report=report)
    bulk = _bulk(model, chosen, report.tokens, default, 0.7 * seconds)
    queries = WORKLOADS["single"].sample(sources, QUERIES)
    latency = {profile: _latency(model, profile, queries, 0.08 * seconds) for profile in PROFILES}
    lone = _lone(model, queries, 0.06 * seconds)
    memory = {profile: _memory(model, profile, texts[:200]) for profile in PROFILES}
    return {**facts, **bulk, "latency": latency, "lone": lone, "memory": memory}


PROFILES = ("throughput", "latency", "edge")


def _ticks() -> tuple[float, float, float]:
    """Seconds of all CPUs, those of them that were not idle, and those of this process and its children."""
    import psutil

    system, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = system.idle + getattr(system, "iowait", 0.0)
    # The two are parts of others.
    whole = sum(system) - getattr(system, "guest", 0.0) - getattr(system, "guest_nice", 0.0)
    return whole, whole - idle, own.user + own.system + own.children_user + own.children_system


def _foreign(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """What others used of all CPUs, in percent."""
    whole, busy, own = (now - then for now, then in zip(after, before, strict=True))
    return round(100 * max(0.0, busy - own) / whole, 1) if whole > 0 else 0.0


def is_disturbed(measured: Mapping[str, Any]) -> bool:
    """Whether others used so much of the machine meanwhile that the figures are not its own."""
    return float(measured["foreign_percent"]) > MOST_FOREIGN


def tunings_of(measured: Mapping[str, Any]) -> dict[str, Tuning]:
    """The best settings by profile, where clearly better than the defaults, and nobody else used the machine."""
    if is_disturbed(measured):
        return {}
    lone = max(measured["lone"], key=lambda row: float(row["times_default"]))
    best = {"throughput": measured["best"], "latency": lone}
    return {
        profile: Tuning(row["threads"], row["token_budget"])
        for profile, row in best.items()
        if row["times_default"] >= WORTH
    }


def _as_many_as_take(embedder: Embedder, texts: Sequence[str], seconds: float) -> list[str]:
    """The first of the texts, as many as take about so long; all lengths are among them."""
    count = 8
    while count < len(texts):
        start = time.perf_counter()
        embedder.embed(texts[:count])
        took = time.perf_counter() - start
        if took > seconds / 2:
            break
        count *= 2
    return list(texts[:count])


def _bulk(model: str, texts: Sequence[str], tokens: int, default: _Setting, seconds: float) -> dict[str, Any]:
    """Budgets with the default's threads first, then other numbers of threads with the best budget."""
    budgets = [default, *(_Setting(default.threads, n) for n in BUDGETS if n != default.budget)]
    times = _rounds(model, texts, budgets, seconds * 0.7)
    best = min(budgets, key=lambda one: -ratios_to(times, str(default))[str(one)])
    others = [_Setting(n, best.budget) for n in _thread_counts() if n != best.threads]
    settings = list(dict.fromkeys([default, best, *others]))
    threads = _rounds(model, texts, settings, seconds * 0.3)
    found = {**_rows(times, default, tokens, budgets), **_rows(threads, default, tokens, settings)}
    winner = max(found.values(), key=lambda row: float(row["times_default"]))
    return {
        "texts": len(texts),
        "tokens": tokens,
        "default": found[str(default)],
        "best": winner,
        "settings": list(found.values()),
    }


def _thread_counts() -> list[int]:
    """Powers of two, and as many as there are CPUs."""
    return sorted({n for n in (*(1 << n for n in range(10)), available_cpus()) if n <= available_cpus()})


def _rows(
    times: dict[str, list[float]], default: _Setting, tokens: int, settings: Sequence[_Setting]
) -> dict[str, dict[str, Any]]:
    ratios, middle = ratios_to(times, str(default)), medians(times)
    return {
        str(one): {
            "threads": one.threads,
            "token_budget": one.budget,
            "tokens_per_second": round(tokens / middle[str(one)]),
            "times_default": round(ratios[str(one)], 3),
            "rounds": len(times[str(one)]),
        }
        for one in settings
    }


def _rounds(
    model: str, texts: Sequence[str], settings: Sequence[_Setting], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each setting in each round; rounds go on for so long, and are three at least."""
    embedders = {
        str(one): with_budget(Path(model), "throughput", one.budget, threads=one.threads) for one in settings
    }
    return _in_turns(embedders, lambda one: _seconds(one, texts), texts[:32], seconds)


def _in_turns(
    embedders: Mapping[str, Embedder], cost: Callable[[Embedder], float], first: Sequence[str], seconds: float
) -> dict[str, list[float]]:
    """The ``cost`` of each embedder in each round, odd rounds backwards; ``first`` before them; all are closed."""
    times: dict[str, list[float]] = {name: [] for name in embedders}
    try:
        for embedder in embedders.values():
            embedder.embed(first)
        end = time.perf_counter() + seconds
        rounds = 0
        while time.perf_counter() < end or rounds < LEAST_ROUNDS:
            for name in list(embedders)[::-1] if rounds % 2 == 1 else list(embedders):
                times[name].append(cost(embedders[name]))
            rounds += 1
    finally:
        for embedder in embedders.values():
            embedder.close()
    return times


def _seconds(embedder: Embedder, texts: str | Sequence[str]) -> float:
    start = time.perf_counter()
    embedder.embed(texts)
    return time.perf_counter() - start


def _latency(model: str, profile: str, texts: Sequence[str], seconds: float) -> dict[str, float]:
    """Milliseconds of one query at a time."""
    took: list[float] = []
    with Embedder.open(model, profile=profile) as embedder:  # type: ignore[arg-type] # one of PROFILES
        for text in texts[:8]:
            embedder.embed(text)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            took.extend(1e3 * _seconds(embedder, text) for text in texts)
    return {f"p{share}_ms": round(percentile(took, share), 3) for share in (50, 95, 99)}


def _lone(model: str, texts: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One query at a time with the profile latency and various threads: milliseconds, the default's row first.

    Threads share the work of one query, and where another machine's load delays one of them, all wait for it: on some
    virtual machines one thread is faster than two. The queries of a round are asked of one setting, then of the next.
    """
    settings = settings_of("latency")
    default = settings.threads(None)
    counts = [default, *(n for n in _thread_counts() if n != default)]
    embedders = {str(n): Embedder.open(model, profile="latency", threads=n) for n in counts}
    asked = texts[:ROUND_QUERIES]
    times = _in_turns(
        embedders, lambda one: percentile([_seconds(one, text) for text in asked], 50), texts[:1], seconds
    )
    ratios, middle = ratios_to(times, str(default)), medians(times)
    return [
        {
            "threads": n,
            "token_budget": settings.token_budget,
            "p50_ms": round(1e3 * middle[str(n)], 3),
            "times_default": round(ratios[str(n)], 3),
            "rounds": len(times[str(n)]),
        }
        for n in counts
    ]


def _memory(model: str, profile: str, texts: Sequence[str]) -> dict[str, float]:
    """Resident MB of a process of its own once open, and after the texts."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, model, profile]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    opened, after = json.loads(done.stdout)
    return {"opened_mb": round(opened / (1 << 20), 1), "after_mb": round(after / (1 << 20), 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.on_device", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a model folder, or a name")
    parser.add_argument("--seconds", type=float, default=40.0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.model, seconds=options.seconds), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
