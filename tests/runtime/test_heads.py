"""Classifying, reranking, tagging and answering on tiny real models: equality with transformers, spans, refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import qingyu
from qingyu import Classifier, QuestionAnswerer, Reranker, TokenClassifier
from qingyu.errors import InvalidOptionError, InvalidTextError, TextTooLongError, UnsupportedModelError
from qingyu.runtime.task import Report
from qingyu.runtime.token_classifier import TaggedToken, grouped
from qingyu.runtime.tokenizer import longest_first

TEXTS = ["今天天气真好", "怎么修改登录密码", "人工智能正在改变医疗、教育和交通。" * 2, "a", ""]
PAIRS = [
    ("今天天气真好", "外面阳光明媚"),
    ("怎么修改登录密码", "忘记登录密码怎么办" * 9),
    ("人工智能正在改变医疗、教育和交通。" * 5, "今天"),
    ("今天" * 40, "明天" * 41),
    ("", "今天"),
]
PEOPLE = ["O", "B-人", "I-人", "B-地", "I-地"]


@pytest.fixture(scope="module")
def transformers():
    torch = pytest.importorskip("torch", reason="compares with transformers")
    torch.set_num_threads(1)
    return pytest.importorskip("transformers", reason="compares with transformers")


def pipeline(transformers, task: str, folder):
    return transformers.pipeline(task, model=str(folder), tokenizer=str(folder))


@pytest.mark.parametrize("config", [{}, {"problem_type": "multi_label_classification"}], ids=["one", "many"])
def test_labels_and_scores_are_those_of_the_pipeline(transformers, head_checkpoint, head_model, config):
    labels = ["好", "坏", "不知道"]
    pipe = pipeline(transformers, "text-classification", head_checkpoint("classification", labels, **config))
    with Classifier.open(head_model("classification", labels, **config)) as model:
        pairs = PAIRS[:4]  # an empty first text of a pair is another matter in the pipeline
        for found in model.classify([*TEXTS, *pairs]):
            text = found.text
            given = text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
            wanted = pipe(given, top_k=None, truncation=True, max_length=64)
            assert [one.label for one in found.labels] == [one["label"] for one in wanted]
            scores = [one["score"] for one in wanted]
            assert [one.score for one in found.labels] == pytest.approx(scores, abs=1e-5)
            assert found.best == found.labels[0]


def test_pairs_are_encoded_as_the_reference_does_it(transformers, head_checkpoint, head_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(head_checkpoint("classification")))
    with Classifier.open(head_model("classification")) as model:
        random = np.random.default_rng(0)
        pairs = PAIRS + [("今" * a, "天" * b) for a, b in random.integers(0, 90, (60, 2)).tolist()]
        for pair, found in zip(pairs, model._tokenizer.encode_pairs(pairs), strict=True):
            # In lists: alone, the reference takes an empty second text for none at all.
            lists = [pair[0]], [pair[1]]
            wanted = tokenizer(*lists, truncation="longest_first", max_length=64)
            assert found.ids.tolist() == wanted["input_ids"][0]
            assert found.types.tolist() == wanted["token_type_ids"][0]
            whole = tokenizer(*lists, verbose=False)["input_ids"][0]
            assert found.truncated == (len(whole) > 64)
            assert found.dropped == max(0, len(whole) - 64), "one character a token"


@pytest.mark.parametrize("room", [7, 8])
def test_the_longer_text_is_cut_first(room):
    for first in range(12):
        for second in range(12):
            a, b = longest_first(first, second, room)
            assert a <= first
            assert b <= second
            assert a + b <= room or (a, b) == (first, second)


def test_a_batch_of_texts_and_pairs_keeps_its_order_and_scores(head_model):
    with Classifier.open(head_model("classification")) as model:
        mixed = [*TEXTS, *PAIRS] * 20
        report = Report()
        together = model.classify(iter(mixed), report=report)
        assert [one.text for one in together] == mixed
        assert report.texts == len(mixed)
        assert report.truncated == 20 * 3
        for one in together[:10]:
            alone = model.classify([one.text])[0]
            assert [x.score for x in alone.labels] == pytest.approx([x.score for x in one.labels], abs=1e-6)


def test_documents_are_ranked_by_their_score_with_the_query(transformers, head_checkpoint, head_model):
    pipe = pipeline(transformers, "text-classification", head_checkpoint("reranking"))
    documents = ["股票大跌", "怎么修改登录密码", "忘记登录密码怎么办", "今天天气真好" * 20]
    with Reranker.open(head_model("reranking")) as model:
        ranked = model.rank("怎么改密码", documents)
        assert sorted(one.index for one in ranked) == [0, 1, 2, 3]
        assert all(one.text == documents[one.index] for one in ranked)
        assert [one.score for one in ranked] == sorted((one.score for one in ranked), reverse=True)
        for one in ranked:
            given = {"text": "怎么改密码", "text_pair": one.text}
            assert one.score == pytest.approx(pipe(given, truncation=True, max_length=64)["score"], abs=1e-5)
        assert model.rank("怎么改密码", documents, top_k=2) == ranked[:2]
        assert model.rank("怎么", []) == []
        assert model.score([]).shape == (0,)
        with pytest.raises(InvalidOptionError, match="top_k"):
            model.rank("怎么", documents, top_k=0)


def test_entities_are_those_of_the_pipeline_with_simple_aggregation(
    transformers, head_checkpoint, head_model
):
    folder = head_checkpoint("tagging", PEOPLE)
    simple = transformers.pipeline(
        "token-classification", model=str(folder), tokenizer=str(folder), aggregation_strategy="simple"
    )
    plain = pipeline(transformers, "token-classification", folder)
    texts = ["我们在北京的公司 abc12 学习", "今天  天气真好，外面阳光明媚。", "上海城市"]
    with TokenClassifier.open(head_model("tagging", PEOPLE)) as model:
        for found in model.tag(texts):
            wanted = simple(found.text)
            spans = [(one.label, one.start, one.end) for one in found.entities]
            assert spans == [(one["entity_group"], one["start"], one["end"]) for one in wanted]
            scores = [one["score"] for one in wanted]
            assert [one.score for one in found.entities] == pytest.approx(scores, abs=1e-5)
            assert all(found.text[one.start : one.end] == one.text for one in found.entities)
            tokens = [one for one in found.tokens if one.label != "O"]
            assert [(t.label, t.start, t.end) for t in tokens] == [
                (one["entity"], one["start"], one["end"]) for one in plain(found.text)
            ]
        assert any(found.entities for found in model.tag(texts)), "random labels, but some are entities"
        assert model.tag("")[0].entities == ()


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ("B-X I-X O B-X", ["X:0-2", "X:3-4"]),
        ("B-X B-X I-X", ["X:0-1", "X:1-3"]),
        ("I-X I-X I-Y", ["X:0-2", "Y:2-3"]),
        ("B-X I-X E-X S-X", ["X:0-3", "X:3-4"]),
        ("B-X E-X I-X O", ["X:0-2", "X:2-3"]),
        ("B_X M_X E_X O", ["X:0-3"]),
        ("B-X L-X U-X U-X", ["X:0-2", "X:2-3", "X:3-4"]),
        ("LOC LOC O PER", ["LOC:0-2", "PER:3-4"]),
        ("O O", []),
    ],
)
def test_labels_of_every_scheme_are_grouped(labels, wanted):
    text = "甲乙丙丁"
    tokens = [TaggedToken(text[n], label, 1.0, n, n + 1) for n, label in enumerate(labels.split())]
    found = list(grouped(text, tokens))
    assert [f"{one.label}:{one.start}-{one.end}" for one in found] == wanted
    assert all(one.text == text[one.start : one.end] for one in found)


def reference_answers(network, tokenizer, question: str, context: str, top_k: int, longest: int):
    """transformers 4's pipeline in short: (text, score) by torch over the tokenizer's own overlapping windows."""
    import torch

    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=64,
        stride=min(128, 64 // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found: dict[str, float] = {}
    for n in range(len(encoded["input_ids"])):
        row = encoded[n]
        with torch.no_grad():
            out = network(input_ids=torch.tensor([row.ids]), token_type_ids=torch.tensor([row.type_ids]))
        keep = np.array([i == 0 or s == 1 for i, s in enumerate(row.sequence_ids)])
        shares = []
        for logits in (out.start_logits[0], out.end_logits[0]):
            masked = np.where(keep, logits.double().numpy(), -10000.0)
            shares.append(np.exp(masked - masked.max()) / np.exp(masked - masked.max()).sum())
        start, end = shares
        start[0] = end[0] = 0
        table = np.tril(np.triu(np.outer(start, end)), longest - 1)
        for place in np.argsort(-table, axis=None)[: 2 * top_k + 10]:
            s, e = divmod(int(place), len(end))
            if table[s, e] > 0:
                text = context[row.offsets[s][0] : row.offsets[e][1]]
                found[text] = found.get(text, 0.0) + float(table[s, e])
    return sorted(found.items(), key=lambda one: -one[1])[:top_k]


@pytest.mark.parametrize("longest", [1, 5, 15])
def test_answers_are_those_of_the_reference_also_over_several_windows(
    transformers, head_checkpoint, head_model, longest
):
    folder = str(head_checkpoint("question-answering"))
    network = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    long = "".join(np.random.default_rng(1).choice(list("今天气真好外面阳光明媚股票大跌怎么修改"), 150))
    with QuestionAnswerer.open(head_model("question-answering")) as model:
        for context in ("忘记了密码会怎么办", "今天天气真好，外面阳光明媚。", long):
            found = model.answer("怎么修改密码", context, top_k=3, max_answer_tokens=longest)
            wanted = reference_answers(network, tokenizer, "怎么修改密码", context, 3, longest)
            assert [one.text for one in found] == [text for text, _ in wanted]
            assert [one.score for one in found] == pytest.approx([score for _, score in wanted], abs=1e-5)
            assert all(context[one.start : one.end] == one.text for one in found)
            assert all(len(one.text) <= longest for one in found)


def test_an_answer_covers_whole_words_and_may_be_none(head_model):
    with QuestionAnswerer.open(head_model("question-answering")) as model:
        for one in model.answer("今天", "abcdef 天气 xyz12", top_k=10):
            assert one.text.strip(" ") == one.text
            assert {*one.text.split(" ")} <= {"abcdef", "天", "气", "天气", "xyz12"}
        answers = model.answer("今天", "天气", top_k=10, allow_none=True)
        assert [one for one in answers if (one.text, one.start, one.end) == ("", 0, 0)]
        assert model.answer("今天", "") == ()


def test_questions_and_pairs_that_make_no_sense_are_refused(head_model):
    with QuestionAnswerer.open(head_model("question-answering")) as model:
        with pytest.raises(TextTooLongError, match="question 0 is too long"):
            model.answer("今天" * 31, "天气")
        with pytest.raises(InvalidOptionError, match="top_k"):
            model.answer("今天", "天气", top_k=0)
        with pytest.raises(InvalidTextError, match="pair 1 is no pair"):
            list(model.answer_stream([("今天", "天气"), "今天"]))
    with Classifier.open(head_model("classification")) as model:
        with pytest.raises(InvalidTextError, match="text 1 is no pair"):
            model.classify(["今", ("今", "天", "气")])
        with pytest.raises(InvalidTextError, match="the second text of pair 0 is not text"):
            model.classify([("今", None)])


TASKS = {
    "embedding": "Embedder",
    "fill-mask": "FillMask",
    "classification": "Classifier",
    "tagging": "TokenClassifier",
    "question-answering": "QuestionAnswerer",
    "reranking": "Reranker",
}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "embedding"])
def test_each_class_opens_its_own_task_only_and_can_be_pickled(head_model, tiny_model, task):
    folder = head_model(task)
    with getattr(qingyu, TASKS[task]).open(folder) as model:
        assert repr(pickle.loads(pickle.dumps(model))) == repr(model)
    for other, name in TASKS.items():
        if other != task:
            with pytest.raises(UnsupportedModelError, match=f"found the task {task}.*{TASKS[task]}"):
                getattr(qingyu, name).open(folder)
