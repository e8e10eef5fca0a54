"""What qingyu means to reach against its contenders, each target with what was measured: met or not, by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qingyu.bench.records import Row
from qingyu.bench.summary import Spread, Table, is_ours, percentile, seconds_of, share_of_wall, undisturbed

__all__ = ["MODEL", "Found", "targets"]

MODEL = "bge-small-zh"
ONNX, TORCH = "st-onnx-int8", "st-torch-fp32"


@dataclass(frozen=True)
class Found:
    """One target: ``value``, ``None`` where it was not measured, is to be at least, or at most, ``bound``."""

    name: str
    bound: float
    at_least: bool
    value: float | None
    detail: str

    @property
    def met(self) -> bool | None:
        """``None`` where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def written(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "met": self.met}


def targets(rows: Sequence[Row]) -> list[Found]:
    """All targets, from the rows of one or more runs."""
    table = Table(undisturbed(rows))
    return [
        _bulk(table, "mixed", 1.3),
        _bulk(table, "mixed", 3.0, against=ONNX),
        _bulk(table, "mixed", 7.0, against=TORCH),
        _bulk(table, "short", 1.2),
        _bulk(table, "documents", 1.1),
        _latency(table),
        _tail(table),
        _share(table),
        _cold(table),
        _peak(table),
        _constant(table),
        _flat(table),
        _two_cores(table),
    ]


Times = dict[str, dict[tuple[str, int], float]]


def _times(table: Table, kind: str, wanted: Mapping[str, object], value: Callable[[Row], float]) -> Times:
    """Each contender's value in each round."""
    names = dict.fromkeys(row["contender"] for row in table.of(kind, wanted))
    return {name: table.by_round(kind, {**wanted, "contender": name}, value) for name in names}


def _cores(table: Table) -> int:
    return max((row["cores"] for row in table.of("round", {"model": MODEL})), default=0)


def _least(table: Table, times: Times, names: Sequence[str]) -> str | None:
    """The fastest of the names: the one that none of the others beats in the median round."""
    left = [name for name in names if name in times]
    if not left:
        return None
    base = left[0]
    ratios = {name: table.ratio(times[name], times[base]) for name in left}
    return min(left, key=lambda name: ratios[name].median if ratios[name] else float("inf"))  # type: ignore[union-attr]


def _against(table: Table, times: Times, against: str | None) -> tuple[str, str, Spread] | None:
    """Our fastest, the contender, and how many times its time the contender takes."""
    ours = _least(table, times, [name for name in times if is_ours(name) and not name.endswith("fp32")])
    other = against or _least(table, times, [name for name in times if not is_ours(name)])
    if ours is None or other is None or other not in times:
        return None
    ratio = table.ratio(times[other], times[ours])
    return None if ratio is None else (ours, other, ratio)


def _shown(spread: Spread) -> str:
    return f"{spread.least:.2f} to {spread.most:.2f} in {spread.rounds} rounds"


TITLES = {"mixed": "Mixed lengths", "short": "Short queries in bulk", "documents": "Documents of 512 tokens"}


def _bulk(table: Table, workload: str, bound: float, *, against: str | None = None) -> Found:
    name = f"{TITLES[workload]}: times as fast as {against or 'the fastest contender'}"
    wanted = {"model": MODEL, "workload": workload, "cores": _cores(table)}
    found = _against(table, _times(table, "round", wanted, seconds_of), against)
    if found is None:
        return Found(name, bound, True, None, "")
    ours, other, ratio = found
    return Found(name, bound, True, ratio.median, f"{ours} against {other}, {_shown(ratio)}")


def _latency(table: Table) -> Found:
    name = "One query at a time: p50 to that of the fastest contender"
    wanted = {"model": MODEL, "workload": "single"}
    times = _times(table, "round", wanted, seconds_of)
    found = _against(table, times, None)
    if found is None:
        return Found(name, 0.8, False, None, "")
    ours, other, _ = found
    ratio = table.ratio(times[ours], times[other])
    assert ratio is not None
    return Found(name, 0.8, False, ratio.median, f"{ours} against {other}, {_shown(ratio)}")


def _tail(table: Table) -> Found:
    name = "One query at a time: p99 to p50"
    wanted = {"model": MODEL, "workload": "single"}
    times = _times(table, "round", wanted, seconds_of)
    ours = _least(table, times, [one for one in times if is_ours(one)])
    rows = table.of("round", {**wanted, "contender": ours})
    spread = Spread.of(
        percentile(row["latencies_ms"], 99) / percentile(row["latencies_ms"], 50) for row in rows
    )
    if spread is None:
        return Found(name, 2.0, False, None, "")
    return Found(name, 2.0, False, spread.median, f"{ours}, {_shown(spread)}")


def _share(table: Table) -> Found:
    name = "Mixed lengths, from str to vectors: share of the integer ceiling"
    wanted = {"model": MODEL, "workload": "mixed", "cores": _cores(table)}
    times = _times(table, "round", wanted, seconds_of)
    ours = _least(table, times, [one for one in times if is_ours(one)])
    spread = None if ours is None else share_of_wall(table, {**wanted, "contender": ours})
    if spread is None:
        return Found(name, 0.7, True, None, "")
    return Found(name, 0.7, True, spread.median, f"{ours}, {_shown(spread)}")


def _cold(table: Table) -> Found:
    name = "Cold start of the edge profile to that of the fastest contender"
    times = _times(table, "cold", {"model": MODEL}, lambda row: float(row["milliseconds"]))
    other = _least(table, times, [one for one in times if not is_ours(one)])
    edge = times.get("qingyu-int8-edge")
    ratio = None if other is None or edge is None else table.ratio(edge, times[other])
    if ratio is None:
        return Found(name, 0.5, False, None, "")
    return Found(name, 0.5, False, ratio.median, f"against {other}, {_shown(ratio)}")


def _peak(table: Table) -> Found:
    name = f"Peak memory to that of {ONNX}, its largest batch"
    peaks = {row["contender"]: row["largest"]["peak"] for row in table.of("memory", {"model": MODEL})}
    if not {"qingyu-int8", ONNX} <= set(peaks):
        return Found(name, 0.5, False, None, "")
    own, other = peaks["qingyu-int8"], peaks[ONNX]
    return Found(name, 0.5, False, round(own / other, 3), f"{own:.0f} MB against {other:.0f} MB")


def _grown(table: Table, least: int) -> Iterator[Row]:
    wanted = {"model": MODEL, "contender": "qingyu-int8"}
    return (row for row in table.of("growth", wanted) if row["texts"] >= least)


def _constant(table: Table) -> Found:
    """Each size's mean over going up and down, so that a drift of the machine does not look like growth."""
    name = "Time per text, most to least, from 1,000 to 100,000 texts"
    by_size: dict[int, list[float]] = {}
    for row in _grown(table, 1_000):
        by_size.setdefault(row["texts"], []).append(row["seconds"] / row["texts"])
    if not {1_000, 100_000} <= set(by_size):
        return Found(name, 1.1, False, None, "")
    means = {size: sum(values) / len(values) for size, values in by_size.items()}
    shown = ", ".join(f"{size:,}: {1e3 * mean:.3f} ms" for size, mean in sorted(means.items()))
    return Found(name, 1.1, False, round(max(means.values()) / min(means.values()), 3), shown)


def _flat(table: Table) -> Found:
    name = "Resident memory after a stream of 100,000 texts to that after the first 10,000"
    sizes: dict[int, list[float]] = {}
    for row in _grown(table, 1_000):
        sizes.setdefault(row["texts"], []).append(row["resident"])
    if not {10_000, 100_000} <= set(sizes):
        return Found(name, 1.1, False, None, "")
    first, last = sizes[10_000][0], sizes[100_000][-1]
    return Found(name, 1.1, False, round(last / first, 3), f"{first:.0f} MB, then {last:.0f} MB")


def _two_cores(table: Table) -> Found:
    name = "Two CPUs to one, mixed lengths"
    spreads = {}
    for ours in dict.fromkeys(row["contender"] for row in table.of("round", {"model": MODEL, "cores": 1})):
        wanted = {"model": MODEL, "workload": "mixed", "contender": ours}
        one, two = (table.by_round("round", {**wanted, "cores": n}, seconds_of) for n in (1, 2))
        ratio = table.ratio(one, two)
        if is_ours(ours) and ratio is not None:
            spreads[ours] = ratio
    if not spreads:
        return Found(name, 1.8, True, None, "")
    best = max(spreads, key=lambda one: spreads[one].median)
    return Found(name, 1.8, True, spreads[best].median, f"{best}, {_shown(spreads[best])}")
