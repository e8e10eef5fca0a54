"""Checkpoints with a head become graphs whose logits are torch's; what a checkpoint is for; refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qingyu.errors import CheckpointError, InvalidOptionError
from qingyu.models.export import export
from qingyu.models.export.graph import narrowed, read_plan, read_weights
from qingyu.models.export.heads import TaskHead, head_shapes, task_of_architecture
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import read_spec

CLASSES = {
    "fill-mask": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
PREFIX = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


def random_network(transformers, torch, kind: str, task: str, **more):
    """A network of transformers with random weights, large enough for a wrong bias or order to show."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "type_vocab_size": 1 if kind == "xlm-roberta" else 2,
        "pad_token_id": 0,
        "num_labels": 3 if task in ("classification", "tagging") else 2,
        **more,
    }
    config = getattr(transformers, f"{PREFIX[kind]}Config")(**sizes)
    torch.manual_seed(1)
    network = getattr(transformers, f"{PREFIX[kind]}{CLASSES[task]}")(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return network


def saved(network, folder):
    """The network's checkpoint with a tokenizer of 60 words."""
    network.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x4E00, 0x4E00 + 55))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def batch() -> TokenBatch:
    random = np.random.default_rng(0)
    rows = [random.integers(5, 60, length) for length in (9, 20, 3)]
    types = [(np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in rows]
    return TokenBatch.pad(rows, 0, types=types, chosen=[[2, 8], [], [1]])


@pytest.mark.parametrize("task", sorted(CLASSES))
@pytest.mark.parametrize("kind", sorted(PREFIX))
def test_logits_are_those_of_transformers(transformers, torch, tmp_path, kind, task):
    network = random_network(transformers, torch, kind, task)
    spec = export(saved(network, tmp_path / "checkpoint"), tmp_path / "model")
    assert spec.task == task
    given = batch()
    arguments = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.mask)}
    if "token_type_ids" in spec.inputs:
        arguments["token_type_ids"] = torch.tensor(given.types)
    with torch.no_grad():
        wanted = network(**arguments)
    with OnnxRuntimeEngine(tmp_path / "model", spec, threads=1) as engine:
        found = engine.run(given, spec.outputs[1:2])[0]
    real = given.mask == 1
    if task == "question-answering":
        assert np.abs(found[..., 0] - wanted.start_logits.numpy())[real].max() < 1e-5
        assert np.abs(found[..., 1] - wanted.end_logits.numpy())[real].max() < 1e-5
    elif task == "fill-mask":
        flat = wanted.logits.numpy().reshape(-1, 60)
        assert np.abs(found - flat[given.chosen]).max() < 1e-5
    elif task == "tagging":
        assert np.abs(found - wanted.logits.numpy())[real].max() < 1e-5
    else:
        assert np.abs(found - wanted.logits.numpy()).max() < 1e-5


def test_only_tasks_of_pairs_with_two_token_types_have_them_as_an_input(head_model):
    assert "token_type_ids" in read_spec(head_model("classification")).inputs
    assert "token_type_ids" in read_spec(head_model("question-answering")).inputs
    assert read_spec(head_model("tagging")).inputs == ("input_ids", "attention_mask")
    assert read_spec(head_model("fill-mask")).inputs == ("input_ids", "attention_mask", "mask_positions")


def tables(folder) -> list[tuple[int, str]]:
    """Type and name of the initializers as large as the word table."""
    import onnx

    sizes = read_spec(folder).architecture
    size = sizes.vocab_size * sizes.hidden_size
    model = onnx.load(folder / "model.onnx")
    return [(t.data_type, t.name) for t in model.graph.initializer if int(np.prod(t.dims)) == size]


def test_a_tied_decoder_is_the_word_table_stored_once(head_model):
    assert tables(head_model("fill-mask")) == [(1, "embeddings.word_embeddings.weight")]
    assert read_plan(head_model("fill-mask") / "model.onnx").task_head.tied


def test_an_equal_decoder_is_tied_and_another_is_kept(head_checkpoint, tmp_path):
    load = pytest.importorskip("safetensors.numpy").load_file
    words = load(head_checkpoint("fill-mask") / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    name = "cls.predictions.decoder.weight"
    export(head_checkpoint("fill-mask", more={name: words.copy()}), tmp_path / "equal")
    assert len(tables(tmp_path / "equal")) == 1
    other = head_checkpoint("fill-mask", more={name: words[::-1].copy()})
    export(other, tmp_path / "other")
    assert len(tables(tmp_path / "other")) == 2
    stored = read_weights(tmp_path / "other" / "model.onnx")["task_head.output.weight"]
    assert np.array_equal(stored, words[::-1].T)


def test_states_are_chosen_before_the_head(head_model):
    """So that its products are with as many rows as there are masks."""
    import onnx

    graph = onnx.load(head_model("fill-mask") / "model.onnx").graph
    order = {name: number for number, node in enumerate(graph.node) for name in node.input}
    assert (
        order["mask_positions"] < order["task_head.dense.weight"] < order["embeddings.word_embeddings.bias"]
    )


def mean_logits(network, arguments):
    """What transformers' own layers make of the mean of the states that are no padding."""
    states = network.base_model(**arguments)[0]
    weights = arguments["attention_mask"].unsqueeze(-1).float()
    mean = ((states * weights).sum(1) / weights.sum(1)).unsqueeze(1)
    pooler = getattr(network.base_model, "pooler", None)
    return network.classifier(mean if pooler is None else pooler(mean))


@pytest.mark.parametrize("kind", sorted(PREFIX))
@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_on_the_mean_of_the_states(transformers, torch, tmp_path, kind, labels):
    network = random_network(transformers, torch, kind, "classification", num_labels=labels)
    network.config.classifier_pooling = "mean"
    spec = export(saved(network, tmp_path / "checkpoint"), tmp_path / "model")
    assert spec.pooling == "mean"
    plan = read_plan(tmp_path / "model" / "model.onnx")
    assert narrowed(plan) == plan
    given = batch()
    arguments = {"input_ids": torch.tensor(given.ids), "attention_mask": torch.tensor(given.mask)}
    if "token_type_ids" in spec.inputs:
        arguments["token_type_ids"] = torch.tensor(given.types)
    with torch.no_grad():
        expected = mean_logits(network, arguments).numpy()
        first = network(**arguments).logits.numpy()
    with OnnxRuntimeEngine(tmp_path / "model", spec, threads=1) as engine:
        found = engine.run(given, spec.outputs[1:2])[0]
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - first).max() > 1e-3  # a hundred times what it may differ by


def test_a_pooling_that_heads_do_not_have_is_refused(head_checkpoint, tmp_path):
    checkpoint = head_checkpoint("classification", classifier_pooling="max")
    with pytest.raises(CheckpointError, match=r"classifier_pooling.*cls or mean.*max"):
        export(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("task", ["fill-mask", "classification", "tagging", "question-answering"])
def test_plan_and_weights_of_a_head_can_be_read_back(head_model, task):
    path = head_model(task) / "model.onnx"
    plan, weights = read_plan(path), read_weights(path)
    assert isinstance(plan.task_head, TaskHead)
    shapes = head_shapes(plan.task_head, plan.architecture)
    assert {name: weights[name].shape for name in shapes} == shapes


@pytest.mark.parametrize(
    ("name", "labels", "task"),
    [
        ("BertForMaskedLM", 2, "fill-mask"),
        ("BertForPreTraining", 2, "fill-mask"),
        ("XLMRobertaForSequenceClassification", 1, "reranking"),
        ("BertForSequenceClassification", 2, "classification"),
        ("RobertaForTokenClassification", 9, "tagging"),
        ("BertForQuestionAnswering", 2, "question-answering"),
        ("BertModel", 2, "embedding"),
    ],
)
def test_a_class_of_transformers_names_the_task(name, labels, task):
    assert task_of_architecture(name, labels) == task


def test_sentence_transformers_files_make_it_an_embedding_model(tiny_checkpoint, tmp_path):
    import shutil

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert export(folder, tmp_path / "model").task == "embedding"


def test_a_head_can_be_left_out(head_checkpoint, tmp_path):
    assert export(head_checkpoint("fill-mask"), tmp_path / "a", task="embedding").outputs[1] == "pooled"
    assert export(head_checkpoint("tagging"), tmp_path / "b", pooling="cls").task == "embedding"


@pytest.mark.parametrize(
    ("labels", "config", "arguments", "task", "scores"),
    [
        (["a", "b", "c"], {}, {}, "classification", "softmax"),
        (["a", "b"], {"problem_type": "multi_label_classification"}, {}, "classification", "sigmoid"),
        (["a", "b"], {}, {"multi_label": True}, "classification", "sigmoid"),
        (["a"], {"problem_type": "regression"}, {"task": "classification"}, "classification", "none"),
        (["a"], {}, {}, "reranking", "sigmoid"),
        (
            ["a"],
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            {},
            "reranking",
            "none",
        ),
    ],
)
def test_labels_and_scores_follow_the_checkpoint(
    head_checkpoint, tmp_path, labels, config, arguments, task, scores
):
    spec = export(head_checkpoint("classification", labels, **config), tmp_path / "model", **arguments)
    assert (spec.task, spec.labels, spec.scores) == (task, tuple(labels), scores)
    assert read_spec(tmp_path / "model") == spec


def test_a_checkpoint_without_the_head_that_is_asked_for_is_refused(
    tiny_checkpoint, head_checkpoint, tmp_path
):
    with pytest.raises(InvalidOptionError, match="has no head for fill-mask"):
        export(tiny_checkpoint, tmp_path / "model", task="fill-mask")
    with pytest.raises(CheckpointError, match=r"decoder.weight: expected a decoder, as it is not tied"):
        export(head_checkpoint("fill-mask", tie_word_embeddings=False), tmp_path / "model")
    with pytest.raises(InvalidOptionError, match="no model for reranking: expected 1 label, found 2"):
        export(head_checkpoint("classification"), tmp_path / "model", task="reranking")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": "summarization"},
        {"task": "tagging", "pooling": "cls"},
        {"task": "fill-mask", "prompts": {"query": "查"}},
        {"task": "tagging", "via": "optimum"},
        {"task": "tagging", "multi_label": True},
    ],
)
def test_options_that_do_not_fit_the_task_are_refused(head_checkpoint, tmp_path, arguments):
    with pytest.raises(InvalidOptionError):
        export(head_checkpoint("tagging"), tmp_path / "model", **arguments)
