from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import DataFileError, InvalidOptionError
from qingyu.quantize.evaluation import (
    Change,
    RetrievalSet,
    SimilaritySet,
    recall_at,
    recall_of,
    spearman,
    spearman_of,
)
from qingyu.runtime.embedder import Embedder

QUERIES = '{"id": 0, "text": "股票"}\n{"id": "q1", "text": "天气"}\n'
CORPUS = '{"id": 7, "text": "股票大跌"}\n{"id": 8, "text": "天气真好"}\n{"id": 9, "text": "看电影"}\n'
QRELS = "query_id\tdoc_id\trel\n0\t7\t1\n0\t9\t0\nq1\t8\t2\nq1\t9\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "小问答"
    place.mkdir()
    for name, text in (("queries.jsonl", QUERIES), ("corpus.jsonl", CORPUS), ("qrels.tsv", QRELS)):
        (place / name).write_text(text, encoding="utf-8")
    return place


# Recall


def unit_vectors(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize(("k", "recall"), [(1, (1 + 0) / 2), (2, (1 + 1 / 2) / 2), (3, 1.0), (50, 1.0)])
def test_recall_is_the_share_of_relevant_passages_among_the_nearest(k: int, recall: float) -> None:
    queries, corpus = unit_vectors(0, 90), unit_vectors(5, 60, 40)
    # Nearest of the first query: 0, 2, 1; of the second: 1, 2, 0.
    assert recall_at(k, queries, corpus, [frozenset({0}), frozenset({0, 2})]) == pytest.approx(recall)


def test_length_of_vectors_does_not_count() -> None:
    queries, corpus = unit_vectors(0), unit_vectors(5, 60) * np.float32([[0.001], [1000]])
    assert recall_at(1, queries, corpus, [frozenset({0})]) == 1.0


def test_of_equal_passages_the_earlier_is_nearer() -> None:
    queries, corpus = unit_vectors(0), unit_vectors(10, 10, 10)
    assert [recall_at(1, queries, corpus, [frozenset({n})]) for n in range(3)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [511, 512, 513])
def test_recall_in_blocks_is_that_of_all_at_once(count: int) -> None:
    random = np.random.default_rng(2)
    queries, corpus = (random.normal(size=(n, 8)).astype(np.float32) for n in (count, 60))
    relevant = [frozenset({n % 60}) for n in range(count)]
    units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, corpus)]
    best = np.argsort(-(units[0] @ units[1].T), axis=1)[:, :10].tolist()
    expected = np.mean([n % 60 in row for n, row in enumerate(best)])
    assert recall_at(10, queries, corpus, relevant) == pytest.approx(expected)


def test_k_below_one_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="k of recall@k: expected at least 1, found 0"):
        recall_at(0, unit_vectors(0), unit_vectors(0), [frozenset({0})])


# Spearman


def test_spearman_of_ties_is_that_computed_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4; centred -1.5 0 0 1.5 and -1 -1 .5 1.5.
    by_hand = (1.5 + 2.25) / math.sqrt(4.5 * 4.5)
    assert spearman(np.array([1.0, 5, 5, 9]), np.array([-3.0, -3, 0, 2])) == pytest.approx(by_hand)


@pytest.mark.parametrize(("b", "expected"), [([1, 2, 3], 1.0), ([9, 8, 7], -1.0), ([5, 5, 5], 0.0)])
def test_spearman_is_one_for_the_same_order_and_zero_for_none(b: list[float], expected: float) -> None:
    assert spearman(np.array([0.1, 0.2, 40.0]), np.array(b, dtype=float)) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_spearman_equals_scipy(levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(levels)
    a = random.normal(size=300)
    b = np.floor(levels * random.random(300)) + np.round(a)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(b, a) == spearman(a, b)


def test_points_are_candidate_minus_reference() -> None:
    assert Change("csl", 10, 93.5, 93.25).points == -0.25


# Models


class Noted:
    """An embedder's face over a real one that notes prompts."""

    def __init__(self, embedder: Embedder) -> None:
        self.spec, self.prompts, self._embedder = embedder.spec, [], embedder

    def embed(self, texts: list[str], *, prompt: str | None) -> np.ndarray:
        self.prompts.append(prompt)
        return self._embedder.embed(texts, prompt=prompt)


def test_queries_and_passages_get_the_prompts_that_the_model_has(tiny_model: Path, folder: Path) -> None:
    with Embedder.open(tiny_model) as model:
        assert set(model.spec.prompts) == {"query"}
        noted = Noted(model)
        found = recall_of(noted, RetrievalSet.read(folder), k=3)  # type: ignore[arg-type]
    assert noted.prompts == ["query", None]
    assert found == 1.0


def test_similarity_is_the_correlation_of_cosines_with_labels(tiny_model: Path) -> None:
    pairs = SimilaritySet(
        "x", ("今天", "天气", "股票"), ("今天", "天气好吗", "怎么修改登录密码"), (5.0, 3.0, 3.0)
    )
    with Embedder.open(tiny_model) as model:
        first, second = model.embed(pairs.first), model.embed(pairs.second)
        assert spearman_of(model, pairs) == pytest.approx(
            spearman((first * second).sum(axis=1), np.array(pairs.labels))
        )


# Files


def test_a_retrieval_folder_is_read(folder: Path) -> None:
    found = RetrievalSet.read(folder)
    assert found == RetrievalSet(
        name="小问答",
        queries=("股票", "天气"),
        corpus=("股票大跌", "天气真好", "看电影"),
        relevant=(frozenset({0}), frozenset({1, 2})),
    )


def test_queries_without_a_relevant_passage_are_left_out(folder: Path) -> None:
    (folder / "qrels.tsv").write_text("query_id\tdoc_id\trel\nq1\t8\t1\n0\t7\t0\n", encoding="utf-8")
    found = RetrievalSet.read(folder)
    assert (found.queries, found.relevant) == (("天气",), (frozenset({1}),))


def test_windows_line_ends_a_byte_order_mark_and_other_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    rows = "id\tsentence2\tlabel\tsentence1\n1\t乙\u2028\t0\t甲\n2\t丁\t4.5\t丙\n"
    path.write_bytes(b"\xef\xbb\xbf" + rows.replace("\n", "\r\n").encode())
    assert SimilaritySet.read(path, name="x") == SimilaritySet(
        "x", ("甲", "丙"), ("乙\u2028", "丁"), (0.0, 4.5)
    )
    assert SimilaritySet.read(path).name == f"{tmp_path.name}/dev"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("queries.jsonl", "", "expected at least one text, found an empty file"),
        ("queries.jsonl", "股票\n", "line 1 cannot be used: expected a JSON object"),
        (
            "queries.jsonl",
            '{"id": 0, "text": "a"}\n["b"]\n',
            "line 2 cannot be used: expected a JSON object, found list",
        ),
        (
            "queries.jsonl",
            '{"id": true, "text": "a"}',
            "expected a string or whole number as 'id', found True",
        ),
        ("queries.jsonl", '{"text": "a"}', "as 'id', found no such field"),
        ("corpus.jsonl", '{"id": 7, "text": null}', "expected a string as 'text', found None"),
        (
            "corpus.jsonl",
            '{"id": 7, "text": "a"}\n{"id": "7", "text": "b"}\n',
            "line 2 cannot be used: expected an id of its own for each line, found '7' again",
        ),
        ("qrels.tsv", "", "expected a header line with query_id, doc_id, rel, found nothing"),
        ("qrels.tsv", "0\t7\t1\n", "expected a header line with query_id, doc_id, rel, found 0, 7, 1"),
        ("qrels.tsv", QRELS + "0\t7\n", "line 6 cannot be used: expected 3 cells, found 2"),
        (
            "qrels.tsv",
            QRELS + "5\t7\t1\n",
            "line 6 cannot be used: expected an id of queries.jsonl, found '5'",
        ),
        ("qrels.tsv", QRELS + "0\t0\t1\n", "expected an id of corpus.jsonl, found '0'"),
        ("qrels.tsv", QRELS + "0\t7\tyes\n", "expected a whole number as rel, found 'yes'"),
        (
            "qrels.tsv",
            "query_id\tdoc_id\trel\n0\t7\t0\n",
            "expected a relevant passage for at least one query",
        ),
    ],
)
def test_a_malformed_retrieval_file_is_named_with_its_line(
    folder: Path, name: str, text: str, message: str
) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataFileError) as caught:
        RetrievalSet.read(folder)
    assert str(folder / name) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("甲\t乙\t1\n", "expected a header line with sentence1, sentence2, label"),
        ("sentence1\tsentence2\tlabel\n", "expected at least two different labels, found 0"),
        ("sentence1\tsentence2\tlabel\n甲\t乙\t1\n丙\t丁\t1.0\n", "two different labels, found 1"),
        ("sentence1\tsentence2\tlabel\n甲\t乙\thigh\n", "line 2 cannot be used: expected a number as label"),
        ("sentence1\tsentence2\tlabel\n甲\t乙\tnan\n", "expected a number as label, found 'nan'"),
        ("sentence1\tsentence2\tlabel\n甲\t乙\t丙\t1\n", "line 2 cannot be used: expected 3 cells, found 4"),
    ],
)
def test_a_malformed_similarity_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataFileError) as caught:
        SimilaritySet.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_files_that_are_absent_or_not_utf_8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="expected a readable file, found No such file"):
        RetrievalSet.read(tmp_path / "nowhere")
    path = tmp_path / "dev.tsv"
    path.write_bytes("sentence1\tsentence2\tlabel\n甲\t".encode() + "乙".encode("gb18030") + b"\t1\n")
    with pytest.raises(DataFileError, match="line 2 cannot be used: expected UTF-8, found byte 0xd2"):
        SimilaritySet.read(path)


def test_deeply_nested_json_is_refused(folder: Path) -> None:
    (folder / "queries.jsonl").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(DataFileError, match="expected a JSON object"):
        RetrievalSet.read(folder)


@pytest.mark.parametrize(("name", "queries", "corpus"), [("cmrc2018", 4219, 1104), ("csl", 2000, 2000)])
def test_the_shared_retrieval_sets_are_read_whole(
    shared_data: Path, name: str, queries: int, corpus: int
) -> None:
    found = RetrievalSet.read(shared_data / name)
    assert (found.name, len(found.queries), len(found.corpus)) == (name, queries, corpus)
    first = json.loads((shared_data / name / "corpus.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert found.corpus[0] == first["text"]
    assert found.relevant[0] == {0}


def test_the_shared_similarity_set_is_read_whole(shared_data: Path) -> None:
    found = SimilaritySet.read(shared_data / "sts-b-zh" / "dev.tsv")
    assert found.name == "sts-b-zh/dev"
    assert len(found.labels) == 1458
    assert {min(found.labels), max(found.labels)} == {0.0, 5.0}
