from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import InputError, ManifestError, MismatchError
from qingyu.quantize.certificate import (
    Certificate,
    Texts,
    certificate_rows,
    check_same_model,
    compare,
    differences,
    neighbour_overlap,
    text_cosines,
)
from qingyu.quantize.evaluation import Change, RetrievalSet, SimilaritySet
from qingyu.quantize.fidelity import Reference
from qingyu.quantize.speed import Speed, measure_speed, speed_ratio, speed_sample
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.spec import ModelSpec, read_spec

TEXTS = [
    "今天天气真好",
    "外面阳光明媚",
    "股票大跌",
    "怎么修改登录密码",
    "北京",
    "我们看电影，你听音乐吗？",
] * 4


def pair(rows: int, dim: int = 16, noise: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(rows, dim)).astype(np.float32)
    return vectors, vectors + noise * random.normal(size=(rows, dim)).astype(np.float32)


@pytest.fixture(scope="module")
def certificate(tiny_model: Path, tiny_int8: Path) -> Certificate:
    """A whole certificate of the tiny model, measured, with a set of each kind."""
    retrieval = RetrievalSet(
        "问答", tuple(TEXTS[:4]), tuple(TEXTS[:6]), tuple(frozenset({n}) for n in range(4))
    )
    pairs = SimilaritySet("句对", tuple(TEXTS[:4]), tuple(TEXTS[1:5]), (1.0, 2.0, 2.0, 5.0))
    with Embedder.open(tiny_model) as fp32, Embedder.open(tiny_int8) as int8:
        reference = Reference.of(fp32, TEXTS, retrieval=[retrieval], similarity=[pairs])
        return reference.measure(int8, rounds=3).certificate


# Figures


def test_cosines_are_those_computed_by_hand() -> None:
    reference = np.float32([[1, 0], [0, 2], [3, 4]])
    candidate = np.float32([[1, 1], [0, 7], [4, 3]])
    found = text_cosines(reference, candidate)
    np.testing.assert_allclose(found.plain, [math.sqrt(0.5), 1.0, 0.96], atol=1e-7)
    mean = np.array([1.6 / 3, 1.8 / 3])
    by_hand = []
    for a, b in (([1, 0], [math.sqrt(0.5)] * 2), ([0, 1], [0, 1]), ([0.6, 0.8], [0.8, 0.6])):
        x, y = np.array(a) - mean, np.array(b) - mean
        by_hand.append(x @ y / math.sqrt((x @ x) * (y @ y)))
    np.testing.assert_allclose(found.centred, by_hand, atol=1e-7)


def test_summary_is_mean_first_percentile_and_minimum() -> None:
    angles = np.arange(101) / 100  # candidate n is turned by n / 100 from its FP32 vector
    reference = np.tile(np.float32([1, 0]), (101, 1))
    reference[::2] *= -1
    candidate = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    candidate[::2] *= -1
    found = compare(reference, candidate, [5] * 101).cosine
    assert found.texts == 101
    assert found.mean == pytest.approx(np.cos(angles).mean(), abs=1e-6)
    assert found.percentile_1 == pytest.approx(math.cos(0.99), abs=1e-6)  # 1 of 100 steps above the lowest
    assert found.minimum == pytest.approx(math.cos(1.0), abs=1e-6)


def test_centring_shows_a_loss_that_plain_cosine_hides() -> None:
    random = np.random.default_rng(1)
    own = random.normal(size=(400, 32))
    common = np.zeros(32)
    common[0] = 60.0  # what all vectors share, as in models whose similarities all lie near 1
    reference = (common + own).astype(np.float32)
    candidate = (common + 0.5 * own + math.sqrt(0.75) * random.normal(size=own.shape)).astype(np.float32)
    found = compare(reference, candidate, [9] * 400)
    assert found.cosine.mean > 0.99
    assert 0.45 < found.centred_cosine.mean < 0.55
    assert found.top_10_overlap is not None
    assert found.top_10_overlap < 0.5


def test_bands_hold_each_text_once_by_its_length() -> None:
    reference, candidate = pair(7)
    found = compare(reference, candidate, [1, 16, 17, 64, 256, 257, 9000])
    counts = {"1-16": 2, "17-64": 2, "65-256": 1, "over 256": 2}
    assert {name: c.texts for name, c in found.bands.items()} == counts
    assert {name: c.texts for name, c in found.centred_bands.items()} == counts
    cosines = text_cosines(reference, candidate)
    assert found.bands["17-64"].minimum == pytest.approx(cosines.plain[2:4].min())
    assert found.centred_bands["17-64"].mean == pytest.approx(cosines.centred[2:4].mean())


def test_a_model_against_itself_is_perfect() -> None:
    vectors, _ = pair(40)
    found = compare(vectors, vectors.copy(), [9] * 40)
    for cosines in (found.cosine, found.centred_cosine):
        assert (cosines.mean, cosines.percentile_1, cosines.minimum) == pytest.approx(
            (1.0, 1.0, 1.0), abs=1e-12
        )
        assert max(cosines.mean, cosines.minimum) <= 1.0
    assert found.top_10_overlap == 1.0


def test_overlap_is_the_share_of_neighbours_that_stay() -> None:
    angles = np.deg2rad([0, 1, 3, 40, 42, 45])
    moved = np.deg2rad([0, 2.9, 3, 40, 42, 45])  # now the second's nearest is the third, not the first
    a, b = (np.stack([np.cos(x), np.sin(x)], axis=1).astype(np.float32) for x in (angles, moved))
    # Nearest before: 1 0 1 4 3 4, after: 1 2 1 4 3 4.
    assert neighbour_overlap(a, b, neighbours=1) == pytest.approx(5 / 6)


def test_overlap_needs_twice_as_many_texts_as_neighbours() -> None:
    vectors, _ = pair(20)
    assert neighbour_overlap(vectors[:19], vectors[:19]) is None
    assert neighbour_overlap(vectors, vectors) == 1.0


@pytest.mark.parametrize("rows", [511, 512, 513, 1100])
def test_overlap_in_blocks_is_that_of_the_whole_matrix(rows: int) -> None:
    a, b = pair(rows, noise=0.3)

    def nearest(vectors: np.ndarray) -> list[set[int]]:
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = units @ units.T
        np.fill_diagonal(cosines, -2)
        return [set(row[:10]) for row in np.argsort(-cosines, axis=1).tolist()]

    whole = np.mean([len(x & y) / 10 for x, y in zip(nearest(a), nearest(b), strict=True)])
    assert neighbour_overlap(a, b) == pytest.approx(
        whole, abs=2e-3
    )  # products of other shapes round otherwise


def test_five_thousand_texts_take_less_than_the_matrix_of_their_neighbours() -> None:
    a, b = pair(5000, dim=512)
    tracemalloc.start()
    compare(a, b, [9] * 5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5000 * 5000 * 4 * 1.5  # measured 122 MB, in float64 copies; two neighbour matrices are 200


@pytest.mark.parametrize("rows", [1, 3])
def test_texts_with_one_vector_cannot_be_centred_and_are_refused(rows: int) -> None:
    vectors = np.ones((rows, 4), dtype=np.float32)
    with pytest.raises(InputError, match=f"cannot tell apart.*found {rows} texts with the same"):
        compare(vectors, vectors, [5] * rows)


# Texts


def test_the_hash_of_texts_is_over_their_lengths_and_bytes() -> None:
    assert Texts.of(["轻语", "a"]) == Texts(2, hashlib.sha256(b"6:" + "轻语".encode() + b"1:a").hexdigest())


@pytest.mark.parametrize("other", [["b", "a"], ["ab"], ["a", "b", ""], ["a", "B"]])
def test_other_texts_have_another_hash(other: list[str]) -> None:
    assert Texts.of(other).sha256 != Texts.of(["a", "b"]).sha256


# The whole


def test_a_measured_certificate_holds_every_figure(certificate: Certificate, tiny_model: Path) -> None:
    assert certificate.texts == Texts.of(TEXTS)
    assert [(c.measured_on, c.items) for c in certificate.recall_change] == [("问答", 4)]
    assert certificate.recall_change[0].points == 0.0  # ten of six passages: all are found
    assert certificate.recall_change[0].reference == 100.0
    assert [(c.measured_on, c.items) for c in certificate.spearman_change] == [("句对", 4)]
    spec = read_spec(tiny_model)
    assert certificate.size is not None
    assert certificate.size.reference_sha256 == spec.files[spec.graph].sha256
    assert certificate.size.ratio > 1.0
    assert certificate.speed is not None
    assert certificate.speed.least <= certificate.speed.ratio <= certificate.speed.most
    assert certificate.speed.rounds == 3
    assert certificate.environment.versions["numpy"] == np.__version__


def test_speed_and_sets_are_measured_only_when_asked_for(tiny_model: Path, tiny_int8: Path) -> None:
    with Embedder.open(tiny_model) as fp32, Embedder.open(tiny_int8) as int8:
        found = Reference.of(fp32, TEXTS).measure(int8, rounds=0)
    assert (found.certificate.speed, found.certificate.recall_change) == (None, ())
    assert found.certificate.cosine.mean == pytest.approx(found.cosines.plain.mean())
    assert found.certificate.centred_cosine.minimum == found.cosines.centred.min()


def test_json_is_read_back_as_it_was_written(certificate: Certificate) -> None:
    text = json.dumps(certificate.to_json(), allow_nan=False)
    again = Certificate.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.environment == certificate.environment
    assert again.texts == certificate.texts


def test_a_certificate_of_cosines_alone_is_read_back_too() -> None:
    found = compare(*pair(4), [3, 4, 5, 600])
    again = Certificate.from_json(json.loads(json.dumps(found.to_json())))
    assert (again.texts, again.size, again.speed, again.top_10_overlap) == (None, None, None, None)


def changed(document: dict, path: str, value: object) -> dict:
    document = json.loads(json.dumps(document))
    *way, last = path.split(".")
    place = document
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cosine.mean", 1.5, "mean: expected -1 to 1, found 1.5"),
        ("cosine.mean", float("inf"), "mean: expected -1 to 1, found inf"),
        ("cosine.mean", "high", "'cosine.mean': expected a float, found 'high'"),
        ("cosine.texts", 0, "texts: expected 1 to"),
        ("centred_cosine", None, "'centred_cosine': expected an object"),
        ("bands.1-16.minimum", -2, "minimum: expected -1 to 1"),
        ("top_10_overlap", 1.01, "top_10_overlap: expected 0 to 1"),
        ("texts.sha256", "abc", "sha256: expected 64 hexadecimal digits"),
        ("size.candidate_bytes", 0, "candidate_bytes: expected 1 to"),
        ("size.reference_sha256", "g" * 64, "reference_sha256: expected 64 hexadecimal digits"),
        ("recall_change.0.candidate", 101, "candidate: expected -100 to 100"),
        ("speed.ratio", 0, "ratio: expected 1e-06 to 1e+06"),
        ("speed.unit", "x", "'speed.unit': expected a field of this format"),
        ("environment.cpu_flags", "avx2", "'environment.cpu_flags': expected a list"),
    ],
)
def test_a_damaged_certificate_is_refused_by_field(
    certificate: Certificate, path: str, value: object, message: str
) -> None:
    document = changed(certificate.to_json(), path, value)
    with pytest.raises(ManifestError) as caught:
        Certificate.from_json(document, origin="m/qingyu.json")
    assert str(caught.value).startswith("m/qingyu.json: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("Quantize the model again.")


@pytest.mark.parametrize("document", [None, [], "certificate", {}])
def test_what_is_no_certificate_is_refused(document: object) -> None:
    with pytest.raises(ManifestError):
        Certificate.from_json(document)


# Words


def test_rows_hold_every_figure_in_words() -> None:
    found = dataclasses.replace(
        compare(*pair(40), [9] * 40),
        top_10_overlap=0.9465,
        texts=Texts(2000, "ab" * 32),
        recall_change=(Change("cmrc2018", 4219, 93.214, 93.101),),
        spearman_change=(Change("sts-b-zh/dev", 1458, 70.0, 70.125),),
        speed=Speed(2.414, 2.3, 2.5, 5, 64, 2, 512),
    )
    rows = dict(certificate_rows(found))
    cosine = found.cosine
    assert rows["cosine to FP32"] == (
        f"mean {cosine.mean:.5f}, 1st percentile {cosine.percentile_1:.5f}, minimum {cosine.minimum:.5f} (40 texts)"
    )
    assert rows["top-10 neighbours kept"] in {"94.6%", "94.7%"}
    assert rows["recall@10 on cmrc2018"] == "93.21 -> 93.10 (-0.11 points, 4,219 queries)"
    assert rows["Spearman on sts-b-zh/dev"] == "70.00 -> 70.12 (+0.12 points, 1,458 pairs)"
    assert rows["speed"] == "2.41 times FP32 (2.30-2.50 in 5 rounds of 64 texts, 2 workers)"
    assert rows["measured on"] == f"2,000 texts, sha256 {'ab' * 8}"
    assert "size of the graph" not in rows
    assert rows["engine"].startswith("onnxruntime (qingyu ")
    assert {"CPU", "CPU flags"} <= rows.keys()


def test_rows_say_when_there_were_too_few_texts_for_neighbours() -> None:
    rows = dict(certificate_rows(compare(*pair(3), [9] * 3)))
    assert rows["top-10 neighbours kept"] == "not measured (fewer than 20 texts)"


# Verification


def test_a_recomputed_certificate_differs_only_beyond_the_tolerance() -> None:
    stored = compare(*pair(40), [9] * 40)
    near = dataclasses.replace(stored.cosine, mean=stored.cosine.mean - 4e-4)
    far = dataclasses.replace(stored.cosine, mean=stored.cosine.mean - 6e-4, minimum=0.5)
    assert differences(stored, dataclasses.replace(stored, cosine=near)) == []
    found = differences(stored, dataclasses.replace(stored, cosine=far))
    assert [(d.figure, d.recomputed) for d in found] == [("cosine mean", far.mean), ("cosine minimum", 0.5)]


def test_a_model_and_its_quantized_form_are_the_same_model(tiny_model: Path, tiny_int8: Path) -> None:
    check_same_model(read_spec(tiny_model), read_spec(tiny_int8))


def other(spec: ModelSpec, what: str) -> ModelSpec:
    sizes = spec.architecture
    tokenizer = dataclasses.replace(spec.files["tokenizer.json"], sha256="0" * 64)
    return {
        "dim": lambda: dataclasses.replace(spec, dim=8),
        "pooling": lambda: dataclasses.replace(spec, pooling="cls"),
        "prompts": lambda: dataclasses.replace(spec, prompts={"query": "问："}),
        "normalize": lambda: dataclasses.replace(spec, normalize=False),
        "max_tokens": lambda: dataclasses.replace(spec, max_tokens=8),
        "architecture.layers": lambda: dataclasses.replace(
            spec, architecture=dataclasses.replace(sizes, layers=9)
        ),
        "sha256 of tokenizer.json": lambda: dataclasses.replace(
            spec, files={**spec.files, "tokenizer.json": tokenizer}
        ),
    }[what]()


@pytest.mark.parametrize(
    "what",
    [
        "dim",
        "pooling",
        "prompts",
        "normalize",
        "max_tokens",
        "architecture.layers",
        "sha256 of tokenizer.json",
    ],
)
def test_models_that_differ_are_refused_with_what_differs(tiny_model: Path, what: str) -> None:
    spec = read_spec(tiny_model)
    with pytest.raises(MismatchError) as caught:
        check_same_model(spec, other(spec, what))
    assert caught.value.expected.startswith(f"{what} ")
    assert "are not the same model" in str(caught.value)


def test_a_quantized_model_cannot_be_the_reference(tiny_model: Path, tiny_int8: Path) -> None:
    with pytest.raises(MismatchError, match="expected an FP32 model folder, found int8"):
        check_same_model(read_spec(tiny_int8), read_spec(tiny_model))


# Speed


class Slow:
    """An embedder's face that takes its time and notes when it was called."""

    def __init__(self, embedder: Embedder, calls: list[str], name: str) -> None:
        self.plan, self._calls, self._name = embedder.plan, calls, name

    def embed(self, texts: list[str]) -> None:
        self._calls.append(self._name)


def test_rounds_take_turns_after_one_uncounted_pass_of_each(tiny_model: Path) -> None:
    calls: list[str] = []
    with Embedder.open(tiny_model) as model:
        a, b = Slow(model, calls, "a"), Slow(model, calls, "b")
        measure_speed(a, b, ["今天"], rounds=3)  # type: ignore[arg-type]
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


def test_the_ratio_is_reference_time_by_candidate_time_at_the_median(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seconds of each pass: rounds (ab, ba, ab) of ratio 6/2, 4/2, 100/2.
    spent = iter([6, 2, 2, 4, 100, 2])
    clock = [0.0]
    started = [False]

    def now() -> float:
        if started[0]:
            clock[0] += next(spent)
        started[0] = not started[0]
        return clock[0]

    monkeypatch.setattr("time.perf_counter", now)
    with Embedder.open(tiny_model) as model:
        a, b = Slow(model, [], "a"), Slow(model, [], "b")
        found = measure_speed(a, b, ["今天"], rounds=3)  # type: ignore[arg-type]
    assert (found.least, found.ratio, found.most) == (2.0, 3.0, 50.0)


def test_a_model_is_about_as_fast_as_itself(tiny_model: Path) -> None:
    with Embedder.open(tiny_model) as a, Embedder.open(tiny_model) as b:
        assert 0.2 < speed_ratio(a, b, TEXTS * 8) < 5  # the sense of the ratio, not a measurement


def test_speed_wants_the_same_micro_batches_and_something_to_do(tiny_model: Path) -> None:
    with Embedder.open(tiny_model) as a, Embedder.open(tiny_model, profile="edge") as b:
        assert a.plan != b.plan
        with pytest.raises(InputError, match="models of a speed ratio: expected both with Plan"):
            speed_ratio(a, b, TEXTS)
        for texts, rounds in (([], 5), (TEXTS, 0)):
            with pytest.raises(InputError, match="expected at least 1 round and 1 text"):
                speed_ratio(a, a, texts, rounds=rounds)


def test_a_speed_sample_is_spread_over_the_texts() -> None:
    texts = [str(n) for n in range(1000)]
    chosen = speed_sample(texts, [100] * 1000)
    assert chosen == texts[::25]
    assert speed_sample(texts[:3], [100] * 3) == texts[:3] * 7
    assert speed_sample(texts[:30], [100] * 30) == texts[:30]
    assert speed_sample(["a"], [9000]) == ["a"]
