"""Checkpoints made smaller, or better at one domain or task: distillation, fine-tuning, heads, vocabulary.

Needs the extra ``train`` (torch, transformers, sentence-transformers, peft), but for ``prune_vocabulary`` and
``unpack``, which need ``export``. Every result is a checkpoint that ``qingyu.models.export`` takes. Importing this
loads none of them. Not here: quantization.
"""

from __future__ import annotations

from qingyu.models.adapt.contrast import FULL, LOW_RANK, Example, contrast
from qingyu.models.adapt.distil import ScoredPair, distil
from qingyu.models.adapt.heads import (
    SCHEDULE,
    Entity,
    LabelledText,
    TaggedText,
    classify,
    longest_entities,
    tag,
)
from qingyu.models.adapt.student import prune_vocabulary
from qingyu.models.adapt.texts import training_texts
from qingyu.models.adapt.training import Schedule, Trained
from qingyu.models.adapt.unpack import unpack
from qingyu.models.adapt.vocabulary import vocabulary_words

__all__ = [
    "Entity",
    "Example",
    "LabelledText",
    "Schedule",
    "ScoredPair",
    "TaggedText",
    "Trained",
    "classify",
    "contrast",
    "distil",
    "longest_entities",
    "prune_vocabulary",
    "schedule_of",
    "tag",
    "training_texts",
    "unpack",
    "vocabulary_words",
]


def schedule_of(kind: str) -> Schedule:
    """The schedule that a kind of training ("distil", "contrast", "lora", "head") uses where none is given."""
    return {"distil": Schedule(), "contrast": FULL, "lora": LOW_RANK, "head": SCHEDULE}[kind]
