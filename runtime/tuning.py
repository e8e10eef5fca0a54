"""What was measured to be best for a model on this machine, kept in a file, and used when the model is opened.

A file is for one graph, CPU, number of CPUs and version of the engines, all of which stand in it; for any other, and
where it is damaged, it counts as absent. Nothing else than speed and memory depends on it. Not here: measuring
(``qingyu.bench.on_device``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingyu.errors import UnsafeFolderError
from qingyu.runtime.cpu import available_cpus, cpu_flags, cpu_model
from qingyu.runtime.home import distrusted, own_folder, qingyu_home
from qingyu.runtime.spec import ModelSpec

__all__ = ["BUDGETS", "TUNED", "Tuning", "forget", "recall", "store"]

FORMAT = 2
FOLDER = "tuned"
LIMIT = 1 << 14  # bytes; a file has about 600
BUDGETS = (32, 1 << 16)  # the token budgets that are believed
TUNED = ("throughput", "latency")  # the profiles that may have settings; edge has one thread by definition


@dataclass(frozen=True)
class Tuning:
    """Threads, and tokens of a micro-batch, for a model opened with one profile."""

    threads: int
    token_budget: int


def recall(spec: ModelSpec) -> Mapping[str, Tuning]:
    """What was stored for this model on this machine, by profile; empty where nothing was, or nothing can be used."""
    path = _path(spec)
    try:
        if path is None or not path.is_file() or path.stat().st_size > LIMIT:
            return {}
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    known = {"format": FORMAT, "facts": _facts(spec), "engines": _versions()}
    if {key: document.get(key) for key in known} != known:
        return {}
    return _checked(document.get("profiles"))


def store(spec: ModelSpec, tunings: Mapping[str, Tuning]) -> Path | None:
    """Keep them, whole or not at all; the file, or ``None`` where there is no home to keep it in or nothing to keep."""
    path = _path(spec)
    profiles = {profile: vars(tuning) for profile, tuning in tunings.items()}
    if path is None or not _checked(profiles):
        return None
    document = {"format": FORMAT, "facts": _facts(spec), "engines": _versions(), "profiles": profiles}
    beside = path.with_name(f".{path.stem}.{os.getpid()}")
    try:
        own_folder(qingyu_home(), FOLDER)
        beside.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except (OSError, UnsafeFolderError):
        with contextlib.suppress(OSError):
            beside.unlink()
        return None
    return path


def forget(spec: ModelSpec) -> bool:
    """Remove what was stored; whether there was anything."""
    path = _path(spec)
    try:
        if path is None:
            return False
        path.unlink()
    except OSError:
        return False
    return True


def _checked(profiles: object) -> dict[str, Tuning]:
    """The tunings of a document, or none of them if one makes no sense."""
    if not isinstance(profiles, dict) or not all(map(_makes_sense, profiles.items())):
        return {}
    return {profile: Tuning(**settings) for profile, settings in profiles.items()}


def _makes_sense(item: tuple[object, object]) -> bool:
    profile, settings = item
    bounds = {"threads": (1, available_cpus()), "token_budget": BUDGETS}
    return (
        profile in TUNED
        and isinstance(settings, dict)
        and set(settings) == set(bounds)
        and all(
            type(settings[name]) is int and least <= settings[name] <= most
            for name, (least, most) in bounds.items()
        )
    )


def _path(spec: ModelSpec) -> Path | None:
    """The file of a graph on this machine. The CPU is read only where anything is stored: it takes a millisecond."""
    folder = qingyu_home() / FOLDER
    if not folder.is_absolute() or distrusted(qingyu_home(), FOLDER):
        return None
    return folder / f"{hashlib.sha256(spec.files[spec.graph].sha256.encode()).hexdigest()[:32]}.json"


def _facts(spec: ModelSpec) -> Mapping[str, Any]:
    return {
        "graph": spec.files[spec.graph].sha256,
        "cpu": cpu_model(),
        "flags": list(cpu_flags()),
        "cpus": available_cpus(),
    }


def _versions() -> dict[str, str | None]:
    """Those of the engines that could be opened, without importing them: which one is taken decides what is best."""
    return {name: _version(name) for name in ("onnxruntime", "openvino")}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
