"""From a model folder back to a checkpoint, so that a model of which only the graph is at hand can be adapted.

The weights of an INT8 graph are its codes times their scales: what training then starts from differs from the
checkpoint that was quantized by the rounding of the weights alone, not of the activations. Not here: recipes that
store weights in another way, models with a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import UnsupportedModelError
from qingyu.models.export.folder import check_output, new_folder
from qingyu.models.export.graph import GraphPlan, linear_shapes, norm_before, read_plan, weight_shapes
from qingyu.models.export.modules import POOLING_FLAGS
from qingyu.models.extras import require
from qingyu.runtime.spec import ModelSpec, read_checked, read_spec
from qingyu.runtime.task import find_model

if TYPE_CHECKING:
    import onnx

__all__ = ["unpack"]

Weights = dict[str, NDArray[np.float32]]

# The special tokens by the names that transformers gives them, and how each family spells them.
SPECIAL_TOKENS = {
    "unk_token": ("[UNK]", "<unk>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def unpack(model: str | Path, output: Path) -> None:
    """Write to the folder ``output`` the checkpoint that computes in FP32 what the model folder ``model`` does.

    ``model`` is a folder, a bundle or a name, as ``Embedder.open`` takes it: an embedding model that ``qingyu
    export`` wrote, or ``qingyu quantize`` by a recipe that keeps weights as codes and scales (the default one
    does). Vectors of the checkpoint are those of an FP32 folder within 1e-5; those of an INT8 folder as far off as
    its activations are rounded.

    Raises ``MissingExtraError``, ``ModelNotFoundError``, ``ManifestError``, ``CorruptFileError``, ``GraphError``,
    ``UnsupportedModelError``, and ``OutputError`` where the folder is not new or cannot be written.
    """
    require("export", "onnx", "safetensors")
    folder = find_model(model)
    check_output(output, folder, overwrite=False)
    spec = read_spec(folder)
    graph, plan = _read(folder, spec)
    if _other_factors(graph):
        _refuse(
            folder, "no factors but those of LayerNormalizations", "a recipe that scales other activations"
        )
    weights = _plain(plan, _unscaled(plan, graph, _folded(plan, graph, folder)))
    tokenizer = read_checked(folder, "tokenizer.json", spec.files["tokenizer.json"])
    with new_folder(output) as made:
        _write(made, spec, plan, weights, tokenizer)


def _read(folder: Path, spec: ModelSpec) -> tuple[onnx.GraphProto, GraphPlan]:
    import onnx

    if spec.task != "embedding":
        _refuse(folder, "an embedding model", f"one for {spec.task}")
    data = read_checked(folder, spec.graph, spec.files[spec.graph])
    plan = read_plan(folder / spec.graph)
    if plan.head:
        _refuse(folder, "an encoder and its pooling", "Dense layers behind them")
    return onnx.load_model_from_string(data).graph, plan


def _refuse(folder: Path, expected: str, found: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{folder} cannot be unpacked",
        expected=expected,
        found=found,
        remedy="Adapt the checkpoint that it was exported from.",
    )


def _folded(plan: GraphPlan, graph: onnx.GraphProto, folder: Path) -> Weights:
    """The weights as the graph has them: linear ones (in, out), the query's divided by sqrt(head size)."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights: Weights = {}
    for name, shape in weight_shapes(plan.architecture).items():
        if name in stored:
            weights[name] = _by_columns(name, stored[name].astype(np.float32)).reshape(shape)
        elif f"{name}.codes" in stored and stored[f"{name}.codes"].shape == shape:
            # Scales are (entries, 1) for the rows of a table, (out,) for the columns of a linear layer.
            codes = stored[f"{name}.codes"].astype(np.float32)
            weights[name] = codes * stored[f"{name}.scales"].astype(np.float32)
        elif name.endswith(".bias"):
            weights[name] = np.zeros(shape, dtype=np.float32)  # left out where it changes nothing
        else:
            _refuse(folder, "weights stored as they are, or as codes and scales", f"no {name}")
    return weights


def _by_columns(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A weight (in, heads, head size) where a narrow graph keeps it by head: keys and values of its last layer."""
    if weight.ndim != 3:
        return weight
    axes = (2, 0, 1) if ".key." in name else (1, 0, 2)
    turned: NDArray[np.float32] = weight.transpose(axes)
    return turned


def _unscaled(plan: GraphPlan, graph: onnx.GraphProto, weights: Weights) -> Weights:
    """The same function without the scales by which smoothing divides what a LayerNormalization gives.

    The shift that goes with them may stay: what is added to the residual, and the biases of the layers that read
    it, hold it already.
    """
    scales = dict(_norm_scales(graph))
    result = dict(weights)
    for norm, readers in _readers(plan):
        factors = scales.get(norm)
        if factors is not None:
            for kind in ("weight", "bias"):
                result[f"{norm}.LayerNorm.{kind}"] = weights[f"{norm}.LayerNorm.{kind}"] * factors
            for name in readers:
                result[f"{name}.weight"] = weights[f"{name}.weight"] / factors[:, None]
    return result


def _readers(plan: GraphPlan) -> Iterator[tuple[str, list[str]]]:
    """Each LayerNormalization, and the linear layers that read its state."""
    for layer in range(plan.architecture.layers):
        names = list(linear_shapes(plan.architecture, layer))
        attention = [name for name in names if ".attention.self." in name]
        yield norm_before(layer), attention
        yield (
            f"encoder.layer.{layer}.attention.output",
            [name for name in names if ".intermediate." in name],
        )


def _norm_scales(graph: onnx.GraphProto) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The vectors that the graph multiplies the states of its LayerNormalizations with, for the residual."""
    from onnx import numpy_helper

    vectors, states = _vectors(graph), _norm_states(graph)
    for node in graph.node:
        if node.op_type == "Mul" and node.input[0] in states and node.input[1] in vectors:
            yield states[node.input[0]], numpy_helper.to_array(vectors[node.input[1]]).astype(np.float32)


def _other_factors(graph: onnx.GraphProto) -> list[str]:
    """The outputs that are something else times, or divided by, a vector of the graph."""
    vectors, states = _vectors(graph), _norm_states(graph)
    return [
        node.output[0]
        for node in graph.node
        if node.op_type in ("Mul", "Div") and node.input[1] in vectors and node.input[0] not in states
    ]


def _vectors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The constants of one axis and more than one value, by name."""
    return {
        tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] > 1
    }


def _norm_states(graph: onnx.GraphProto) -> dict[str, str]:
    """Names of what LayerNormalizations give, whole, flattened or chosen from, and the names of their weights."""
    states: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            states[node.output[0]] = node.input[1].removesuffix(".LayerNorm.weight")
        if node.op_type in ("Reshape", "Gather") and node.input[0] in states:
            states[node.output[0]] = states[node.input[0]]
    return states


def _plain(plan: GraphPlan, folded: Weights) -> Weights:
    """The weights as a checkpoint has them; the inverse of ``FoldedWeights``."""
    sizes = plan.architecture
    linear = {name for layer in range(sizes.layers) for name in linear_shapes(sizes, layer)}
    query = np.float32((sizes.hidden_size // sizes.heads) ** 0.5)
    plain: Weights = {}
    for name, weight in folded.items():
        turned = weight.T if name.removesuffix(".weight") in linear and name.endswith(".weight") else weight
        scaled = turned * query if ".attention.self.query." in name else turned
        plain[name] = np.ascontiguousarray(scaled, dtype=np.float32)
    # Type 0, the only one that an embedding model sees, is in the positions already.
    plain["embeddings.token_type_embeddings.weight"] = np.zeros((2, sizes.hidden_size), dtype=np.float32)
    return plain


def _write(made: Path, spec: ModelSpec, plan: GraphPlan, weights: Weights, tokenizer: bytes) -> None:
    from safetensors.numpy import save_file

    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    (made / "tokenizer.json").write_bytes(tokenizer)
    if spec.source.license is not None:  # where a checkpoint says it
        (made / "README.md").write_text(f"---\nlicense: {spec.source.license}\n---\n", encoding="utf-8")
    (made / "1_Pooling").mkdir()
    special = _special_tokens(tokenizer)
    documents: Mapping[Path, object] = {
        made / "config.json": _config(plan, tokenizer, special.get("pad_token")),
        made / "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": spec.max_tokens,
            "model_input_names": ["input_ids", "attention_mask"],
            **special,
        },
        made / "sentence_bert_config.json": {"max_seq_length": spec.max_tokens, "do_lower_case": False},
        made / "config_sentence_transformers.json": {
            "prompts": dict(spec.prompts),
            "default_prompt_name": spec.default_prompt,
        },
        made / "modules.json": _modules(spec),
        made / "1_Pooling" / "config.json": {
            "word_embedding_dimension": plan.architecture.hidden_size,
            **{flag: pooling == plan.pooling for flag, pooling in POOLING_FLAGS.items()},
        },
    }
    for path, document in documents.items():
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_tokens(tokenizer: bytes) -> dict[str, str]:
    known = {token["content"] for token in json.loads(tokenizer)["added_tokens"]}
    return {
        name: spelling
        for name, spellings in SPECIAL_TOKENS.items()
        for spelling in spellings
        if spelling in known
    }


def _config(plan: GraphPlan, tokenizer: bytes, pad_token: str | None) -> dict[str, Any]:
    sizes = plan.architecture
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    architecture = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
    return {
        "architectures": [architecture.get(sizes.model_type, "BertModel")],
        "model_type": sizes.model_type,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.intermediate_size,
        "hidden_act": sizes.activation,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": sizes.max_positions,
        "type_vocab_size": 2,
        "layer_norm_eps": sizes.layer_norm_eps,
        "pad_token_id": plan.padding_id if plan.padding_id is not None else ids.get(str(pad_token), 0),
        "torch_dtype": "float32",
    }


def _modules(spec: ModelSpec) -> list[dict[str, object]]:
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if spec.normalize else []),
    ]
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
