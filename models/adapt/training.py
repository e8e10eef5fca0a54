"""One training run of sentence-transformers' trainer: resumable, seeded, evaluated, its best state kept.

Everything of a run lies in one folder: ``settings.json`` says what it is of, ``training/`` holds the trainer's
checkpoints, ``model/`` the result. Not here: what is learnt (the loss), and on what.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.errors import InvalidOptionError, OutputError
from qingyu.models.extras import require

__all__ = ["Schedule", "Trained", "TrainingFolder", "check_extra", "train", "write_note"]

PACKAGES = ("torch", "transformers", "sentence_transformers", "accelerate", "datasets", "peft")
KEPT_CHECKPOINTS = 2
LOGGED_EVERY = 50  # steps
WEIGHTS = "weights.safetensors"
JITTER = 0.03  # how far texts of unlike length may meet in a batch, as a share of their length
BF16_SHARE = 0.7  # of the time of float32
BF16_TRIALS = 5
LONGEST = 512  # no BERT reads more
EAGER_TOKENS = (
    128  # up to here plain attention is faster than the fused one on CPUs (1.5x at 24 tokens; 0.6x at 512)
)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    ``evaluate_every``: steps between two evaluations, each of which also writes a checkpoint. ``patience``:
    evaluations without a better result before training ends early; ``None`` trains to the end. ``warmup``: the
    share of steps over which the learning rate rises; it then falls along a cosine. ``bf16``: ``None`` uses it
    where this machine multiplies it faster.
    """

    epochs: float = 1.0
    learning_rate: float = 3e-4
    warmup: float = 0.05
    evaluate_every: int = 500
    patience: int | None = 5
    seed: int = 0
    bf16: bool | None = None

    def check(self) -> None:
        """Raise ``InvalidOptionError`` for a number out of its range."""
        limits: dict[str, tuple[float, float]] = {
            "epochs": (1e-6, 1000),
            "learning_rate": (1e-8, 1),
            "warmup": (0, 0.5),
            "evaluate_every": (1, 1 << 30),
            "seed": (0, (1 << 32) - 1),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise InvalidOptionError(
                    name,
                    expected=f"a number from {least:g} to {most:g}",
                    found=str(value),
                    remedy="Change it.",
                )
        if self.patience is not None and self.patience < 1:
            raise InvalidOptionError(
                "patience", expected="at least 1", found=str(self.patience), remedy="Leave it out for none."
            )


@dataclass(frozen=True)
class Trained:
    """What a run gave: where the checkpoint is, its best score, and every evaluation as (step, scores).

    The evaluation at step 0 is of what training started from.
    """

    model: Path
    score: float | None
    steps: int
    evaluations: tuple[tuple[int, Mapping[str, float]], ...] = field(default=())


def check_extra() -> None:
    """Raise ``MissingExtraError`` unless the extra ``train`` is installed."""
    require("train", *PACKAGES)


class TrainingFolder:
    """The folder of one run, which goes on where it was stopped, and refuses to go on with other settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.start = folder / "start"
        self.checkpoints = folder / "training"
        self.teacher = folder / "teacher"

    def claim(self, settings: Mapping[str, object]) -> None:
        """Note what the run is of; ``InvalidOptionError`` where the folder is of another one.

        ``OutputError`` where it holds something else, or cannot be written.
        """
        path = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._begin(path, wanted)
                return
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"cannot use {self.folder} for training",
                expected="a folder that can be written, new or of an earlier run",
                found=str(error),
                remedy="Name another folder.",
            ) from None
        self._compare(wanted, found)

    def release(self) -> None:
        """Take the note back of a run that could not begin, so that it can be given again with other options."""
        (self.folder / "settings.json").unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def fresh(self, folder: Path) -> contextlib.AbstractContextManager[Path]:
        """A temporary folder that takes the place of ``folder`` when the block ends well."""
        return _replaced(folder)

    def _begin(self, path: Path, wanted: object) -> None:
        if any(self.folder.iterdir()):
            raise OutputError(
                f"cannot use {self.folder} for training",
                expected="a new or empty folder, or that of an earlier run",
                found="a folder with other files in it",
                remedy="Name another folder.",
            )
        write_note(path, wanted)

    def _compare(self, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        if names:
            raise InvalidOptionError(
                f"{self.folder} holds another run",
                expected=", ".join(f"{name}={found.get(name)!r}" for name in names),
                found=", ".join(f"{name}={wanted.get(name)!r}" for name in names),
                remedy="Go on with the same options, or name another folder.",
            )


def write_note(path: Path, document: object) -> None:
    """Put a JSON document at ``path``, whole or not at all; ``OSError`` where the disk refuses."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def train(
    start: Path,
    folder: TrainingFolder,
    *,
    data: Mapping[str, Any],
    losses: Callable[[Any], Mapping[str, Any]],
    evaluator: Any,  # noqa: ANN401 - a class of an optional dependency
    metric: str,
    schedule: Schedule,
    batch: int,
    like_length: bool = True,
    max_tokens: int = 512,
    wrap: Callable[[Any], Any] = lambda model: model,
    finish: Callable[[Any], Any] = lambda model: model,
) -> Trained:
    """Train the checkpoint ``start`` on datasets by name, each with its loss, and write ``folder.model``.

    ``losses`` makes the losses for the model. ``evaluator`` is one of sentence-transformers'; ``metric`` of it
    chooses the checkpoint that is kept. ``batch`` counts tokens, and texts of like length are put together; with
    ``like_length=False`` it counts rows, none twice in a batch, as in-batch negatives need. A run that was killed
    goes on from its last whole checkpoint. ``wrap`` and ``finish`` change the model before and after, as LoRA
    does. Raises ``OutputError`` where the disk refuses; checkpoints written before stay.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import set_seed

    silence()
    set_seed(schedule.seed)
    model = SentenceTransformer(str(start), device="cpu")
    model.model_card_data.generate_widget_examples = False
    model.max_seq_length = min(max_tokens, int(model.max_seq_length or max_tokens))
    model[0].auto_model.register_forward_pre_hook(_attention_for_length, with_kwargs=True)
    model = wrap(model)
    trainer = _trainer_class()(
        model=model,
        args=_arguments(folder, schedule, metric, batch, model.tokenizer if like_length else None),
        train_dataset=dict(data),
        loss=dict(losses(model)),
        evaluator=evaluator,
    )
    return run_trainer(
        trainer, folder, schedule, lambda made: finish(model).save(str(made), create_model_card=False)
    )


def _trainer_class() -> Any:  # noqa: ANN401
    """The trainer, whose checkpoints hold exactly the weights that are trained.

    Loading its usual checkpoints builds the model anew from their configuration, which forgets what the first one
    was built with: a pooler that was left out, and LoRA's layers.
    """
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformerTrainer

    class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
        def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: one.contiguous() for name, one in self.model.state_dict().items()}, folder / WEIGHTS
            )

        def _load_from_checkpoint(self, checkpoint_path: str) -> None:
            self.model.load_state_dict(load_file(Path(checkpoint_path) / WEIGHTS))

        def _load_best_model(self) -> None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    return Trainer


def run_trainer(
    trainer: Any,  # noqa: ANN401 - a class of an optional dependency
    folder: TrainingFolder,
    schedule: Schedule,
    save: Callable[[Path], None],
) -> Trained:
    """Run a trainer from its last whole checkpoint, if any, to its end; ``save`` then fills the model's folder."""
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub, and a model card would ask one
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(_reporter(folder.folder / "log.jsonl", trainer.args.metric_for_best_model))
    if schedule.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(schedule.patience))
    try:
        trainer.train(resume_from_checkpoint=_last_whole(folder.checkpoints))
        with folder.fresh(folder.model) as made:
            save(made)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "write" not in str(error).lower():
            raise  # torch reports a full disk as a RuntimeError of its file writer
        raise OutputError(
            f"cannot write to {folder.folder}",
            expected="room for checkpoints of the model and of the optimizer",
            found=str(error).splitlines()[0],
            remedy="Free space there, and run the same command again: it goes on from the last checkpoint.",
        ) from None
    return _result(folder, trainer)


def _arguments(
    folder: TrainingFolder,
    schedule: Schedule,
    metric: str,
    batch: int,
    tokenizer: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.training_args import (
        BatchSamplers,
        MultiDatasetBatchSamplers,
    )

    by_length = partial(batches_of_like_length, tokenizer=tokenizer)
    return SentenceTransformerTrainingArguments(
        **common_arguments(folder, schedule, f"eval_{metric}"),
        per_device_train_batch_size=batch,
        batch_sampler=BatchSamplers.NO_DUPLICATES if tokenizer is None else by_length,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
    )


def common_arguments(folder: TrainingFolder, schedule: Schedule, metric: str) -> dict[str, Any]:
    """What every trainer is told: pace, evaluation, checkpoints, and to talk to nobody."""
    import transformers

    # transformers 5 takes a share under the name of the count
    warmup = "warmup_ratio" if transformers.__version__.startswith("4.") else "warmup_steps"
    return {
        "output_dir": str(folder.checkpoints),
        "num_train_epochs": schedule.epochs,
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": "cosine",
        warmup: schedule.warmup,
        "bf16": bf16_is_faster() if schedule.bf16 is None else schedule.bf16,
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": schedule.evaluate_every,
        "eval_on_start": True,  # what there was before, to compare with
        "save_steps": schedule.evaluate_every,
        "save_total_limit": KEPT_CHECKPOINTS,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": True,
        "logging_steps": LOGGED_EVERY,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": schedule.seed,
    }


def silence() -> None:
    """Keep the libraries' own bars and notes off standard error, which is for ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def bf16_is_faster() -> bool:
    """Whether torch multiplies matrices of bfloat16 well faster here than those of float32, tried for a moment.

    The processor's flags do not say it: with avx512_bf16 an AMD Zen 5 takes half the time, and an Intel Xeon whose AMX
    is hidden by its hypervisor takes twice the time. The margin is what converting weights to bfloat16 costs.
    """
    import torch

    rows, weights = torch.ones(2048, 384), torch.ones(384, 1536)
    shorter = rows.bfloat16(), weights.bfloat16()
    return _least_seconds(torch.matmul, *shorter) < BF16_SHARE * _least_seconds(torch.matmul, rows, weights)


def _least_seconds(function: Callable[..., object], *arguments: object) -> float:
    def once() -> float:
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start

    return min(once() for _ in range(BF16_TRIALS))


def _attention_for_length(model: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ANN401
    ids = named.get("input_ids", positional[0] if positional else None)
    wanted = "eager" if ids is not None and ids.shape[1] <= EAGER_TOKENS else "sdpa"
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def batches_of_like_length(
    dataset: Any,  # noqa: ANN401 - a class of an optional dependency
    batch_size: int,
    drop_last: bool,
    valid_label_columns: Sequence[str] | None = None,
    generator: Any = None,  # noqa: ANN401
    seed: int = 0,
    *,
    tokenizer: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Batches of texts of about equal length, about ``batch_size`` tokens each, in another order every epoch.

    The number of batches and the rows of each are the same in every epoch, so that a run can be resumed.
    """
    from sentence_transformers.base.sampler import DefaultBatchSampler

    lengths = _lengths(dataset, tokenizer)
    sizes = _batch_sizes(np.sort(lengths), batch_size)

    class LikeLength(DefaultBatchSampler):  # type: ignore[misc]
        def __iter__(self) -> Iterator[list[int]]:
            source = np.random.default_rng((seed, self.epoch))
            order = np.argsort(lengths * source.uniform(1 - JITTER, 1 + JITTER, len(lengths)))
            batches = np.split(order, np.cumsum(sizes)[:-1])
            for number in source.permutation(len(batches)):
                yield batches[number].tolist()

        def __len__(self) -> int:
            return len(sizes)

    return LikeLength(dataset, batch_size, drop_last, valid_label_columns, generator, seed)


def _lengths(dataset: Any, tokenizer: Any) -> np.ndarray[Any, np.dtype[np.float64]]:  # noqa: ANN401
    """Tokens of each row, all its texts together."""
    columns = [name for name, kind in dataset.features.items() if str(getattr(kind, "dtype", "")) == "string"]
    total = np.zeros(len(dataset))
    for name in columns:
        if name != "dataset_name":
            total += [min(length, LONGEST) for length in _token_counts(list(dataset[name]), tokenizer)]
    return total


def _token_counts(texts: Sequence[str], tokenizer: Any) -> Iterator[int]:  # noqa: ANN401
    for start in range(0, len(texts), 1024):
        encoded = tokenizer(list(texts[start : start + 1024]), return_attention_mask=False, truncation=False)
        yield from map(len, encoded["input_ids"])


def _batch_sizes(ascending: Sequence[float] | np.ndarray[Any, Any], budget: int) -> list[int]:
    """How many rows each batch takes of rows in ascending length: as many as ``budget`` tokens hold when padded."""
    sizes: list[int] = []
    rows = 0
    for length in ascending:
        if rows and (rows + 1) * length > budget:
            sizes.append(rows)
            rows = 0
        rows += 1
    return [*sizes, rows]


def _reporter(path: Path, metric: str) -> Any:  # noqa: ANN401
    """A callback that writes what is measured as JSON lines, and on a terminal draws a bar with the latest of it."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ANN401
            hidden = not sys.stderr.isatty()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=hidden)
            self.shown: dict[str, str] = {}

        def on_step_end(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ANN401
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:  # noqa: ANN401
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            for name, label in (("loss", "loss"), (metric, "score")):
                if name in logs:
                    self.shown[label] = f"{float(logs[name]):.4f}"
            self.bar.set_postfix(self.shown)

        def on_train_end(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ANN401
            self.bar.close()

    return Reporter()


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end, so that one cut by a kill is passed over."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True
    )
    return next((str(path) for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with zipfile.ZipFile(checkpoint / "optimizer.pt") as archive:
            return archive.testzip() is None and (checkpoint / "scheduler.pt").exists()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _result(folder: TrainingFolder, trainer: Any) -> Trained:  # noqa: ANN401
    history = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    evaluations = tuple(
        (int(entry["step"]), {key: float(value) for key, value in entry.items() if key.startswith("eval_")})
        for entry in history
    )
    return Trained(folder.model, trainer.state.best_metric, trainer.state.global_step, evaluations)


def described(schedule: Schedule) -> dict[str, object]:
    """The schedule as it is noted in a run's settings."""
    return asdict(schedule)
