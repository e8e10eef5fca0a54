"""A stream of any length is embedded in flat memory: peak resident size early on and at the end.

    python -m qingyu.bench.stream_memory MODEL --texts 1000000

Prints one JSON line. The texts are made up as they are needed, so none of them is held but those under way.
Not here: speed, which this model and these texts do not represent. Linux only: the peak is the kernel's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qingyu.bench.process_memory import peak_bytes
from qingyu.runtime.embedder import Embedder

__all__ = ["main", "measure", "short_texts"]

EARLY = 10_000  # texts after which a stream holds all that it will ever hold
MEGABYTE = 1 << 20
PHRASES = (
    "今天天气真好",
    "外面阳光明媚",
    "股票大跌",
    "怎么修改登录密码",
    "人工智能正在改变医疗、教育和交通",
    "北京的学生和上海的老师看电影",
)


def short_texts(count: int, *, seed: int = 7) -> Iterator[str]:
    """``count`` texts of one to four phrases and a number, almost all different; the same for the same seed.

    >>> list(short_texts(2)) == list(short_texts(2))
    True
    """
    source = random.Random(seed)
    for number in range(count):
        phrases = source.choices(PHRASES, k=source.randint(1, 4))
        yield "，".join(phrases) + str(number)


def measure(
    model: Path, *, texts: int, early: int = EARLY, max_memory_mb: int | None = None
) -> dict[str, object]:
    """Embeds ``texts`` short texts as a stream; the peaks after ``early`` of them and at the end, in MB."""
    done, peak_early = 0, 0
    with Embedder.open(model, max_memory_mb=max_memory_mb) as embedder:
        embedder.embed(next(short_texts(1)))
        start = time.perf_counter()
        for block in embedder.embed_stream(short_texts(texts)):
            done += len(block.texts)
            if not peak_early and done >= min(early, texts):
                peak_early = peak_bytes()
        seconds = time.perf_counter() - start
        return {
            "model": embedder.spec.name,
            "precision": embedder.spec.precision,
            "workers": embedder.plan.workers,
            "token_budget": embedder.plan.token_budget,
            "texts": done,
            "early_texts": min(early, texts),
            "peak_early_mb": round(peak_early / MEGABYTE, 1),
            "peak_mb": round(peak_bytes() / MEGABYTE, 1),
            "growth_mb": round((peak_bytes() - peak_early) / MEGABYTE, 1),
            "seconds": round(seconds, 1),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.stream_memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--texts", type=int, default=1_000_000, help="how many texts (default: %(default)s)")
    parser.add_argument("--max-memory-mb", type=int, help="as for Embedder.open")
    options = parser.parse_args(arguments)
    result = measure(options.model, texts=options.texts, max_memory_mb=options.max_memory_mb)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
