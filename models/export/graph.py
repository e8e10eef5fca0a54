"""The graph writer: a BERT-family encoder with pooling, from sizes and named weights, in standard operators.

One function, ``write_graph``, writes every such graph; how a linear layer and the word embedding are computed
is the caller's ``LinearWriter``, so that an FP32 and a quantized graph share everything else.

The shape of the graph was chosen by measurement: rows and tokens are one axis except within attention; no
fused SkipLayerNormalization (slower in onnxruntime than Add and LayerNormalization) and no fused attention
(no faster). A narrow graph computes the last layer for those states alone that the result is made of.

Not here: reading checkpoints (``checkpoint.py``), normalization of the pooled vector (the runtime).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import GraphError
from qingyu.models.export.builder import GraphBuilder
from qingyu.models.export.heads import LOGITS, TaskHead, head_shapes
from qingyu.models.export.pooling import FLOAT, write_pooling
from qingyu.runtime.spec import Architecture, Pooling

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ACTIVATIONS",
    "FloatLinear",
    "FoldedWeights",
    "GraphPlan",
    "LinearWriter",
    "Select",
    "input_names",
    "linear_shapes",
    "narrow_names",
    "narrowed",
    "norm_before",
    "output_names",
    "read_plan",
    "read_weights",
    "weight_shapes",
    "write_graph",
]

PLAN_KEY = "qingyu.plan"
INPUTS = ("input_ids", "attention_mask")
TOKEN_TYPES = "token_type_ids"
MASK_POSITIONS = "mask_positions"
WORDS = "embeddings.word_embeddings"
TYPES = "embeddings.token_type_embeddings.weight"

Weights = NDArray[np.float32]
P = TypeVar("P")
# Takes the name of a table (entries, ...) and writes the nodes that pick the wanted entries from it.
Select = Callable[[str], str]


@dataclass(frozen=True)
class GraphPlan:
    """What a graph is written from, beside the weights; stored in the graph's metadata.

    ``padding_id`` is ``None`` where positions are counted from 0 (BERT), and otherwise the token id that
    positions skip, counting from that id + 1 (RoBERTa). ``head`` names the activation of each Dense layer
    after pooling, ``identity`` or ``tanh``. A ``task_head`` for sequences reads what ``pooling`` gives. Without
    ``token_states`` the graph is narrow: see ``narrowed``.
    """

    architecture: Architecture
    pooling: Pooling
    hidden_states: bool = False
    padding_id: int | None = None
    head: tuple[str, ...] = ()
    task_head: TaskHead | None = None
    token_states: bool = True


class LinearWriter(Protocol[P]):
    """How a graph computes its linear layers and its word embedding."""

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> P:
        """An activation (rows * tokens, in), made ready once for the linear layers ``names`` that share it."""
        ...

    def apply(self, graph: GraphBuilder, prepared: P, name: str, weight: Weights, bias: Weights) -> str:
        """``activation @ weight + bias``, (rows * tokens, out); ``weight`` is (in, out).

        Initializers are named ``<name>.weight`` and ``<name>.bias``, with further suffixes as needed.
        """
        ...

    def lookup(self, graph: GraphBuilder, name: str, table: Weights, select: Select) -> str:
        """The rows of an embedding ``table`` (entries, hidden) that ``select`` takes: (..., hidden)."""
        ...

    def decode(self, graph: GraphBuilder, prepared: P, name: str, table: Weights, bias: Weights) -> str:
        """``activation @ table.T + bias``, (n, entries), with the ``table`` that ``lookup`` has stored by ``name``.

        Nothing of the table is stored again. The bias is named ``<name>.bias``.
        """
        ...

    def stored(self, graph: GraphBuilder, name: str, weight: Weights) -> str:
        """A weight of any shape as a value of the graph, FP32, that an engine can compute when it loads it."""
        ...


class FloatLinear:
    """Linear layers in FP32, as the checkpoint has them."""

    def prepare(self, graph: GraphBuilder, activation: str, names: Sequence[str]) -> str:
        """The activation itself."""
        return activation

    def apply(self, graph: GraphBuilder, prepared: str, name: str, weight: Weights, bias: Weights) -> str:
        """A MatMul and an Add."""
        product = graph.node("MatMul", [prepared, graph.weight(f"{name}.weight", weight)])
        return graph.node("Add", [product, graph.weight(f"{name}.bias", bias)])

    def lookup(self, graph: GraphBuilder, name: str, table: Weights, select: Select) -> str:
        """Rows of the table as it is."""
        return select(graph.weight(f"{name}.weight", table))

    def decode(self, graph: GraphBuilder, prepared: str, name: str, table: Weights, bias: Weights) -> str:
        """A Gemm that reads the table row by row."""
        inputs = [prepared, f"{name}.weight", graph.weight(f"{name}.bias", bias)]
        return graph.node("Gemm", inputs, attributes={"transB": 1})

    def stored(self, graph: GraphBuilder, name: str, weight: Weights) -> str:
        """The weight as it is."""
        return graph.weight(f"{name}.weight", weight)


def weight_shapes(sizes: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every folded weight of the encoder; linear weights are (in, out)."""
    hidden = (sizes.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (sizes.vocab_size, *hidden),
        "embeddings.position_embeddings.weight": (sizes.max_positions, *hidden),
        "embeddings.LayerNorm.weight": hidden,
        "embeddings.LayerNorm.bias": hidden,
    }
    for layer in range(sizes.layers):
        for name, shape in linear_shapes(sizes, layer).items():
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[1:]
        for part in ("attention.output", "output"):
            for kind in ("weight", "bias"):
                shapes[f"encoder.layer.{layer}.{part}.LayerNorm.{kind}"] = hidden
    return shapes


def linear_shapes(sizes: Architecture, layer: int) -> dict[str, tuple[int, int]]:
    """Name and (in, out) of the six linear layers of one encoder layer."""
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    prefix = f"encoder.layer.{layer}"
    return {
        f"{prefix}.attention.self.query": (hidden, hidden),
        f"{prefix}.attention.self.key": (hidden, hidden),
        f"{prefix}.attention.self.value": (hidden, hidden),
        f"{prefix}.attention.output.dense": (hidden, hidden),
        f"{prefix}.intermediate.dense": (hidden, wide),
        f"{prefix}.output.dense": (wide, hidden),
    }


def norm_before(layer: int) -> str:
    """What the name of the LayerNormalization begins with that gives a layer its input."""
    return f"encoder.layer.{layer - 1}.output" if layer else "embeddings"


_HEADS = ("head.", "task_head.")


class FoldedWeights(Mapping[str, Weights]):
    """A checkpoint's weights as ``write_graph`` wants them, computed when asked for.

    Linear weights are turned to (in, out); the query's weight and bias are divided by sqrt(head size);
    row 0 of the token types is added to every position. With ``token_types`` their table holds what each type
    differs from type 0. Everything else is passed through.
    """

    def __init__(
        self, sizes: Architecture, checkpoint: Mapping[str, Weights], *, token_types: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._scale = np.float32((sizes.hidden_size // sizes.heads) ** -0.5)
        self._linear = {f"{name}.weight" for n in range(sizes.layers) for name in linear_shapes(sizes, n)}
        self._names = [*weight_shapes(sizes), *(name for name in checkpoint if name.startswith(_HEADS))]
        self._names += [TYPES] if token_types else []

    def __getitem__(self, name: str) -> Weights:
        if name not in self._names:
            raise KeyError(name)
        weight = self._checkpoint[name]
        if name == "embeddings.position_embeddings.weight":
            weight = np.add(weight, self._checkpoint[TYPES][0])
        if name == TYPES:
            weight = np.subtract(weight, weight[0])
        if name in self._linear or (name.startswith(_HEADS) and name.endswith(".weight")):
            weight = np.ascontiguousarray(weight.T)
        return np.multiply(weight, self._scale) if ".attention.self.query." in name else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def narrowed(plan: GraphPlan) -> GraphPlan:
    """The plan of the same model that computes nothing beside its result, where that makes a difference.

    The last layer then gives the states of first tokens or of masks alone, which is all that a CLS pooling and most
    heads read. Instead of ``token_states`` there are, with a head, ``chosen_states``: those that the head reads.
    """
    return plan if plan.hidden_states or _chosen_rows(plan) is None else replace(plan, token_states=False)


def _chosen_rows(plan: GraphPlan) -> str | None:
    """What the result is made of: "first" tokens, "masks", or ``None`` for all tokens."""
    if plan.task_head is None:
        return "first" if plan.pooling == "cls" else None
    output = LOGITS[plan.task_head.task]
    if output == "logits":
        return "first" if plan.pooling == "cls" else None
    return "masks" if output == "mask_logits" else None


def narrow_names(plan: GraphPlan) -> frozenset[str]:
    """The linear layers of a narrow graph that read chosen states; all others read those of all tokens."""
    if plan.token_states:
        return frozenset()
    prefix = f"encoder.layer.{plan.architecture.layers - 1}"
    names = [f"{prefix}.{part}" for part in ("attention.output.dense", "intermediate.dense", "output.dense")]
    first = [f"{prefix}.attention.self.query"] if _chosen_rows(plan) == "first" else []
    return frozenset(names + first)


def output_names(plan: GraphPlan) -> tuple[str, ...]:
    """The outputs of the graph, in order."""
    hidden = (f"hidden_state_{n}" for n in range(plan.architecture.layers + 1)) if plan.hidden_states else ()
    result = "pooled" if plan.task_head is None else LOGITS[plan.task_head.task]
    chosen = ("chosen_states",) if plan.task_head is not None else ()
    return (*(("token_states",) if plan.token_states else chosen), result, *hidden)


def input_names(head: TaskHead | None) -> tuple[str, ...]:
    """The inputs of a graph with this head, in order."""
    return tuple(_input_shapes(head))


def _input_shapes(head: TaskHead | None) -> dict[str, tuple[str, ...]]:
    shapes: dict[str, tuple[str, ...]] = dict.fromkeys(INPUTS, ("rows", "tokens"))
    if head is not None and head.token_types:
        shapes[TOKEN_TYPES] = ("rows", "tokens")
    if head is not None and head.task == "fill-mask":
        shapes[MASK_POSITIONS] = ("masks",)
    return shapes


def write_graph(
    plan: GraphPlan,
    weights: Mapping[str, Weights],
    linear: LinearWriter[P],
    *,
    domains: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """The serialized graph of an encoder with pooling, or with the head of a task.

    ``weights`` are folded (``FoldedWeights`` or ``read_weights``). Inputs ``input_ids`` and
    ``attention_mask``, int64 (rows, tokens), padding on the right and at least one token a row. Outputs
    float32: ``token_states`` (rows, tokens, hidden), ``pooled`` (rows, dim) which is not normalized, and
    with ``plan.hidden_states`` ``hidden_state_0`` (the embedding) to ``hidden_state_<layers>`` (equal to
    ``token_states``). With ``plan.task_head`` there are instead of ``pooled`` the logits of the task: ``logits``
    (rows, labels), ``token_logits`` (rows, tokens, labels) or ``mask_logits`` (masks, vocabulary), the last for
    the input ``mask_positions`` (masks,), positions in the rows put one after the other: only those states reach
    the head. ``token_type_ids`` (rows, tokens) is an input where the plan says so.

    Without ``plan.token_states`` see ``narrowed``; ``chosen_states`` are (rows, hidden), or (masks, hidden).

    ``domains`` names the operator sets that ``linear`` uses beside the standard one. ``progress`` is called with the
    number of layers written and their total.

    A LayerNormalization whose state linear layers and the residual share may be moved and scaled for the sake of
    the former: with ``<name>.LayerNorm.scales`` and ``.shift`` (hidden,) in ``weights`` it gives
    (state - shift) / scales. The graph then scales the residual back, the bias of the linear layer that is added
    to it must hold the shift, and hidden states come out as they were.
    """
    graph = GraphBuilder()
    writer = _Encoder(graph, plan, weights, linear)
    state = writer.embedding()
    states = [state]
    last = plan.architecture.layers - 1
    for layer in range(plan.architecture.layers):
        narrow = layer == last and not plan.token_states
        state = writer.narrow_layer(layer, state) if narrow else writer.layer(layer, state)
        states.append(state)
        if progress is not None:
            progress(layer + 1, plan.architecture.layers)
    result = writer.outputs(states)
    hidden = ("rows", "tokens", plan.architecture.hidden_size)
    names = output_names(plan)
    shapes: dict[str, tuple[str | int, ...]] = dict.fromkeys(names, hidden) | result
    metadata = {PLAN_KEY: json.dumps(dataclasses.asdict(plan), sort_keys=True)}
    return graph.finish(_input_shapes(plan.task_head), shapes, metadata=metadata, domains=domains)


class _Encoder:
    """Writes the parts of one encoder; states between them are (rows * tokens, hidden)."""

    def __init__(
        self, graph: GraphBuilder, plan: GraphPlan, weights: Mapping[str, Weights], linear: LinearWriter[Any]
    ) -> None:
        sizes = plan.architecture
        self.head_size = sizes.hidden_size // sizes.heads
        self.graph, self.plan, self.weights, self.linear = graph, plan, weights, linear
        shape = graph.node("Shape", ["input_ids"])
        self.tokens = graph.node("Slice", [shape, graph.ints(1), graph.ints(2), graph.ints(0)])
        heads = graph.ints(sizes.heads, self.head_size)
        self.by_head = graph.node("Concat", [shape, heads], attributes={"axis": 0})
        self.by_row = graph.node("Concat", [shape, graph.ints(sizes.hidden_size)], attributes={"axis": 0})
        self.flat = graph.ints(-1, sizes.hidden_size)
        self.mask = self._additive_mask()

    def _additive_mask(self) -> str:
        """(rows, 1, 1, tokens): 0 at a token; at padding the lowest float, whose softmax is 0."""
        graph = self.graph
        mask = graph.node("Cast", ["attention_mask"], attributes={"to": FLOAT})
        padding = graph.node("Sub", [graph.constant(np.float32(1)), mask])
        lowest = graph.node("Mul", [padding, graph.constant(np.finfo(np.float32).min)])
        return graph.node("Unsqueeze", [lowest, graph.ints(1, 2)])

    def _add(self, name: str) -> str:
        return self.graph.weight(name, self.weights[name])

    def _norm(self, state: str, name: str) -> str:
        inputs = [state, self._add(f"{name}.LayerNorm.weight"), self._add(f"{name}.LayerNorm.bias")]
        epsilon = self.plan.architecture.layer_norm_eps
        return self.graph.node("LayerNormalization", inputs, attributes={"axis": -1, "epsilon": epsilon})

    def _residual(self, state: str, name: str) -> str:
        """The state that ``_norm`` gave, scaled back if it was scaled."""
        scales = self.weights.get(f"{name}.LayerNorm.scales")
        return state if scales is None else self.graph.node("Mul", [state, self.graph.constant(scales)])

    def _restored(self, state: str, name: str) -> str:
        """The state that ``_norm`` gave, as it would be without scales and shift."""
        shift = self.weights.get(f"{name}.LayerNorm.shift")
        state = self._residual(state, name)
        return state if shift is None else self.graph.node("Add", [state, self.graph.constant(shift)])

    def _linear(self, prepared: Any, name: str) -> str:  # noqa: ANN401 - the writer's own type, passed through
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.linear.apply(self.graph, prepared, name, weight, bias)

    def _only(self, state: str, name: str) -> str:
        """A linear layer that shares its input with no other."""
        return self._linear(self.linear.prepare(self.graph, state, [name]), name)

    def _positions(self) -> str:
        """Position and token type 0 embeddings: (tokens, hidden) or (rows, tokens, hidden)."""
        graph, padding_id = self.graph, self.plan.padding_id
        name = "embeddings.position_embeddings"
        if padding_id is None:
            first = (graph.ints(0), self.tokens, graph.ints(0))
            return self._lookup(name, lambda table: graph.node("Slice", [table, *first]))
        same = graph.node("Equal", ["input_ids", graph.constant(np.int64(padding_id))])
        counted = graph.node("Cast", [graph.node("Not", [same])], attributes={"to": 7})  # 7: int64
        place = graph.node("Mul", [graph.node("CumSum", [counted, graph.constant(np.int64(1))]), counted])
        place = graph.node("Add", [place, graph.constant(np.int64(padding_id))])
        return self._lookup(name, lambda table: graph.node("Gather", [table, place]))

    def _lookup(self, name: str, select: Select) -> str:
        return self.linear.lookup(self.graph, name, self.weights[f"{name}.weight"], select)

    def embedding(self) -> str:
        """The state before the first layer."""
        graph = self.graph
        words = self._lookup(WORDS, lambda table: graph.node("Gather", [table, "input_ids"]))
        state = self.graph.node("Add", [words, self._positions()])
        if self.plan.task_head is not None and self.plan.task_head.token_types:
            types = graph.node("Gather", [self._add(TYPES), TOKEN_TYPES])
            state = graph.node("Add", [state, types])
        return self.graph.node("Reshape", [self._norm(state, "embeddings"), self.flat])

    def layer(self, number: int, state: str) -> str:
        """The state after one layer."""
        return self._after_attention(
            number, self._attention(state, f"encoder.layer.{number}.attention.self"), state
        )

    def narrow_layer(self, number: int, state: str) -> str:
        """The states after one layer that the result is made of, (n, hidden)."""
        name = f"encoder.layer.{number}.attention.self"
        if _chosen_rows(self.plan) == "masks":
            mixed, own = (
                self.graph.node("Gather", [value, MASK_POSITIONS])
                for value in (self._attention(state, name), state)
            )
        else:
            mixed, own = self._first_attention(state, name)
        return self._after_attention(number, mixed, own)

    def _after_attention(self, number: int, mixed: str, state: str) -> str:
        graph, prefix = self.graph, f"encoder.layer.{number}"
        mixed = self._only(mixed, f"{prefix}.attention.output.dense")
        residual = self._residual(state, norm_before(number))
        state = self._norm(graph.node("Add", [mixed, residual]), f"{prefix}.attention.output")
        wide = self._only(state, f"{prefix}.intermediate.dense")
        wide = ACTIVATIONS[self.plan.architecture.activation](graph, wide)
        narrow = self._only(wide, f"{prefix}.output.dense")
        residual = self._residual(state, f"{prefix}.attention.output")
        return self._norm(graph.node("Add", [narrow, residual]), f"{prefix}.output")

    def _attention(self, state: str, name: str) -> str:
        graph = self.graph
        names = [f"{name}.{part}" for part in ("query", "key", "value")]
        prepared = self.linear.prepare(graph, state, names)
        query, value = (
            self._by_head(prepared, f"{name}.{part}", (0, 2, 1, 3)) for part in ("query", "value")
        )
        key = self._by_head(prepared, f"{name}.key", (0, 2, 3, 1))
        scores = graph.node("Add", [graph.node("MatMul", [query, key]), self.mask])
        shares = graph.node("Softmax", [scores], attributes={"axis": -1})
        mixed = graph.node("MatMul", [shares, value])
        mixed = graph.node("Transpose", [mixed], attributes={"perm": (0, 2, 1, 3)})
        return graph.node("Reshape", [mixed, self.flat])

    def _first_attention(self, state: str, name: str) -> tuple[str, str]:
        """What the first tokens gather, and their states, both (rows, hidden), without a key or value of any token.

        For one query q of a head, q . (x K) = (q K^T) . x, and the values' sum is (sum of shares x) V: both products
        are then done once a row instead of once a token. The key's bias adds the same to all scores of a row, which
        softmax ignores; the value's passes through unchanged, since shares add up to one.
        """
        graph, sizes = self.graph, self.plan.architecture
        tokens = graph.node("Reshape", [state, self.by_row])
        own = graph.node("Gather", [tokens, graph.constant(np.int64(0))], attributes={"axis": 1})
        split = graph.ints(-1, sizes.heads, self.head_size)
        query = graph.node("Reshape", [self._only(own, f"{name}.query"), split])
        query = graph.node("Transpose", [query], attributes={"perm": (1, 0, 2)})
        shape = (sizes.hidden_size, sizes.heads, self.head_size)
        key = self.weights[f"{name}.key.weight"].reshape(shape).transpose(1, 2, 0)
        value = self.weights[f"{name}.value.weight"].reshape(shape).transpose(1, 0, 2)
        query = graph.node("MatMul", [query, self._stored(f"{name}.key", key)])
        query = graph.node("Transpose", [query], attributes={"perm": (1, 2, 0)})
        scores = graph.node("MatMul", [tokens, query])
        scores = graph.node("Transpose", [scores], attributes={"perm": (0, 2, 1)})
        scores = graph.node("Add", [scores, graph.node("Squeeze", [self.mask, graph.ints(1)])])
        shares = graph.node("Softmax", [scores], attributes={"axis": -1})
        mixed = graph.node(
            "Transpose", [graph.node("MatMul", [shares, tokens])], attributes={"perm": (1, 0, 2)}
        )
        mixed = graph.node("MatMul", [mixed, self._stored(f"{name}.value", value)])
        mixed = graph.node("Transpose", [mixed], attributes={"perm": (1, 0, 2)})
        mixed = graph.node("Reshape", [mixed, self.flat])
        bias = self.weights[f"{name}.value.bias"]
        if bias.any():
            mixed = graph.node("Add", [mixed, graph.weight(f"{name}.value.bias", bias)])
        return mixed, own

    def _stored(self, name: str, weight: Weights) -> str:
        return self.linear.stored(self.graph, name, np.ascontiguousarray(weight))

    def _by_head(self, prepared: Any, name: str, perm: tuple[int, ...]) -> str:  # noqa: ANN401 - as in _linear
        split = self.graph.node("Reshape", [self._linear(prepared, name), self.by_head])
        return self.graph.node("Transpose", [split], attributes={"perm": perm})

    def outputs(self, states: list[str]) -> dict[str, tuple[str | int, ...]]:
        """Write the named outputs from the states after each layer; names and shapes of those that are no states."""
        graph, plan = self.graph, self.plan
        if plan.token_states:
            graph.node("Reshape", [states[-1], self.by_row], output="token_states")
        if plan.hidden_states:
            for number, state in enumerate(states):
                whole = self._restored(state, norm_before(number))
                graph.node("Reshape", [whole, self.by_row], output=f"hidden_state_{number}")
        if plan.task_head is not None:
            return self._task_head(plan.task_head, states[-1])
        pooled = (
            write_pooling(graph, plan.pooling, "token_states", "attention_mask")
            if plan.token_states
            else states[-1]
        )
        dim = write_head(graph, plan.head, self.weights, pooled, plan.architecture.hidden_size)
        return {"pooled": ("rows", dim)}

    def _task_head(self, head: TaskHead, states: str) -> dict[str, tuple[str | int, ...]]:
        graph, output = self.graph, LOGITS[head.task]
        chosen, axes = self._chosen(output, states)
        shapes: dict[str, tuple[str | int, ...]] = {}
        if not self.plan.token_states:
            chosen = graph.node("Identity", [chosen], output="chosen_states")
            shapes[chosen] = (*axes, self.plan.architecture.hidden_size)
        if head.activation is not None:
            chosen = ACTIVATIONS[head.activation](graph, self._only(chosen, "task_head.dense"))
        if head.norm:
            chosen = self._norm(chosen, "task_head")
        logits = self._head_output(head, chosen)
        if output == "token_logits":
            shape = graph.node(
                "Concat", [graph.node("Shape", ["input_ids"]), graph.ints(-1)], attributes={"axis": 0}
            )
            graph.node("Reshape", [logits, shape], output=output)
        else:
            graph.node("Identity", [logits], output=output)
        return shapes | {output: (*axes, head.labels)}

    def _chosen(self, output: str, states: str) -> tuple[str, tuple[str, ...]]:
        """The states that a head reads, (n, hidden), and the names of the axes before the logits."""
        graph, narrow = self.graph, not self.plan.token_states
        if output == "mask_logits":
            return states if narrow else graph.node("Gather", [states, MASK_POSITIONS]), ("masks",)
        if output == "logits":
            if narrow:
                return states, ("rows",)
            return write_pooling(graph, self.plan.pooling, "token_states", "attention_mask"), ("rows",)
        return states, ("rows", "tokens")

    def _head_output(self, head: TaskHead, state: str) -> str:
        """The last layer. That of a few labels stays FP32: its weights are nothing, its rounding errors are not."""
        name = "task_head.output"
        bias = self.weights[f"{name}.bias"]
        if head.tied:
            prepared = self.linear.prepare(self.graph, state, [name])
            return self.linear.decode(self.graph, prepared, WORDS, self.weights[f"{WORDS}.weight"], bias)
        if head.task == "fill-mask":
            return self._only(state, name)
        return FloatLinear().apply(self.graph, state, name, self.weights[f"{name}.weight"], bias)


def write_head(
    graph: GraphBuilder, head: tuple[str, ...], weights: Mapping[str, Weights], pooled: str, dim: int
) -> int:
    """Write the Dense layers after pooling, named ``head.<n>``, ending in ``pooled``; its width."""
    for number, activation in enumerate(head):
        weight = weights[f"head.{number}.weight"]
        pooled = graph.node("MatMul", [pooled, graph.weight(f"head.{number}.weight", weight)])
        if f"head.{number}.bias" in weights:
            bias = graph.weight(f"head.{number}.bias", weights[f"head.{number}.bias"])
            pooled = graph.node("Add", [pooled, bias])
        pooled = ACTIVATIONS[activation](graph, pooled)
        dim = weight.shape[1]
    graph.node("Identity", [pooled], output="pooled")
    return dim


def _identity(graph: GraphBuilder, state: str) -> str:
    return state


def _gelu(graph: GraphBuilder, state: str) -> str:
    return graph.node("Gelu", [state])


def _gelu_tanh(graph: GraphBuilder, state: str) -> str:
    return graph.node("Gelu", [state], attributes={"approximate": "tanh"})


def _relu(graph: GraphBuilder, state: str) -> str:
    return graph.node("Relu", [state])


def _silu(graph: GraphBuilder, state: str) -> str:
    return graph.node("Mul", [state, graph.node("Sigmoid", [state])])


def _tanh(graph: GraphBuilder, state: str) -> str:
    return graph.node("Tanh", [state])


ACTIVATIONS: Mapping[str, Callable[[GraphBuilder, str], str]] = {
    # The names are those of transformers.activations.ACT2FN.
    "identity": _identity,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
    "tanh": _tanh,
}


def read_weights(path: Path) -> dict[str, Weights]:
    """The folded weights of a graph that ``write_graph`` wrote with ``FloatLinear``, by name.

    Raises ``GraphError`` when the file is no such graph.
    """
    import onnx

    model = _load(path)
    plan = _plan_of(model, path)
    found = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if "." in tensor.name and tensor.data_type == FLOAT
    }
    if plan.task_head is not None and plan.task_head.tied:  # stored as the bias of the table
        found["task_head.output.bias"] = found.get(f"{WORDS}.bias", np.empty(0, dtype=np.float32))
    for name, shape in _folded_shapes(plan).items():
        if name not in found or found[name].shape != shape:
            shown = f"shape {found[name].shape}" if name in found else "no such weight"
            raise _not_ours(path, f"{name} of shape {shape}", shown)
    return found


def _folded_shapes(plan: GraphPlan) -> dict[str, tuple[int, ...]]:
    head = {} if plan.task_head is None else head_shapes(plan.task_head, plan.architecture)
    return weight_shapes(plan.architecture) | head


def read_plan(path: Path) -> GraphPlan:
    """The plan that a graph was written from; ``GraphError`` when the file is no graph of ``write_graph``."""
    return _plan_of(_load(path), path)


def _load(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise _not_ours(path, "an ONNX graph", str(error) or type(error).__name__) from None


def _plan_of(model: onnx.ModelProto, path: Path) -> GraphPlan:
    stored = {entry.key: entry.value for entry in model.metadata_props}.get(PLAN_KEY)
    if stored is None:
        raise _not_ours(path, f"a graph with the metadata {PLAN_KEY}", "none")
    try:
        document = json.loads(stored)
        document["architecture"] = Architecture(**document["architecture"])
        document["head"] = tuple(document["head"])
        if document.get("task_head") is not None:
            document["task_head"] = TaskHead(**document["task_head"])
        plan = GraphPlan(**document)
    except (ValueError, TypeError, KeyError) as error:
        raise _not_ours(path, f"valid metadata {PLAN_KEY}", str(error)) from None
    if plan.pooling not in get_args(Pooling):
        raise _not_ours(path, "a known pooling", repr(plan.pooling))
    return plan


def _not_ours(path: Path, expected: str, found: str) -> GraphError:
    remedy = "Export the checkpoint again with `qingyu export`."
    return GraphError(
        f"{path} is not a graph that this can read", expected=expected, found=found, remedy=remedy
    )
