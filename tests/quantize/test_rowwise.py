"""Integer linear layers compute what integer arithmetic by hand gives."""

from __future__ import annotations

import numpy as np
import pytest

from qingyu.models.export.builder import GraphBuilder
from qingyu.quantize.codes import quantize_columns
from qingyu.quantize.integer import FLOORS, MICROSOFT, IntegerLinear
from qingyu.quantize.ranges import Range
from qingyu.runtime.onnxruntime_engine import import_onnxruntime, product_entries, session_options

TOKENS, WIDTH, COLUMNS = 23, 48, 20
CONTEXT = "encoder.layer.0.attention.output.dense"
OUTPUT = "encoder.layer.0.output.dense"
RANDOM = np.random.default_rng(5)
WEIGHT = RANDOM.normal(size=(WIDTH, COLUMNS)).astype(np.float32)
BIAS = RANDOM.normal(size=COLUMNS).astype(np.float32)


def states(*, floor=None):
    """Tokens of very different magnitudes, the last of them zero; nothing below -floor."""
    found = RANDOM.normal(size=(TOKENS, WIDTH)) * np.logspace(-3, 2, TOKENS)[:, None]
    found[-1] = 0
    if floor is not None:
        found = np.maximum(found, -floor)
    return found.astype(np.float32)


def run(writer, name, activation, bias=BIAS):
    graph = GraphBuilder()
    rows = graph.node("Gather", [graph.constant(activation), "ids"])
    flat = graph.node("Reshape", [rows, graph.ints(-1, WIDTH)])
    result = writer.apply(graph, writer.prepare(graph, flat, [name]), name, WEIGHT, bias)
    graph.node("Reshape", [result, graph.ints(1, -1, COLUMNS)], output="out")
    model = graph.finish(
        {"ids": (1, "tokens")}, {"out": (1, "tokens", COLUMNS)}, metadata={}, domains=(MICROSOFT,)
    )
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=1, entries=product_entries("int8"))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(["out"], {"ids": np.arange(len(activation))[None]})[0][0]


def by_hand(activation, scales, zero_point, bits=8):
    """The product in whole numbers: int32 sums of (code - zero point) x weight code, then the two scales."""
    codes = np.clip(np.rint(activation / scales) + zero_point, 0, 255).astype(np.int32)
    weight_codes, weight_scales = quantize_columns(WEIGHT, bits=bits)
    sums = (codes - zero_point) @ weight_codes.astype(np.int32)
    return sums.astype(np.float64) * weight_scales * scales + BIAS


def assert_equal(found, wanted):
    size = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(found - wanted) <= 1e-5 * size).all()


@pytest.mark.parametrize("bits", [7, 8])
def test_symmetric_rows_equal_integer_arithmetic(bits):
    activation = states()
    writer = IntegerLinear({"context": "row"}, ranges={}, floor=0.17, weight_bits=bits)
    scales = np.maximum(np.abs(activation).max(1, keepdims=True) * np.float32(1 / 127), np.float32(1e-30))
    assert_equal(run(writer, CONTEXT, activation), by_hand(activation, scales, 128, bits))


@pytest.mark.parametrize(("floor", "zero_point"), [(0.17, 32), (0.2785, 32), (0.0, 0)])
def test_rows_with_a_floor_equal_integer_arithmetic(floor, zero_point):
    activation = states(floor=floor)
    writer = IntegerLinear({"output": "row"}, ranges={}, floor=floor)
    largest = activation.max(1, keepdims=True)
    least = np.float32(floor / zero_point) if zero_point else np.float32(1e-30)
    scales = np.maximum(largest * np.float32(1 / (255 - zero_point)), least)
    assert_equal(run(writer, OUTPUT, activation), by_hand(activation, scales, zero_point))


def test_a_floor_is_used_for_the_activation_functions_input_alone():
    """Anywhere else values below it occur, and would be cut off."""
    activation = states()
    writer = IntegerLinear({"output": "row", "context": "row"}, ranges={}, floor=0.17)
    exact = activation @ WEIGHT + BIAS
    off = [np.abs(run(writer, name, activation) - exact)[:-1].max() for name in (CONTEXT, OUTPUT)]
    assert off[0] < 10 < off[1]


def test_a_static_scale_equals_integer_arithmetic_and_cuts_off_what_is_outside():
    activation = states()
    found = Range(-20.0, 60.0)
    writer = IntegerLinear({"context": "static"}, ranges={CONTEXT: found})
    assert (activation < -20).any()
    wanted = by_hand(activation, np.float32(found.scale), found.zero_point)
    assert_equal(run(writer, CONTEXT, activation), wanted)


def test_a_dynamic_scale_equals_integer_arithmetic():
    activation = states()
    writer = IntegerLinear({"context": "tensor"}, ranges={})
    low, high = min(activation.min(), 0), max(activation.max(), 0)
    scale = (high - low) / np.float32(255)
    wanted = by_hand(activation, scale, int(np.rint(-low / scale)))
    assert_equal(run(writer, CONTEXT, activation), wanted)


def test_an_input_is_divided_before_it_is_rounded():
    activation, divisors = states(), np.linspace(1, 30, WIDTH, dtype=np.float32)
    writer = IntegerLinear({"context": "row"}, ranges={}, divisors={CONTEXT: divisors})
    plain = IntegerLinear({"context": "row"}, ranges={})
    divided = activation * (1 / divisors)
    np.testing.assert_array_equal(run(writer, CONTEXT, activation), run(plain, CONTEXT, divided))


@pytest.mark.parametrize("scale", ["row", "tensor", "static"])
def test_a_bias_of_zero_is_left_out(scale):
    activation = states()
    writer = IntegerLinear({"context": scale}, ranges={CONTEXT: Range(-200, 200)})
    with_bias = run(writer, CONTEXT, activation)
    writer = IntegerLinear({"context": scale}, ranges={CONTEXT: Range(-200, 200)})
    without = run(writer, CONTEXT, activation, bias=np.zeros_like(BIAS))
    np.testing.assert_allclose(with_bias - BIAS, without, atol=1e-4)


def test_rows_of_zeros_give_the_bias():
    for name, floor in ((CONTEXT, None), (OUTPUT, 0.17), (OUTPUT, 0.0)):
        writer = IntegerLinear({"output": "row", "context": "row"}, ranges={}, floor=floor)
        np.testing.assert_array_equal(run(writer, name, np.zeros((3, WIDTH), np.float32))[0], BIAS)


@pytest.mark.parametrize("name", FLOORS)
def test_no_activation_function_goes_below_its_floor(name):
    """Computed by onnxruntime itself, in the steps that the graph writer writes."""
    from qingyu.models.export.graph import ACTIVATIONS

    graph = GraphBuilder()
    grid = np.linspace(-8, 8, 200_001, dtype=np.float32).reshape(1, -1)
    values = graph.node("Gather", [graph.constant(grid), "ids"])
    graph.node("Identity", [ACTIVATIONS[name](graph, values)], output="out")
    model = graph.finish({"ids": (1, "n")}, {"out": (1, "n", grid.shape[1])}, metadata={})
    session = import_onnxruntime().InferenceSession(model, providers=["CPUExecutionProvider"])
    least = session.run(["out"], {"ids": np.zeros((1, 1), dtype=np.int64)})[0].min()
    assert -FLOORS[name] <= least <= -FLOORS[name] + 1e-3
