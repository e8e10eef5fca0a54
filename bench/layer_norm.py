"""Why our graphs have no SkipLayerNormalization: it against the two Adds and the LayerNormalization it replaces.

python -m qingyu.bench.layer_norm
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from qingyu.bench.rounds import medians, ratios_to, time_rounds
from qingyu.models.export.builder import GraphBuilder
from qingyu.runtime.onnxruntime_engine import import_onnxruntime

REPEATS = 200
HIDDEN = 512


def graph(*, fused: bool) -> bytes:
    """Bias, residual and layer normalization of (tokens, 512), in one operator or in three."""
    builder = GraphBuilder()
    random = np.random.default_rng(0)
    gamma, beta, bias = (builder.constant(random.normal(size=HIDDEN).astype(np.float32)) for _ in range(3))
    state = builder.node(
        "Gather", [builder.constant(random.normal(size=(64, HIDDEN)).astype(np.float32)), "ids"]
    )
    residual = builder.node("Neg", [state])
    if fused:
        inputs = [state, residual, gamma, beta, bias]
        builder.node(
            "SkipLayerNormalization",
            inputs,
            output="out",
            domain="com.microsoft",
            attributes={"epsilon": 1e-12},
        )
    else:
        total = builder.node("Add", [builder.node("Add", [state, bias]), residual])
        builder.node(
            "LayerNormalization",
            [total, gamma, beta],
            output="out",
            attributes={"axis": -1, "epsilon": 1e-12},
        )
    shape = ("rows", "tokens")
    return builder.finish({"ids": shape}, {"out": (*shape, HIDDEN)}, metadata={}, domains=("com.microsoft",))


def session(model: bytes) -> Any:  # noqa: ANN401 - an InferenceSession, which is untyped
    """One thread, and the fusion under test switched off so that each graph runs as it is written."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON line: microseconds, and how many times as fast the plain operators are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    ids = np.zeros((1, 256), dtype=np.int64)
    sessions = {"fused": session(graph(fused=True)), "plain": session(graph(fused=False))}
    fused, plain = (runner.run(None, {"ids": ids})[0] for runner in sessions.values())
    np.testing.assert_allclose(fused, plain, atol=1e-4)

    def repeated(runner: Any) -> None:  # noqa: ANN401 - as above
        for _ in range(REPEATS):
            runner.run(None, {"ids": ids})

    seconds = time_rounds(
        {name: partial(repeated, own) for name, own in sessions.items()}, rounds=options.rounds
    )
    microseconds = {name: round(value / REPEATS * 1e6, 1) for name, value in medians(seconds).items()}
    ratio = round(ratios_to(seconds, "fused")["plain"], 2)
    print(json.dumps({"shape": [256, HIDDEN], "microseconds": microseconds, "plain is faster by": ratio}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
