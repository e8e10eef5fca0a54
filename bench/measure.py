"""Measures contenders side by side, round by round, so that a machine's drift falls on all of them alike.

Every contender with a model is a process of its own that lives through all rounds; in a round each carries out each
workload in turn, in an order that is turned round every time, while the others are stopped. The ceiling of integer
products is measured in the same rounds. Rows are appended to a file as they come. Not here: what figures are made of
them (``summary``).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from qingyu.bench.contenders import contender
from qingyu.bench.machine import machine
from qingyu.bench.prepare import FIDELITY, Prepared
from qingyu.bench.records import FORMAT, Row, Session
from qingyu.bench.seats import Load, Seat, SeatError, Started, cold_start, started
from qingyu.bench.summary import is_disturbed
from qingyu.bench.wall import Ceiling, operations_per_token
from qingyu.bench.workloads import GROWTH, WORKLOADS, Workload, arrival_times

__all__ = ["REFERENCE", "Comparison", "Settings"]

REFERENCE = "st-torch-fp32"  # what vectors are compared with
BASE_OPERATIONS = 25.2e6  # of the model that the workloads' counts are for
IDLE_SECONDS = 3.0
GROWTH_SECONDS = 150.0  # what one call may be expected to take before a contender is spared the next size
PREPARING = 0.45  # of the seconds that there are
WARM_UP = 16  # texts
TIMED = ("bulk", "single", "arrivals")


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long: ``seconds`` end it after the round under way, ``None`` never.

    ``most_texts`` bounds the growth of texts.
    """

    workloads: tuple[str, ...]
    rounds: int
    cores: tuple[int, ...]
    quick: bool
    seconds: float | None = None
    most_texts: int = GROWTH[-1]
    pythons: Mapping[str, str] = field(default_factory=dict)


class Comparison:
    """One run over one or more models; ``measure`` appends what it finds to the session."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        texts: Mapping[str, Path],
        settings: Settings,
        say: Callable[[str], None],
    ) -> None:
        self.session = session
        self.folder = folder
        self.texts = texts
        self.settings = settings
        self.say = say
        self._begun = time.perf_counter()
        facts: Row = {"format": FORMAT, "machine": machine(), "quick": settings.quick}
        facts |= {"cores": list(settings.cores), "started": time.strftime("%Y-%m-%d", time.gmtime())}
        session.add("session", facts)

    def prepare(self, prepared: Prepared, names: Sequence[str]) -> list[str]:
        """Have each contender make its files; the names of those that can run, the others noted with the reason."""
        ready = []
        for name in names:
            seat = self._seat(name, prepared, max(self.settings.cores))
            has_files = contender(name).prepare is None or seat.files.own.is_dir()
            if self._late(PREPARING) and not has_files:
                self._skip(name, prepared, "no time left to prepare it; run it once more, or without --quick")
                continue
            try:
                with started([seat]) as (process,):
                    self.say(f"preparing {name} for {prepared.model.name}")
                    process.ask({"do": "prepare"}, seconds=900)
                    self._note_facts(process, prepared)
            except SeatError as error:
                self._skip(name, prepared, str(error))
            else:
                ready.append(name)
        return ready

    def measure(self, prepared: Prepared, names: Sequence[str]) -> None:
        """All workloads with one model; what does not fit into ``seconds`` any more is left out."""
        row = {"model": prepared.model.name, "title": prepared.model.title, "real": prepared.model.real}
        self.session.add("model", {**row, "operations_per_token": operations_per_token(prepared.sizes)})
        kinds = {kind: self._of_kind(kind) for kind in ("cold", "memory", "growth")}
        timed = [one for kind in TIMED for one in self._of_kind(kind)]
        if timed or prepared.model.real:
            self._rounds(prepared, names, timed)
        for one in kinds["cold"]:
            self._cold(prepared, names, one)
        for one in kinds["memory"]:
            self._memory(prepared, names, one)
        for one in kinds["growth"]:
            self._growth(prepared, names, one)

    def _rounds(self, prepared: Prepared, names: Sequence[str], workloads: Sequence[Workload]) -> None:
        wanted = [self._seat(name, prepared, cores) for cores in self.settings.cores for name in names]
        with started(wanted) as processes:
            with ThreadPoolExecutor(max(self.settings.cores)) as pool:  # opening is not timed
                opened = list(pool.map(partial(self._opened, prepared=prepared), processes))
            seats = [process for process, ready in zip(processes, opened, strict=True) if ready]
            if prepared.model.real:
                self._fidelity([one for one in seats if self._on_all(one)], prepared)
            if not workloads:
                return
            ceilings = {cores: Ceiling(prepared.sizes, cores) for cores in self.settings.cores}
            sizes = {one.name: self._size(one, prepared) for one in workloads}
            for process, one in self._pairs(seats, workloads):
                # Warms up, and is not timed.
                compiles = one.kind == "bulk" and contender(process.seat.contender).compiles_shapes
                most = sizes[one.name]["texts"] if compiles else WARM_UP
                self._ask(process, prepared, one, min(sizes[one.name]["texts"], most))
            for number in range(self.settings.rounds):
                if number and self._late():
                    break
                self.say(f"{prepared.model.name}, round {number + 1} of {self.settings.rounds}")
                where = {"model": prepared.model.name, "round": number}
                for cores, ceiling in ceilings.items():
                    load = Load(os.getpid())
                    row = {**where, "cores": cores, "gops": ceiling.measure()}
                    self.session.add("wall", {**row, **load.since()})
                for process, one in self._pairs(seats if number % 2 == 0 else seats[::-1], workloads):
                    found = self._ask(process, prepared, one, sizes[one.name]["texts"])
                    if found is not None:
                        who = {"contender": process.seat.contender, "cores": process.seat.cores}
                        row = {**where, **who, "workload": one.name, **sizes[one.name], **found}
                        self.session.add("round", row)

    def _on_all(self, process: Started) -> bool:
        return process.seat.cores == max(self.settings.cores)

    def _pairs(
        self, processes: Sequence[Started], workloads: Sequence[Workload]
    ) -> Iterator[tuple[Started, Workload]]:
        """Workload by workload all contenders, so that what is compared lies close together.

        Fewer CPUs than all are for bulk work only.
        """
        for one in workloads:
            for process in processes:
                if one.kind == "bulk" or self._on_all(process):
                    yield process, one

    def _fidelity(self, seats: Sequence[Started], prepared: Prepared) -> None:
        """Each contender's vectors of the same texts against those of the reference."""
        found = {}
        for process in seats:
            to = self.folder / f"vectors-{process.seat.contender}.npy"
            try:
                process.ask({"do": "vectors", "texts": str(self.texts[FIDELITY]), "to": str(to.resolve())})
            except SeatError as error:
                self._skip(process.seat.contender, prepared, str(error))
            else:
                found[process.seat.contender] = to
        if REFERENCE in found:
            lengths = _token_counts(prepared, self.texts[FIDELITY])
            for row in _fidelities(found, lengths):
                self.session.add("fidelity", {"model": prepared.model.name, **row})
        for path in found.values():
            path.unlink()

    def _cold(self, prepared: Prepared, names: Sequence[str], one: Workload) -> None:
        """Fresh processes in turn; the first of each compiles modules and makes the self-check, and is not counted."""
        seats = [self._seat(name, prepared, max(self.settings.cores)) for name in names]
        for number in range(-1, self.settings.rounds):
            if self._late():
                break
            self.say(f"{prepared.model.name}, cold start {number + 1} of {self.settings.rounds}")
            for seat in seats if number % 2 == 0 else seats[::-1]:
                try:
                    found = cold_start(seat, self.texts[one.name])
                except SeatError as error:
                    self._skip(seat.contender, prepared, str(error))
                    continue
                if number >= 0:
                    row = {"contender": seat.contender, "cores": seat.cores, "round": number}
                    self.session.add("cold", {"model": prepared.model.name, **row, **found})

    def _memory(self, prepared: Prepared, names: Sequence[str], one: Workload) -> None:
        for name in names:
            if self._late():
                break
            self.say(f"{prepared.model.name}, memory of {name}")
            seat = self._seat(name, prepared, max(self.settings.cores))
            order = {"do": "bulk", "texts": str(self.texts[one.name])}
            try:
                with started([seat]) as (process,):
                    process.ask({**order, "count": 1})
                    opened = process.ask({"do": "memory"})
                    process.ask({**order, "count": self._count(one, prepared)})
                    largest = process.ask({"do": "memory"})
                    idle = process.ask({"do": "idle", "seconds": IDLE_SECONDS})
            except SeatError as error:
                self._skip(name, prepared, str(error))
                continue
            row = {"model": prepared.model.name, "contender": name, "cores": seat.cores}
            self.session.add("memory", {**row, "opened": opened, "largest": largest, "idle": idle})

    def _growth(self, prepared: Prepared, names: Sequence[str], one: Workload) -> None:
        """More and more texts. A contender that would take too long for the next size is spared it."""
        most = min(self.settings.most_texts, one.quick if self.settings.quick else one.texts)
        sizes = [size for size in GROWTH if size <= most]
        for name in names:
            if self._late():
                break
            self.say(f"{prepared.model.name}, growth of {name}")
            try:
                with started([self._seat(name, prepared, max(self.settings.cores))]) as (process,):
                    self._grow(process, prepared, one, sizes)
            except SeatError as error:
                self._skip(name, prepared, str(error))

    def _grow(self, process: Started, prepared: Prepared, one: Workload, sizes: Sequence[int]) -> None:
        """Up, and down again, so that a drift of the machine does not look like growth."""
        order = {"do": "growth", "texts": str(self.texts[one.name])}
        process.ask({**order, "count": sizes[0]})
        rate = 0.0
        reached: list[int] = []
        for size in sizes:
            if rate * size > GROWTH_SECONDS:
                break
            rate = self._grown(process, prepared, {**order, "count": size}, len(reached))
            reached.append(size)
        for number, size in enumerate(reached[-2::-1], len(reached)):
            self._grown(process, prepared, {**order, "count": size}, number)

    def _grown(self, process: Started, prepared: Prepared, order: Mapping[str, Any], number: int) -> float:
        """One call; seconds a text."""
        found, samples = process.watched(order, seconds=4 * GROWTH_SECONDS)
        row = {"contender": process.seat.contender, "cores": process.seat.cores, "round": number}
        row |= {"texts": order["count"], "samples": samples[:: max(1, len(samples) // 100)], **found}
        self.session.add("growth", {"model": prepared.model.name, **row})
        return float(found["seconds"] / order["count"])

    def _ask(self, process: Started, prepared: Prepared, one: Workload, count: int) -> Row | None:
        """One workload, once more if it was disturbed, or ``None`` and a note of the reason."""
        order: dict[str, Any] = {"do": one.kind, "texts": str(self.texts[one.name]), "count": count}
        if one.kind == "arrivals":
            order["times"] = arrival_times(count, one.rate)
        try:
            found = process.ask(order)
            return process.ask(order) if is_disturbed(found) else found
        except SeatError as error:
            self._skip(process.seat.contender, prepared, f"{one.name}: {error}")
            return None

    def _opened(self, process: Started, prepared: Prepared) -> bool:
        try:
            process.ask({"do": "open"}, seconds=120)
        except SeatError as error:
            self._skip(process.seat.contender, prepared, str(error))
            return False
        return True

    def _note_facts(self, process: Started, prepared: Prepared) -> None:
        one = contender(process.seat.contender)
        row = {"model": prepared.model.name, "contender": process.seat.contender, "title": one.title}
        row |= {"precision": one.precision, "how": one.how}
        self.session.add("facts", {**row, **process.ask({"do": "facts"})})

    def _skip(self, name: str, prepared: Prepared, reason: str) -> None:
        reason = reason.replace(str(prepared.files.int8), prepared.model.name)  # a page is read elsewhere
        self.say(f"{name} cannot run {prepared.model.name}: {reason}")
        self.session.add("skipped", {"model": prepared.model.name, "contender": name, "reason": reason})

    def _seat(self, name: str, prepared: Prepared, cores: int) -> Seat:
        files = replace(prepared.files, own=self.folder / "models" / prepared.model.name / name)
        python = self.settings.pythons.get(name, sys.executable)
        return Seat(name, files, cores, python=python, home=self.folder / "home")

    def _of_kind(self, kind: str) -> list[Workload]:
        chosen = [WORKLOADS[name] for name in self.settings.workloads]
        return [one for one in chosen if one.kind == kind]

    def _count(self, one: Workload, prepared: Prepared) -> int:
        """Fewer texts for larger models, so that a round takes about as long."""
        count = one.quick if self.settings.quick else one.texts
        if one.kind == "arrivals":
            return count
        share = min(1.0, BASE_OPERATIONS / operations_per_token(prepared.sizes))
        return max(4, round(count * share))

    def _size(self, one: Workload, prepared: Prepared) -> dict[str, int]:
        count = self._count(one, prepared)
        return {"texts": count, "tokens": sum(_token_counts(prepared, self.texts[one.name])[:count])}

    def _late(self, share: float = 1.0) -> bool:
        limit = self.settings.seconds
        return limit is not None and time.perf_counter() - self._begun > share * limit


def _token_counts(prepared: Prepared, texts: Path) -> list[int]:
    """Tokens of each text with the prompt, special ones counted: what a model must read."""
    import json

    from qingyu.runtime.tokenizer import Tokenizer

    files = prepared.files
    tokenizer = Tokenizer.from_file(files.int8 / "tokenizer.json", max_tokens=files.max_tokens)
    found = tokenizer.encode(json.loads(texts.read_text(encoding="utf-8")), prompt=files.prompt)
    return [len(one.ids) for one in found]


def _fidelities(vectors: Mapping[str, Path], lengths: Sequence[int]) -> Iterator[Row]:
    """How close each contender's vectors are to the reference's."""
    import numpy as np

    from qingyu.quantize.certificate import compare

    reference = np.load(vectors[REFERENCE])
    for name, path in vectors.items():
        found = compare(reference, np.load(path), lengths)
        cosines = {
            kind: {part: round(getattr(values, part), 6) for part in ("mean", "percentile_1", "minimum")}
            for kind, values in (("cosine", found.cosine), ("centred_cosine", found.centred_cosine))
        }
        yield {"contender": name, "texts": len(lengths), "top_10_overlap": found.top_10_overlap, **cosines}
