"""What the machine really gives this process: CPUs, memory limit and the CPU's integer instructions.

Read from the scheduler's affinity mask, from cgroup v1 and v2 files and from /proc/cpuinfo. Anything that
is missing or unreadable counts as "no limit known", so the functions also work where there is no /proc
(macOS) and where /sys is hidden. Not here: measuring speed, and pinning threads to CPUs.

Every function that reads files takes ``root``, the folder that stands for ``/``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from qingyu.errors import InvalidOptionError

__all__ = [
    "CgroupReport",
    "available_cpus",
    "cgroup_report",
    "choose_threads",
    "cpu_flags",
    "cpu_model",
    "memory_limit",
    "saturates_byte_products",
]

ROOT = Path("/")

# Those that decide which integer matrix kernel runs, and so its speed and whether 16-bit pairs saturate.
INTEGER_FLAGS = (
    "sse4_1",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "amx_tile",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
    "svei8mm",
    "sme",
    "sme2",
)

# The kernel's "no limit" of cgroup v1 is 2**63 less one page; no machine has an exbibyte.
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class CgroupReport:
    """What the control groups allow: ``quota`` in CPUs, ``memory_limit`` in bytes, ``None`` where unlimited.

    ``version`` is that of the hierarchy which holds the CPU controller, ``None`` where there is none.
    ``cpus`` is ``available_cpus()``: the quota and the affinity mask together.
    """

    version: Literal["v1", "v2"] | None
    quota: float | None
    cpus: int
    memory_limit: int | None


@dataclass(frozen=True)
class _Group:
    """The folder of one control group that this process is in, and the version of its hierarchy."""

    folder: Path
    version: Literal["v1", "v2"]


@dataclass(frozen=True)
class _Mount:
    """One mounted hierarchy: where, which part of it, and its controllers (none are named for v2)."""

    point: PurePosixPath
    part: PurePosixPath
    version: Literal["v1", "v2"]
    controllers: frozenset[str]


def available_cpus(*, root: Path = ROOT) -> int:
    """The CPUs this process may use: the smaller of affinity mask and cgroup quota rounded up, at least 1."""
    quota = _cpu_quota(root)
    allowed = _affinity()
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def memory_limit(*, root: Path = ROOT) -> int | None:
    """The memory in bytes that the tightest control group around this process allows; ``None``: no limit."""
    names = {"v1": "memory.limit_in_bytes", "v2": "memory.max"}
    limits = (_positive(_text(group.folder / names[group.version])) for group in _groups(root, "memory"))
    return min((limit for limit in limits if limit is not None), default=None)


def cgroup_report(*, root: Path = ROOT) -> CgroupReport:
    """The limits that control groups put on this process."""
    first = next(_groups(root, "cpu"), None)
    return CgroupReport(
        version=None if first is None else first.version,
        quota=_cpu_quota(root),
        cpus=available_cpus(root=root),
        memory_limit=memory_limit(root=root),
    )


def choose_threads(requested: int | None, *, root: Path = ROOT) -> int:
    """The number of threads to use: ``available_cpus()`` for ``None``, else the request if it can be met.

    Raises ``InvalidOptionError`` below 1 and above ``available_cpus()``: more threads than CPUs only wait
    for each other, and under a quota all of them are stopped together.
    """
    most = available_cpus(root=root)
    if requested is None:
        return most
    if isinstance(requested, bool) or not isinstance(requested, int) or not 1 <= requested <= most:
        raise InvalidOptionError(
            "option threads",
            expected=f"a number from 1 to {most}, the CPUs this process may use",
            found=repr(requested),
            remedy="Leave threads out to use them all.",
        )
    return requested


def cpu_flags(*, root: Path = ROOT) -> tuple[str, ...]:
    """The CPU's instruction sets that matter to integer kernels, in a fixed order; empty when unknown."""
    facts = _cpuinfo(root)
    found = {flag for key in ("flags", "features") for flag in facts.get(key, "").split()}
    return tuple(flag for flag in INTEGER_FLAGS if flag in found)


def saturates_byte_products(*, root: Path = ROOT) -> bool:
    """Whether this CPU's fast product of bytes adds pairs in 16 bits: x86 with AVX2 and without VNNI.

    ``runtime/selftest.py`` measures the same; this asks the flags alone, which takes no time.
    """
    flags = set(cpu_flags(root=root))
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def cpu_model(*, root: Path = ROOT) -> str:
    """The CPU's name, or for an ARM CPU without one its implementer and part codes; empty when unknown."""
    facts = _cpuinfo(root)
    if facts.get("model name"):
        return facts["model name"]
    codes = (facts.get("cpu implementer"), facts.get("cpu part"))
    code = f"ARM implementer {codes[0]} part {codes[1]}" if all(codes) else ""
    board = facts.get("hardware", "")  # "model" is the board on a Raspberry Pi but a bare number on x86
    return ", ".join(filter(None, (board, code)))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        try:
            return len(os.sched_getaffinity(0))
        except OSError:
            pass  # some sandboxes refuse the call
    return os.cpu_count() or 1


def _cpu_quota(root: Path) -> float | None:
    readers = {"v1": _quota_v1, "v2": _quota_v2}
    quotas = (readers[group.version](group.folder) for group in _groups(root, "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _quota_v2(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    return _ratio(*words) if len(words) == 2 else None


def _ratio(quota: str, period: str) -> float | None:
    """CPUs from microseconds per period; ``None`` for "max", -1 and anything that is not a number."""
    numbers = (_positive(quota), _positive(period))
    return None if None in numbers else numbers[0] / numbers[1]  # type: ignore[operator]


def _positive(text: str) -> int | None:
    """The number, or ``None`` unless it is one from 1 to below ``UNLIMITED``."""
    if re.fullmatch(r"[0-9]{1,20}", text.strip(), re.ASCII) is None:
        return None
    number = int(text)
    return number if 0 < number < UNLIMITED else None


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """The control groups that hold this process, from its own up to the mount point, v1 before v2.

    All are needed because a limit binds everything below it. See cgroups(7) and proc_pid_mountinfo(5).
    """
    paths = _own_paths(root)
    for mount in sorted(_mounts(root), key=lambda mount: mount.version):
        key = "" if mount.version == "v2" else controller
        if key not in paths or (key and controller not in mount.controllers):
            continue
        folder = root / mount.point.relative_to("/")
        below = _relative(paths[key], mount.part)
        for place in (below, *below.parents):
            yield _Group(folder / place, mount.version)


def _relative(path: PurePosixPath, part: PurePosixPath) -> PurePosixPath:
    """The group's place below the mount point: the point itself when only something else is mounted there."""
    if ".." in path.parts or not path.is_relative_to(part):
        return PurePosixPath(".")
    return path.relative_to(part)


def _own_paths(root: Path) -> dict[str, PurePosixPath]:
    """The process's own group in each v1 controller's hierarchy and, under the empty name, in v2's."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and path.startswith("/"):
            paths.update(dict.fromkeys(controllers.split(","), PurePosixPath(path)))
    return paths


_MOUNT = re.compile(
    r"\S+ \S+ \S+ (?P<part>/\S*) (?P<point>/\S*) .* - (?P<kind>cgroup2?) \S+ (?P<options>\S+)", re.ASCII
)


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _text(root / "proc/self/mountinfo").splitlines():
        if found := _MOUNT.fullmatch(line):
            yield _Mount(
                PurePosixPath(_unescape(found["point"])),
                PurePosixPath(_unescape(found["part"])),
                "v1" if found["kind"] == "cgroup" else "v2",
                frozenset(found["options"].split(",")),
            )


def _unescape(text: str) -> str:
    """The kernel writes blanks and backslashes in paths as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first value of each key in /proc/cpuinfo, keys in lower case."""
    facts: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    return facts


def _text(path: Path) -> str:
    """The file's text, empty when it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
