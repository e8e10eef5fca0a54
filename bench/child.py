"""One contender in a process of its own: reads commands as JSON lines, answers each with one.

    python -m qingyu.bench.child CONTENDER FILES.json

``{"do": "open"}`` opens the model; "bulk", "single", "arrivals" and "growth" run the texts of a workload's file;
"vectors" writes an array; "memory", "idle" and "facts" tell what they say; "prepare" makes the contender's files.
What libraries print goes to standard error. Started by ``qingyu.bench.seats``, which stops and continues it.
"""

from __future__ import annotations

import time

BEGUN = time.perf_counter()

import json  # noqa: E402 - the clock starts first
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from qingyu.bench.contenders import contender  # noqa: E402
from qingyu.bench.contenders.contract import Contender, Files, Opened, require_packages  # noqa: E402
from qingyu.bench.process_memory import megabytes  # noqa: E402

__all__ = ["Child", "main"]

Answer = dict[str, Any]
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
KILL = 9


class Child:
    """One contender with one model, and what it can be told to do."""

    def __init__(self, one: Contender, files: Files, threads: int) -> None:
        self.contender = one
        self.files = files
        self.threads = threads
        self._opened: Opened | None = None
        self._texts: dict[str, list[str]] = {}

    def open(self, order: Mapping[str, Any]) -> Answer:
        """Open the model; how long that took."""
        self.contender.check(self.files.model)
        start = time.perf_counter()
        self._opened = self.contender.open(self.files, self.threads)
        return {"seconds": time.perf_counter() - start}

    def prepare(self, order: Mapping[str, Any]) -> Answer:
        """Make the contender's files, if it has any and they are not there yet."""
        self.contender.check(self.files.model)
        start = time.perf_counter()
        if self.contender.prepare is not None and not self.files.own.is_dir():
            require_packages(self.contender, preparing=True)
            self.contender.prepare(self.files)
        return {"seconds": time.perf_counter() - start}

    def bulk(self, order: Mapping[str, Any]) -> Answer:
        """All texts in one call."""
        texts = self._read(order)
        cpu, start = time.process_time(), time.perf_counter()
        vectors = self._ready.embed(texts)
        answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        _check(vectors, len(texts), self.files.dim)
        return answer

    def single(self, order: Mapping[str, Any]) -> Answer:
        """A call a text."""
        embed = self._ready.embed
        took = []
        cpu = time.process_time()
        for text in self._read(order):
            start = time.perf_counter()
            embed([text])
            took.append(time.perf_counter() - start)
        return {"cpu_seconds": time.process_time() - cpu, "latencies_ms": _milliseconds(took)}

    def arrivals(self, order: Mapping[str, Any]) -> Answer:
        """Texts that arrive at given times; each call takes all that wait."""
        texts, times = self._read(order), order["times"]
        embed = self._ready.embed
        took: list[float] = []
        cpu, start = time.process_time(), time.perf_counter()
        done = 0
        while done < len(texts):
            now = time.perf_counter() - start
            if now < times[done]:
                time.sleep(times[done] - now)
                continue
            waiting = [text for text, at in zip(texts[done:], times[done:], strict=True) if at <= now]
            embed(waiting)
            end = time.perf_counter() - start
            took.extend(end - at for at in times[done : done + len(waiting)])
            done += len(waiting)
        return {"cpu_seconds": time.process_time() - cpu, "latencies_ms": _milliseconds(took)}

    def growth(self, order: Mapping[str, Any]) -> Answer:
        """The first ``count`` texts, as a stream where there is one, in one call where there is none."""
        texts = self._read(order)[: order["count"]]
        start = time.perf_counter()
        stream = self._ready.stream
        done = sum(len(block) for block in stream(texts)) if stream else len(self._ready.embed(texts))
        seconds = time.perf_counter() - start
        if done != len(texts):
            raise ValueError(f"{done} vectors of {len(texts)} texts")
        return {"seconds": seconds, "streamed": stream is not None, **megabytes()}

    def vectors(self, order: Mapping[str, Any]) -> Answer:
        """All texts, and the vectors into a file."""
        import numpy as np

        texts = self._read(order)
        found = self._ready.embed(texts)
        _check(found, len(texts), self.files.dim)
        np.save(order["to"], np.asarray(found, dtype=np.float32))
        return {}

    def memory(self, order: Mapping[str, Any]) -> Answer:
        """What this process holds now, and has held."""
        return dict(megabytes())

    def idle(self, order: Mapping[str, Any]) -> Answer:
        """CPU time of doing nothing for a while."""
        cpu, start = time.process_time(), time.perf_counter()
        time.sleep(order["seconds"])
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    def facts(self, order: Mapping[str, Any]) -> Answer:
        """Versions, and megabytes installed."""
        from qingyu.bench.machine import closure, installed_megabytes

        names = self.contender.distributions
        found = {name: one.version for name, one in closure(names).items()}
        return {
            "versions": {name: found[name] for name in names if name in found},
            "installed_mb": installed_megabytes(names),
            "distributions": len(found),
        }

    @property
    def _ready(self) -> Opened:
        if self._opened is None:
            self.open({})
        assert self._opened is not None
        return self._opened

    def _read(self, order: Mapping[str, Any]) -> list[str]:
        """The texts of a file, with the model's prompt unless the contender puts it there itself."""
        name = order["texts"]
        if name not in self._texts:
            texts = json.loads(Path(name).read_text(encoding="utf-8"))
            prompt = "" if self.contender.adds_prompt else self.files.prompt
            self._texts[name] = [prompt + text for text in texts]
        return self._texts[name][: order.get("count")]


ORDERS: Mapping[str, Callable[[Child, Mapping[str, Any]], Answer]] = {
    name: getattr(Child, name)
    for name in (
        *("open", "prepare", "bulk", "single", "arrivals", "growth"),
        *("vectors", "memory", "idle", "facts"),
    )
}


def _check(vectors: Any, rows: int, dim: int) -> None:  # noqa: ANN401 - what a library gave
    if tuple(vectors.shape) != (rows, dim):
        raise ValueError(f"vectors of shape {tuple(vectors.shape)} instead of {(rows, dim)}")


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [round(1e3 * one, 3) for one in seconds]


def answer(child: Child, order: Mapping[str, Any]) -> Answer:
    """What an order gives, or its error: a contender that fails is a row of the results, not the end of them."""
    try:
        return {"ok": True, **ORDERS[order["do"]](child, order)}
    except Exception as error:  # noqa: BLE001 - any library may raise anything
        return {"ok": False, "kind": type(error).__name__, "error": str(error) or repr(error)}
    except BaseException as error:  # panics of Rust libraries are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return {"ok": False, "kind": type(error).__name__, "error": str(error) or repr(error)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer orders until there are no more."""
    name, document, threads = (sys.argv[1:] if arguments is None else arguments)[:3]
    end_with_parent()
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    child = Child(contender(name), Files.read(json.loads(Path(document).read_text("utf-8"))), int(threads))
    ready = time.perf_counter()
    for line in sys.stdin:
        order = json.loads(line)
        found = answer(child, order)
        if order.get("marks"):
            found["marks"] = [BEGUN, ready, time.perf_counter()]
        output.write(json.dumps(found) + "\n")
        output.flush()
    return 0


def end_with_parent() -> None:
    """Have the kernel end this process when its parent dies: a stopped process would not see its input end."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, KILL)


if __name__ == "__main__":
    raise SystemExit(main())
