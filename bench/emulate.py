"""How close a model's vectors are to FP32's on CPUs that are not here, by user-mode emulation.

    python -m qingyu.bench.emulate --commands TOOLS | sh
    python -m qingyu.bench.emulate MODEL... --against FP32 --tools TOOLS [--pairs dev.tsv] [--out FILE.json]

The first command prints what brings the emulator, an aarch64 Python and aarch64 wheels into the folder TOOLS, on
Debian or Ubuntu on x86-64. The second runs each MODEL under each emulated CPU on twelve texts, and on the sentences
of labelled pairs, and compares the vectors with those of FP32 and of the same MODEL on this machine. It exits with 1
when a model that is within 0.999 of FP32 here is not so there, or when a CPU could not be emulated.

aarch64 needs a mount namespace of its own (root, or user namespaces): onnxruntime crashes on an x86 /sys and
/proc/cpuinfo. Not here: speed, which emulation says nothing about.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidOptionError, OperatorError, QingyuError
from qingyu.quantize.evaluation import SimilaritySet, spearman
from qingyu.runtime.spec import read_spec

__all__ = ["CPUS", "TEXTS", "Cpu", "Row", "commands", "emulate", "main", "require_tools", "rows_of", "table"]

Floats = NDArray[np.float32]
Machine = Literal["x86_64", "aarch64"]

BAR = 0.999  # mean cosine to FP32 that a model must keep elsewhere if it has it here
SECONDS = 7200  # of one emulated CPU; twelve texts take two minutes in the slowest case seen, FP32 on Haswell


@dataclass(frozen=True)
class Cpu:
    """One emulated CPU: ``model`` as the emulator calls it, and what sets it apart."""

    name: str
    machine: Machine
    model: str
    has: str


CPUS = (
    Cpu("haswell", "x86_64", "Haswell", "AVX2, no VNNI"),
    Cpu("nehalem", "x86_64", "Nehalem", "SSE4.2, no AVX"),
    Cpu("cortex-a53", "aarch64", "cortex-a53", "NEON, no dot product"),
    Cpu("cortex-a76", "aarch64", "cortex-a76", "dot product"),
    Cpu("armv8.6", "aarch64", "max,sve=off,sme=off", "i8mm"),
    Cpu("armv9", "aarch64", "max,sme=off", "i8mm and SVE"),
    Cpu("armv9-sme", "aarch64", "max", "i8mm, SVE and SME"),
)

TEXTS = (
    "今天天气真好",
    "怎么修改登录密码？",
    "iPhone15 Pro 的电池能用多久",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "番茄两个，鸡蛋三个，油烧热后先炒鸡蛋，盛出备用，再炒番茄。",
    "在 PyTorch 2.0 中使用 torch.compile 可以把模型编译成更快的 kernel。",
    "我最近蹲久了站起来眼前会突然变黑，是不是贫血？要不要去医院检查一下？",
    "物流很快，第二天就到了，包装完好，就是颜色比图片深一点。",
    "求函数 y=x^2-4x+3 在区间 [0,3] 上的最大值和最小值。",
    "第三条 本市行政区域内鉴定机构、鉴定人从事司法鉴定活动及其监督管理，适用本条例。",
    "“你怎么又迟到了？”“路上堵车，我已经提前半小时出门了。”",
    "记者从交通部门了解到，跨江大桥主体工程已经完工，进入通车前的最后检测阶段，预计年底可以投入使用。"
    "届时两岸车程将由原来的四十分钟缩短到十分钟以内。",
)

# The Debian packages of an aarch64 Python, and what its standard library and the wheels link to.
ARM_PACKAGES = (
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libbz2-1.0",
    "libexpat1",
    "libffi8",
    "liblzma5",
    "libssl3",
    "zlib1g",
)
ARM_WHEELS = ("numpy", "onnxruntime", "tokenizers", "psutil")
ARM_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
ARM_CPUINFO = "".join(
    f"processor\t: {cpu}\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd03\nCPU revision\t: 4\n\n"
    for cpu in range(2)
)

# Run in a mount namespace: $1 is a folder with an ARM cpuinfo, the rest is the command.
HIDE_HOST = """set -e
mount -t tmpfs none /sys
mkdir -p /sys/devices/system/cpu
echo 0-1 > /sys/devices/system/cpu/possible
echo 0-1 > /sys/devices/system/cpu/present
mount --bind "$1/cpuinfo" /proc/cpuinfo
shift
exec "$@"
"""


@dataclass(frozen=True)
class Row:
    """One model on one CPU; cosines are ``None``, and ``failure`` says why, where it could not be run.

    ``spearman`` is that of the cosines of labelled pairs with their labels, where there are pairs.
    """

    cpu: str
    has: str
    model: str
    kernels: str
    mean_to_fp32: float | None = None
    min_to_fp32: float | None = None
    min_to_native: float | None = None
    failure: str | None = None
    spearman: float | None = None

    def passes(self, native: Row) -> bool:
        """Whether the model keeps the bar here if it does on this machine."""
        if self.mean_to_fp32 is None or native.mean_to_fp32 is None:
            return False
        return self.mean_to_fp32 >= BAR or native.mean_to_fp32 < BAR


def commands(tools: Path) -> str:
    """Shell commands that fill ``tools``; nothing outside it is changed but apt's list of packages."""
    here = shlex.quote(str(tools.absolute()))
    wheels = " ".join(f"{name}=={version(name)}" for name in ARM_WHEELS)
    platforms = " ".join(f"--platform {name}" for name in ARM_PLATFORMS)
    python = shlex.quote(sys.executable)
    return f"""set -eu
mkdir -p {here}/debs {here}/arm-debs {here}/wheels {here}/site {here}/apt/state/lists/partial
cd {here}
mkdir -p apt/cache/archives/partial
: > apt/status
apt-get update
(cd debs && apt-get download qemu-user-static)
for package in debs/*.deb; do dpkg -x "$package" qemu; done
arm="-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root"
arm="$arm -o Dir::State=$PWD/apt/state -o Dir::State::status=$PWD/apt/status -o Dir::Cache=$PWD/apt/cache"
apt-get $arm update
(cd arm-debs && apt-get $arm download {" ".join(ARM_PACKAGES)})
for package in arm-debs/*.deb; do dpkg -x "$package" arm64; done
{python} -m pip download --only-binary :all: --no-deps --python-version 3.11 --implementation cp \\
    --abi cp311 --abi abi3 {platforms} -d wheels {wheels}
for wheel in wheels/*.whl; do {python} -m zipfile -e "$wheel" site; done
"""


def require_tools(tools: Path, cpus: Sequence[Cpu]) -> None:
    """Raise ``OperatorError`` unless this machine and ``tools`` hold what emulating ``cpus`` takes."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise OperatorError(
            "no emulation on this machine",
            expected="Linux on x86_64",
            found=f"{sys.platform} on {platform.machine()}",
            remedy="Run it on such a machine.",
        )
    machines = {cpu.machine for cpu in cpus}
    wanted = [_emulator(tools, machine) for machine in sorted(machines)]
    if "aarch64" in machines:
        wanted += [_arm_python(tools), *(tools / "site" / name for name in ARM_WHEELS)]
    missing = [str(path.relative_to(tools)) for path in wanted if not path.exists()]
    if "aarch64" in machines and shutil.which("unshare") is None:
        missing.append("unshare (of util-linux)")
    if missing:
        raise OperatorError(
            f"{tools} does not hold the tools for emulation",
            expected="qemu-user-static, an aarch64 Python and aarch64 wheels",
            found=f"no {', '.join(missing)}",
            remedy=f"Run: python -m qingyu.bench.emulate --commands {shlex.quote(str(tools))} | sh",
        )


def _emulator(tools: Path, machine: Machine) -> Path:
    return tools / "qemu" / "usr" / "bin" / f"qemu-{machine}-static"


def _arm_python(tools: Path) -> Path:
    return tools / "arm64" / "usr" / "bin" / "python3.11"


def command(cpu: Cpu, tools: Path, tree: Path, job: Path) -> tuple[list[str], dict[str, str]]:
    """The child's command line and environment on an emulated CPU; ``tree`` holds the package and cpuinfo."""
    # Names an OpenBLAS kernel for this machine's CPU, which the emulated one may not have.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    environment |= {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    child = ["-m", "qingyu.bench.emulate_child", str(job)]
    emulator = [str(_emulator(tools, cpu.machine)), "-cpu", cpu.model]
    if cpu.machine == "x86_64":
        return [*emulator, sys.executable, *child], environment
    root = tools / "arm64"
    environment |= {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": f"{tree}:{tools / 'site'}"}
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    hidden = [*unshare, "sh", "-c", HIDE_HOST, "sh", str(tree)]
    return [*hidden, *emulator, "-L", str(root), str(_arm_python(tools)), *child], environment


@contextmanager
def _package_tree() -> Iterator[Path]:
    """A folder with the runtime and the child as a package, whatever way this one is installed."""
    import qingyu
    import qingyu.bench
    import qingyu.runtime

    with tempfile.TemporaryDirectory(prefix="qingyu-emulate-") as name:
        tree = Path(name)
        parts = {
            "qingyu": (qingyu.__file__, ("__init__.py", "errors.py")),
            "qingyu/runtime": (qingyu.runtime.__file__, ("*.py", "*.onnx")),
            "qingyu/bench": (qingyu.bench.__file__, ("__init__.py", "emulate_child.py")),
        }
        for folder, (origin, patterns) in parts.items():
            (tree / folder).mkdir()
            for pattern in patterns:
                for file in Path(str(origin)).parent.glob(pattern):
                    shutil.copy(file, tree / folder)
        (tree / "cpuinfo").write_text(ARM_CPUINFO, encoding="ascii")
        yield tree


def _run_child(
    command_line: Sequence[str], environment: Mapping[str, str], job: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], list[Floats]]:
    """The child's report and its vectors for each model; ``ChildError`` when it did not come to its end."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    try:
        done = subprocess.run(
            command_line,
            env=dict(environment),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"not done after {SECONDS} s") from None
    if done.returncode:
        raise ChildError(_why(done.returncode, done.stderr))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report, [np.load(folder / f"vectors-{number}.npy") for number in range(len(job["models"]))]


class ChildError(Exception):
    """An emulated process did not come to its end; the text says how it ended. Never leaves this module."""


def _why(status: int, errors: str) -> str:
    # The emulator names the CPU features that it cannot emulate, none of which onnxruntime uses.
    lines = [line for line in errors.splitlines() if line.strip() and "TCG doesn't support" not in line]
    ended = f"signal {-status}" if status < 0 else f"status {status}"
    return f"ended with {ended}: {lines[-1].strip()}" if lines else f"ended with {ended}"


def emulate(
    models: Sequence[Path],
    fp32: Path,
    tools: Path,
    *,
    cpus: Sequence[Cpu] = CPUS,
    session_entries: Mapping[str, str] | None = None,
    pairs: SimilaritySet | None = None,
) -> list[Row]:
    """Rows for this machine ("native") and then each CPU, one for each model.

    The sentences of ``pairs`` are embedded and compared like the other texts.

    Raises ``OperatorError`` when tools are missing or the native run fails, and ``ManifestError`` and its like
    for a folder that is no model. A CPU that cannot be emulated becomes rows with a ``failure``.
    """
    require_tools(tools, cpus)
    tools = tools.absolute()
    paths = [path.absolute() for path in models]
    names = [f"{path.name} ({read_spec(path).recipe or read_spec(path).precision})" for path in paths]
    job = {
        "texts": [*TEXTS, *(() if pairs is None else (*pairs.first, *pairs.second))],
        "session_entries": dict(session_entries or {}),
        "models": [str(path) for path in paths],
    }
    with _package_tree() as tree:
        report, vectors = _native(tree, {**job, "models": [str(fp32.absolute()), *job["models"]]})
        reference, native = vectors[0], vectors[1:]
        here = Cpu("native", "x86_64", "", "this machine")
        rows = rows_of(here, names, report, native, reference=reference, native=native, pairs=pairs)
        for cpu in cpus:
            rows += _rows_on(
                cpu, tools, tree, job, names=names, reference=reference, native=native, pairs=pairs
            )
    return rows


def _native(tree: Path, job: Mapping[str, Any]) -> tuple[dict[str, Any], list[Floats]]:
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(tree)}
    folder = tree / "native"
    folder.mkdir()
    child = [sys.executable, "-m", "qingyu.bench.emulate_child", str(folder / "job.json")]
    try:
        return _run_child(child, environment, job, folder)
    except ChildError as error:
        raise OperatorError(
            "cannot run the models on this machine",
            expected="vectors",
            found=str(error),
            remedy="Try qingyu embed with each model.",
        ) from None


def _rows_on(
    cpu: Cpu,
    tools: Path,
    tree: Path,
    job: Mapping[str, Any],
    *,
    names: Sequence[str],
    reference: Floats,
    native: Sequence[Floats],
    pairs: SimilaritySet | None,
) -> list[Row]:
    folder = tree / cpu.name
    folder.mkdir()
    command_line, environment = command(cpu, tools, tree, folder / "job.json")
    try:
        report, vectors = _run_child(command_line, environment, job, folder)
    except ChildError as error:
        return [Row(cpu.name, cpu.has, name, "not tested", failure=str(error)) for name in names]
    return rows_of(cpu, names, report, vectors, reference=reference, native=native, pairs=pairs)


def rows_of(
    cpu: Cpu,
    names: Sequence[str],
    report: Mapping[str, Any],
    vectors: Sequence[Floats],
    *,
    reference: Floats,
    native: Sequence[Floats],
    pairs: SimilaritySet | None = None,
) -> list[Row]:
    """Rows from each model's vectors (texts, dim) on a CPU, FP32's here, and each model's own here.

    The last texts are those of ``pairs``: all first ones, then all second ones.
    """
    rows = []
    for name, found, own in zip(names, vectors, native, strict=True):
        row = Row(cpu.name, cpu.has, name, report["kernels"])
        if not np.isfinite(found).all():
            rows.append(dataclasses.replace(row, failure="vectors are not finite"))
            continue
        to_fp32, to_native = _cosines(found, reference), _cosines(found, own)
        rows.append(
            dataclasses.replace(
                row,
                mean_to_fp32=float(to_fp32.mean()),
                min_to_fp32=float(to_fp32.min()),
                min_to_native=float(to_native.min()),
                spearman=None if pairs is None else _spearman(found, pairs),
            )
        )
    return rows


def _spearman(vectors: Floats, pairs: SimilaritySet) -> float:
    count = len(pairs.labels)
    first, second = vectors[-2 * count : -count], vectors[-count:]
    return spearman(_cosines(first, second), np.asarray(pairs.labels))


def _cosines(a: Floats, b: Floats) -> NDArray[np.float64]:
    wide, other = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(other, axis=1)
    cosines: NDArray[np.float64] = np.einsum("nd,nd->n", wide, other) / lengths
    return cosines


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    paired = any(row.spearman is not None for row in rows)
    columns = [
        "CPU",
        "has",
        "model",
        "integer kernels",
        "cosine to FP32, mean",
        "min",
        "to the same model here, min",
    ]
    columns += ["Spearman"] * paired
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        figures = [row.mean_to_fp32, row.min_to_fp32, row.min_to_native, *([row.spearman] * paired)]
        cells = [row.failure or "", *[""] * (len(figures) - 1)]
        if row.failure is None:
            cells = [f"{figure:.5f}" for figure in figures]
        lines.append("| " + " | ".join([row.cpu, row.has, row.model, row.kernels, *cells]) + " |")
    return "\n".join(lines)


def failing(rows: Sequence[Row]) -> list[Row]:
    """The rows that do not keep the bar that their model keeps on this machine."""
    native = {row.model: row for row in rows if row.cpu == "native"}
    return [row for row in rows if not row.passes(native[row.model])]


def _entries(values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for key, sign, _ in pairs:
        if not sign or not key:
            raise InvalidOptionError(
                "option session-entry",
                expected="KEY=VALUE",
                found=key or "=",
                remedy="Write it as KEY=VALUE.",
            )
    return {key: value for key, _, value in pairs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.emulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="*", metavar="MODEL", type=Path, help="model folders to run")
    parser.add_argument(
        "--against", metavar="FP32", type=Path, help="the FP32 model folder they were made from"
    )
    parser.add_argument("--tools", type=Path, help="folder that the printed commands have filled")
    parser.add_argument("--commands", metavar="TOOLS", type=Path, help="print the commands that fill TOOLS")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the rows as JSON")
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        type=Path,
        help="also Spearman on labelled pairs: sentence1, sentence2, label",
    )
    parser.add_argument("--cpu", action="append", choices=[cpu.name for cpu in CPUS], help="only this one")
    parser.add_argument(
        "--session-entry",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of onnxruntime, to be tried",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 when a model does not keep the bar on a CPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.commands:
        sys.stdout.write(commands(options.commands))
        return 0
    if not (options.models and options.against and options.tools):
        parser.error("MODEL, --against and --tools are needed")
    cpus = [cpu for cpu in CPUS if options.cpu is None or cpu.name in options.cpu]
    entries = _entries(options.session_entry)
    pairs = SimilaritySet.read(options.pairs) if options.pairs else None
    rows = emulate(
        options.models, options.against, options.tools, cpus=cpus, session_entries=entries, pairs=pairs
    )
    below = failing(rows)
    sys.stdout.write(table(rows) + "\n")
    if options.out:
        document = {"bar": BAR, "session_entries": entries, "rows": [dataclasses.asdict(row) for row in rows]}
        options.out.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for row in below:
        sys.stderr.write(f"{row.cpu}, {row.model}: does not keep mean cosine {BAR} to FP32\n")
    return 1 if below else 0


def cli() -> int:
    """``main`` with errors as one line on stderr and their exit code."""
    try:
        return main()
    except QingyuError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(cli())
