"""Distillation: a small student that ranks texts as its teacher does.

Teachers trained with a low temperature squeeze all cosines into a narrow range (multilingual-e5: 0.7 to 1).
So the student learns the teacher's vectors less their mean, which spreads them over the whole range without
changing which texts are near. Not here: how a student is cut (``student``) and trained (``training``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import InvalidOptionError
from qingyu.models.adapt.student import cut_checkpoint
from qingyu.models.adapt.teacher import Halves, teacher_vectors, texts_digest
from qingyu.models.adapt.training import Schedule, Trained, TrainingFolder, check_extra, described, train

__all__ = ["ScoredPair", "centred", "distil"]

HELD_OUT = 2000  # texts never trained on, whose similarities choose the checkpoint
BANK = 2048  # teacher vectors that a text's similarities are compared over
TEMPERATURE = 0.05
VECTOR, RANKING, PAIRWISE = 1.0, 1.0, 5.0  # weights of the three losses, whose sizes are then alike


@dataclass(frozen=True)
class ScoredPair:
    """Two texts and how similar people find them, from 0 to 1."""

    first: str
    second: str
    score: float


def distil(
    teacher: Path,
    output: Path,
    texts: Sequence[str],
    *,
    teacher_model: Path | None = None,
    layers: Sequence[int] | None = None,
    vocabulary: int | None = None,
    words: Sequence[str] = (),
    student: Path | None = None,
    pairs: Sequence[ScoredPair] = (),
    pair_repeats: int = 1,
    prompt: str | None = None,
    batch_tokens: int = 4096,
    schedule: Schedule | None = None,
    progress: bool = False,
) -> Trained:
    """Train a student of ``teacher`` (a checkpoint) on ``texts``; the run's folder is ``output``.

    The student has the teacher's ``layers`` and the ``vocabulary`` tokens that the texts and ``words`` need, and no
    prompt; or it is ``student``, a checkpoint that was distilled before. Three losses keep the teacher's centred
    vectors t by the student's s: 1 - cos(s, t); the Kullback-Leibler divergence of softmax(cos(., b) / 0.05) over
    2,048 random b of the teacher's vectors; and the squared difference of the similarities within a batch.
    ``pairs``, where given, are learnt alongside by CoSENT loss (Su 2022), ``pair_repeats`` times in a pass over the
    texts. ``teacher_model`` is the model folder that computes the teacher's vectors, with ``prompt`` put before
    each text; ``None`` exports one in FP32 into the run's folder. The last 2,000 texts (or a tenth) are held out:
    the rank correlation of the student's similarities with the teacher's over pairs of them chooses the checkpoint
    that is kept.

    Run again with the same arguments, it goes on where it was stopped. Raises ``MissingExtraError``,
    ``InputError`` and its kin for texts, ``CheckpointError`` and its kin for the teacher, ``OutputError``.
    """
    check_extra()
    plan = schedule or Schedule()
    plan.check()
    _check_student(student, layers, vocabulary, pair_repeats)
    folder = TrainingFolder(output)
    folder.claim(
        {
            "task": "distil",
            "teacher": str(Path(teacher).resolve()),
            "texts": texts_digest(texts),
            "pairs": texts_digest([f"{pair.first}\t{pair.second}\t{pair.score}" for pair in pairs]),
            "layers": None if layers is None else list(layers),
            "vocabulary": vocabulary,
            "words": texts_digest(words),
            "student": None if student is None else str(Path(student).resolve()),
            "pair_repeats": pair_repeats,
            "prompt": prompt,
            "batch_tokens": batch_tokens,
            **described(plan),
        }
    )
    if not folder.start.exists():
        _cut(folder, student or teacher, texts, layers, vocabulary, words)
    vectors = teacher_vectors(
        teacher_model or _exported(teacher, output), texts, folder.teacher, prompt=prompt, progress=progress
    )
    _check_width(folder.start, vectors)
    targets = centred(vectors)
    held_out = min(HELD_OUT, len(texts) // 10)
    return train(
        folder.start,
        folder,
        data=_datasets(texts[:-held_out], list(pairs) * pair_repeats),
        losses=lambda model: _losses(model, targets[:-held_out], bool(pairs)),
        evaluator=_agreement(texts[-held_out:], targets[-held_out:].astype(np.float32), plan.seed),
        metric="teacher_spearman_cosine",
        schedule=plan,
        batch=batch_tokens,
    )


def _cut(
    folder: TrainingFolder,
    source: Path,
    texts: Sequence[str],
    layers: Sequence[int] | None,
    vocabulary: int | None,
    words: Sequence[str],
) -> None:
    """Make the student that training starts from; a run whose student cannot be made has not begun."""
    try:
        with folder.fresh(folder.start) as made:
            cut_checkpoint(
                source,
                made,
                layers=layers,
                vocabulary=vocabulary,
                texts=texts,
                words=words,
                prompts=False,
                dropout=0.0,
            )
    except BaseException:
        folder.release()
        raise


def centred(vectors: Halves) -> Halves:
    """The vectors less their mean, of length 1 again, float16 (n, dim)."""
    sample = vectors[:: max(1, len(vectors) // 100_000)].astype(np.float32)
    mean = sample.mean(axis=0)
    result = np.empty(vectors.shape, dtype=np.float16)
    for start in range(0, len(vectors), 1 << 16):
        part = vectors[start : start + (1 << 16)].astype(np.float32) - mean
        result[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return result


def _exported(teacher: Path, output: Path) -> Path:
    from qingyu.models.export import export

    folder = output / "teacher-model"
    if not folder.exists():
        export(teacher, folder)
    return folder


def _check_student(
    student: Path | None, layers: Sequence[int] | None, vocabulary: int | None, pair_repeats: int
) -> None:
    if student is not None and (layers is not None or vocabulary is not None):
        raise InvalidOptionError(
            "student",
            expected="a student as it is, or layers and a vocabulary to cut one with",
            found="both",
            remedy="Leave one of them out.",
        )
    if pair_repeats < 1:
        raise InvalidOptionError(
            "pair_repeats", expected="at least 1", found=str(pair_repeats), remedy="Give no pairs for none."
        )


def _check_width(student: Path, vectors: Halves) -> None:
    from qingyu.models.export.checkpoint import read_checkpoint

    dim = read_checkpoint(student).dim
    if dim != vectors.shape[1]:
        raise InvalidOptionError(
            "teacher model",
            expected=f"vectors of {dim} dimensions, as the student gives",
            found=str(vectors.shape[1]),
            remedy="Use the model folder that was exported from the teacher.",
        )


def _datasets(texts: Sequence[str], pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    from datasets import Dataset

    data = {"texts": Dataset.from_dict({"sentence": list(texts), "label": list(range(len(texts)))})}
    if pairs:
        data["pairs"] = Dataset.from_dict(
            {
                "sentence1": [pair.first for pair in pairs],
                "sentence2": [pair.second for pair in pairs],
                "score": [float(pair.score) for pair in pairs],
            }
        )
    return data


def _losses(model: Any, targets: Halves, with_pairs: bool) -> Mapping[str, Any]:  # noqa: ANN401
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    losses: dict[str, Any] = {"texts": similarity_loss(model, targets)}
    if with_pairs:
        losses["pairs"] = CoSENTLoss(model)
    return losses


def similarity_loss(model: Any, targets: Halves) -> Any:  # noqa: ANN401 - torch is an optional dependency
    """The module whose forward is the sum of the three losses; labels are row numbers in ``targets``."""
    import torch
    from torch.nn import functional

    everything = torch.from_numpy(targets)

    class SimilarityLoss(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sentence_features: Sequence[Any], labels: Any) -> Any:  # noqa: ANN401
            student = self.model(sentence_features[0])["sentence_embedding"]
            with torch.autocast("cpu", enabled=False):  # similarities need more than bf16's three digits
                return self.compare(functional.normalize(student.float(), dim=-1), labels)

        def compare(self, student: Any, labels: Any) -> Any:  # noqa: ANN401
            target = everything[labels.long()].float()
            bank = everything[torch.randint(len(everything), (BANK,))].float()
            ranking = functional.kl_div(
                functional.log_softmax(student @ bank.T / TEMPERATURE, dim=-1),
                functional.log_softmax(target @ bank.T / TEMPERATURE, dim=-1),
                log_target=True,
                reduction="batchmean",
            )
            vector = 1 - (student * target).sum(dim=-1).mean()
            pairwise = functional.mse_loss(student @ student.T, target @ target.T)
            return VECTOR * vector + RANKING * ranking + PAIRWISE * pairwise

    return SimilarityLoss()


def _agreement(texts: Sequence[str], vectors: NDArray[np.float32], seed: int) -> Any:  # noqa: ANN401
    """Rank correlation with the teacher over pairs of held-out texts: near ones and random ones, half and half."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    source = np.random.default_rng(seed)
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -np.inf)
    first = np.arange(len(texts))
    near = np.argsort(-similarities, axis=1)[first, source.integers(0, 10, len(texts))]
    other = (first + source.integers(1, len(texts), len(texts))) % len(texts)
    rows, columns = np.concatenate([first, first]), np.concatenate([near, other])
    return EmbeddingSimilarityEvaluator(
        [texts[row] for row in rows],
        [texts[column] for column in columns],
        similarities[rows, columns].tolist(),
        name="teacher",
        main_similarity="cosine",
        show_progress_bar=False,
        write_csv=False,
    )
