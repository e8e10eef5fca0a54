"""The core of the test suite on an emulated aarch64 CPU: tokenizing, embedding, the self-check, verifying, forking.

    python -m qingyu.bench.emulate --commands TOOLS | sh
    python -m qingyu.bench.arm_suite --commands TOOLS | sh
    python -m qingyu.bench.arm_suite --tools TOOLS [--cpu cortex-a76] [--bundle FOLDER] [TEST...]

The first two commands bring the emulator, an aarch64 Python, and the packages that tests need, into TOOLS. The third
runs this checkout's tests with them, and prints a JSON line: how many passed, failed and were skipped. With a bundle
that ``qingyu bundle-app --target pi`` made for aarch64 and Python 3.11 it also runs that bundle's ``doctor``.

Run it in a checkout, as root (aarch64 needs a mount namespace of its own). Not here: speed, which emulation says
nothing about, and comparing vectors between CPUs (``qingyu.bench.emulate``).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qingyu.bench.emulate import ARM_PLATFORMS, CPUS, Cpu, command, require_tools
from qingyu.errors import OperatorError, QingyuError

__all__ = ["TESTS", "commands", "main", "run_bundle", "run_tests"]

# Files of tests, or single tests. Left out: comparisons with torch and transformers, and what measures memory and
# time of this machine.
TESTS = (
    "tests/runtime/test_tokenizer.py",
    "tests/runtime/test_embedder.py",
    "tests/runtime/test_batching.py",
    "tests/runtime/test_onnxruntime_engine.py",
    "tests/runtime/test_selfcheck.py",
    "tests/runtime/test_selftest.py",
    "tests/runtime/test_serverless.py",
    "tests/runtime/test_wire.py",
    "tests/quantize/test_rowwise.py",
    "tests/quantize/test_golden.py",
    "tests/quantize/test_edge.py",
    "tests/quantize/test_pipeline.py::test_verify_measures_the_same_again",
)
WHEELS = (
    *("onnx", "ml_dtypes", "protobuf", "safetensors", "typing_extensions"),
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments"),
    *("hypothesis", "attrs", "sortedcontainers"),
)
# Tests start Python by this name.
RUN_TESTS = """
import sys
sys.executable = sys.argv[1]
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""
SECONDS = 5400
TEXT = "今天天气真好"


def commands(tools: Path) -> str:
    """Shell commands that add the packages of tests to ``tools``, in the versions that are installed here."""
    here, python = shlex.quote(str(tools.absolute())), shlex.quote(sys.executable)
    platforms = " ".join(f"--platform {name}" for name in ARM_PLATFORMS)
    wheels = " ".join(f"{name}=={version(name)}" for name in WHEELS)
    return f"""set -eu
cd {here}
mkdir -p test-wheels test-site
{python} -m pip download --only-binary :all: --no-deps --python-version 3.11 --implementation cp \\
    --abi cp311 --abi abi3 --abi none {platforms} -d test-wheels {wheels}
for wheel in test-wheels/*.whl; do {python} -m zipfile -e "$wheel" test-site; done
"""


def run_tests(
    tools: Path, cpu: Cpu, tests: Sequence[str] = TESTS, *, checkout: Path | None = None
) -> dict[str, Any]:
    """How many tests passed, failed and were skipped on an emulated CPU, and the names of those that failed.

    Raises ``OperatorError`` where tools or the checkout are missing.
    """
    require_tools(tools, [cpu])
    root = Path.cwd() if checkout is None else checkout
    if not (tools / "test-site" / "pytest").is_dir() or not (root / "tests").is_dir():
        raise OperatorError(
            "the tests cannot be run",
            expected=f"pytest in {tools / 'test-site'} and tests in {root}",
            found="not both",
            remedy=f"In a checkout, run: python -m qingyu.bench.arm_suite --commands {shlex.quote(str(tools))} | sh",
        )
    with tempfile.TemporaryDirectory(prefix="qingyu-arm-") as scratch:
        tree = _tree(Path(scratch), root)
        again = _emulated_python(cpu, tools.absolute(), tree)
        arguments = ["-c", RUN_TESTS, str(again), "-q", "-p", "no:cacheprovider", *tests]
        line, environment = _line(cpu, tools, tree, arguments)
        environment["PYTHONPATH"] += f":{tools / 'test-site'}"
        done = subprocess.run(
            line, env=environment, cwd=tree, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    return {"cpu": cpu.name, "has": cpu.has, "tests": list(tests), **_counts(done.stdout + done.stderr)}


def run_bundle(tools: Path, cpu: Cpu, bundle: Path) -> dict[str, Any]:
    """What an aarch64 bundle's ``doctor`` and ``embed`` say on an emulated CPU.

    The bundle's packages are used, and of ``tools`` only Python and the emulator.
    """
    require_tools(tools, [cpu])
    model = str(bundle.absolute() / "model")
    with tempfile.TemporaryDirectory(prefix="qingyu-arm-") as scratch:
        tree = Path(scratch)
        _cpuinfo(tree)
        runs = {}
        asked = {
            "doctor": ["doctor", "--json", "--model", model],
            "embed": ["embed", "--profile", "edge", "--model", model, TEXT],
        }
        for name, arguments in asked.items():
            line, environment = _line(cpu, tools, tree, ["-m", "qingyu", *arguments])
            environment |= {"PYTHONPATH": str(bundle.absolute() / "lib"), "QINGYU_HOME": str(tree / "home")}
            runs[name] = subprocess.run(
                line, env=environment, capture_output=True, text=True, timeout=600, check=False
            )
        served = _served(cpu, tools, tree, bundle) if (bundle / "lib" / "uvicorn").is_dir() else {}
    failed = [run.stderr.strip().splitlines()[-1:] for run in runs.values() if run.returncode]
    if failed:
        return {"cpu": cpu.name, "bundle": str(bundle), "failed": failed}
    report = json.loads(runs["doctor"].stdout)
    shown = ("machine", "onnxruntime", "integer kernels", "self-check", "model check")
    dim = len(json.loads(runs["embed"].stdout)["vector"])
    return {
        "cpu": cpu.name,
        "bundle": str(bundle),
        "dim": dim,
        **{key: report[key] for key in shown},
        **served,
    }


def _served(cpu: Cpu, tools: Path, tree: Path, bundle: Path) -> dict[str, Any]:
    """What the bundle's server answers, and how it ends when it is told to."""
    arguments = ["-m", "qingyu", "serve", "--port", "0", "--profile", "edge", "--model"]
    line, environment = _line(cpu, tools, tree, [*arguments, str(bundle.absolute() / "model")])
    environment |= {"PYTHONPATH": str(bundle.absolute() / "lib"), "QINGYU_HOME": str(tree / "home")}
    server = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = ""
    for entry in server.stderr:
        event = json.loads(entry) if entry.startswith("{") else {}
        address = event.get("address", address)
        if event.get("event") == "ready":
            break
    body = json.dumps({"inputs": [TEXT]}).encode()
    request = urllib.request.Request(f"{address}/embed", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        served = len(json.load(answer)[0])
    server.terminate()
    code = server.wait(120)
    server.stderr.close()
    return {"served_dim": served, "server_exit": code}


def _line(cpu: Cpu, tools: Path, tree: Path, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A Python command line on the emulated CPU, where ``tree`` holds the package and the faked cpuinfo."""
    line, environment = command(cpu, tools.absolute(), tree, tree / "job.json")
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tree)}
    return [*line[: line.index("-m")], *arguments], environment


def _emulated_python(cpu: Cpu, tools: Path, tree: Path) -> Path:
    """A program that is the emulated Python, for tests that start one: this machine cannot run the real one."""
    line, _ = _line(cpu, tools, tree, [])
    program = tree / "python"
    emulated = shlex.join(line[line.index(str(tree)) + 1 :])
    program.write_text(f'#!/bin/sh\nexec {emulated} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def _tree(scratch: Path, root: Path) -> Path:
    """The whole package as plain files, however it is installed, with the tests beside it."""
    import qingyu

    tree = scratch / "tree"
    shutil.copytree(Path(qingyu.__file__).parent, tree / "qingyu", symlinks=False)
    for name in ("bench", "models", "quantize", "runtime"):
        shutil.copytree(root / name, tree / "qingyu" / name, dirs_exist_ok=True)
    shutil.copytree(root / "tests", tree / "tests")
    shutil.copy(root / "pyproject.toml", tree)
    _cpuinfo(tree)
    return tree


def _cpuinfo(tree: Path) -> None:
    from qingyu.bench.emulate import ARM_CPUINFO

    (tree / "cpuinfo").write_text(ARM_CPUINFO, encoding="ascii")


def _counts(output: str) -> dict[str, Any]:
    """What pytest's last line says."""
    last = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)][-1:]
    numbers = {
        kind: int(number)
        for number, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", "".join(last))
    }
    failures = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)))
    counts = {kind: numbers.get(kind, 0) for kind in ("passed", "failed", "skipped")}
    counts["failed"] += numbers.get("error", 0) + numbers.get("errors", 0)
    ended = {} if last else {"ended": output.strip().splitlines()[-3:]}
    return {**counts, "failures": failures, **ended}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.arm_suite", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tests", nargs="*", metavar="TEST", help="test files or tests (default: the core)")
    parser.add_argument("--tools", type=Path, help="folder that the printed commands have filled")
    parser.add_argument("--commands", metavar="TOOLS", type=Path, help="print the commands that fill TOOLS")
    names = [cpu.name for cpu in CPUS if cpu.machine == "aarch64"]
    parser.add_argument("--cpu", choices=names, default="cortex-a76", help="(default: %(default)s)")
    parser.add_argument("--bundle", type=Path, help="also run this bundle for aarch64")
    options = parser.parse_args(arguments)
    if options.commands:
        sys.stdout.write(commands(options.commands))
        return 0
    if not options.tools:
        parser.error("--tools is needed")
    cpu = next(cpu for cpu in CPUS if cpu.name == options.cpu)
    try:
        rows = [run_bundle(options.tools, cpu, options.bundle)] if options.bundle else []
        if options.tests or not options.bundle:
            rows.append(run_tests(options.tools, cpu, options.tests or TESTS))
    except QingyuError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sound = all(not row.get("failed") and (row.get("passed") or "dim" in row) for row in rows)
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
