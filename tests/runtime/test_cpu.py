from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qingyu.errors import InvalidOptionError
from qingyu.runtime import cpu

V1 = "31 23 0:29 {part} {point} rw,relatime shared:9 - cgroup cgroup rw,{controllers}"
V2 = "41 31 0:38 {part} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
TMPFS = "30 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755"


class Tree:
    """A fake ``/`` with the few kernel files that are read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounts = [TMPFS]
        self.groups: list[str] = []

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def v1(self, controllers: str, path: str, *, part: str = "/", point: str = "") -> str:
        point = point or f"/sys/fs/cgroup/{controllers}"
        self.mounts.append(V1.format(part=part, point=point, controllers=controllers))
        self.groups.append(f"{len(self.groups) + 1}:{controllers}:{path}")
        self._kernel_files()
        return point

    def v2(self, path: str, *, part: str = "/", point: str = "/sys/fs/cgroup") -> str:
        self.mounts.append(V2.format(part=part, point=point))
        self.groups.append(f"0::{path}")
        self._kernel_files()
        return point

    def _kernel_files(self) -> None:
        self.write("proc/self/mountinfo", "\n".join(self.mounts) + "\n")
        self.write("proc/self/cgroup", "\n".join(self.groups) + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3}, raising=False)


QUOTAS = [(50_000, 0.5, 1), (100_000, 1.0, 1), (150_000, 1.5, 2), (800_000, 8.0, 4)]


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(("quota", "cpus", "threads"), QUOTAS)
def test_a_v1_quota_is_rounded_up_and_capped_by_affinity(
    tree: Tree, quota: int, cpus: float, threads: int
) -> None:
    point = tree.v1("cpu,cpuacct", "/docker/a")
    tree.write(f"{point}/docker/a/cpu.cfs_quota_us", f"{quota}\n")
    tree.write(f"{point}/docker/a/cpu.cfs_period_us", "100000\n")
    assert cpu.available_cpus(root=tree.root) == threads
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v1", cpus, threads, None)


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(("quota", "cpus", "threads"), QUOTAS)
def test_a_v2_quota_is_rounded_up_and_capped_by_affinity(
    tree: Tree, quota: int, cpus: float, threads: int
) -> None:
    point = tree.v2("/user.slice/a")
    tree.write(f"{point}/user.slice/a/cpu.max", f"{quota} 100000\n")
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v2", cpus, threads, None)


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("tightest", ["", "/outer", "/outer/inner"])
def test_the_tightest_group_around_the_process_wins(tree: Tree, tightest: str) -> None:
    point = tree.v2("/outer/inner")
    for place in ("", "/outer", "/outer/inner"):
        here = place == tightest
        tree.write(f"{point}{place}/cpu.max", "200000 100000" if here else "300000 100000")
        tree.write(f"{point}{place}/memory.max", "1000" if here else "2000")
    tree.write(f"{point}/outer/inner/child/cpu.max", "10000 100000")
    tree.write(f"{point}/neighbour/memory.max", "10")
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v2", 2.0, 2, 1000)


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("tightest", ["", "/outer", "/outer/inner"])
def test_the_tightest_v1_group_wins_for_each_controller_by_its_own_path(tree: Tree, tightest: str) -> None:
    processors = tree.v1("cpu,cpuacct", "/outer/inner")
    memory = tree.v1("memory", "/elsewhere")
    for place in ("", "/outer", "/outer/inner"):
        quota = 100_000 if place == tightest else -1
        tree.write(f"{processors}{place}/cpu.cfs_quota_us", str(quota))
        tree.write(f"{processors}{place}/cpu.cfs_period_us", "50000")
    tree.write(f"{memory}/memory.limit_in_bytes", "9223372036854771712")
    tree.write(f"{memory}/elsewhere/memory.limit_in_bytes", "268435456")
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v1", 2.0, 2, 268_435_456)


@pytest.mark.usefixtures("four_cpus")
def test_a_container_sees_its_own_group_at_the_mount_point(tree: Tree) -> None:
    """docker with cgroup v1: the path in /proc/self/cgroup is the host's, and that part is what is mounted."""
    point = tree.v1("cpu", "/docker/abc", part="/docker/abc")
    tree.write(f"{point}/cpu.cfs_quota_us", "50000")
    tree.write(f"{point}/cpu.cfs_period_us", "100000")
    assert cpu.available_cpus(root=tree.root) == 1


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/mounted/here"])
def test_a_group_outside_the_mounted_part_reads_the_mount_point(tree: Tree, path: str) -> None:
    point = tree.v2(path, part="/mine")
    tree.write(f"{point}/cpu.max", "100000 100000")
    tree.write("sys/elsewhere/cpu.max", "1000 100000")
    assert cpu.cgroup_report(root=tree.root).quota == 1.0


@pytest.mark.usefixtures("four_cpus")
def test_in_a_hybrid_system_v1_holds_the_controllers(tree: Tree) -> None:
    tree.v2("/", point="/sys/fs/cgroup/unified")
    point = tree.v1("cpu", "/")
    tree.write(f"{point}/cpu.cfs_quota_us", "150000")
    tree.write(f"{point}/cpu.cfs_period_us", "100000")
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v1", 1.5, 2, None)


@pytest.mark.usefixtures("four_cpus")
def test_a_mount_point_with_a_blank_is_found(tree: Tree) -> None:
    tree.v2("/", point="/my\\040groups")
    tree.write("/my groups/cpu.max", "100000 100000")
    assert cpu.available_cpus(root=tree.root) == 1


UNLIMITED_V2 = ["max 100000", "max", ""]


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("text", UNLIMITED_V2)
def test_unlimited_v2_groups_leave_the_affinity(tree: Tree, text: str) -> None:
    point = tree.v2("/a")
    tree.write(f"{point}/a/cpu.max", text)
    tree.write(f"{point}/a/memory.max", "max\n")
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v2", None, 4, None)


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    "text",
    ["-1", "0 0", "100000 0", "0 100000", "-5 100000", "a b", "1 2 3", "1e5 1e5", "\x00", "²  ²", "9" * 5000],
)
def test_garbage_in_the_files_counts_as_no_limit(tree: Tree, text: str) -> None:
    point = tree.v2("/a")
    tree.write(f"{point}/a/cpu.max", text)
    tree.write(f"{point}/a/memory.max", text)
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport("v2", None, 4, None)


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("text", ["", "garbage", "1:2", ":::", "\x00\x00", "31 23 - cgroup"])
def test_garbage_in_proc_counts_as_no_limit(tree: Tree, text: str) -> None:
    tree.write("proc/self/mountinfo", text)
    tree.write("proc/self/cgroup", text)
    tree.write("proc/cpuinfo", text)
    assert cpu.cgroup_report(root=tree.root) == cpu.CgroupReport(None, None, 4, None)
    assert cpu.cpu_flags(root=tree.root) == ()
    assert cpu.cpu_model(root=tree.root) == ""


@pytest.mark.usefixtures("four_cpus")
def test_a_machine_without_proc_and_sys_works(tmp_path: Path) -> None:
    assert cpu.cgroup_report(root=tmp_path) == cpu.CgroupReport(None, None, 4, None)


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (None, 1)])
def test_a_system_without_affinity_masks_uses_the_cpu_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert cpu.available_cpus(root=tmp_path) == expected


def test_a_refused_affinity_call_falls_back_to_the_cpu_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int) -> set[int]:
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", refuse, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cpu.available_cpus(root=tmp_path) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_a_process_bound_to_one_cpu_uses_one_thread() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from qingyu.runtime.cpu import choose_threads; print(choose_threads(None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "1\n"


@pytest.mark.usefixtures("four_cpus")
def test_threads_default_to_the_available_cpus(tmp_path: Path) -> None:
    assert cpu.choose_threads(None, root=tmp_path) == 4
    assert [cpu.choose_threads(n, root=tmp_path) for n in (1, 4)] == [1, 4]


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize("threads", [0, -1, 5, 10**9, True, 2.0, "2"])
def test_threads_out_of_range_are_refused(tmp_path: Path, threads: object) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        cpu.choose_threads(threads, root=tmp_path)  # type: ignore[arg-type]
    assert str(refused.value) == (
        "option threads: expected a number from 1 to 4, the CPUs this process may use, "
        f"found {threads!r}. Leave threads out to use them all."
    )


X86 = """processor	: 0
vendor_id	: AuthenticAMD
model		: 2
model name	: AMD EPYC 9B14
flags		: fpu sse4_1 avx2 avx512f avx512_vnni avx_vnni amx_int8 not_avx2
processor	: 1
model name	: something else
"""
ARM_SERVER = """processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd asimddp sve i8mm
CPU implementer	: 0x41
CPU part	: 0xd40
"""
RASPBERRY = ARM_SERVER + "\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 5 Model B\n"


@pytest.mark.parametrize(
    ("text", "flags", "model"),
    [
        (X86, ("sse4_1", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"), "AMD EPYC 9B14"),
        (ARM_SERVER, ("asimd", "asimddp", "i8mm", "sve"), "ARM implementer 0x41 part 0xd40"),
        (RASPBERRY, ("asimd", "asimddp", "i8mm", "sve"), "BCM2835, ARM implementer 0x41 part 0xd40"),
    ],
)
def test_cpu_flags_and_model_are_read_on_x86_and_arm(
    tree: Tree, text: str, flags: tuple[str, ...], model: str
) -> None:
    tree.write("proc/cpuinfo", text)
    assert cpu.cpu_flags(root=tree.root) == flags
    assert cpu.cpu_model(root=tree.root) == model


REAL_V1 = Path("/sys/fs/cgroup/cpu")


@pytest.fixture
def real_group() -> Path:
    group = REAL_V1 / f"qingyu-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"needs a writable cgroup v1 CPU controller: {error}")
    yield group
    group.rmdir()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no control groups")
@pytest.mark.parametrize(("quota", "expected"), [(50_000, 1), (100_000, 1), (150_000, 2)])
def test_a_real_v1_quota_decides_the_threads(real_group: Path, quota: int, expected: int) -> None:
    (real_group / "cpu.cfs_quota_us").write_text(str(quota))
    program = (
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from qingyu.runtime.cpu import cgroup_report; report = cgroup_report()\n"
        "print(report.version, report.quota, report.cpus)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(real_group)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    allowed = min(expected, len(os.sched_getaffinity(0)))
    assert done.stdout.split() == ["v1", str(quota / 100_000), str(allowed)]


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        ("sse4_1 avx2", True),
        ("sse4_1 avx2 avx512f avx512bw", True),
        ("sse4_1 avx2 avx512f avx512_vnni", False),
        ("sse4_1 avx2 avx_vnni", False),
        ("sse4_1", False),
        ("asimd asimddp", False),
        ("", False),
    ],
)
def test_only_avx2_without_vnni_saturates(tree: Tree, flags: str, saturates: bool) -> None:
    tree.write("proc/cpuinfo", f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu.saturates_byte_products(root=tree.root) is saturates
