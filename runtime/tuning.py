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

__all__ = ["BUDGETS", "Tuning", "forget", "recall", "store"]

FORMAT = 1
FOLDER = "tuned"
LIMIT = 1 << 14  # bytes; a file has about 500
BUDGETS = (32, 1 << 16)  # the token budgets that are believed


@dataclass(frozen=True)
class Tuning:
    """Threads, and tokens of a micro-batch, for many texts at once."""

    threads: int
    token_budget: int


def recall(spec: ModelSpec) -> Tuning | None:
    """What was stored for this model on this machine; ``None`` where nothing was, or what is there cannot be used."""
    path = _path(spec)
    try:
        if path is None or not path.is_file() or path.stat().st_size > LIMIT:
            return None
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    known = {"format": FORMAT, "facts": _facts(spec), "engines": _versions()}
    if {key: document.get(key) for key in known} != known:
        return None
    return _checked(document.get("threads"), document.get("token_budget"))


def store(spec: ModelSpec, tuning: Tuning) -> Path | None:
    """Keep it, whole or not at all; the file, or ``None`` where there is no home to keep it in or it is no tuning."""
    path = _path(spec)
    if path is None or _checked(tuning.threads, tuning.token_budget) is None:
        return None
    document = {"format": FORMAT, "facts": _facts(spec), "engines": _versions(), **vars(tuning)}
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


def _checked(threads: object, token_budget: object) -> Tuning | None:
    least, most = BUDGETS
    if type(threads) is not int or not 1 <= threads <= available_cpus():
        return None
    if type(token_budget) is not int or not least <= token_budget <= most:
        return None
    return Tuning(threads, token_budget)


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
