"""The benchmarks of searching and of building an index run, and measure what they say."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from qingyu.bench import index_build, search, search_modes
from qingyu.runtime.vectors import unit

pytestmark = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")


def test_exact_answers_are_those_of_sorting_all(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 64)
    random = np.random.default_rng(0)
    vectors, queries = (unit(random.normal(size=(n, 8)).astype(np.float32)) for n in (300, 20))
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert np.array_equal(search.exact_answers(vectors, queries), expected)


def test_made_up_vectors_are_clustered_units_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        search.make_vectors(tmp_path / name / "vectors.npy", 1000, 32, queries=20)
    first, second = (np.load(tmp_path / name / "vectors.npy") for name in ("a", "b"))
    assert np.array_equal(first, second)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    queries = np.load(tmp_path / "a" / "queries.npy")
    nearest = np.sort(queries @ first.T, axis=1)
    # Neighbours are near, and most others are not.
    assert nearest[:, -10:].mean() > 0.6 > 0.1 > abs(np.median(nearest))


def test_a_small_run_builds_once_and_prints_a_line_a_width(tmp_path, capsys):
    arguments = [
        "--work",
        str(tmp_path),
        "--vectors",
        "500",
        "--queries",
        "60",
        "--rounds",
        "1",
        "--contenders",
        "qingyu",
    ]
    assert search.main([*arguments, "--build-only"]) == 0
    built = (tmp_path / "qingyu.json").read_text(encoding="utf-8")
    assert search.main(arguments) == 0
    assert (tmp_path / "qingyu.json").read_text(encoding="utf-8") == built
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["width"] for line in lines] == list(search.WIDTHS)
    assert all(line["recall"] > 0.9 and 0 < line["p50_ms"] <= line["p99_ms"] for line in lines)
    assert (tmp_path / "results.jsonl").read_text(encoding="utf-8").count("\n") == len(lines)


def test_building_is_measured_beside_embedding(tiny_model, monkeypatch):
    monkeypatch.setattr(index_build, "BLOCK", 50)
    texts = [f"今天天气真好{n}" for n in range(400)]
    found = index_build.measure(tiny_model, texts, block=50)
    assert (found["embedding"]["documents"], found["indexing"]["documents"]) == (100, 300)
    assert found["graph_entries"] == 300
    assert 0 < found["share_by_cpu"] < 2


def test_modes_are_measured_on_a_set(tiny_model, tmp_path, capsys):
    texts = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码", "忘记密码了怎么办"]
    rows = "\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(texts))
    for name in ("queries", "corpus"):
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "qrels.tsv").write_text(
        "query_id\tdoc_id\trel\n" + "".join(f"{n}\t{n}\t1\n" for n in range(5)), encoding="utf-8"
    )
    for _ in range(2):  # made, and then opened again
        assert (
            search_modes.main([str(tiny_model), "--data", str(tmp_path), "--index", str(tmp_path / "kb")])
            == 0
        )
        lines = {line["mode"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
        assert list(lines) == ["vector", "words", "hybrid"]
        assert lines["words"]["recall@1"] == lines["words"]["recall@10"] == 100
        assert all(line["queries"] == 5 and line["median_ms"] > 0 for line in lines.values())
