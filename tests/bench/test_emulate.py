from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qingyu.bench import emulate, emulate_child
from qingyu.bench.emulate import CPUS, TEXTS, Cpu, Row
from qingyu.errors import InvalidOptionError, OperatorError
from qingyu.quantize.evaluation import SimilaritySet

X86 = [cpu for cpu in CPUS if cpu.machine == "x86_64"]
HERE = Cpu("native", "x86_64", "", "this machine")
REPORT = {"kernels": "exact"}


@pytest.fixture
def on_x86_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def row(cpu: str, mean: float | None, model: str = "m") -> Row:
    return Row(cpu, "", model, "exact", mean, mean, mean, None if mean is not None else "ended with signal 4")


@pytest.mark.usefixtures("on_x86_linux")
def test_missing_tools_are_named_with_the_command_that_brings_them(tmp_path: Path) -> None:
    with pytest.raises(OperatorError) as caught:
        emulate.require_tools(tmp_path, X86)
    assert str(caught.value) == (
        f"{tmp_path} does not hold the tools for emulation: "
        "expected qemu-user-static, an aarch64 Python and aarch64 wheels, "
        "found no qemu/usr/bin/qemu-x86_64-static. "
        f"Run: python -m qingyu.bench.emulate --commands {tmp_path} | sh"
    )


@pytest.mark.usefixtures("on_x86_linux")
def test_an_x86_cpu_needs_nothing_of_aarch64(tmp_path: Path) -> None:
    touch(tmp_path / "qemu/usr/bin/qemu-x86_64-static")
    emulate.require_tools(tmp_path, X86)
    with pytest.raises(
        OperatorError, match=r"found no qemu/usr/bin/qemu-aarch64-static, arm64/usr/bin/python3\.11"
    ):
        emulate.require_tools(tmp_path, CPUS)


@pytest.mark.usefixtures("on_x86_linux")
def test_complete_tools_pass_and_a_missing_unshare_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine in ("x86_64", "aarch64"):
        touch(tmp_path / f"qemu/usr/bin/qemu-{machine}-static")
    touch(tmp_path / "arm64/usr/bin/python3.11")
    for name in emulate.ARM_WHEELS:
        touch(tmp_path / "site" / name)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    emulate.require_tools(tmp_path, CPUS)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(OperatorError, match="found no unshare"):
        emulate.require_tools(tmp_path, CPUS)


def test_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(OperatorError, match="expected Linux on x86_64, found darwin on arm64"):
        emulate.require_tools(tmp_path, CPUS)


def test_the_printed_commands_are_valid_shell_and_stay_in_the_folder(tmp_path: Path) -> None:
    shell = shutil.which("sh")
    if shell is None:
        pytest.skip("needs a shell")
    script = emulate.commands(tmp_path / "a folder")
    subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)
    assert f"cd '{tmp_path}/a folder'" in script
    assert "install" not in script


def test_rows_are_cosines_to_fp32_and_to_the_same_model_here() -> None:
    reference = np.float32([[1, 0], [0, 1]])
    native = np.float32([[1, 0], [0.6, 0.8]])
    found = np.float32([[0.8, 0.6], [0.6, 0.8]])
    (result,) = emulate.rows_of(HERE, ["m"], REPORT, [found], reference=reference, native=[native])
    assert result.mean_to_fp32 == pytest.approx(0.8)
    assert result.min_to_fp32 == pytest.approx(0.8)
    assert result.min_to_native == pytest.approx(0.8)
    (same,) = emulate.rows_of(HERE, ["m"], REPORT, [native], reference=reference, native=[native])
    assert same.min_to_native == pytest.approx(1)
    assert same.mean_to_fp32 == pytest.approx(0.9)


def test_pairs_at_the_end_of_the_texts_are_correlated_with_their_labels() -> None:
    pairs = SimilaritySet("s", ("a", "b", "c"), ("d", "e", "f"), (0.0, 2.0, 1.0))
    first = [[1, 0]] * 3
    found = np.float32([[0, 1], *first, [0, 1], [1, 0.1], [1, 1]])
    (result,) = emulate.rows_of(HERE, ["m"], REPORT, [found], reference=found, native=[found], pairs=pairs)
    assert result.spearman == pytest.approx(1)
    turned = SimilaritySet("s", pairs.first, pairs.second, (2.0, 1.0, 0.0))
    (result,) = emulate.rows_of(HERE, ["m"], REPORT, [found], reference=found, native=[found], pairs=turned)
    assert result.spearman == pytest.approx(-0.5)
    assert emulate.table([result]).splitlines()[-1].endswith("| 1.00000 | -0.50000 |")


def test_vectors_that_are_not_finite_are_a_failure() -> None:
    good, bad = np.float32([[1, 0]]), np.float32([[np.nan, 0]])
    (result,) = emulate.rows_of(HERE, ["m"], REPORT, [bad], reference=good, native=[good])
    assert result.failure == "vectors are not finite"
    assert not result.passes(row("native", 0.9))


@pytest.mark.parametrize(
    ("here", "there", "passes"),
    [(0.9995, 0.9991, True), (0.9995, 0.9989, False), (0.9989, 0.98, True), (0.9995, None, False)],
)
def test_a_model_keeps_the_bar_elsewhere_if_it_keeps_it_here(
    here: float, there: float | None, passes: bool
) -> None:
    assert row("haswell", there).passes(row("native", here)) is passes


def test_each_model_is_held_to_its_own_native_row() -> None:
    rows = [row("native", 0.9995, "a"), row("native", 0.99, "b"), row("x", 0.998, "a"), row("x", 0.98, "b")]
    assert emulate.failing(rows) == [rows[2]]


def test_the_table_shows_figures_and_failures() -> None:
    lines = emulate.table([row("native", 0.99928), row("haswell", None)]).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[2] == "| native |  | m | exact | 0.99928 | 0.99928 | 0.99928 |"
    assert lines[3] == "| haswell |  | m | exact | ended with signal 4 |  |  |"


def test_an_x86_child_runs_this_python_without_the_hosts_openblas_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "SkylakeX")
    line, environment = emulate.command(X86[0], Path("/t"), Path("/tree"), Path("/tree/job.json"))
    assert line[:4] == ["/t/qemu/usr/bin/qemu-x86_64-static", "-cpu", "Haswell", sys.executable]
    assert "OPENBLAS_CORETYPE" not in environment
    assert environment["PYTHONPATH"] == "/tree"


@pytest.mark.parametrize(("user", "mapped"), [(0, False), (1000, True)])
def test_an_aarch64_child_runs_in_its_own_mount_namespace(
    monkeypatch: pytest.MonkeyPatch, user: int, mapped: bool
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    arm = next(cpu for cpu in CPUS if cpu.name == "cortex-a53")
    line, environment = emulate.command(arm, Path("/t"), Path("/tree"), Path("/tree/job.json"))
    assert line[:2] == ["unshare", "--mount"]
    assert ("--map-root-user" in line) is mapped
    assert "/t/arm64/usr/bin/python3.11" in line
    assert environment["PYTHONHOME"] == "/t/arm64/usr"


def test_a_child_that_is_killed_is_told_with_its_last_words(tmp_path: Path) -> None:
    program = "import os, sys; sys.stderr.write('last words\\n'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    with pytest.raises(emulate.ChildError, match=r"^ended with signal 9: last words$"):
        emulate._run_child([sys.executable, "-c", program], {}, {"models": []}, tmp_path)


def test_warnings_of_the_emulator_are_not_last_words() -> None:
    noise = "qemu: warning: TCG doesn't support requested feature: CPUID.01H:ECX.pcid [bit 17]\n"
    assert emulate._why(-11, noise) == "ended with signal 11"


@pytest.mark.parametrize("value", ["session.key", "=1", ""])
def test_a_session_entry_without_key_and_value_is_refused(value: str) -> None:
    with pytest.raises(InvalidOptionError, match="expected KEY=VALUE"):
        emulate._entries([value])


def test_session_entries_are_split_at_the_first_sign() -> None:
    assert emulate._entries(["a.b=c=d"]) == {"a.b": "c=d"}


def test_texts_differ_in_length_and_are_not_repeated() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == 12
    assert min(map(len, TEXTS)) < 8
    assert max(map(len, TEXTS)) > 64


def test_the_child_runs_alone_and_gives_what_an_embedder_here_gives(tiny_model: Path) -> None:
    """In a process of its own, from a package tree of the runtime alone, as under emulation."""
    from qingyu.runtime.embedder import Embedder

    job = {"texts": TEXTS, "session_entries": {}, "models": [str(tiny_model)] * 2}
    with pytest.warns(UserWarning, match="unknown"), Embedder.open(tiny_model) as embedder:
        expected = embedder.embed(list(TEXTS))
    with emulate._package_tree() as tree:
        assert not (tree / "qingyu" / "quantize").exists()
        report, vectors = emulate._native(tree, job)
    assert report["kernels"] in ("exact", "saturates")
    assert len(vectors) == 2
    for found in vectors:
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_native_run_that_fails_is_an_operators_error(tmp_path: Path) -> None:
    job = {"texts": TEXTS, "session_entries": {}, "models": [str(tmp_path / "nothing")]}
    with emulate._package_tree() as tree, pytest.raises(OperatorError, match="cannot run the models on this"):
        emulate._native(tree, job)


def test_a_session_entry_reaches_the_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qingyu.runtime import onnxruntime_engine

    monkeypatch.setattr(onnxruntime_engine, "SESSION_ENTRIES", dict(onnxruntime_engine.SESSION_ENTRIES))
    entry = {"session.disable_prepacking": "1"}
    job = {"texts": ["今天天气真好"], "session_entries": entry, "models": [str(tiny_model)]}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    assert emulate_child.main([str(tmp_path / "job.json")]) == 0
    assert onnxruntime_engine.SESSION_ENTRIES["session.disable_prepacking"] == "1"
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["machine"] == platform.machine()


def test_the_command_line_asks_for_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        emulate.main([])
    assert caught.value.code == 2
    assert "MODEL, --against and --tools are needed" in capsys.readouterr().err


def test_missing_tools_are_one_line_on_stderr(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "qingyu.bench.emulate", "m", "--against", "f", "--tools", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
