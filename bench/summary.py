"""Figures from rows: medians, and ratios only between measurements of the same round of the same run.

Not here: how they are shown (``page``, ``charts``), and what was aimed at (``targets``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qingyu.bench.records import FORMAT, Row
from qingyu.bench.workloads import WORKLOADS

__all__ = [
    "BASE",
    "Spread",
    "Table",
    "is_disturbed",
    "is_ours",
    "percentile",
    "seconds_of",
    "share_of_wall",
    "summarize",
    "undisturbed",
]

BASE = "qingyu-int8"  # what ratios in the tables are to
MOST_FOREIGN = 0.08  # of all CPUs: more, and a contender may have had clearly less than the others
ENOUGH_IDLE = 0.05
WHOLE = 0.04
QUANTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 100)


def is_ours(contender: str) -> bool:
    """Whether a contender is qingyu."""
    return contender.startswith("qingyu")


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and their extremes."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float], digits: int = 3) -> Spread | None:
        """``None`` of no values."""
        found = sorted(values)
        if not found:
            return None
        median, least, most = (
            round(value, digits) for value in (statistics.median(found), found[0], found[-1])
        )
        return cls(median, least, most, len(found))

    def written(self) -> dict[str, float]:
        """As JSON."""
        return dict(vars(self))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` percent of all do not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50)
    2.0
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def seconds_of(row: Row) -> float:
    """What a round is compared by: the time of all texts, or the median of single ones."""
    if "latencies_ms" in row:
        return percentile(row["latencies_ms"], 50) / 1e3
    return float(row["seconds"])


Key = tuple[str, int]


class Table:
    """Rows by what they are of, for ratios round by round."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def of(self, kind: str, wanted: Mapping[str, object]) -> list[Row]:
        """The rows of a kind with the given fields."""
        items = wanted.items()
        return [row for row in self.rows if row["kind"] == kind and all(row.get(k) == v for k, v in items)]

    def by_round(
        self, kind: str, wanted: Mapping[str, object], value: Callable[[Row], float]
    ) -> dict[Key, float]:
        """One value for each session and round; the last where a round was repeated."""
        return {(row["session"], row.get("round", 0)): value(row) for row in self.of(kind, wanted)}

    def ratio(self, first: Mapping[Key, float], second: Mapping[Key, float]) -> Spread | None:
        """``first`` to ``second`` in the rounds that have both."""
        return Spread.of(first[key] / second[key] for key in first if key in second and second[key] > 0)


def is_disturbed(row: Row) -> bool:
    """Whether others used more than a few percent of the machine, and may have kept it from the process.

    They did not where CPUs were idle all the same, or where the process had a whole number of CPUs to itself: one
    thread on one of two CPUs does not miss the other.
    """
    if row.get("foreign", 0.0) <= MOST_FOREIGN or row["idle"] >= ENOUGH_IDLE:
        return False
    own = float(row["own"])
    return round(own) < 1 or abs(own - round(own)) > WHOLE


def undisturbed(rows: Sequence[Row]) -> list[Row]:
    """Those that others did not disturb."""
    return [row for row in rows if not is_disturbed(row)]


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures as one JSON object; disturbed rows count in ``disturbed`` only."""
    kept = undisturbed(rows)
    table = Table(kept)
    sessions = table.of("session", {})
    return {
        "format": FORMAT,
        "machine": sessions[-1]["machine"],
        "dates": sorted({row["started"] for row in sessions}),
        "quick": any(row["quick"] for row in sessions),
        "disturbed": len(rows) - len(kept),
        "models": {row["model"]: _without(row, "model", "kind", "session") for row in table.of("model", {})},
        "contenders": _contenders(table),
        "skipped": _skipped(table),
        "wall": [_wall(table, *key) for key in _keys(table, "wall", "model", "cores")],
        "bulk": [_bulk(table, *key) for key in _round_keys(table, "bulk")],
        "latency": [_latency(table, *key) for key in _round_keys(table, "single", "arrivals")],
        "cold": [_cold(table, *key) for key in _keys(table, "cold", "model", "contender")],
        "memory": [_memory(table, *key) for key in _keys(table, "memory", "model", "contender")],
        "growth": [_growth(table, *key) for key in _keys(table, "growth", "model", "contender")],
        "fidelity": [
            _without(
                table.of("fidelity", dict(zip(("model", "contender"), key, strict=True)))[-1],
                "kind",
                "session",
            )
            for key in _keys(table, "fidelity", "model", "contender")
        ],
    }


def _contenders(table: Table) -> dict[str, Row]:
    """What is known of each contender that has figures; little of one that was never prepared in these runs."""
    found: dict[str, Row] = {}
    for kind in ("round", "cold", "memory", "growth", "fidelity"):
        for row in table.of(kind, {}):
            name = row["contender"]
            facts = {"title": name, "precision": name.rpartition("-")[2], "how": "", "versions": {}}
            found.setdefault(name, {**facts, "installed_mb": 0.0})
    facts_rows = {row["contender"]: row for row in table.of("facts", {})}
    return found | {
        name: _without(row, "contender", "model", "kind", "session") for name, row in facts_rows.items()
    }


def _without(row: Row, *names: str) -> Row:
    return {key: value for key, value in row.items() if key not in names}


def _keys(table: Table, kind: str, *fields: str) -> list[tuple[Any, ...]]:
    """The different values of the fields, in the order in which they came."""
    return list(dict.fromkeys(tuple(row[field] for field in fields) for row in table.of(kind, {})))


def _round_keys(table: Table, *kinds: str) -> list[tuple[Any, ...]]:
    names = [name for name, one in WORKLOADS.items() if one.kind in kinds]
    keys = _keys(table, "round", "model", "workload", "cores", "contender")
    return [key for name in names for key in keys if key[1] == name]


def _skipped(table: Table) -> list[Row]:
    """Contenders that never ran a model, each with its last reason."""
    ran = {
        (row["model"], row["contender"]) for kind in ("round", "cold", "memory") for row in table.of(kind, {})
    }
    reasons = {(row["model"], row["contender"]): row["reason"] for row in table.of("skipped", {})}
    return [
        {"model": model, "contender": name, "reason": reason}
        for (model, name), reason in reasons.items()
        if (model, name) not in ran
    ]


def _written(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread.written()


def best_engine(table: Table, model: str, cores: int) -> str | None:
    """The engine whose products are the fastest, which is the ceiling that shares are of."""
    rows = table.of("wall", {"model": model, "cores": cores})
    engines = {engine for row in rows for engine in row["gops"]}
    medians = {
        one: statistics.median(row["gops"][one] for row in rows if one in row["gops"]) for one in engines
    }
    return max(medians, key=lambda one: medians[one], default=None)


def _wall(table: Table, model: str, cores: int) -> Row:
    rows = table.of("wall", {"model": model, "cores": cores})
    engines = sorted({engine for row in rows for engine in row["gops"]})
    spreads = {one: Spread.of((row["gops"][one] for row in rows if one in row["gops"]), 1) for one in engines}
    return {
        "model": model,
        "cores": cores,
        "engine": best_engine(table, model, cores),
        "gops": {one: _written(spread) for one, spread in spreads.items()},
    }


def _bulk(table: Table, model: str, workload: str, cores: int, contender: str) -> Row:
    where = {"model": model, "workload": workload, "cores": cores}
    own = {**where, "contender": contender}
    rows = table.of("round", own)
    times = table.by_round("round", own, seconds_of)
    base = table.by_round("round", {**where, "contender": BASE}, seconds_of)
    return {
        **own,
        "texts": rows[-1]["texts"],
        "tokens": rows[-1]["tokens"],
        "tokens_per_second": _written(Spread.of((row["tokens"] / row["seconds"] for row in rows), 1)),
        "texts_per_second": _written(Spread.of((row["texts"] / row["seconds"] for row in rows), 1)),
        "cpu_ms_per_text": _written(Spread.of(1e3 * row["cpu_seconds"] / row["texts"] for row in rows)),
        "times_base": _written(table.ratio(times, base)),
        "share_of_wall": _written(share_of_wall(table, own)),
    }


def share_of_wall(table: Table, own: Mapping[str, object]) -> Spread | None:
    """Operations that real tokens need, to those that the fastest engine's bare products did in the same round."""
    model, cores = str(own["model"]), int(str(own["cores"]))
    engine = best_engine(table, model, cores)
    facts = table.of("model", {"model": model})
    if engine is None or not facts:
        return None
    need = facts[-1]["operations_per_token"]
    done = table.by_round("round", own, lambda row: need * row["tokens"] / row["seconds"] / 1e9)
    ceiling = table.by_round(
        "wall", {"model": model, "cores": cores}, lambda row: float(row["gops"].get(engine, 0))
    )
    return table.ratio(done, ceiling)


def _latency(table: Table, model: str, workload: str, cores: int, contender: str) -> Row:
    where = {"model": model, "workload": workload, "cores": cores}
    own = {**where, "contender": contender}
    rows = table.of("round", own)
    times = table.by_round("round", own, seconds_of)
    base = table.by_round("round", {**where, "contender": BASE}, seconds_of)
    pooled = [value for row in rows for value in row["latencies_ms"]]
    shares = {
        f"p{share}_ms": _written(Spread.of(percentile(row["latencies_ms"], share) for row in rows))
        for share in (50, 95, 99)
    }
    return {
        **own,
        **shares,
        "texts": rows[-1]["texts"],
        "cpu_ms_per_text": _written(Spread.of(1e3 * row["cpu_seconds"] / row["texts"] for row in rows)),
        "times_base": _written(table.ratio(times, base)),
        "quantiles_ms": {str(share): percentile(pooled, share) for share in QUANTILES},
    }


def _cold(table: Table, model: str, contender: str) -> Row:
    own = {"model": model, "contender": contender}
    rows = table.of("cold", own)
    times = table.by_round("cold", own, lambda row: float(row["milliseconds"]))
    base = table.by_round("cold", {"model": model, "contender": BASE}, lambda row: float(row["milliseconds"]))
    return {
        **own,
        "milliseconds": _written(Spread.of((row["milliseconds"] for row in rows), 1)),
        "private_mb": _written(Spread.of((row["private"] for row in rows), 1)),
        "peak_mb": _written(Spread.of((row["peak"] for row in rows), 1)),
        "times_base": _written(table.ratio(times, base)),
    }


def _memory(table: Table, model: str, contender: str) -> Row:
    row = table.of("memory", {"model": model, "contender": contender})[-1]
    return {
        "model": model,
        "contender": contender,
        "opened_private_mb": row["opened"]["private"],
        "largest_private_mb": row["largest"]["private"],
        "largest_resident_mb": row["largest"]["resident"],
        "peak_mb": row["largest"]["peak"],
        "idle_cpu_percent": round(100 * row["idle"]["cpu_seconds"] / row["idle"]["seconds"], 2),
    }


def _growth(table: Table, model: str, contender: str) -> Row:
    rows = table.of("growth", {"model": model, "contender": contender})
    sizes = sorted({row["texts"] for row in rows})
    largest = [row for row in rows if row["texts"] == sizes[-1]][-1]
    points = []
    for size in sizes:
        own = [row for row in rows if row["texts"] == size]
        milliseconds = Spread.of((1e3 * row["seconds"] / size for row in own), 4)
        peak = max(row["resident"] for row in own)
        points.append({"texts": size, "ms_per_text": _written(milliseconds), "resident_mb": peak})
    facts = {"model": model, "contender": contender, "streamed": largest["streamed"]}
    return {**facts, "points": points, "samples": largest["samples"]}
