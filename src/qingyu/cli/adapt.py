"""``qingyu adapt``: checkpoints made smaller, or better at one domain or task."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import BUNDLED, new_command
from qingyu.cli.rows import read_rows
from qingyu.cli.text_input import read_texts
from qingyu.errors import DataFileError, InvalidOptionError

if TYPE_CHECKING:
    from qingyu.models.adapt import Trained
    from qingyu.models.adapt.contrast import Example
    from qingyu.models.adapt.distil import ScoredPair
    from qingyu.models.adapt.heads import LabelledText, TaggedText
    from qingyu.models.adapt.training import Schedule

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu adapt contrast checkpoints/bge-small-zh-v1.5 out/support --pairs questions.jsonl --lora 16
qingyu export out/support/model out/support-fp32"""

EXAMPLES = {
    "distil": "qingyu adapt distil checkpoints/teacher out/student --texts corpus.txt --layers 0,3,7,11",
    "contrast": "qingyu adapt contrast checkpoints/bge out/support --pairs questions.jsonl --lora 16",
    "classify": "qingyu adapt classify checkpoints/bge out/sentiment --texts reviews.tsv",
    "tag": "qingyu adapt tag checkpoints/bge out/names --texts sentences.jsonl",
    "prune-vocab": "qingyu adapt prune-vocab checkpoints/e5 out/e5-zh --texts corpus.txt --size 20000",
    "unpack": "qingyu adapt unpack qingyu-mini-zh out/mini",
}


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command and its own commands."""
    summary = "train a student, fine-tune an encoder, add a head, or cut a vocabulary (extra: train)"
    parser = new_command(commands, "adapt", summary, EXAMPLE)
    parser.epilog = (parser.epilog or "") + (
        "\n\nA run that was stopped goes on when the same command is given again. The result is the checkpoint\n"
        "OUTPUT/model, which `qingyu export` takes."
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_distil(kinds)
    _add_contrast(kinds)
    classifier = _add_head(kinds, "classify", "train a text classifier", "columns text, label", _classify)
    classifier.add_argument(
        "--pooling",
        choices=("cls", "mean"),
        default="cls",
        help="what the head reads: the first token's state, or the mean of all, for encoders that were trained with "
        "it, as E5; transformers' own classes do not know of the latter (default: %(default)s)",
    )
    tagger = _add_head(kinds, "tag", "train a tagger of entities", TAGGED_FORMAT, _tag)
    tagger.add_argument(
        "--overlaps",
        choices=("error", "longest"),
        default="error",
        help="entities that overlap: refuse them, or keep the longest (default: %(default)s)",
    )
    _add_prune(kinds)
    _add_unpack(kinds)


TAGGED_FORMAT = (
    'JSON lines with text and entities: [{"start": 0, "end": 2, "label": "name"}], in characters; or with label: '
    '{"name": {"张三": [[0, 1]]}}, the last character included'
)


def run(options: argparse.Namespace) -> int:
    """Run one of the commands, and say what it made."""
    code: int = options.adapt(options)
    return code


def _add_distil(kinds: Any) -> None:  # noqa: ANN401
    summary = "train a small student that ranks texts as its teacher does"
    parser = _new_kind(kinds, "distil", summary, _distil)
    parser.add_argument("checkpoint", metavar="TEACHER", type=Path, help="folder of the teacher's checkpoint")
    _add_output(parser)
    parser.add_argument(
        "--texts",
        action="append",
        required=True,
        metavar="FILE[#FIELD]",
        help="texts to learn on: lines, JSON lines or TSV (FIELD: name or column number); repeatable",
    )
    parser.add_argument(
        "--sentences", type=float, default=0.4, metavar="S", help="add S sentences a text (%(default)s)"
    )
    parser.add_argument(
        "--passages", type=float, default=0.1, metavar="P", help="add P joined texts a text (%(default)s)"
    )
    parser.add_argument(
        "--variants",
        type=float,
        default=0.0,
        metavar="V",
        help="add V changed short texts a text (%(default)s)",
    )
    parser.add_argument("--max-texts", type=int, metavar="N", help="learn on N of them (default: all)")
    parser.add_argument(
        "--pairs", metavar="FILE", help="also learn scores: columns sentence1, sentence2, label (any scale)"
    )
    parser.add_argument(
        "--pair-repeats",
        type=int,
        default=1,
        metavar="N",
        help="times in a pass over the texts (%(default)s)",
    )
    parser.add_argument(
        "--student",
        type=Path,
        metavar="FOLDER",
        help="checkpoint of a student to go on with (default: cut one)",
    )
    parser.add_argument(
        "--layers", type=_numbers, metavar="I,J,...", help="the teacher's layers to keep, from 0"
    )
    parser.add_argument("--vocabulary", type=int, metavar="N", help="keep the N most useful tokens")
    parser.add_argument("--words", metavar="FILE", help="words whose tokens stay, one a line")
    parser.add_argument(
        "--teacher-model",
        type=Path,
        metavar="FOLDER",
        help="model folder that computes the vectors (default: export one)",
    )
    parser.add_argument("--prompt", metavar="P", help="the teacher's prompt: query, passage, or a text")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="(default: %(default)s)")
    _add_schedule(parser)


def _add_contrast(kinds: Any) -> None:  # noqa: ANN401
    parser = _new_kind(kinds, "contrast", "fine-tune on pairs of texts that belong together", _contrast)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    _add_output(parser)
    parser.add_argument(
        "--pairs",
        required=True,
        metavar="FILE",
        help="TSV or JSON lines: anchor, positive and maybe negative",
    )
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="train low-rank updates only (default: all weights)"
    )
    parser.add_argument(
        "--dims",
        type=_numbers,
        default=[],
        metavar="D,E,...",
        help="make shorter vectors useful, too (Matryoshka)",
    )
    parser.add_argument("--anchor-prompt", default="", metavar="TEXT", help="put before anchors")
    parser.add_argument(
        "--positive-prompt", default="", metavar="TEXT", help="put before positives and negatives"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="to evaluate on (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows (default: %(default)s)")
    _add_schedule(parser)


def _add_head(
    kinds: Any,  # noqa: ANN401
    name: str,
    summary: str,
    form: str,
    work: Any,  # noqa: ANN401
) -> argparse.ArgumentParser:
    parser = _new_kind(kinds, name, summary, work)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    _add_output(parser)
    parser.add_argument("--texts", required=True, metavar="FILE", help=form)
    parser.add_argument(
        "--held-out-texts", metavar="FILE", help="to evaluate on (default: a tenth of the texts)"
    )
    parser.add_argument("--freeze", action="store_true", help="train the head alone")
    parser.add_argument(
        "--head-rate",
        type=float,
        metavar="X",
        help="times the learning rate for the head (default: 1, with --freeze 20)",
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows (default: %(default)s)")
    _add_schedule(parser)
    return parser


def _add_prune(kinds: Any) -> None:  # noqa: ANN401
    parser = _new_kind(kinds, "prune-vocab", "keep the tokens that a language or corpus needs", _prune)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    _add_output(parser, "checkpoint folder to make")
    parser.add_argument(
        "--texts", action="append", required=True, metavar="FILE[#FIELD]", help="the corpus; repeatable"
    )
    parser.add_argument("--size", type=int, required=True, metavar="N", help="how many tokens to keep")
    parser.add_argument("--words", metavar="FILE", help="words whose tokens stay, one a line")


def _add_unpack(kinds: Any) -> None:  # noqa: ANN401
    parser = _new_kind(kinds, "unpack", "turn a model folder back into a checkpoint to adapt", _unpack)
    parser.add_argument("model", metavar="MODEL", help=f"model folder, bundle, or name such as {BUNDLED}")
    _add_output(parser, "checkpoint folder to make")


def _new_kind(kinds: Any, name: str, summary: str, work: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    parser = new_command(kinds, name, summary, EXAMPLES[name])
    parser.set_defaults(run=run, adapt=work)
    return parser


def _add_output(parser: argparse.ArgumentParser, text: str = "folder of the run") -> None:
    parser.add_argument("output", metavar="OUTPUT", type=Path, help=text)


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    """The options of ``Schedule``; those not given keep the defaults of the kind of training."""
    parser.add_argument("--epochs", type=float, metavar="N", help="passes over the data")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="at its highest")
    parser.add_argument("--evaluate-every", type=int, metavar="STEPS", help="also writes a checkpoint")
    parser.add_argument(
        "--patience", type=int, metavar="N", help="evaluations without gain before it ends early"
    )
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _distil(options: argparse.Namespace) -> int:
    from qingyu.models.adapt import distil, training_texts, vocabulary_words

    given = [text for source in options.texts for text in _texts(source)]
    texts = training_texts(
        given,
        sentences=options.sentences,
        passages=options.passages,
        variants=options.variants,
        words=vocabulary_words(options.checkpoint) if options.variants else list,
        limit=options.max_texts,
        seed=options.seed or 0,
    )
    trained = distil(
        options.checkpoint,
        options.output,
        texts,
        teacher_model=options.teacher_model,
        layers=options.layers,
        vocabulary=options.vocabulary,
        words=[] if options.words is None else list(read_texts(options.words)),
        pairs=[] if options.pairs is None else list(_scored(options.pairs)),
        student=options.student,
        pair_repeats=options.pair_repeats,
        prompt=options.prompt,
        batch_tokens=options.batch_tokens,
        schedule=_schedule(options, "distil"),
        progress=True,
    )
    return _say(trained, options)


def _contrast(options: argparse.Namespace) -> int:
    from qingyu.models.adapt import contrast

    trained = contrast(
        options.checkpoint,
        options.output,
        list(_examples(options.pairs)),
        lora=options.lora,
        dims=options.dims,
        prompts=(options.anchor_prompt, options.positive_prompt),
        held_out=options.held_out,
        batch_size=options.batch_size,
        schedule=_schedule(options, "lora" if options.lora else "contrast"),
    )
    return _say(trained, options)


def _classify(options: argparse.Namespace) -> int:
    from qingyu.models.adapt import classify

    held_out = 0.1 if options.held_out_texts is None else list(_labelled(options.held_out_texts))
    work = partial(classify, pooling=options.pooling)
    return _say(_head(work, options, list(_labelled(options.texts)), held_out), options)


def _tag(options: argparse.Namespace) -> int:
    from qingyu.models.adapt import tag

    held_out = 0.1 if options.held_out_texts is None else _untangled(options.held_out_texts, options)
    return _say(_head(tag, options, _untangled(options.texts, options), held_out), options)


def _untangled(source: str, options: argparse.Namespace) -> list[TaggedText]:
    from qingyu.models.adapt import longest_entities

    texts = list(_tagged(source))
    if options.overlaps == "longest":
        texts, dropped = longest_entities(texts)
        if dropped:
            print(f"{source}: {dropped:,} entities overlap a longer one and are left out", file=sys.stderr)
    return texts


def _head(work: Any, options: argparse.Namespace, texts: Any, held_out: Any) -> Trained:  # noqa: ANN401
    trained: Trained = work(
        options.checkpoint,
        options.output,
        texts,
        held_out=held_out,
        freeze=options.freeze,
        head_rate=options.head_rate,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        schedule=_schedule(options, "head"),
    )
    return trained


def _prune(options: argparse.Namespace) -> int:
    from qingyu.models.adapt import prune_vocabulary

    size = prune_vocabulary(
        options.checkpoint,
        options.output,
        [text for source in options.texts for text in _texts(source)],
        size=options.size,
        words=[] if options.words is None else list(read_texts(options.words)),
    )
    print(f"{options.output}: {size:,} tokens")
    return 0


def _unpack(options: argparse.Namespace) -> int:
    from qingyu.models.adapt import unpack

    unpack(options.model, options.output)
    print(f"{options.output}: checkpoint of {options.model}")
    return 0


def _say(trained: Trained, options: argparse.Namespace) -> int:
    if options.json:
        evaluations = [{"step": step, **scores} for step, scores in trained.evaluations]
        outcome = {
            "model": str(trained.model),
            "score": trained.score,
            "steps": trained.steps,
            "evaluations": evaluations,
        }
        print(json.dumps(outcome, ensure_ascii=False))
    else:
        score = "not evaluated" if trained.score is None else f"best score {trained.score:.4f}"
        print(f"{trained.model}: {trained.steps:,} steps, {score}")
    return 0


def _schedule(options: argparse.Namespace, kind: str) -> Schedule:
    from dataclasses import replace

    from qingyu.models.adapt import schedule_of

    names = ("epochs", "learning_rate", "evaluate_every", "patience", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(schedule_of(kind), **given)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,3,7,11") from None


def _texts(source: str) -> Iterator[str]:
    path, separator, field = source.rpartition("#")
    if not separator or Path(source).exists():
        return read_texts(source)
    return read_texts(path, field=field)


def _scored(source: str) -> Iterator[ScoredPair]:
    """Scores of any scale become 0 to 1, which CoSENT's order-only loss does not need but a reader expects."""
    from qingyu.models.adapt.distil import ScoredPair

    rows = [
        (row["sentence1"], row["sentence2"], _number(source, number, row["label"]))
        for number, row in read_rows(source, ("sentence1", "sentence2", "label"))
    ]
    if not rows:
        raise DataFileError(f"{source} is empty", expected="rows", found="none", remedy="Check the path.")
    least, most = min(score for *_, score in rows), max(score for *_, score in rows)
    if least == most:
        raise InvalidOptionError(
            "--pairs", expected="at least two different labels", found=str(least), remedy="Give graded pairs."
        )
    for first, second, score in rows:
        yield ScoredPair(first, second, (score - least) / (most - least))


def _number(source: str, line: int, value: Any) -> float:  # noqa: ANN401
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataFileError(
            f"{source}, line {line}",
            expected="a number as label",
            found=repr(value),
            remedy="Repair the line.",
        ) from None


def _examples(source: str) -> Iterator[Example]:
    from qingyu.models.adapt.contrast import Example

    for number, row in read_rows(source, ("anchor", "positive")):
        anchor, positive = (_string(source, number, row[name]) for name in ("anchor", "positive"))
        negative = row.get("negative")
        yield Example(anchor, positive, None if negative is None else _string(source, number, negative))


def _labelled(source: str) -> Iterator[LabelledText]:
    from qingyu.models.adapt.heads import LabelledText

    for number, row in read_rows(source, ("text", "label")):
        yield LabelledText(_string(source, number, row["text"]), str(row["label"]))


def _tagged(source: str) -> Iterator[TaggedText]:
    from qingyu.models.adapt.heads import Entity, TaggedText

    for number, row in read_rows(source, ("text",)):
        text = _string(source, number, row["text"])
        try:
            spans = tuple(Entity(*span) for span in _spans(row))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DataFileError(
                f"{source}, line {number} has no entities",
                expected=TAGGED_FORMAT,
                found=str(row)[:80],
                remedy="Repair the line.",
            ) from None
        yield TaggedText(text, spans)


def _spans(row: Any) -> Iterator[tuple[int, int, str]]:  # noqa: ANN401
    """Both formats of entities; the second is CLUENER's, whose ends are inclusive."""
    if "entities" in row:
        for entity in row["entities"]:
            yield int(entity["start"]), int(entity["end"]), str(entity["label"])
    else:
        for label, names in row["label"].items():
            for places in names.values():
                for start, last in places:
                    yield int(start), int(last) + 1, str(label)


def _string(source: str, line: int, value: Any) -> str:  # noqa: ANN401
    if not isinstance(value, str):
        raise DataFileError(
            f"{source}, line {line}", expected="a string", found=repr(value)[:80], remedy="Repair the line."
        )
    return value
