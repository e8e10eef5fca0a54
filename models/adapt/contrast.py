"""Contrastive fine-tuning: texts that belong together come closer than all others of their batch.

InfoNCE with in-batch negatives (van den Oord et al. 2018; Henderson et al. 2017) and given hard ones, on all
weights or on low-rank updates (LoRA, Hu et al. 2021) that are merged into the weights afterwards. Not here: the
trainer (``training``).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingyu.errors import InputError, InvalidOptionError
from qingyu.models.adapt.student import checked_config
from qingyu.models.adapt.teacher import texts_digest
from qingyu.models.adapt.training import Schedule, Trained, TrainingFolder, check_extra, described, train

__all__ = ["Example", "contrast"]

LEAST_EXAMPLES = 16
TEMPERATURE = 0.05
LORA_TARGETS = ("query", "key", "value", "dense")  # every linear layer of a BERT encoder
# Few examples, so smaller steps than distillation and more passes; LoRA's few weights take larger ones.
FULL = Schedule(epochs=3, learning_rate=2e-5, evaluate_every=50)
LOW_RANK = Schedule(epochs=3, learning_rate=3e-4, evaluate_every=50)


@dataclass(frozen=True)
class Example:
    """A text, one that belongs to it, and optionally one that only seems to."""

    anchor: str
    positive: str
    negative: str | None = None


def contrast(
    checkpoint: Path,
    output: Path,
    examples: Sequence[Example],
    *,
    lora: int | None = None,
    dims: Sequence[int] = (),
    prompts: tuple[str, str] = ("", ""),
    held_out: float = 0.1,
    batch_size: int = 32,
    schedule: Schedule | None = None,
) -> Trained:
    """Fine-tune ``checkpoint`` on ``examples``; the run's folder is ``output``, the result ``output/model``.

    ``lora``: the rank of the update, ``None`` trains all weights. ``dims`` also trains the first so many values
    of a vector to serve alone (Matryoshka, Kusupati et al. 2022). ``prompts`` are put before anchors, and before
    positives and negatives. The share ``held_out`` of the anchors, with all examples of their positives, is not
    trained on; nDCG@10 of finding their positives among all held-out ones chooses the checkpoint that is kept.
    ``batch_size``: rows, of which none shares a text with another.

    Run again with the same arguments, it goes on where it was stopped. Raises ``MissingExtraError``,
    ``InputError`` for examples that are blank, too few, or partly without a negative, ``InvalidOptionError``,
    ``CheckpointError`` and its kin, ``OutputError``.
    """
    check_extra()
    plan = schedule or (FULL if lora is None else LOW_RANK)
    plan.check()
    checked = _checked(examples)
    _check_options(lora, dims, held_out, batch_size)
    checked_config(checkpoint)
    folder = TrainingFolder(output)
    folder.claim(
        {
            "task": "contrast",
            "checkpoint": str(Path(checkpoint).resolve()),
            "examples": texts_digest([f"{row.anchor}\t{row.positive}\t{row.negative}" for row in checked]),
            "lora": lora,
            "dims": list(dims),
            "prompts": list(prompts),
            "held_out": held_out,
            "batch_size": batch_size,
            **described(plan),
        }
    )
    learnt, kept = split(checked, held_out, plan.seed)
    return train(
        checkpoint,
        folder,
        data={"examples": _dataset(learnt, prompts)},
        losses=lambda model: {"examples": _loss(model, dims)},
        evaluator=retrieval_evaluator(kept, prompts),
        metric="held-out_cosine_ndcg@10",
        schedule=plan,
        batch=batch_size,
        like_length=False,
        wrap=lambda model: model if lora is None else _with_lora(model, lora),
        finish=lambda model: model if lora is None else _merged(model),
    )


def split(examples: Sequence[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(to learn, held out): by positive, so that no passage of the one part is in the other."""
    positives = sorted({example.positive for example in examples})
    random.Random(seed).shuffle(positives)
    kept = set(positives[: max(2, round(held_out * len(positives)))])
    learnt = [example for example in examples if example.positive not in kept]
    return learnt, [example for example in examples if example.positive in kept]


def _checked(examples: Sequence[Example]) -> list[Example]:
    rows = list(examples)
    for position, row in enumerate(rows):
        texts = [row.anchor, row.positive, *([] if row.negative is None else [row.negative])]
        if not all(text.strip() for text in texts):
            raise InputError(
                f"example {position} has an empty text",
                expected="an anchor and a positive, and a negative where there are any",
                found=repr(row)[:80],
                remedy="Remove the row.",
            )
    with_negative = sum(row.negative is not None for row in rows)
    if with_negative not in (0, len(rows)):
        raise InputError(
            "some examples have no negative",
            expected="a negative in all rows or in none",
            found=f"{with_negative} of {len(rows)} rows with one",
            remedy="Complete the column, or leave it out: other rows of the batch serve as negatives.",
        )
    different = len({row.positive for row in rows})
    if different < LEAST_EXAMPLES:
        raise InputError(
            "too few examples to train on",
            expected=f"at least {LEAST_EXAMPLES} different positives",
            found=f"{different} in {len(rows)} rows",
            remedy="Give more pairs; the other pairs of a batch are what a pair is told apart from.",
        )
    return rows


def _check_options(lora: int | None, dims: Sequence[int], held_out: float, batch_size: int) -> None:
    for name, value, fine, expected in (
        ("lora", lora, lora is None or 1 <= lora <= 256, "a rank from 1 to 256"),
        ("dims", list(dims), all(dim > 0 for dim in dims), "numbers above 0"),
        ("held_out", held_out, 0 < held_out < 1, "a share between 0 and 1"),
        ("batch_size", batch_size, batch_size >= 2, "at least 2 rows"),
    ):
        if not fine:
            raise InvalidOptionError(name, expected=expected, found=str(value), remedy="Change it.")


def _dataset(examples: Sequence[Example], prompts: tuple[str, str]) -> Any:  # noqa: ANN401
    from datasets import Dataset

    columns: dict[str, list[str]] = {
        "anchor": [prompts[0] + row.anchor for row in examples],
        "positive": [prompts[1] + row.positive for row in examples],
    }
    if examples[0].negative is not None:
        columns["negative"] = [f"{prompts[1]}{row.negative}" for row in examples]
    return Dataset.from_dict(columns)


def _loss(model: Any, dims: Sequence[int]) -> Any:  # noqa: ANN401
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    if not dims:
        return loss
    whole = int(model.get_embedding_dimension())
    return MatryoshkaLoss(model, loss, matryoshka_dims=sorted({whole, *dims}, reverse=True))


def retrieval_evaluator(examples: Sequence[Example], prompts: tuple[str, str]) -> Any:  # noqa: ANN401
    """Finding each anchor's positives among all positives of ``examples``."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    corpus = {
        text: str(number) for number, text in enumerate(dict.fromkeys(row.positive for row in examples))
    }
    relevant: dict[str, set[str]] = {}
    queries: Mapping[str, str] = {
        text: f"q{number}" for number, text in enumerate({row.anchor: None for row in examples})
    }
    for row in examples:
        relevant.setdefault(queries[row.anchor], set()).add(corpus[row.positive])
    return InformationRetrievalEvaluator(
        {number: prompts[0] + text for text, number in queries.items()},
        {number: prompts[1] + text for text, number in corpus.items()},
        relevant,
        name="held-out",
        main_score_function="cosine",
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 10],
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[10],
        show_progress_bar=False,
        write_csv=False,
    )


def _with_lora(model: Any, rank: int) -> Any:  # noqa: ANN401
    from peft import LoraConfig, TaskType

    model.add_adapter(
        LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=list(LORA_TARGETS),
        )
    )
    return model


def _merged(model: Any) -> Any:  # noqa: ANN401
    """The model with the low-rank updates added into its weights and nothing of LoRA left."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    encoder = model[0].auto_model
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent = encoder.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
    encoder._hf_peft_config_loaded = False
    return model
