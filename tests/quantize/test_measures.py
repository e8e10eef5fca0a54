"""Measures of retrieval against their definitions and scikit-learn; probes and clusters against scikit-learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qingyu.errors import DataFileError
from qingyu.quantize.evaluation import RetrievalSet, SimilaritySet, recall_at
from qingyu.quantize.measures import ranked, retrieval_figures, retrieval_measures
from qingyu.quantize.probes import LabelledSet, ProbeSet, clustering_figures, probe, probe_figures, v_measure
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.vectors import unit


def made_up(queries=60, passages=200, seed=0):
    """Vectors, and grades 1 to 3 of one to fifteen passages a query, near ones more often."""
    random = np.random.default_rng(seed)
    corpus = unit(random.normal(size=(passages, 16)).astype(np.float32))
    near = random.integers(0, passages, queries)
    asked = unit(corpus[near] + 0.3 * random.normal(size=(queries, 16)).astype(np.float32))
    grades = []
    for place in near:
        chosen = {int(place), *random.integers(0, passages, random.integers(0, 15)).tolist()}
        grades.append({one: int(random.integers(1, 4)) for one in chosen})
    return asked, corpus, grades


def naive(order, grades):
    """The measures by their definitions, one query at a time."""
    recall, ndcg, mrr = {1: [], 5: [], 10: []}, [], []
    for row, wanted in zip(order, grades, strict=True):
        for k, values in recall.items():
            values.append(len([place for place in row[:k] if place in wanted]) / len(wanted))
        gain = sum(wanted.get(place, 0) / math.log2(rank + 2) for rank, place in enumerate(row[:10]))
        best = sorted(wanted.values(), reverse=True)[:10]
        ndcg.append(gain / sum(grade / math.log2(rank + 2) for rank, grade in enumerate(best)))
        ranks = [rank + 1 for rank, place in enumerate(row[:10]) if place in wanted]
        mrr.append(1 / ranks[0] if ranks else 0)
    figures = {f"recall@{k}": np.mean(values) for k, values in recall.items()}
    return {**figures, "nDCG@10": np.mean(ndcg), "MRR@10": np.mean(mrr)}


def test_measures_are_what_their_definitions_give():
    queries, corpus, grades = made_up()
    order = ranked(queries, corpus, depth=10)
    found = retrieval_measures(order, grades)
    assert found == pytest.approx(naive(order.tolist(), grades))
    assert 0.1 < found["recall@1"] < found["recall@5"] < found["recall@10"] < 1
    relevant = [frozenset(one) for one in grades]
    assert found["recall@10"] == pytest.approx(recall_at(10, queries, corpus, relevant))


def test_ndcg_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    queries, corpus, grades = made_up(seed=1)
    truth = np.array([[wanted.get(place, 0) for place in range(len(corpus))] for wanted in grades])
    expected = metrics.ndcg_score(truth, queries @ corpus.T, k=10)
    found = retrieval_measures(ranked(queries, corpus, depth=10), grades)
    assert found["nDCG@10"] == pytest.approx(expected, abs=1e-9)


def test_a_perfect_order_is_one_and_none_found_is_zero():
    order = np.arange(20)[None]
    perfect = retrieval_measures(order, [{0: 3, 1: 1}])
    assert perfect == {
        "recall@1": 0.5,
        "recall@5": 1,
        "recall@10": 1,
        "nDCG@10": pytest.approx(1),
        "MRR@10": 1,
    }
    assert set(retrieval_measures(order, [{15: 1}]).values()) == {0.0}


def test_passages_that_are_fewer_than_the_depth_are_all_ranked():
    queries, corpus, _ = made_up(passages=3)
    assert ranked(queries, corpus, depth=10).shape == (60, 3)
    assert ranked(queries[:0], corpus, depth=10).shape == (0, 3)


def test_grades_of_a_folder_count_and_binary_sets_are_as_before(tmp_path, tiny_model):
    texts = ["今天天气真好", "股票大跌", "怎么修改密码"]
    for name in ("queries", "corpus"):
        rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "qrels.tsv").write_text(
        "query_id\tdoc_id\trel\n0\t0\t2\n0\t1\t1\n1\t2\t0\n2\t2\t1\n", encoding="utf-8"
    )
    retrieval = RetrievalSet.read(tmp_path)
    assert retrieval.relevant == (frozenset({0, 1}), frozenset({2}))
    assert retrieval.grades == ({0: 2, 1: 1}, {2: 1})
    with Embedder.open(tiny_model) as embedder:
        figures = retrieval_figures(embedder, retrieval)
        queries, corpus = embedder.embed([texts[0], texts[2]], prompt="query"), embedder.embed(texts)
    expected = naive(ranked(queries, corpus, depth=10).tolist(), retrieval.grades)
    assert {one.measure: one.value for one in figures} == pytest.approx(
        {k: 100 * v for k, v in expected.items()}
    )
    assert {(one.measured_on, one.items) for one in figures} == {(tmp_path.name, 2)}


def test_pairs_are_read_from_json_lines_too(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": "b", "label": 1.5},
        {"sentence1": "c", "sentence2": "d", "label": "3"},
    ]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    pairs = SimilaritySet.read(tmp_path / "dev.jsonl")
    assert (pairs.first, pairs.second, pairs.labels) == (("a", "c"), ("b", "d"), (1.5, 3.0))
    (tmp_path / "dev.jsonl").write_text(
        '{"sentence1": "a", "sentence2": null, "label": 1}\n', encoding="utf-8"
    )
    with pytest.raises(DataFileError, match=r"line 1 .*a string or number as 'sentence2', found None"):
        SimilaritySet.read(tmp_path / "dev.jsonl")


# Probes and clusters.


def write(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


ROWS = [(f"今天天气真好{n}", "天气") for n in range(30)] + [(f"怎么修改密码{n}", "账号") for n in range(30)]


def test_labelled_sets_are_read_split_and_sampled_the_same_each_time(tmp_path):
    whole = LabelledSet.read(write(tmp_path / "all.tsv", ROWS))
    train, test = whole.split(0.2)
    assert (len(train.texts), len(test.texts)) == (48, 12)
    assert sorted(train.texts + test.texts) == sorted(text for text, _ in ROWS)
    assert whole.split(0.2) == (train, test)
    assert whole.sample(10) == whole.sample(10)
    assert len(whole.sample(10).texts) == 10
    assert whole.sample(100) is whole
    folder = tmp_path / "reviews"
    folder.mkdir()
    write(folder / "train.tsv", ROWS[10:50])
    with pytest.raises(DataFileError, match="a file test or dev"):
        ProbeSet.read(folder)
    write(folder / "dev.tsv", ROWS[:10] + ROWS[50:])
    probing = ProbeSet.read(folder, limit=15)
    assert (probing.name, len(probing.train.texts), len(probing.test.texts)) == ("reviews", 15, 15)
    with pytest.raises(DataFileError, match="two different labels"):
        LabelledSet.read(write(tmp_path / "one.tsv", ROWS[:5]))
    with pytest.raises(DataFileError, match="header line with text, label"):
        LabelledSet.read(write_headless(tmp_path))


def write_headless(folder):
    (folder / "headless.tsv").write_text("a\tb\nc\td\n", encoding="utf-8")
    return folder / "headless.tsv"


def test_a_probe_is_logistic_regression_and_clusters_are_k_means(tmp_path, tiny_model):
    linear_model = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    cluster = pytest.importorskip("sklearn.cluster")
    random = np.random.default_rng(0)
    labels = [str(n % 3) for n in range(150)]
    centres = random.normal(size=(3, 8))
    vectors = (centres[[int(label) for label in labels]] + random.normal(size=(150, 8))).astype(np.float32)
    expected = (
        linear_model.LogisticRegression(max_iter=1000).fit(vectors[:100], labels[:100]).predict(vectors[100:])
    )
    given = probe(vectors[:100], labels[:100], vectors[100:])
    assert given == expected.tolist()
    assert 0.6 < np.mean([a == b for a, b in zip(given, labels[100:], strict=True)]) < 1
    starts = [cluster.KMeans(3, n_init=1, random_state=seed).fit_predict(vectors) for seed in (0, 1, 2)]
    agreement = np.mean([metrics.v_measure_score(labels, start) for start in starts])
    assert v_measure(vectors, labels) == pytest.approx(agreement)

    labelled = LabelledSet.read(write(tmp_path / "all.tsv", ROWS))
    probing = ProbeSet.read(tmp_path / "all.tsv")
    with Embedder.open(tiny_model) as embedder:
        figures = probe_figures(embedder, probing)
        assert [(one.measure, one.items) for one in figures] == [("accuracy", 12), ("macro F1", 12)]
        train, test = embedder.embed(probing.train.texts), embedder.embed(probing.test.texts)
        given = probe(train, probing.train.labels, test)
        assert figures[0].value == pytest.approx(100 * metrics.accuracy_score(probing.test.labels, given))
        (found,) = clustering_figures(embedder, labelled)
        assert found.value == pytest.approx(100 * v_measure(embedder.embed(labelled.texts), labelled.labels))
