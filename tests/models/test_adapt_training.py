"""Distillation, contrastive fine-tuning and heads, on models small enough to train in seconds."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qingyu import Classifier, Embedder
from qingyu.errors import (
    InputError,
    InvalidOptionError,
    OutputError,
    TruncationWarning,
    UnsupportedModelError,
)
from qingyu.models.adapt import (
    Entity,
    Example,
    LabelledText,
    Schedule,
    ScoredPair,
    TaggedText,
    classify,
    contrast,
    distil,
    tag,
    training,
)
from qingyu.models.adapt.contrast import retrieval_evaluator, split
from qingyu.models.adapt.distil import centred
from qingyu.models.adapt.heads import spans_of, token_labels
from qingyu.models.adapt.training import TrainingFolder
from qingyu.models.export import export

# The libraries warn of their own deprecations; what qingyu warns of is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")

CHARACTERS = "今天气真好外面阳光明媚股票大跌怎么修改登录密码忘记了办雨会下吗人工智能正在变医疗教育和交通"
QUICK = Schedule(epochs=2, learning_rate=3e-3, evaluate_every=5, patience=None, bf16=False)


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers", "sentence_transformers", "peft", "datasets", "accelerate"):
        pytest.importorskip(name)


def sentences(count, seed=0):
    source = random.Random(seed)
    return ["".join(source.choices(CHARACTERS, k=source.randint(4, 30))) for _ in range(count)]


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def distilled(tiny_checkpoint, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "student"
    options = {"teacher_model": tiny_model, "batch_tokens": 512, "schedule": QUICK}
    return distil(tiny_checkpoint, folder, sentences(400), **options), folder, options


def test_a_student_comes_to_its_teachers_centred_vectors(distilled, tiny_model, tmp_path):
    trained, folder, _ = distilled
    held_out = sentences(100, seed=99)
    with Embedder.open(tiny_model) as teacher:
        target = centred(teacher.embed(held_out, normalize=True).astype(np.float16)).astype(np.float32)

    def nearness(checkpoint, name):
        export(checkpoint, tmp_path / name)
        with Embedder.open(tmp_path / name) as student:
            return float((student.embed(held_out, normalize=True) * target).sum(axis=1).mean())

    start, end = nearness(folder / "start", "start"), nearness(trained.model, "trained")
    assert end > start + 0.1
    assert trained.evaluations[0][0] == 0
    scores = [scores["eval_teacher_spearman_cosine"] for step, scores in trained.evaluations if step]
    assert trained.score == max(scores)


def test_a_finished_run_given_again_changes_nothing(distilled, tiny_checkpoint):
    trained, folder, options = distilled
    before = weights(trained.model)
    again = distil(tiny_checkpoint, folder, sentences(400), **options)
    assert again.steps == trained.steps
    after = weights(again.model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_the_same_student(distilled, tiny_checkpoint, tmp_path):
    trained, _, options = distilled
    twin = distil(tiny_checkpoint, tmp_path / "twin", sentences(400), **options)
    first, second = weights(trained.model), weights(twin.model)
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-6


def test_a_log_of_the_run_is_kept(distilled):
    _, folder, _ = distilled
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"step", "eval_teacher_spearman_cosine"} <= {name for line in lines for name in line}


@pytest.mark.parametrize(
    "change", [{"layers": [1]}, {"schedule": dataclasses.replace(QUICK, epochs=3)}, {"batch_tokens": 256}]
)
def test_a_folder_of_another_run_is_refused(distilled, tiny_checkpoint, change):
    trained, folder, options = distilled
    before = weights(trained.model)
    with pytest.raises(InvalidOptionError, match="holds another run"):
        distil(tiny_checkpoint, folder, sentences(400), **{**options, **change})
    assert np.array_equal(
        before["embeddings.LayerNorm.weight"], weights(trained.model)["embeddings.LayerNorm.weight"]
    )


@pytest.mark.parametrize("wrong", [{"layers": [7]}, {"vocabulary": 3}])
def test_a_run_that_could_not_begin_leaves_no_folder(tiny_checkpoint, tiny_model, tmp_path, wrong):
    with pytest.raises(InvalidOptionError):
        distil(tiny_checkpoint, tmp_path / "run", sentences(200), teacher_model=tiny_model, **wrong)
    assert not (tmp_path / "run").exists()


def test_scored_pairs_are_learnt_alongside(tiny_checkpoint, tiny_model, tmp_path):
    texts = sentences(200)
    pairs = [ScoredPair(text, text[::-1], n % 2) for n, text in enumerate(texts)]
    trained = distil(
        tiny_checkpoint,
        tmp_path / "run",
        texts,
        teacher_model=tiny_model,
        pairs=pairs,
        batch_tokens=512,
        schedule=QUICK,
    )
    assert trained.steps > 0


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_adapt_training import killed_run
killed_run(Path({checkpoint!r}), Path({model!r}), Path({folder!r}))
"""


def killed_run(checkpoint, model, folder):
    schedule = dataclasses.replace(QUICK, epochs=8, evaluate_every=2)
    return distil(
        checkpoint, folder, sentences(400), teacher_model=model, batch_tokens=256, schedule=schedule
    )


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tiny_checkpoint, tiny_model, tmp_path):
    folder = tmp_path / "run"
    names = {
        "checkpoint": tiny_checkpoint,
        "model": tiny_model,
        "folder": folder,
        "tests": Path(__file__).parent,
    }
    code = KILLED.format(**{name: str(path) for name, path in names.items()})
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
    deadline = time.monotonic() + 300
    while len(list((folder / "training").glob("checkpoint-*/trainer_state.json"))) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = (folder / "training").glob("checkpoint-*/trainer_state.json")
    steps = sorted(int(path.parent.name.partition("-")[2]) for path in states)
    (folder / "training" / f"checkpoint-{steps[-1]}" / "optimizer.pt").write_bytes(b"cut")
    logged = len((folder / "log.jsonl").read_text().splitlines())
    trained = killed_run(tiny_checkpoint, tiny_model, folder)
    after = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()[logged:]]
    if after[0] == steps[-2]:  # transformers 4 evaluates once more what it goes on from
        after = after[1:]
    assert after[0] == steps[-2] + 2
    assert after[-1] == trained.steps
    assert trained.model.is_dir()


def test_a_full_disk_is_one_typed_error_and_earlier_checkpoints_stay(
    tiny_checkpoint, tiny_model, tmp_path, monkeypatch
):
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    folder = tmp_path / "run"
    with pytest.raises(OutputError, match="No space left"):
        distil(
            tiny_checkpoint,
            folder,
            sentences(200),
            teacher_model=tiny_model,
            batch_tokens=256,
            schedule=QUICK,
        )
    assert (folder / "training" / "checkpoint-5" / "trainer_state.json").exists()
    assert not (folder / "model").exists()


def topics(count, seed=0):
    return [Example(text, text[::-1] + "股票") for text in sentences(count, seed)]


@pytest.mark.parametrize("lora", [None, 8])
def test_contrast_gives_a_plain_checkpoint_that_scores_as_it_was_evaluated(tiny_checkpoint, tmp_path, lora):
    from sentence_transformers import SentenceTransformer

    schedule = dataclasses.replace(QUICK, epochs=4, learning_rate=1e-3, evaluate_every=10)
    trained = contrast(
        tiny_checkpoint, tmp_path / "run", topics(300), lora=lora, dims=[16], schedule=schedule
    )
    before, after = weights(tiny_checkpoint), weights(trained.model)
    assert {name for name in after if "lora" in name or "base_layer" in name} == set()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    linear = {name for name in before if before[name].ndim == 2 and "encoder" in name}
    assert changed == linear if lora is not None else changed > linear
    model = SentenceTransformer(str(trained.model), device="cpu")
    examples = split(topics(300), 0.1, schedule.seed)[1]
    again = retrieval_evaluator(examples, ("", ""))(model)
    assert trained.score == pytest.approx(again["held-out_cosine_ndcg@10"], abs=1e-6)
    export(trained.model, tmp_path / "model")
    texts = sentences(20)
    with Embedder.open(tmp_path / "model") as embedder:
        assert np.abs(embedder.embed(texts) - model.encode(texts)).max() < 1e-5


def test_held_out_positives_are_never_learnt():
    examples = [Example(f"问{n}", f"答{n // 4}") for n in range(100)]
    learnt, kept = split(examples, 0.2, 0)
    assert len(kept) == 20
    assert not {e.positive for e in learnt} & {e.positive for e in kept}
    assert sorted(map(repr, [*learnt, *kept])) == sorted(map(repr, examples))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([Example("问", "答")] * 50, "too few examples"),
        ([Example(f"问{n}", f"答{n}" if n else " ") for n in range(50)], "example 0 has an empty text"),
        ([Example(f"问{n}", f"答{n}", "反" if n else None) for n in range(50)], "no negative"),
    ],
)
def test_examples_that_cannot_train_are_refused(tiny_checkpoint, tmp_path, examples, message):
    with pytest.raises(InputError, match=message):
        contrast(tiny_checkpoint, tmp_path / "run", examples)
    assert not (tmp_path / "run").exists()


def labelled(count, seed=0):
    texts = sentences(count, seed)
    return [
        LabelledText(("好" if n % 2 else "跌") * 3 + text, "正" if n % 2 else "负")
        for n, text in enumerate(texts)
    ]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_classifier_learns_its_classes(tiny_checkpoint, tmp_path, freeze):
    schedule = dataclasses.replace(QUICK, epochs=8, learning_rate=1e-3, evaluate_every=20)
    trained = classify(tiny_checkpoint, tmp_path / "run", labelled(300), freeze=freeze, schedule=schedule)
    assert trained.score is not None
    assert trained.score > (0.6 if freeze else 0.95)
    same = np.array_equal(
        weights(trained.model)["bert.embeddings.word_embeddings.weight"],
        weights(tiny_checkpoint)["embeddings.word_embeddings.weight"],
    )
    assert same == freeze
    config = json.loads((trained.model / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "正", "1": "负"}
    assert not list(trained.model.glob("*.bin"))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_classifier_on_the_mean_of_the_states_gives_what_it_was_trained_to(
    tiny_checkpoint, tmp_path, freeze
):
    schedule = dataclasses.replace(QUICK, epochs=8, learning_rate=1e-3, evaluate_every=20)
    learnt, kept = labelled(300), labelled(60, seed=9)
    trained = classify(
        tiny_checkpoint,
        tmp_path / "run",
        learnt,
        held_out=kept,
        freeze=freeze,
        head_rate=5,
        pooling="mean",
        schedule=schedule,
    )
    assert trained.score is not None
    assert trained.score > (0.6 if freeze else 0.95)
    assert json.loads((trained.model / "config.json").read_text())["classifier_pooling"] == "mean"
    export(trained.model, tmp_path / "model")
    with Classifier.open(tmp_path / "model") as classifier:
        found = [one.best.label for one in classifier.classify([row.text for row in kept])]
    right = np.mean([label == row.label for label, row in zip(found, kept, strict=True)])
    assert right == pytest.approx(trained.score, abs=0.02)


def test_what_a_head_reads_and_learns_by_is_checked(tiny_checkpoint, tmp_path):
    for wrong in ({"pooling": "max"}, {"head_rate": 0.0}, {"head_rate": -1.0}, {"head_rate": 2000.0}):
        with pytest.raises(InvalidOptionError, match=next(iter(wrong))):
            classify(tiny_checkpoint, tmp_path / "run", labelled(50), **wrong)
    assert not (tmp_path / "run").exists()


def tagged(count, seed=0):
    source = random.Random(seed)
    made = []
    for text in sentences(count, seed):
        at = source.randrange(len(text))
        made.append(TaggedText(text[:at] + "北京" + text[at:], (Entity(at, at + 2, "地"),)))
    return made


def test_a_tagger_learns_its_entities(tiny_checkpoint, tmp_path):
    schedule = dataclasses.replace(QUICK, epochs=15, learning_rate=5e-4, evaluate_every=100)
    held_out = tagged(50, seed=5)
    trained = tag(
        tiny_checkpoint, tmp_path / "run", tagged(300), held_out=held_out, batch_size=8, schedule=schedule
    )
    assert trained.score is not None
    assert trained.score > 0.5
    config = json.loads((trained.model / "config.json").read_text())
    assert config["id2label"] == {"0": "O", "1": "B-地", "2": "I-地"}


def test_labels_of_tokens_and_spans_of_labels_are_each_others_inverse():
    names = ["O", "B-人", "I-人", "B-地", "I-地"]
    number = {name: n for n, name in enumerate(names)}
    spans = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (0, 0)]
    entities = (Entity(0, 2, "人"), Entity(2, 3, "人"), Entity(4, 6, "地"))
    labels = token_labels(spans, entities, number)
    assert labels == [-100, 1, 2, 1, 0, 3, 4, -100]
    assert spans_of(labels, names) == {(1, 3, "人"), (3, 4, "人"), (5, 7, "地")}


def test_an_i_without_its_b_begins_an_entity():
    assert spans_of([2, 2, 0, 4, 2], ["O", "B-人", "I-人", "B-地", "I-地"]) == {
        (0, 2, "人"),
        (3, 4, "地"),
        (4, 5, "人"),
    }


@pytest.mark.parametrize(
    ("work", "texts", "message"),
    [
        (classify, [LabelledText(f"文{n}", "正") for n in range(50)], "one class only"),
        (classify, [LabelledText(f"文{n}", str(n % 2)) for n in range(5)], "too few"),
        (classify, [LabelledText(" " if n == 7 else "文", str(n % 2)) for n in range(50)], "text 7 is empty"),
        (tag, [TaggedText("文字", ())] * 50, "no entities"),
        (tag, [TaggedText("文字", (Entity(0, 3, "人"),))] * 50, "cannot be"),
        (tag, [TaggedText("文字", (Entity(0, 2, "人"), Entity(1, 2, "地")))] * 50, "cannot be"),
    ],
)
def test_texts_that_cannot_train_a_head_are_refused(tiny_checkpoint, tmp_path, work, texts, message):
    with pytest.raises(InputError, match=message):
        work(tiny_checkpoint, tmp_path / "run", texts)
    assert not (tmp_path / "run").exists()


def test_labels_that_only_the_held_out_texts_have_are_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="labels that the others lack"):
        classify(tiny_checkpoint, tmp_path / "run", labelled(50), held_out=[LabelledText("文", "中")])


def test_a_checkpoint_of_another_family_is_refused(tiny_checkpoint, tmp_path):
    folder = tmp_path / "gpt"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="BERT family"):
        classify(folder, tmp_path / "run", labelled(50))
    with pytest.raises(UnsupportedModelError, match="BERT family"):
        contrast(folder, tmp_path / "run", topics(50))


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": -1}, {"evaluate_every": 0}, {"patience": 0}, {"seed": -1}]
)
def test_a_schedule_out_of_range_is_refused(wrong):
    with pytest.raises(InvalidOptionError):
        Schedule(**wrong).check()


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="other files"):
        TrainingFolder(tmp_path).claim({"task": "distil"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_texts_that_are_cut_to_train_on_are_counted_in_a_warning(tiny_checkpoint, kind):
    import transformers

    from qingyu.models.adapt.heads import _classified, _tagged

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny_checkpoint))
    texts = ["今天" * 20, "今天", "天气" * 9]
    work, label, labels = (_classified, "好", ["好"]) if kind == "classify" else (_tagged, [], ["O"])
    with pytest.warns(TruncationWarning, match="2 of 3 texts were cut at 16 tokens"):
        found = work(tokenizer, [(text, label) for text in texts], labels, 16)
    assert [len(ids) for ids in found["input_ids"]] == [16, 4, 16]
    work(tokenizer, [("今天", label)], labels, 16)


@pytest.mark.parametrize(("seconds", "faster"), [(0.5, True), (0.9, False), (2.0, False)])
def test_bfloat16_is_used_where_it_is_faster_and_not_where_the_flags_name_it(monkeypatch, seconds, faster):
    def measured(function, rows, weights):
        assert rows.dtype == weights.dtype
        assert function(rows, weights).shape == (2048, 1536)
        return seconds if str(rows.dtype) == "torch.bfloat16" else 1.0

    monkeypatch.setattr(training, "_least_seconds", measured)
    assert training.bf16_is_faster() is faster


def test_the_least_of_several_times_is_taken():
    calls = []
    assert training._least_seconds(calls.append, 1) < 1
    assert len(calls) == training.BF16_TRIALS
