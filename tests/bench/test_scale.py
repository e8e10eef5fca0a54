"""The arithmetic of scale, and of two workers against one."""

from __future__ import annotations

import doctest
import json
import math
from importlib.util import find_spec

import pytest

from qingyu.bench import scale


def test_examples_of_the_module_are_true():
    assert doctest.testmod(scale).attempted == 2
    assert doctest.testmod(scale).failed == 0


def test_the_time_of_an_index_is_the_sum_of_its_insertions():
    rate, at = 1000.0, 5000
    one_by_one = sum(math.log(n) / math.log(at) / rate for n in range(1, 20_001))
    assert scale.index_seconds(20_000, rate, at) == pytest.approx(one_by_one, rel=1e-3)


def test_a_measured_graph_grows_to_the_size_asked_for():
    if find_spec("usearch") is None:  # not importorskip: imported before onnxruntime, it ends the process
        pytest.skip("needs usearch")
    found = list(scale.measure_index(2000, 32))
    assert [one["size"] for one in found] == [500, 1000, 1500, 2000]
    assert all(one["insertions_per_second"] > 0 and 64 < one["link_bytes"] < 400 for one in found)


def test_steady_rate_counts_what_ends_after_every_worker_s_first_block():
    from qingyu.bench.bulk import steady_rate

    assert steady_rate([(10.0, 50), (11.0, 50), (20.0, 100), (21.0, 120)], workers=2) == 22.0
    assert steady_rate([(10.0, 50)], workers=1) == 0.0


def test_processes_without_ray_do_the_same_job(tiny_model, tmp_path):
    for package in ("ray", "pyarrow", "pandas"):
        if find_spec(package) is None:  # not importorskip: what ray does is settled when it is imported
            pytest.skip(f"needs {package}")
    from qingyu.bench.bulk import measured, without_ray

    rows = [{"id": number, "text": f"今天天气真好{number}"} for number in range(40)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with without_ray():
        found = measured(str(path), str(tiny_model), workers=2, block_bytes=512)
    assert (found["texts"], found["workers"]) == (40, 2)
    assert found["parts"] > 2
    assert found["steady_tokens_per_second"] > 0
