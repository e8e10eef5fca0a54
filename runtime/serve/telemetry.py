"""What a server tells of itself: Prometheus metrics, the figures of its page, and a log of JSON lines without any text.

The log is written by a thread of its own: a reader of standard error that stands still costs log lines, never answers.
"""

from __future__ import annotations

import collections
import json
import logging
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily

from qingyu.runtime.scheduler import Batch
from qingyu.runtime.threads import start

if TYPE_CHECKING:
    from qingyu.runtime.serve.service import Service

__all__ = ["Log", "LogHandler", "Telemetry"]

LOG_LINES = 10_000  # that may wait to be written
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKENS = (16, 32, 64, 128, 256, 384, 512, 1024, 2048)
RECENT = 1000  # answers, whose times the page shows
RECENT_SECONDS = 60.0


class Log:
    """JSON lines to a stream, from any thread; ``dropped`` counts those that did not fit while nobody read."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.dropped = 0
        self._stream = sys.stderr if stream is None else stream
        self._lines: queue.Queue[str | None] = queue.Queue(LOG_LINES)
        self._thread = threading.Thread(target=self._write, name="qingyu-log", daemon=True)
        start(self._thread)

    def __call__(self, event: str, *, level: str = "info", **facts: object) -> None:
        """One line. Control characters and line ends in a fact are escaped; facts that are ``None`` are left out."""
        line = {"time": round(time.time(), 3), "level": level, "event": event}
        line |= {name: fact for name, fact in facts.items() if fact is not None}
        try:
            self._lines.put_nowait(json.dumps(line, ensure_ascii=True, default=str))
        except queue.Full:
            self.dropped += 1

    def close(self, *, seconds: float = 1.0) -> None:
        """Write what waits, for a second at most."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # One write for all that wait: under load a system call for each would cost more than the lines.
            lines, ended = [line], False
            while not self._lines.empty():
                more = self._lines.get()
                if more is None:
                    ended = True
                    break
                lines.append(more)
            try:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                self.dropped += len(lines)
            if ended:
                return


class LogHandler(logging.Handler):
    """Gives what libraries log to a ``Log``, in a line of its own."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One line; the trace of an exception is left to its last words."""
        error = record.exc_info[1] if record.exc_info else None
        words = record.getMessage() if error is None else f"{record.getMessage()}: {error!r}"
        self._log("library", level=record.levelname.lower(), logger=record.name, message=words)


class Telemetry:
    """Counts what happens. All calls are of the event loop's thread but ``exposition``."""

    def __init__(self) -> None:
        # When a counter began is of no use here, and doubles the text.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.service: Service | None = None
        self.connections: Callable[[], int] = lambda: 0
        self.in_flight = 0
        self._process = psutil.Process()
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=RECENT)
        self._answered = 0
        self._refused = 0
        named: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("qingyu_requests", "Answered requests", ["route", "status"], **named)
        self._seconds = Histogram(
            "qingyu_request_seconds", "From headers to answer", ["route"], buckets=SECONDS, **named
        )
        self._waits = Histogram(
            "qingyu_wait_seconds", "Until a request's last row started", ["model"], buckets=SECONDS, **named
        )
        self._refusals = Counter("qingyu_refusals", "Refused requests", ["code"], **named)
        self._cancelled = Counter("qingyu_cancelled", "Requests whose client left before the answer", **named)
        self._texts = Counter("qingyu_texts", "Texts that were run", ["model"], **named)
        self._truncated = Counter("qingyu_truncated", "Texts that were read in part only", ["model"], **named)
        self._tokens = Counter("qingyu_tokens", "Tokens that were run, without padding", ["model"], **named)
        self._padded = Counter(
            "qingyu_padded_tokens", "Tokens that were run, with padding", ["model"], **named
        )
        self._batches = Histogram(
            "qingyu_batch_tokens", "Tokens of a micro-batch, with padding", ["model"], buckets=TOKENS, **named
        )
        self._busy = Counter("qingyu_run_seconds", "Seconds of a slot in micro-batches", ["model"], **named)
        self._reloads = Counter("qingyu_reloads", "Models opened again", ["model", "result"], **named)
        self.registry.register(self)

    def batch(self, batch: Batch) -> None:
        """A micro-batch was run."""
        name = batch.lane.name
        self._tokens.labels(name).inc(batch.tokens)
        self._padded.labels(name).inc(batch.padded)
        self._batches.labels(name).observe(batch.padded)
        self._busy.labels(name).inc(batch.seconds)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        self._answered += 1

    def ran(self, model: str, *, seconds: float, waited: float, texts: int, truncated: int) -> None:
        """A request was answered by a model."""
        self._waits.labels(model).observe(waited)
        self._texts.labels(model).inc(texts)
        if truncated:
            self._truncated.labels(model).inc(truncated)
        self._recent.append((time.monotonic(), seconds))

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refusals.labels(code).inc()
        self._refused += 1

    def cancelled(self) -> None:
        """A client left before its answer."""
        self._cancelled.inc()

    def reloaded(self, model: str, result: str) -> None:
        """A model was opened again."""
        self._reloads.labels(model, result).inc()

    def exposition(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def resident(self) -> int:
        """Resident memory in bytes."""
        return int(self._process.memory_info().rss)

    def stats(self) -> dict[str, object]:
        """What the page shows: queue, speed and memory now, times of the last minute."""
        since = time.monotonic() - RECENT_SECONDS
        times = sorted(seconds for at, seconds in self._recent if at >= since)
        scheduler = None if self.service is None else self.service.scheduler
        return {
            "ready": self.service is not None and self.service.ready,
            "uptime_seconds": 0.0
            if self.service is None
            else round(time.monotonic() - self.service.started, 1),
            "answered": self._answered,
            "refused": self._refused,
            "in_flight": self.in_flight,
            "queued": 0 if scheduler is None else scheduler.queued,
            "queued_tokens": 0 if scheduler is None else scheduler.queued_tokens,
            "expected_wait_ms": 0.0 if scheduler is None else round(1e3 * scheduler.expected_wait(), 1),
            "tokens_per_second": 0 if scheduler is None else round(scheduler.rate()),
            "last_minute": {
                "answers": len(times),
                "p50_ms": round(1e3 * statistics.median(times), 2) if times else None,
                "p99_ms": round(1e3 * times[int(0.99 * (len(times) - 1))], 2) if times else None,
            },
            "resident_bytes": self.resident(),
        }

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is read when asked for, for the registry."""
        scheduler = None if self.service is None else self.service.scheduler
        values = [
            (
                "qingyu_ready",
                "Whether models can be used",
                float(self.service is not None and self.service.ready),
            ),
            ("qingyu_resident_bytes", "Resident memory", float(self.resident())),
            ("qingyu_connections", "Open connections", float(self.connections())),
            ("qingyu_in_flight", "Requests that are not answered yet", float(self.in_flight)),
        ]
        if scheduler is not None:
            values += [
                ("qingyu_queued_requests", "Requests that wait", float(scheduler.queued)),
                ("qingyu_queued_tokens", "Tokens that wait", float(scheduler.queued_tokens)),
                ("qingyu_expected_wait_seconds", "What waits, by the rate lately", scheduler.expected_wait()),
                ("qingyu_tokens_per_second", "Rate of all slots lately", scheduler.rate()),
                ("qingyu_running_batches", "Micro-batches that run", float(scheduler.running)),
            ]
        for name, about, value in values:
            yield GaugeMetricFamily(name, about, value=value)
        models = GaugeMetricFamily(
            "qingyu_model", "1 for each model", labels=["model", "task", "precision", "fingerprint"]
        )
        withdrawn = GaugeMetricFamily(
            "qingyu_withdrawn_rows", "Rows that were not run, as nobody waited any more", labels=["model"]
        )
        for served in () if self.service is None else self.service.models:
            spec = served.model.running_spec
            models.add_metric([served.name, spec.task, spec.precision, served.fingerprint()], 1.0)
            withdrawn.add_metric([served.name], served.lane.withdrawn)
        yield models
        yield withdrawn
