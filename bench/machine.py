"""What a measurement was made on: CPU, versions, and how many megabytes a library takes once installed."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["installed_megabytes", "machine", "versions"]

MEGABYTE = 1 << 20


def machine() -> dict[str, object]:
    """CPU model and integer flags, CPUs that this process may use, system and Python."""
    from qingyu.runtime.cpu import available_cpus, cpu_flags, cpu_model

    return {
        "cpu": cpu_model() or "unknown",
        "flags": list(cpu_flags()),
        "cpus": available_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution; those that are not installed are left out."""
    found = ((name, _distribution(name)) for name in names)
    return {name: one.version for name, one in found if one is not None}


def installed_megabytes(names: Sequence[str]) -> float:
    """Megabytes on disk of the distributions and of all that they depend on, compiled modules included."""
    return round(sum(map(_bytes, closure(names).values())) / MEGABYTE, 1)


def closure(names: Sequence[str]) -> dict[str, Distribution]:
    """The distributions and what they require, without extras, where installed."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = _canonical(waiting.pop())
        one = None if name in found else _distribution(name)
        if one is not None:
            found[name] = one
            waiting.extend(_required(one))
    return found


def _required(one: Distribution) -> list[str]:
    """Names that a distribution requires on this machine; those of its extras are not among them."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # markers cannot be read, so what has any is left out
        plain = [line for line in one.requires or [] if ";" not in line]
        return [match[0] for match in (re.match(r"[\w.-]+", line) for line in plain) if match]
    wanted = map(Requirement, one.requires or [])
    return [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]


def _bytes(one: Distribution) -> int:
    files = (file.locate() for file in one.files or [])
    return sum(path.stat().st_size for path in map(_path, files) if path.is_file())


def _path(located: object) -> Path:
    return Path(str(located))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
