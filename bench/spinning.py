"""How long the threads of the profile latency should go on looking for work after a run.

    python -m qingyu.bench.spinning [MODEL] --rounds 8

One text at a time, with each length of spinning, and with one thread, in turns: right after the one before, after
0.7 ms in which the caller computes, and after 3 and 100 ms in which it sleeps. Prints a JSON line for each number of
characters and kind of pause: milliseconds from text to vector (the median) and milliseconds of the processor for each
text, what threads use after it and what the caller computes included. ``speed`` is to the longest spinning, the median
of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from statistics import median
from typing import Any
from unittest.mock import patch

from qingyu.bench.rounds import ratios_to
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.graph_engine import PROFILES
from qingyu.runtime.task import BUNDLED

__all__ = ["PAUSES", "main", "measure"]

TEXT = "今天天气真好，"
CHARACTERS = (12, 28, 60)
MICROSECONDS = (0, 150, 300, 500, 1000, 2000)
REPEATS = 30
SETTLED = 0.003  # seconds: longer than any of them spins


def _compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


#: What the caller does between two texts.
PAUSES: Mapping[str, Callable[[], None]] = {
    "none": lambda: None,
    "0.7 ms of computing": lambda: _compute(0.0007),
    "3 ms of sleep": lambda: time.sleep(0.003),
    "100 ms of sleep": lambda: time.sleep(0.1),
}


def measure(
    model: str,
    *,
    rounds: int,
    characters: Sequence[int] = CHARACTERS,
    microseconds: Sequence[int] = MICROSECONDS,
    pauses: Mapping[str, Callable[[], None]] = PAUSES,
    repeats: int = REPEATS,
) -> Iterator[dict[str, Any]]:
    """A line for each number of characters and pause, once all rounds are over."""
    found: dict[tuple[int, str], dict[str, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    with ExitStack() as stack:
        embedders = {str(number): stack.enter_context(_opened(model, number)) for number in microseconds}
        embedders["one thread"] = stack.enter_context(Embedder.open(model, threads=1))
        for index in range(rounds):
            for length, name in product(characters, pauses):
                for key in embedders if index % 2 else reversed(embedders):
                    one = _one(embedders[key], (TEXT * length)[:length], pauses[name], repeats)
                    found[length, name][key].append(one)
    for (length, name), cells in found.items():
        clocks, used = (
            {key: [pair[part] for pair in pairs] for key, pairs in cells.items()} for part in (0, 1)
        )
        yield {
            "characters": length,
            "pause": name,
            "ms": _milliseconds(clocks),
            "cpu_ms": _milliseconds(used),
            "speed": {
                key: round(speed, 2) for key, speed in ratios_to(clocks, str(max(microseconds))).items()
            },
        }


def _milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: round(1e3 * median(values), 2) for key, values in seconds.items()}


def _opened(model: str, microseconds: int) -> Embedder:
    with patch.dict(PROFILES, latency=dataclasses.replace(PROFILES["latency"], spinning_us=microseconds)):
        return Embedder.open(model, profile="latency")


def _one(embedder: Embedder, text: str, pause: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Seconds from text to vector, and of the processor for each text."""
    for _ in range(4):  # another one ran before
        embedder.embed(text)
    clocks = []
    begin = time.process_time()
    for _ in range(repeats):
        pause()
        start = time.perf_counter()
        embedder.embed(text)
        clocks.append(time.perf_counter() - start)
    time.sleep(SETTLED)
    return median(clocks), (time.process_time() - begin) / repeats


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=BUNDLED, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of a minute each (default: %(default)s)")
    options = parser.parse_args(arguments)
    for line in measure(options.model, rounds=options.rounds):
        print(json.dumps(line, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
