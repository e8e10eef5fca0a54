"""Statistics hold what the inputs of linear layers are, and ranges follow from them as their methods say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qingyu.errors import GraphError, InputError
from qingyu.models.export.graph import read_plan, read_weights
from qingyu.quantize.inputs import input_of, linear_groups, linear_names
from qingyu.quantize.ranges import Range, _divergence, entropy, least_divergent, minmax, percentile
from qingyu.quantize.statistics import BINS, InputStatistics, _Channels, collect
from qingyu.quantize.texts import calibration_texts

TEXTS = calibration_texts(24)


@pytest.fixture(scope="module")
def tiny_statistics(tiny_model):
    return collect(tiny_model, TEXTS)


def test_every_linear_layer_has_the_statistics_of_its_input(tiny_statistics, tiny_model):
    plan = read_plan(tiny_model / "model.onnx")
    assert list(tiny_statistics) == [name for group in linear_groups(plan) for name in group]
    assert set(tiny_statistics) == set(linear_names(plan))
    for name, found in tiny_statistics.items():
        width = 64 if input_of(name) == "output" else 32
        assert found.counts.shape == (width, BINS)
        assert (found.counts.sum(axis=1) == tiny_statistics.tokens).all()
        assert (found.minimum <= found.maximum).all()
    layer = "encoder.layer.0.attention.self."
    assert tiny_statistics[f"{layer}query"] is tiny_statistics[f"{layer}value"]


def test_statistics_are_repeatable(tiny_statistics, tiny_model):
    again = collect(tiny_model, TEXTS)
    assert (again.texts, again.tokens) == (tiny_statistics.texts, tiny_statistics.tokens)
    for name, found in tiny_statistics.items():
        for field in ("minimum", "maximum", "low", "step", "counts"):
            np.testing.assert_array_equal(getattr(again[name], field), getattr(found, field))


def test_the_states_after_the_embedding_are_what_its_weights_give(tiny_statistics, tiny_model):
    """A LayerNormalization's mean square is 1 before its weights, so no value leaves sqrt(hidden) times them."""
    weights = read_weights(tiny_model / "model.onnx")
    gamma, beta = (weights[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias"))
    found = tiny_statistics["encoder.layer.0.attention.self.query"]
    reach = np.abs(gamma) * math.sqrt(len(gamma))
    assert (found.maximum <= beta + reach).all()
    assert (found.minimum >= beta - reach).all()
    assert (found.half_width > 0.1 * np.abs(gamma)).all()


def test_progress_ends_with_all_texts(tiny_model):
    calls = []
    collect(tiny_model, TEXTS, progress=lambda *done: calls.append(done))
    assert calls[-1] == (len(TEXTS), len(TEXTS))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_padding_is_not_counted(tiny_model):
    """Two texts of different length share a batch; the tokens counted are theirs."""
    alone = [collect(tiny_model, [text, "我们"]).tokens for text in ("今天天气真好", "雨")]
    assert alone == [8 + 4, 3 + 4]


def test_too_few_texts_are_refused(tiny_model):
    for texts in ([], ["雨"], ["雨"] * 5):
        with pytest.raises(InputError, match="too few texts"):
            collect(tiny_model, texts)


def test_a_graph_that_is_already_quantized_is_refused(tiny_int8):
    with pytest.raises(GraphError, match="is not a graph that can be calibrated"):
        collect(tiny_int8, TEXTS)


def channels(*parts):
    found = _Channels()
    for part in parts:
        found.add(np.asarray(part, dtype=np.float32))
    return found.finish()


def test_a_histogram_does_not_depend_on_the_order_of_what_comes():
    random = np.random.default_rng(1)
    parts = [random.normal(size=(50, 6)) * scale for scale in (0.01, 3, 0.5, 40)]
    wanted = channels(np.concatenate(parts))
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        found = channels(*(parts[n] for n in order))
        for field in ("minimum", "maximum", "low", "step", "counts"):
            np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))
    assert (wanted.counts.sum(axis=1) == 200).all()


def test_values_are_in_the_bins_that_hold_them():
    values = np.array([[-1.0, 0.0], [0.3, 0.0], [0.999, 0.0]])
    found = channels(values)
    for channel in (0, 1):
        for value in values[:, channel]:
            place = int((value - found.low[channel]) // found.step[channel])
            assert found.counts[channel, place] > 0
    assert found.counts[1].max() == 3


def test_mapped_statistics_are_those_of_mapped_values():
    values = np.random.default_rng(2).normal(size=(300, 4)).astype(np.float32)
    shift, scales = np.array([0.5, -1, 0, 3]), np.array([2.0, 0.25, 1, 8])
    found = channels(values).mapped(shift=shift, scales=scales)
    moved = (values - shift) / scales
    np.testing.assert_allclose(found.minimum, moved.min(0), rtol=1e-5)
    np.testing.assert_allclose(found.maximum, moved.max(0), rtol=1e-5)
    np.testing.assert_allclose(found.centre, (moved.max(0) + moved.min(0)) / 2, rtol=1e-5)
    for channel in range(4):
        edges = found.low[channel] + found.step[channel] * np.arange(BINS + 1)
        counted = np.histogram(moved[:, channel], edges)[0]
        assert np.abs(np.cumsum(counted) - np.cumsum(found.counts[channel])).max() <= 1  # rounding at an edge


def uniform_with_outliers():
    """A million values evenly in 0 ... 0.5, and three outliers just below 1 and one just above -1."""
    counts = np.zeros((1, BINS), dtype=np.int64)
    counts[0, BINS // 2 : BINS // 2 + BINS // 4] = 1_000_000 // (BINS // 4)
    counts[0, -1] = 3
    counts[0, 0] = 1
    one = np.ones(1)
    return InputStatistics(-0.999 * one, 0.999 * one, -one, one * 2 / BINS, counts)


def test_min_max_covers_all_values():
    assert minmax(uniform_with_outliers()) == Range(-0.999, 0.999)


def test_a_percentile_leaves_out_the_share_it_names():
    # Half of 1e-5 of a million at each end are five: the outliers fall away, and nothing else.
    found = percentile(uniform_with_outliers(), outside=1e-5)
    assert found.low == 0
    assert found.high == pytest.approx(0.5, abs=0.002)
    # Of a share of 1e-7 not one value: everything stays.
    found = percentile(uniform_with_outliers(), outside=1e-7)
    assert (found.low, found.high) == pytest.approx((-0.999, 0.999), abs=0.002)
    # A fifth left out is a tenth at each end of 0 ... 0.5; the range still holds 0.
    found = percentile(uniform_with_outliers(), outside=0.2)
    assert (found.low, found.high) == pytest.approx((0, 0.45), abs=0.002)


def test_entropy_cuts_off_a_lone_outlier_and_keeps_an_even_spread():
    found = entropy(uniform_with_outliers())
    assert found.high == pytest.approx(0.5, abs=0.01)
    assert found.low == pytest.approx(-0.5, abs=0.01)
    counts = np.full((1, BINS), 1000, dtype=np.int64)
    one = np.ones(1)
    even = InputStatistics(-one, one, -one, one * 2 / BINS, counts)
    assert entropy(even).high == pytest.approx(1, abs=0.01)


def test_the_divergence_of_a_small_case_computed_by_hand():
    # Four of eight bins kept, two codes: 4 4 | 4 4+1 are coded as 4 4 | 4 4 and compared as shares.
    counts = np.array([4, 4, 4, 4, 0, 0, 0, 1], dtype=np.float64)
    wanted = 3 * (4 / 17) * math.log((4 / 17) / (1 / 4)) + (5 / 17) * math.log((5 / 17) / (1 / 4))
    assert _divergence(counts, 4, 2) == pytest.approx(wanted, rel=1e-12)
    # All kept: 4 4 4 4 | 0 0 0 1, where empty bins stay empty, is coded without loss.
    assert _divergence(counts, 8, 2) == pytest.approx(0, abs=1e-12)
    assert least_divergent(counts, levels=2) == 8
    # Two distinct heights within one code are what a cut avoids.
    counts = np.array([9, 9, 1, 1, 0, 0, 0, 0], dtype=np.float64)
    assert _divergence(counts, 8, 2) > _divergence(counts, 4, 2) == pytest.approx(0, abs=1e-12)
    assert least_divergent(counts, levels=2) in (2, 4)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 5.0), (-2.0, 0.0), (-0.17, 30.0), (0.0, 0.0)])
def test_a_range_is_coded_within_half_a_step_and_zero_exactly(low, high):
    found = Range(low, high)
    values = np.linspace(low, high, 1001)
    codes = np.clip(np.rint(values / found.scale) + found.zero_point, 0, 255)
    restored = (codes - found.zero_point) * found.scale
    # The zero point is whole, so the ends may be up to half a step outside.
    assert np.abs(restored - values).max() <= found.scale * 1.0001
    inside = (values > low + found.scale / 2) & (values < high - found.scale / 2)
    assert np.abs(restored - values)[inside].max(initial=0) <= found.scale * 0.5001
    assert 0 <= found.zero_point <= 255
