"""Figures, targets, the page and the charts from rows that are made up; workloads, shapes and the ceiling."""

from __future__ import annotations

import doctest
import hashlib
import json
import statistics
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qingyu.bench import charts
from qingyu.bench.__main__ import listing, measurements
from qingyu.bench.__main__ import main as bench_main
from qingyu.bench.machine import closure, installed_megabytes, machine
from qingyu.bench.report import figures_of, rendered, write_report
from qingyu.bench.shapes import SHAPES, Shape, vocabulary, write_checkpoint
from qingyu.bench.summary import Spread, is_disturbed, percentile, summarize
from qingyu.bench.targets import targets
from qingyu.bench.texts import read_sources, varied_texts
from qingyu.bench.wall import Ceiling, operations_per_token
from qingyu.bench.workloads import WORKLOADS, arrival_times, workload
from qingyu.errors import CheckpointError, DataFileError, InvalidOptionError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "bge-small-zh"
TIMES = {  # seconds of a round by contender, in each of three rounds; the machine is twice as slow in the last
    "qingyu-int8": (1.0, 1.1, 2.0),
    "st-onnx-int8": (3.5, 3.4, 7.0),
    "st-torch-fp32": (6.0, 6.6, 12.0),
    "openvino-nncf-int8": (1.5, 1.2, 3.2),
}


def made_rows():
    """A run of the kind that the targets are about."""
    facts = {"format": 1, "quick": False, "cores": [1, 2], "started": "2025-01-01"}
    where = {"session": "a", "model": MODEL}
    rows = [{"kind": "session", "session": "a", "machine": dict(machine()), **facts}]
    rows.append({"kind": "model", **where, "title": "a shape", "real": False, "operations_per_token": 10**6})
    for name, times in TIMES.items():
        own = {**where, "contender": name}
        how = {"title": name, "precision": name.rpartition("-")[2], "how": "made up"}
        rows.append({"kind": "facts", **own, "versions": {"numpy": "2"}, "installed_mb": 12.3, **how})
        for number, seconds in enumerate(times):
            size = {"texts": 100, "tokens": 10_000, "cpu_seconds": 2 * seconds}
            for cores in (1, 2):
                for work in ("mixed", "short", "documents"):
                    row = {**own, **size, "cores": cores, "workload": work, "round": number}
                    rows.append({"kind": "round", **row, "seconds": seconds * (3 - cores)})
            single = [seconds] * 98 + [10 * seconds] * 2
            row = {**own, **size, "cores": 2, "workload": "single", "round": number}
            rows.append({"kind": "round", **row, "latencies_ms": single})
            cold = {"milliseconds": 100 * seconds, "private": 40.0, "peak": 90.0, "cores": 2, "round": number}
            rows.append({"kind": "cold", **own, **cold})
        memory = {"private": 10.0, "resident": 30.0, "peak": 100 * times[0]}
        idle = {"seconds": 3.0, "cpu_seconds": 0.0}
        rows.append({"kind": "memory", **own, "cores": 2, "opened": memory, "largest": memory, "idle": idle})
        cosine = {"mean": 0.99, "percentile_1": 0.98, "minimum": 0.97}
        kept = {"cosine": cosine, "centred_cosine": cosine, "top_10_overlap": 0.9, "texts": 400}
        rows.append({"kind": "fidelity", **own, **kept})
    for number, texts in enumerate((1_000, 10_000, 100_000, 10_000, 1_000)):
        grown = {"cores": 2, "round": number, "texts": texts, "seconds": texts * 1e-3, "streamed": True}
        grown |= {"resident": 70.0, "samples": [[0.1, 60.0], [0.2, 70.0]]}
        rows.append({"kind": "growth", **where, "contender": "qingyu-int8", **grown})
    for number in range(3):
        for cores in (1, 2):
            gops = {"onnxruntime": 20.0 * cores, "openvino": 5.0 * cores}
            rows.append({"kind": "wall", **where, "cores": cores, "round": number, "gops": gops})
    rows.append({"kind": "skipped", **where, "contender": "fastembed-int8", "reason": "a | b\nc"})
    rows.append({"kind": "skipped", **where, "contender": "qingyu-int8", "reason": "once, then it ran"})
    return rows


def test_ratios_are_medians_of_the_rounds_own_ratios():
    figures = summarize(made_rows())
    found = next(
        row
        for row in figures["bulk"]
        if (row["contender"], row["workload"], row["cores"]) == ("st-onnx-int8", "mixed", 2)
    )
    assert found["times_base"] == {"median": 3.5, "least": 3.091, "most": 3.5, "rounds": 3}


def test_rounds_of_different_runs_are_never_divided():
    rows = made_rows()
    other = [
        {**row, "session": "b", "seconds": 100.0}
        for row in rows
        if row["kind"] == "round" and row["contender"] == "st-onnx-int8" and row["workload"] == "mixed"
    ]
    before, after = summarize(rows)["bulk"], summarize(rows + other)["bulk"]
    assert [row["times_base"] for row in before] == [row["times_base"] for row in after]


def test_what_was_measured_beside_others_is_left_out_and_counted():
    rows = made_rows()
    load = {"foreign": 0.5, "own": 0.7, "idle": 0.0}
    busy = [{**row, "round": 7, "seconds": 100.0, **load} for row in rows if row.get("round") == 0]
    before, after = summarize(rows), summarize(rows + busy)
    assert (before["disturbed"], after["disturbed"]) == (0, len(busy))
    assert {**before, "disturbed": 0} == {**after, "disturbed": 0}
    assert targets(rows) == targets(rows + busy)


@pytest.mark.parametrize(
    ("foreign", "own", "idle", "disturbed"),
    [
        (0.05, 1.3, 0.0, False),  # too little to matter
        (0.3, 1.4, 0.0, True),
        (0.5, 1.0, 0.0, False),  # one thread, which had one of two CPUs to itself
        (0.6, 0.8, 0.0, True),  # one thread, which had less
        (0.9, 0.01, 0.0, True),
        (0.3, 0.8, 0.3, False),  # nobody wanted the rest
    ],
)
def test_others_disturb_only_who_misses_what_they_take(foreign, own, idle, disturbed):
    assert is_disturbed({"foreign": foreign, "own": own, "idle": idle}) is disturbed


def test_the_share_of_the_ceiling_is_of_the_faster_engine():
    figures = summarize(made_rows())
    own = [row for row in figures["bulk"] if row["contender"] == "qingyu-int8" and row["cores"] == 2]
    # 10,000 tokens of a million operations in one second are 10 GOPS, of 40.
    assert own[0]["share_of_wall"]["most"] == 0.25
    assert {row["engine"] for row in figures["wall"]} == {"onnxruntime"}


def test_only_what_never_ran_is_listed_as_not_run():
    assert [row["contender"] for row in summarize(made_rows())["skipped"]] == ["fastembed-int8"]


def test_targets_are_met_or_not_by_the_figures():
    found = {one.name: one for one in targets(made_rows())}
    assert found["Mixed lengths: times as fast as the fastest contender"].value == 1.5
    assert found["Mixed lengths: times as fast as the fastest contender"].met
    assert found["Mixed lengths: times as fast as st-onnx-int8"].met
    assert not found["Mixed lengths: times as fast as st-torch-fp32"].met
    single = found["One query at a time: p50 to that of the fastest contender"]
    assert (single.value, single.met) == (0.667, True)
    assert found["One query at a time: p99 to p50"].value == 10.0
    share = found["Mixed lengths, from str to vectors: share of the integer ceiling"]
    assert (share.value, share.met) == (0.227, False)
    assert found["Peak memory to that of st-onnx-int8, its largest batch"].value == 0.286
    assert found["Cold start of the edge profile to that of the fastest contender"].met is None
    assert found["Time per text, most to least, from 1,000 to 100,000 texts"].value == 1.0
    assert (
        found["Resident memory after a stream of 100,000 texts to that after the first 10,000"].value == 1.0
    )
    assert found["Two CPUs to one, mixed lengths"].value == 2.0


def test_targets_of_nothing_are_not_measured():
    assert {one.met for one in targets([])} == {None}


def test_the_page_is_made_of_the_json_alone(tmp_path):
    pytest.importorskip("matplotlib")
    table = write_report(made_rows(), tmp_path, note="Mind the note.")
    figures = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text == rendered(figures)
    assert "| **qingyu-int8** | 1.00 (1.00 to 1.00) |" in text
    assert "a \\| b c" in text  # a reason stays in its cell
    assert "**not met**" in text
    assert "Mind the note." in text
    assert "NOT MET" in table
    for name in figures["charts"]:
        assert f"benchmarks/{name}.svg" in text
        assert (tmp_path / "benchmarks" / f"{name}.svg").stat().st_size > 2000
        assert (tmp_path / "benchmarks" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert set(figures["charts"]) == {"throughput", "frontier", "latency", "scaling", "memory", "cold"}


def test_charts_are_the_same_bytes_for_the_same_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(charts, "PLOTS", {"latency": charts.PLOTS["latency"]})
    figures = figures_of(made_rows())
    for name in ("a", "b"):
        assert charts.draw(figures, tmp_path / name) == ["latency"]
    assert (tmp_path / "a" / "latency.svg").read_bytes() == (tmp_path / "b" / "latency.svg").read_bytes()


def test_without_matplotlib_there_is_a_page_without_charts(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    table = write_report(made_rows(), tmp_path)
    assert 'pip install "qingyu[bench]"' in table
    assert "](benchmarks/" not in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")


def test_the_page_of_the_documentation_is_that_of_its_json():
    path = ROOT / "docs" / "benchmarks.json"
    if not path.is_file():
        pytest.skip("no measured run is committed")
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == rendered(figures)
    for name in figures["charts"]:
        assert (ROOT / "docs" / "benchmarks" / f"{name}.svg").is_file()


def test_figures_are_json_without_nan():
    json.dumps(figures_of(made_rows()), allow_nan=False)


def test_percentiles_are_values_that_occurred():
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 50) == 7.0
    assert Spread.of([]) is None
    assert Spread.of([1.0, 4.0, 2.0]) == Spread(2.0, 1.0, 4.0, 3)


@pytest.mark.parametrize(("name", "median", "mean"), [("short", 18, 19), ("mixed", 46, 66)])
def test_lengths_of_a_workload_are_what_its_table_says(name, median, mean):
    lengths = [len(text) for text in WORKLOADS[name].sample(read_sources(None), 4000)]
    assert abs(statistics.median(lengths) - median) <= 2
    assert abs(statistics.fmean(lengths) - mean) <= 3
    assert max(lengths) <= 510


def test_texts_are_the_same_for_everyone_and_fewer_are_the_first_of_more():
    sources = read_sources(None)
    for one in WORKLOADS.values():
        found = one.sample(sources, 40)
        assert found == one.sample(sources, 40)
        assert found[:7] == one.sample(sources, 7)
    assert WORKLOADS["short"].sample(sources, 9) != WORKLOADS["single"].sample(sources, 9)
    digest = hashlib.sha256("\n".join(WORKLOADS["mixed"].sample(sources, 20)).encode()).hexdigest()
    assert digest[:12] == MIXED_DIGEST


MIXED_DIGEST = "6f8af12607e2"


def test_an_unknown_workload_is_an_error_that_names_the_known():
    with pytest.raises(InvalidOptionError, match="one of short, mixed, documents"):
        workload("nothing")


def test_arrivals_come_at_the_rate_asked_for():
    times = arrival_times(5000, 50.0)
    assert times == sorted(times)
    assert abs(5000 / times[-1] - 50) < 3
    assert arrival_times(10, 50.0) == times[:10]


def test_a_file_of_texts_that_is_no_text_is_an_error(tmp_path):
    (tmp_path / "texts.gz").write_bytes(b"no gzip")
    with pytest.raises(DataFileError, match="cannot be read"):
        read_sources(tmp_path / "texts.gz")
    assert len(varied_texts(None, 30)) == 30


def test_a_token_of_bge_small_needs_25_million_operations():
    sizes = SimpleNamespace(layers=4, hidden_size=512, intermediate_size=2048)
    assert operations_per_token(sizes) == 25_165_824
    base = SimpleNamespace(layers=12, hidden_size=768, intermediate_size=3072)
    assert operations_per_token(base) == 169_869_312


def test_the_ceiling_is_measured_by_every_engine_that_is_there():
    pytest.importorskip("onnx")
    sizes = SimpleNamespace(layers=1, hidden_size=32, intermediate_size=64)
    found = Ceiling(sizes, 1).measure()
    assert "onnxruntime" in found
    assert all(gops > 0 for gops in found.values())


def test_the_ceilings_product_is_that_of_the_operands():
    """What is timed is the whole product: its result is numpy's."""
    pytest.importorskip("onnx")
    from qingyu.bench import wall

    left, right = wall._operands(16, 8)
    (call,) = wall._onnxruntime(16, 8, 1)
    call()
    binding = call.args[0]
    assert (binding.copy_outputs_to_cpu()[0] == left.astype(np.int32) @ right.astype(np.int32)).all()


TINY = Shape("tiny", hidden=32, layers=2, heads=4, inner=64, pooling="mean", vocabulary=21128, positions=64)


def test_a_made_checkpoint_is_the_same_every_time_and_can_be_exported(tmp_path):
    pytest.importorskip("onnx")
    from qingyu.models.export import export
    from qingyu.runtime.embedder import Embedder

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_checkpoint(TINY, tmp_path / name)
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "a").glob("*.*"))
    spec = export(tmp_path / "a", tmp_path / "model")
    assert (spec.pooling, spec.architecture.layers, spec.dim) == ("mean", 2, 32)
    with Embedder.open(tmp_path / "model") as embedder:
        assert embedder.tokenize("今天 iPhone").tokens[:3] == ("[CLS]", "今", "天")
        assert embedder.embed(["今天天气真好", "股票大跌"]).shape == (2, 32)


def test_a_checkpoint_like_another_has_its_tokenizer_and_sizes(tiny_checkpoint, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "made").mkdir()
    write_checkpoint(TINY, tmp_path / "made", like=tiny_checkpoint)
    assert (tmp_path / "made" / "vocab.txt").read_bytes() == (tiny_checkpoint / "vocab.txt").read_bytes()
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["vocab_size"] < 1000


def test_points_that_would_be_drawn_over_one_another_share_a_label():
    assert doctest.testmod(charts) == (0, 1)


def test_the_made_vocabulary_has_the_size_and_no_token_twice():
    tokens = vocabulary(SHAPES[MODEL].vocabulary)
    assert len(tokens) == len(set(tokens)) == 21128
    with pytest.raises(CheckpointError, match="vocab_size 100"):
        vocabulary(100)


def test_installed_megabytes_count_what_is_depended_on():
    found = closure(["tokenizers"])
    assert {"tokenizers", "huggingface-hub"} <= set(found)
    assert installed_megabytes(["tokenizers"]) > installed_megabytes(["psutil"]) > 0
    assert found["tokenizers"].version == version("tokenizers")
    assert installed_megabytes(["no-such-distribution"]) == 0


def test_the_list_of_measurements_is_complete_and_each_has_a_help_page(capsys):
    wanted = {
        "batching",
        "cold_start",
        "recipes",
        "side_by_side",
        "stream_memory",
        "layer_norm",
        "quality",
        "emulate",
    }
    assert wanted | {"compare"} <= set(measurements())
    assert all(line.endswith(".") for line in measurements().values())
    assert bench_main(["--help"]) == 0
    assert listing() in capsys.readouterr().out
    assert bench_main([]) == 2
    assert bench_main(["nothing"]) == 2
    assert "no measurement 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        bench_main(["compare", "--help"])
    assert caught.value.code == 0
