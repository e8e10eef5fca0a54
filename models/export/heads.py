"""Task heads: what fine-tuned checkpoints have above the encoder, as data, and where its weights are.

Every head is the same chain with parts left out: chosen states, a dense layer with an activation, a normalization,
an output layer. Not here: writing it into a graph (``graph.py``), and what logits mean (``qingyu.runtime``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qingyu.runtime.spec import Architecture, Task

__all__ = ["LOGITS", "HeadLayout", "TaskHead", "head_shapes", "layout_of", "task_of_architecture"]

# The graph's output for each task, beside token_states.
LOGITS: Mapping[Task, str] = {
    "fill-mask": "mask_logits",
    "classification": "logits",
    "reranking": "logits",
    "tagging": "token_logits",
    "question-answering": "token_logits",
}


@dataclass(frozen=True)
class TaskHead:
    """The head of one graph, stored in its metadata.

    ``labels`` is the width of the output. ``activation`` is that of the dense layer before it, ``None`` without one,
    and ``norm`` whether a LayerNormalization follows it. ``tied``: the output layer is the word embedding, stored
    once. ``token_types``: the graph has the input ``token_type_ids``.
    """

    task: Task
    labels: int
    activation: str | None = None
    norm: bool = False
    tied: bool = False
    token_types: bool = False


@dataclass(frozen=True)
class HeadLayout:
    """The names of a head's layers in a checkpoint, the encoder's prefix removed.

    ``output`` is a linear layer with ``.weight`` and ``.bias``; ``biases`` are other names of its bias.
    ``activation`` ``None`` is the encoder's own, where there is a dense layer.
    """

    output: str
    dense: str | None = None
    activation: str | None = None
    norm: str | None = None
    biases: tuple[str, ...] = ()


_TOKENS = HeadLayout("classifier")
_ANSWERS = HeadLayout("qa_outputs")
_ROBERTA_MASKS = HeadLayout(
    "lm_head.decoder", "lm_head.dense", "gelu", "lm_head.layer_norm", biases=("lm_head.bias",)
)
_ROBERTA_CLASSES = HeadLayout("classifier.out_proj", "classifier.dense", "tanh")
_ROBERTA: Mapping[Task, HeadLayout] = {
    "fill-mask": _ROBERTA_MASKS,
    "classification": _ROBERTA_CLASSES,
    "reranking": _ROBERTA_CLASSES,
    "tagging": _TOKENS,
    "question-answering": _ANSWERS,
}
_BERT_CLASSES = HeadLayout("classifier", "pooler.dense", "tanh")
_BERT: Mapping[Task, HeadLayout] = {
    "fill-mask": HeadLayout(
        "cls.predictions.decoder",
        "cls.predictions.transform.dense",
        None,
        "cls.predictions.transform.LayerNorm",
        biases=("cls.predictions.bias",),
    ),
    "classification": _BERT_CLASSES,
    "reranking": _BERT_CLASSES,
    "tagging": _TOKENS,
    "question-answering": _ANSWERS,
}
_LAYOUTS: Mapping[str, Mapping[Task, HeadLayout]] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}

_ENDINGS: Mapping[str, Task] = {
    # How names of transformers' classes end.
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForQuestionAnswering": "question-answering",
}


def layout_of(model_type: str, task: Task) -> HeadLayout:
    """Where a checkpoint of this model type keeps the head of a task."""
    return _LAYOUTS[model_type][task]


def task_of_architecture(name: str, labels: int) -> Task:
    """The task of a class of transformers; a sequence classification with one label is reranking.

    >>> task_of_architecture("BertForMaskedLM", 2)
    'fill-mask'
    """
    endings = (task for ending, task in _ENDINGS.items() if name.endswith(ending))
    found: Task = next(endings, "embedding")
    return "reranking" if found == "classification" and labels == 1 else found


def head_shapes(head: TaskHead, sizes: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every folded weight of a head; linear weights are (in, out)."""
    hidden = sizes.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"task_head.output.bias": (head.labels,)}
    if not head.tied:
        shapes["task_head.output.weight"] = (hidden, head.labels)
    if head.activation is not None:
        shapes |= {"task_head.dense.weight": (hidden, hidden), "task_head.dense.bias": (hidden,)}
    if head.norm:
        shapes |= {f"task_head.LayerNorm.{kind}": (hidden,) for kind in ("weight", "bias")}
    return shapes
