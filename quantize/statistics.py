"""What the inputs of linear layers look like on calibration texts: extremes and histograms of each channel.

A histogram has 256 bins from -2^k to 2^k, k being the least that holds the channel's values; when a larger value
comes, bins are merged in pairs. So the result does not depend on the order of texts. Not here: what scales follow
from it (``ranges``, ``folding``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import GraphError
from qingyu.quantize.texts import checked_texts
from qingyu.runtime.batching import micro_batches
from qingyu.runtime.cpu import choose_threads
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import (
    PROVIDERS,
    SLOW_FUSIONS,
    feeds_of,
    import_onnxruntime,
    session_options,
    typed,
)
from qingyu.runtime.spec import ModelSpec, check_file, read_spec
from qingyu.runtime.tokenizer import Tokenizer

__all__ = ["BINS", "InputStatistics", "Statistics", "collect", "token_batches"]

BINS = 256
LEAST_EXPONENT = -30  # of the bins of a channel that is always 0
TOKEN_BUDGET = 512  # all inputs of all layers are held at once: 130 MB for a BERT of the base size

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class InputStatistics:
    """One input of linear layers: ``minimum`` and ``maximum`` (in,), ``counts`` (in, BINS) of its values.

    Bin b of channel c goes from ``low[c]`` + b x ``step[c]`` to the next.
    """

    minimum: Doubles
    maximum: Doubles
    low: Doubles
    step: Doubles
    counts: Counts

    @property
    def centre(self) -> Doubles:
        """The middle of each channel's range."""
        return (self.minimum + self.maximum) / 2

    @property
    def half_width(self) -> Doubles:
        """Half of each channel's range."""
        return (self.maximum - self.minimum) / 2

    def mapped(self, *, shift: Doubles, scales: Doubles) -> InputStatistics:
        """The statistics of (input - shift) / scales, scales being positive; both (in,)."""
        return replace(
            self,
            minimum=(self.minimum - shift) / scales,
            maximum=(self.maximum - shift) / scales,
            low=(self.low - shift) / scales,
            step=self.step / scales,
        )


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, InputStatistics]):
    """The input of each linear layer by the layer's name, as seen on ``texts`` texts with ``tokens`` tokens."""

    inputs: Mapping[str, InputStatistics]
    texts: int
    tokens: int

    def __getitem__(self, name: str) -> InputStatistics:
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def collect(
    model: Path, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """The statistics of the FP32 model folder ``model`` on ``texts``, with its default prompt; repeatable.

    ``progress`` is called with the number of texts done and their total. Raises ``InputError`` for fewer than two
    different texts, and what ``Embedder.open`` raises.
    """
    from qingyu.models.export.graph import read_plan
    from qingyu.quantize.inputs import linear_groups

    checked = checked_texts(texts, least=2)
    spec = read_spec(model)
    check_file(model, spec.graph, spec.files[spec.graph])
    path = model / spec.graph
    groups = linear_groups(read_plan(path))
    session, values = _observing(path, [group[0] for group in groups])
    seen = [_Channels() for _ in groups]
    done = tokens = 0
    for batch in token_batches(model, spec, checked, token_budget=TOKEN_BUDGET):
        feeds = feeds_of(batch, spec.inputs)
        outputs: list[Floats] = typed("collecting statistics", partial(session.run, values, feeds))
        real = batch.mask.ravel() == 1
        for channels, states in zip(seen, outputs, strict=True):
            channels.add(states[real])
        done += len(batch.ids)
        tokens += int(real.sum())
        if progress is not None:
            progress(done, len(checked))
    found = [channels.finish() for channels in seen]
    inputs = {name: one for group, one in zip(groups, found, strict=True) for name in group}
    return Statistics(inputs, len(checked), tokens)


def token_batches(
    model: Path, spec: ModelSpec, texts: Sequence[str], *, token_budget: int
) -> Iterator[TokenBatch]:
    """The texts as the model in the folder ``model`` reads them, with its default prompt, longest first.

    A micro-batch has at most ``token_budget`` tokens, padding counted, or is one text.
    """
    check_file(model, "tokenizer.json", spec.files["tokenizer.json"])
    tokenizer = Tokenizer.from_file(model / "tokenizer.json", max_tokens=spec.max_tokens)
    prompt = spec.prompts[spec.default_prompt] if spec.default_prompt is not None else ""
    encoded = tokenizer.encode(texts, prompt=prompt)
    for group in micro_batches([len(text.ids) for text in encoded], token_budget):
        yield TokenBatch.pad([encoded[row].ids for row in group], tokenizer.pad_id)


def _observing(path: Path, names: Sequence[str]) -> tuple[Any, list[str]]:
    """A session on the FP32 graph at ``path``, and the values in it that the linear layers ``names`` read."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    read_by = {node.input[1]: node.input[0] for node in model.graph.node if node.op_type == "MatMul"}
    missing = [name for name in names if f"{name}.weight" not in read_by]
    if missing:
        raise GraphError(
            f"{path} is not a graph that can be calibrated",
            expected=f"a MatMul with {missing[0]}.weight",
            found="none",
            remedy="Export the checkpoint again with `qingyu export`.",
        )
    values = [read_by[f"{name}.weight"] for name in names]
    for value in values:
        model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    data = model.SerializeToString()
    del model
    onnxruntime = import_onnxruntime()
    options = session_options(onnxruntime, threads=choose_threads(None))
    disabled = list(SLOW_FUSIONS)
    session = typed(
        f"loading {path} with its inner values as outputs",
        lambda: onnxruntime.InferenceSession(
            data, options, providers=list(PROVIDERS), disabled_optimizers=disabled
        ),
    )
    return session, values


class _Channels:
    """Adds up one input; states are (tokens, in)."""

    def __init__(self) -> None:
        self._empty = True

    def add(self, states: Floats) -> None:
        low, high = states.min(axis=0), states.max(axis=0)
        exponent = np.maximum(np.frexp(np.maximum(-low, high))[1], LEAST_EXPONENT)
        if self._empty:
            self._empty = False
            self.minimum, self.maximum, self.exponent = low, high, exponent
            self.counts = np.zeros((states.shape[1], BINS), dtype=np.int64)
        self.minimum, self.maximum = np.minimum(self.minimum, low), np.maximum(self.maximum, high)
        self._widen(np.maximum(self.exponent, exponent))
        scaled = np.ldexp(states, -self.exponent)  # between -1 and 1
        bins = np.clip(((scaled + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
        flat = (bins + np.arange(len(exponent)) * BINS).ravel()
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def _widen(self, exponent: NDArray[Any]) -> None:
        """Merge bins in pairs until the channels reach ``exponent``."""
        while (narrow := self.exponent < exponent).any():
            pairs = self.counts[narrow].reshape(-1, BINS // 2, 2).sum(axis=2)
            self.counts[narrow] = np.pad(pairs, ((0, 0), (BINS // 4, BINS // 4)))
            self.exponent = self.exponent + narrow

    def finish(self) -> InputStatistics:
        limit = np.ldexp(1.0, self.exponent)
        return InputStatistics(
            minimum=self.minimum.astype(np.float64),
            maximum=self.maximum.astype(np.float64),
            low=-limit,
            step=limit * (2 / BINS),
            counts=self.counts,
        )
