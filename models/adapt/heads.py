"""Heads on an encoder: the class of a text, or the entities in it.

Entities are given and measured as character spans; the labels of tokens (BIO, Ramshaw and Marcus 1995) are
made of them here. Not here: running a head (``qingyu.runtime``), and the run's folder (``training``).
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qingyu.errors import InputError, InvalidOptionError, TruncationWarning
from qingyu.models.adapt.student import checked_config
from qingyu.models.adapt.teacher import texts_digest
from qingyu.models.adapt.training import (
    Schedule,
    Trained,
    TrainingFolder,
    check_extra,
    common_arguments,
    described,
    run_trainer,
    silence,
)

__all__ = ["Entity", "HeadPooling", "LabelledText", "TaggedText", "classify", "longest_entities", "tag"]

HeadPooling = Literal["cls", "mean"]

LEAST_TEXTS = 16
SCHEDULE = Schedule(epochs=3, learning_rate=5e-5, evaluate_every=200)
FROZEN_RATE = 20  # times the learning rate, where only the head learns


@dataclass(frozen=True)
class LabelledText:
    """A text and its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Entity:
    """A labelled span of a text, in characters, ``end`` behind the last one."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class TaggedText:
    """A text and the entities in it, which do not overlap."""

    text: str
    entities: tuple[Entity, ...]


def classify(
    checkpoint: Path,
    output: Path,
    texts: Sequence[LabelledText],
    *,
    held_out: float | Sequence[LabelledText] = 0.1,
    freeze: bool = False,
    head_rate: float | None = None,
    pooling: HeadPooling = "cls",
    max_tokens: int = 256,
    batch_size: int = 32,
    schedule: Schedule | None = None,
) -> Trained:
    """Train a text classifier on ``checkpoint``; the run's folder is ``output``, the result ``output/model``.

    ``held_out``: texts to evaluate on, or the share of ``texts`` to keep for it; macro-averaged F1 on them chooses
    the checkpoint that is kept. ``freeze`` trains the head alone. The head learns at ``head_rate`` times the learning
    rate (default: 1, with ``freeze`` 20). Longer texts are cut at ``max_tokens``.

    ``pooling``: what the head reads, the state of the first token or the mean of all, which is better for an encoder
    that was trained with it, as E5. config.json says so as ``classifier_pooling``, as ModernBERT's does; transformers'
    own classes for BERT and RoBERTa ignore it.

    Run again with the same arguments, it goes on where it was stopped. Raises ``MissingExtraError``,
    ``InputError`` for texts that are blank, too few or of one class, ``CheckpointError`` and its kin,
    ``OutputError``.
    """
    rows = [(row.text, row.label) for row in texts]
    _check_rows(rows)
    labels = sorted({label for _, label in rows})
    if len(labels) < 2:
        raise InputError(
            "texts of one class only",
            expected="two classes or more",
            found=f"{len(rows)} texts of the class {labels[0]!r}",
            remedy="Add texts of the other classes.",
        )
    given = None if isinstance(held_out, float) else [(row.text, row.label) for row in held_out]
    share = held_out if isinstance(held_out, float) else 0.0
    _check_labels(given or [], labels)
    task = _Task(
        name="classify",
        model_class="AutoModelForSequenceClassification",
        collator="DataCollatorWithPadding",
        labels=labels,
        encode=lambda tokenizer, part: _classified(tokenizer, part, labels, max_tokens),
        metrics=_class_metrics,
        metric="eval_f1",
    )
    options = _Options(freeze, head_rate, pooling, max_tokens, batch_size)
    return _train_head(task, checkpoint, output, rows, given, share, options, schedule)


def tag(
    checkpoint: Path,
    output: Path,
    texts: Sequence[TaggedText],
    *,
    held_out: float | Sequence[TaggedText] = 0.1,
    freeze: bool = False,
    head_rate: float | None = None,
    max_tokens: int = 256,
    batch_size: int = 32,
    schedule: Schedule | None = None,
) -> Trained:
    """Train a tagger of entities on ``checkpoint``; arguments and errors as for ``classify``.

    F1 over whole entities (span and label equal) on the held-out texts chooses the checkpoint that is kept. Also
    raises ``InputError`` for entities outside their text or overlapping.
    """
    rows = [(row.text, row.entities) for row in texts]
    _check_rows(rows)
    _check_entities(rows)
    kinds = sorted({entity.label for _, entities in rows for entity in entities})
    if not kinds:
        raise InputError(
            "no entities", expected="entities in some texts", found="none", remedy="Check the file's fields."
        )
    labels = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
    given = None if isinstance(held_out, float) else [(row.text, row.entities) for row in held_out]
    share = held_out if isinstance(held_out, float) else 0.0
    _check_entities(given or [])
    _check_labels([(text, entity.label) for text, entities in given or [] for entity in entities], kinds)
    task = _Task(
        name="tag",
        model_class="AutoModelForTokenClassification",
        collator="DataCollatorForTokenClassification",
        labels=labels,
        encode=lambda tokenizer, part: _tagged(tokenizer, part, labels, max_tokens),
        metrics=lambda outcome: _entity_metrics(outcome, labels),
        metric="eval_f1",
    )
    options = _Options(freeze, head_rate, "cls", max_tokens, batch_size)
    return _train_head(task, checkpoint, output, rows, given, share, options, schedule)


def longest_entities(texts: Sequence[TaggedText]) -> tuple[list[TaggedText], int]:
    """The texts with those entities left out that overlap a longer one, and how many those are.

    Of two of the same length the first stays.
    """
    kept = [replace(text, entities=_longest(text.entities)) for text in texts]
    return kept, sum(len(old.entities) - len(new.entities) for old, new in zip(texts, kept, strict=True))


def _longest(entities: Sequence[Entity]) -> tuple[Entity, ...]:
    chosen: list[Entity] = []
    for entity in sorted(entities, key=lambda one: (one.start - one.end, one.start)):
        if all(entity.end <= other.start or other.end <= entity.start for other in chosen):
            chosen.append(entity)
    return tuple(sorted(chosen, key=lambda one: one.start))


@dataclass(frozen=True)
class _Task:
    """What differs between the two heads."""

    name: str
    model_class: str
    collator: str
    labels: Sequence[str]
    encode: Any
    metrics: Any
    metric: str


@dataclass(frozen=True)
class _Options:
    """How a head is trained, beside its schedule."""

    freeze: bool
    head_rate: float | None
    pooling: HeadPooling
    max_tokens: int
    batch_size: int

    @property
    def rate(self) -> float:
        """Times the learning rate for the head's own layers."""
        if self.head_rate is not None:
            return self.head_rate
        return FROZEN_RATE if self.freeze else 1.0


def _train_head(
    task: _Task,
    checkpoint: Path,
    output: Path,
    rows: Sequence[tuple[str, Any]],
    given: Sequence[tuple[str, Any]] | None,
    share: float,
    options: _Options,
    schedule: Schedule | None,
) -> Trained:
    check_extra()
    plan = schedule or SCHEDULE
    plan.check()
    _check_options(share, given is not None, options)
    checked_config(checkpoint)
    folder = TrainingFolder(output)
    folder.claim(
        {
            "task": task.name,
            "checkpoint": str(Path(checkpoint).resolve()),
            "texts": texts_digest([repr(row) for row in rows]),
            "held_out": share if given is None else texts_digest([repr(row) for row in given]),
            **vars(options),
            **described(plan),
        }
    )
    learnt, kept = (list(rows), list(given)) if given is not None else _split(rows, share, plan.seed)
    return _fit(task, Path(checkpoint), folder, learnt, kept, options, plan)


def _fit(
    task: _Task,
    checkpoint: Path,
    folder: TrainingFolder,
    learnt: Sequence[tuple[str, Any]],
    kept: Sequence[tuple[str, Any]],
    options: _Options,
    plan: Schedule,
) -> Trained:
    import transformers

    silence()
    transformers.set_seed(plan.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    model, loaded = getattr(transformers, task.model_class).from_pretrained(
        str(checkpoint),
        output_loading_info=True,
        num_labels=len(task.labels),
        id2label=dict(enumerate(task.labels)),
        label2id={label: number for number, label in enumerate(task.labels)},
        dtype="float32",
        # Drawing that mask takes a CPU longer than the attention: without it a step of 256 tokens takes half the time.
        attention_probs_dropout_prob=0.0,
    )
    if options.pooling == "mean":
        _read_mean(model, loaded["missing_keys"])
    if options.freeze:
        model.base_model.requires_grad_(False)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            **common_arguments(folder, plan, task.metric),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            **_by_length(transformers.__version__),
        ),
        train_dataset=task.encode(tokenizer, learnt),
        eval_dataset=task.encode(tokenizer, kept),
        data_collator=getattr(transformers, task.collator)(tokenizer),
        compute_metrics=task.metrics,
        optimizers=(_optimizer(model, plan.learning_rate, options.rate), None),
    )

    def save(made: Path) -> None:
        trainer.save_model(str(made))
        tokenizer.save_pretrained(str(made))
        (made / "training_args.bin").unlink(missing_ok=True)  # a pickle
        if (checkpoint / "tokenizer.json").exists():  # the very file, not a rewritten one
            shutil.copyfile(checkpoint / "tokenizer.json", made / "tokenizer.json")

    return run_trainer(trainer, folder, plan, save)


def _read_mean(model: Any, missing: Iterable[str]) -> None:  # noqa: ANN401 - a class of an optional dependency
    """Give the head the mean of the tokens' states in the place of the first one.

    Where the checkpoint has no layer between them and the classes, it begins as the identity: by chance it would hide
    for hundreds of steps what the encoder knows of a text.
    """
    import torch

    masks: list[Any] = []

    def keep(_module: object, _positional: object, named: Mapping[str, Any]) -> None:
        masks[:] = [named["attention_mask"].unsqueeze(-1)]

    def mean(_module: object, positional: tuple[Any, ...]) -> tuple[Any, ...]:
        weights = masks[0].to(positional[0].dtype)
        return ((positional[0] * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True),)

    # BERT's dense layer is its encoder's pooler, RoBERTa's a part of the classifier; both take the first state.
    pooler = getattr(model.base_model, "pooler", None)
    reader = model.classifier if pooler is None else pooler
    if any(key.endswith((".pooler.dense.weight", "classifier.dense.weight")) for key in missing):
        with torch.no_grad():
            torch.nn.init.eye_(reader.dense.weight)
            torch.nn.init.zeros_(reader.dense.bias)
    model.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    reader.register_forward_pre_hook(mean)
    model.config.classifier_pooling = "mean"


def _optimizer(model: Any, rate: float, head_rate: float) -> Any:  # noqa: ANN401
    """The optimizer of transformers, with a learning rate for the encoder and another for what is not in it."""
    import torch

    pooler = getattr(model.base_model, "pooler", None)
    head = [one for part in (pooler, model.classifier) if part is not None for one in part.parameters()]
    of_head = {id(one) for one in head}
    encoder = [one for one in model.parameters() if id(one) not in of_head]
    return torch.optim.AdamW(
        [{"params": encoder, "lr": rate}, {"params": head, "lr": rate * head_rate}], weight_decay=0.0
    )


def _by_length(version: str) -> dict[str, Any]:
    """Batches of texts of like length, as the two versions of transformers call it."""
    return (
        {"group_by_length": True}
        if version.startswith("4.")
        else {"train_sampling_strategy": "group_by_length"}
    )


def _split(
    rows: Sequence[tuple[str, Any]], share: float, seed: int
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    order = np.random.default_rng(seed).permutation(len(rows))
    count = max(1, round(share * len(rows)))
    return [rows[number] for number in order[count:]], [rows[number] for number in order[:count]]


def _classified(
    tokenizer: Any,  # noqa: ANN401 - a class of an optional dependency
    rows: Sequence[tuple[str, str]],
    labels: Sequence[str],
    max_tokens: int,
) -> Any:  # noqa: ANN401
    from datasets import Dataset

    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_tokens)
    _warn_of_cut(encoded, max_tokens)
    number = {label: position for position, label in enumerate(labels)}
    return Dataset.from_dict({**encoded, "labels": [number[label] for _, label in rows]})


def _tagged(
    tokenizer: Any,  # noqa: ANN401
    rows: Sequence[tuple[str, Sequence[Entity]]],
    labels: Sequence[str],
    max_tokens: int,
) -> Any:  # noqa: ANN401
    from datasets import Dataset

    encoded = tokenizer(
        [text for text, _ in rows], truncation=True, max_length=max_tokens, return_offsets_mapping=True
    )
    number = {label: position for position, label in enumerate(labels)}
    _warn_of_cut(encoded, max_tokens)
    offsets = encoded.pop("offset_mapping")
    tags = [token_labels(spans, entities, number) for spans, (_, entities) in zip(offsets, rows, strict=True)]
    return Dataset.from_dict({**encoded, "labels": tags})


def _warn_of_cut(encoded: Any, max_tokens: int) -> None:  # noqa: ANN401 - a class of an optional dependency
    """``TruncationWarning`` where texts are longer than what is trained on."""
    cut = sum(bool(one.overflowing) for one in encoded.encodings or ())
    if cut:
        warnings.warn(
            f"{cut:,} of {len(encoded.encodings):,} texts were cut at {max_tokens} tokens: the rest of them is not "
            "trained on, nor measured. A larger max_tokens (--max-tokens) reads more of them.",
            TruncationWarning,
            stacklevel=2,
        )


def token_labels(
    spans: Sequence[tuple[int, int]], entities: Sequence[Entity], number: Mapping[str, int]
) -> list[int]:
    """The number of each token's label; -100, which no loss counts, for tokens without characters.

    A token belongs to the entity that it overlaps; the first token of an entity is B, the others are I.
    """
    labels = []
    begun: set[Entity] = set()
    for start, end in spans:
        if start == end:
            labels.append(-100)
            continue
        entity = next((one for one in entities if start < one.end and one.start < end), None)
        if entity is None:
            labels.append(number["O"])
            continue
        labels.append(number[f"{'I' if entity in begun else 'B'}-{entity.label}"])
        begun.add(entity)
    return labels


def spans_of(numbers: Sequence[int], labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities that labels of tokens say, as (first token, last token + 1, label); -100 is passed over."""
    found = set()
    kind, start = "", 0
    names = [labels[number] if number >= 0 else "O" for number in numbers]
    for position, name in enumerate([*names, "O"]):
        prefix, _, label = name.partition("-")
        if kind and (prefix != "I" or label != kind):
            found.add((start, position, kind))
            kind = ""
        if not kind and prefix in ("B", "I"):
            kind, start = label, position
    return found


def _class_metrics(outcome: Any) -> dict[str, float]:  # noqa: ANN401
    predicted = np.argmax(outcome.predictions, axis=-1)
    true = outcome.label_ids
    scores = [
        _f1(int(((predicted == k) & (true == k)).sum()), int((predicted == k).sum()), int((true == k).sum()))
        for k in np.unique(true)
    ]
    return {"accuracy": float((predicted == true).mean()), "f1": float(np.mean(scores))}


def _entity_metrics(outcome: Any, labels: Sequence[str]) -> dict[str, float]:  # noqa: ANN401
    predictions = np.argmax(outcome.predictions, axis=-1)
    counts: Counter[str] = Counter()
    for predicted, true in zip(predictions, outcome.label_ids, strict=True):
        real = true != -100
        found, wanted = spans_of(predicted[real], labels), spans_of(true[real], labels)
        counts.update(right=len(found & wanted), found=len(found), wanted=len(wanted))
    return {
        "precision": counts["right"] / max(1, counts["found"]),
        "recall": counts["right"] / max(1, counts["wanted"]),
        "f1": _f1(counts["right"], counts["found"], counts["wanted"]),
    }


def _f1(right: int, found: int, wanted: int) -> float:
    return 2 * right / max(1, found + wanted)


def _check_rows(rows: Sequence[tuple[str, Any]]) -> None:
    for position, (text, _) in enumerate(rows):
        if not text.strip():
            raise InputError(
                f"text {position} is empty", expected="a text", found=repr(text), remedy="Remove it."
            )
    if len(rows) < LEAST_TEXTS:
        raise InputError(
            "too few texts to train on",
            expected=f"at least {LEAST_TEXTS}",
            found=str(len(rows)),
            remedy="Give more labelled texts.",
        )


def _check_labels(rows: Sequence[tuple[str, str]], labels: Sequence[str]) -> None:
    unknown = sorted({label for _, label in rows} - set(labels))
    if unknown:
        raise InputError(
            "the held-out texts have labels that the others lack",
            expected=", ".join(labels),
            found=", ".join(unknown),
            remedy="Add texts of those labels to the training part.",
        )


def _check_entities(rows: Sequence[tuple[str, Sequence[Entity]]]) -> None:
    for position, (text, entities) in enumerate(rows):
        last = 0
        for entity in sorted(entities, key=lambda one: one.start):
            if not last <= entity.start < entity.end <= len(text):
                raise InputError(
                    f"text {position} has an entity that cannot be",
                    expected=f"spans within its {len(text)} characters that do not overlap",
                    found=f"{entity.label} from {entity.start} to {entity.end}",
                    remedy="Correct the row, or leave out those that overlap a longer one (--overlaps longest).",
                )
            last = entity.end


def _check_options(share: float, given: bool, options: _Options) -> None:
    max_tokens, batch_size, rate = options.max_tokens, options.batch_size, options.rate
    for name, value, fine, expected in (
        ("held_out", share, given or 0 < share < 1, "a share between 0 and 1"),
        ("max_tokens", max_tokens, 8 <= max_tokens <= 512, "8 to 512"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("head_rate", rate, 0 < rate <= 1000, "above 0, at most 1000"),
        ("pooling", options.pooling, options.pooling in get_args(HeadPooling), "cls or mean"),
    ):
        if not fine:
            raise InvalidOptionError(name, expected=expected, found=str(value), remedy="Change it.")
