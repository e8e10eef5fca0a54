"""Contenders' processes, one of which runs at a time: the others are stopped, so that none spins or wakes up.

Linux only. Not here: what is asked of them (``measure``) and what a process does (``child``).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qingyu
from qingyu.bench.contenders.contract import Files
from qingyu.errors import InvalidOptionError

__all__ = ["Load", "Seat", "SeatError", "Started", "check_cores", "cold_start", "started"]

Answer = dict[str, Any]
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
SAMPLE_SECONDS = 0.05


class SeatError(Exception):
    """A contender gave an error instead of an answer, or none in time; the message is its reason."""


@dataclass(frozen=True)
class Seat:
    """One contender with one model on a number of CPUs, and the Python that has its packages."""

    contender: str
    files: Files
    cores: int
    python: str = sys.executable
    home: Path = field(default=Path())


def check_cores(cores: int) -> None:
    """Raise ``InvalidOptionError`` for more CPUs than this process may use, quota and affinity counted."""
    from qingyu.runtime.cpu import available_cpus

    if not 1 <= cores <= available_cpus():
        raise InvalidOptionError(
            "option cores",
            expected=f"1 to {available_cpus()}, the CPUs this process may use",
            found=str(cores),
            remedy="Measure with fewer.",
        )


class Started:
    """A contender's process. Stopped unless it answers; ended with ``close``, and with this process in any case."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self._document = _written(seat.files)
        command = [seat.python, "-W", "ignore", "-m", "qingyu.bench.child", seat.contender, self._document]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        with _on_cores(seat.cores):
            self.begun = time.perf_counter()
            self._process = subprocess.Popen(
                [*command, str(seat.cores)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(seat),
            )

    def ask(self, order: Mapping[str, Any], *, seconds: float = 300) -> Answer:
        """Continue the process, have it carry out one order, and stop it again.

        Raises ``SeatError`` with its reason when it fails, dies, or does not answer in ``seconds``.
        """
        load = Load(self._process.pid)
        self._signal(signal.SIGCONT)
        try:
            self._write(order)
            answer: Answer = json.loads(self._line(seconds))
        finally:
            self._signal(signal.SIGSTOP)
        if not answer.pop("ok"):
            raise SeatError(f"{answer['kind']}: {answer['error']}")
        return {**answer, **load.since()}

    def watched(self, order: Mapping[str, Any], *, seconds: float = 300) -> tuple[Answer, list[list[float]]]:
        """As ``ask``, and the resident megabytes meanwhile as [second, MB]."""
        samples: list[list[float]] = []
        ended = threading.Event()
        start = time.perf_counter()

        def watch() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                samples.append([round(time.perf_counter() - start, 2), round(self.resident_mb(), 1)])

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            return self.ask(order, seconds=seconds), samples
        finally:
            ended.set()
            thread.join()

    def resident_mb(self) -> float:
        """Resident memory of the process in MB; 0 once it has ended."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1]
        except (OSError, IndexError):
            return 0.0
        return int(pages) * PAGE / (1 << 20)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        Path(self._document).unlink(missing_ok=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _write(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SeatError(self._last_words()) from None

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        end = time.perf_counter() + seconds
        read = b""
        while not read.endswith(b"\n"):
            left = end - time.perf_counter()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise SeatError(f"no answer in {seconds:g} seconds")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise SeatError(self._last_words())
            read += part
        return read

    def _last_words(self) -> str:
        code = self._process.wait(timeout=10)
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended with {code}" + (f": {lines[-1]}" if lines else "")


class Load:
    """How much of the machine others used since this was made, beside one process and its threads."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begun = self._read()

    def since(self) -> dict[str, float]:
        """``foreign``: the share of all CPUs that others used; ``own``: what the process used, in CPUs; ``idle``."""
        whole, busy, own = (now - then for now, then in zip(self._read(), self._begun, strict=True))
        if whole <= 0:
            return {"foreign": 0.0, "own": 0.0, "idle": 1.0}
        found = (max(0, busy - own) / whole, (os.cpu_count() or 1) * own / whole, (whole - busy) / whole)
        return dict(zip(("foreign", "own", "idle"), (round(share, 3) for share in found), strict=True))

    def _read(self) -> tuple[int, int, int]:
        """Ticks of all CPUs, those of them that were busy or stolen, and this process's own."""
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
        user, nice, system, idle, waiting, *rest = map(int, first.split()[1:9])
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            own = int(fields[11]) + int(fields[12])
        except (OSError, IndexError):  # it has ended
            own = 0
        busy = user + nice + system + sum(rest)
        return busy + idle + waiting, busy, own


@contextlib.contextmanager
def started(seats: Sequence[Seat]) -> Iterator[list[Started]]:
    """The processes of all seats, ended at the end whatever happens."""
    with contextlib.ExitStack() as stack:
        processes = []
        for seat in seats:
            process = Started(seat)
            stack.callback(process.close)
            processes.append(process)
        yield processes


def cold_start(seat: Seat, texts: Path) -> dict[str, float]:
    """Milliseconds from the start of a fresh process to its first vector, and its memory then.

    What the harness itself imports is not counted: its own start is timed and left out.
    """
    with started([seat]) as (process,):
        order = {"do": "bulk", "texts": str(texts), "count": 1, "marks": True}
        answer = process.ask(order)
        begun, ready, end = answer["marks"]
        memory = process.ask({"do": "memory"})
    milliseconds = 1e3 * ((begun - process.begun) + (end - ready))
    load = {name: answer[name] for name in ("foreign", "own", "idle")}
    return {**memory, "milliseconds": round(milliseconds, 1), **load}


def _written(files: Files) -> str:
    descriptor, name = tempfile.mkstemp(prefix="qingyu-bench-", suffix=".json")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(files.written(), file)
    return name


def _environment(seat: Seat) -> dict[str, str]:
    """Our package for any Python, nothing from a network, and notes kept apart from the user's own."""
    # Not resolved: an editable install is a tree of links, and what they point to is not one package.
    package = str(Path(qingyu.__file__).absolute().parents[1])
    environment = {**os.environ, "QINGYU_HOME": str(seat.home.resolve()), "TOKENIZERS_PARALLELISM": "true"}
    if seat.python != sys.executable:
        environment["PYTHONPATH"] = package
    # Installed contenders were compiled by pip; ours, in a checkout, is compiled by its first run or in every one.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", ORT_DISABLE_TELEMETRY="1")
    return environment


@contextlib.contextmanager
def _on_cores(cores: int) -> Iterator[None]:
    """Processes started within may use the first ``cores`` of this process's CPUs."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
