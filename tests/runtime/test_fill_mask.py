"""Fill-mask on a tiny real model: equality with transformers, candidates, batches, refusals."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from qingyu import Embedder, FillMask
from qingyu.errors import (
    ClosedError,
    DataFileError,
    InvalidOptionError,
    InvalidTextError,
    TextTooLongError,
    UnsupportedModelError,
)
from qingyu.runtime.fill_mask import check_golden
from qingyu.runtime.task import Report

TEXTS = [
    "今天[MASK]气真好",
    "[MASK]国的城市是[MASK]京[MASK]。",
    "人工智能正在改变医疗、教育和[MASK]通。" * 2,
    "[MASK]",
]


@pytest.fixture(scope="module")
def folder(head_model):
    return head_model("fill-mask")


@pytest.fixture(scope="module")
def model(folder):
    with FillMask.open(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(head_checkpoint):
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    torch.set_num_threads(1)
    checkpoint = str(head_checkpoint("fill-mask"))
    network = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint).eval()
    return network, transformers.AutoTokenizer.from_pretrained(checkpoint)


def logs(reference, ids: list[int]) -> np.ndarray:
    """Log-probabilities (tokens, vocabulary) of one row by torch."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(reference[0](torch.tensor([ids])).logits[0].double(), -1).numpy()


def test_the_words_and_scores_are_those_of_the_pipeline(model, reference):
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline("fill-mask", model=reference[0], tokenizer=reference[1])
    for filled in model.fill(TEXTS, top_k=7):
        wanted = pipe(filled.text, top_k=7)
        wanted = [wanted] if isinstance(wanted[0], dict) else wanted
        assert len(filled.masks) == len(wanted) == filled.text.count("[MASK]")
        for own, theirs in zip(filled.masks, wanted, strict=True):
            assert [one.id for one in own] == [one["token"] for one in theirs]
            assert [one.token for one in own] == [one["token_str"] for one in theirs]
            assert [one.score for one in own] == pytest.approx([one["score"] for one in theirs], abs=1e-5)


def test_a_prediction_stands_in_the_place_of_its_own_mask(model):
    first, second, third = model.fill("[MASK]国的城市是[MASK]京[MASK]。", top_k=1)[0].masks
    word = [one[0].token.removeprefix("##") for one in (first, second, third)]
    assert first[0].text == f"{word[0]}国的城市是[MASK]京[MASK]。"
    assert second[0].text == f"[MASK]国的城市是{word[1]}京[MASK]。"
    assert third[0].text == f"[MASK]国的城市是[MASK]京{word[2]}。"


def test_a_batch_gives_what_each_text_gives_alone_in_the_order_given(model):
    texts = [f"{'今天' * (n % 9)}[MASK]气{'真好' * (n % 5)}" for n in range(150)]
    for text, filled in zip(texts, model.fill(iter(texts), top_k=3), strict=True):
        alone = model.fill(text, top_k=3)[0]
        assert filled.text == text
        for a, b in zip(filled.masks[0], alone.masks[0], strict=True):
            assert (a.id, a.score) == (b.id, pytest.approx(b.score, abs=1e-6))


def test_scores_of_the_whole_vocabulary_add_up_to_one(model):
    predictions = model.fill("今天[MASK]气", top_k=10_000)[0].masks[0]
    assert len(predictions) == model.spec.architecture.vocab_size
    assert sum(one.score for one in predictions) == pytest.approx(1)
    scores = [one.score for one in predictions]
    assert scores == sorted(scores, reverse=True)


def test_candidates_of_one_token_are_ranked_by_their_probability(model):
    everything = {one.id: one.score for one in model.fill("今天[MASK]气", top_k=10_000)[0].masks[0]}
    ranked = model.fill("今天[MASK]气", candidates=["天", "国", "好", "天"])[0].masks[0]
    assert sorted(one.token for one in ranked) == ["国", "天", "好"]
    assert [one.score for one in ranked] == pytest.approx([everything[one.id] for one in ranked])
    assert [one.score for one in ranked] == sorted((one.score for one in ranked), reverse=True)
    assert len(model.fill("今天[MASK]气", candidates=["天", "国", "好"], top_k=2)[0].masks[0]) == 2


def oracle(reference, text: list[str], scoring: str) -> float:
    """The score of a word in ``text`` (what is before it, itself, what is after it), by torch, row by row."""
    tokenizer = reference[1]
    whole = tokenizer("".join(text))["input_ids"]
    start = len(tokenizer(text[0])["input_ids"]) - 1
    stop = len(whole) - len(tokenizer(text[2])["input_ids"]) + 1
    found = []
    for place in range(start, stop):
        hidden = range(place, stop) if scoring == "left_to_right" else [place]
        masked = [tokenizer.mask_token_id if n in hidden else token for n, token in enumerate(whole)]
        found.append(logs(reference, masked)[place, whole[place]])
    return float(np.exp(np.mean(found) if scoring == "mean_pll" else np.sum(found)))


@pytest.mark.parametrize("scoring", ["left_to_right", "mean_pll", "pll"])
def test_candidates_of_any_length_have_the_scores_of_the_reference(model, reference, scoring):
    """The other mask of the text stays masked. Some words begin alike, and some differ in one token only."""
    words = ["中国", "中国人", "上海市", "上海", "我", "a1b", "国国"]
    ranked = model.fill("[MASK]的城市是[MASK]。", candidates=words, top_k=9, scoring=scoring)[0].masks
    for mask, predictions in enumerate(ranked):
        assert {one.token for one in predictions} == set(words)
        around = ("", "的城市是[MASK]。") if mask == 0 else ("[MASK]的城市是", "。")
        wanted = [oracle(reference, [around[0], one.token, around[1]], scoring) for one in predictions]
        assert [one.score for one in predictions] == pytest.approx(wanted, rel=1e-4)
        assert wanted == sorted(wanted, reverse=True)


def test_scores_from_left_to_right_are_shares_of_one_probability(model):
    """All words of two tokens that begin with one share what that beginning has: by that they add up to 1."""
    first = {one.token: one.score for one in model.fill("今天[MASK][MASK]气", top_k=10_000)[0].masks[0]}
    second = {one.token: one.score for one in model.fill("今天中[MASK]气", top_k=10_000)[0].masks[0]}
    han = [token for token in second if len(token) == 1 and "一" <= token <= "鿿"]
    assert len(han) > 100
    ranked = model.fill("今天[MASK]气", candidates=["中" + c for c in han], top_k=10_000)[0].masks[0]
    scores = {one.token: one.score for one in ranked}
    assert scores == {"中" + c: pytest.approx(first["中"] * second[c], rel=1e-5) for c in han}
    everything = first["中"] * sum(second.values())
    assert sum(scores.values()) < everything == pytest.approx(first["中"])


def test_candidates_share_the_rows_that_their_scores_have_in_common(model):
    words = ["中国", "中京", "上海", "国京", "我", "你"]

    def rows(scoring):
        return len(model.prepare(["[MASK]的"], candidates=words, scoring=scoring).rows)

    assert rows("left_to_right") == 1 + 1 + 3  # the short ones; both masked; behind 中, behind 上, behind 国
    assert rows("pll") == 1 + 6  # of eight: 中 stands before two of the words, 京 behind two


def test_a_scoring_that_does_not_exist_is_refused(model):
    with pytest.raises(
        InvalidOptionError, match="scoring: expected 'left_to_right', 'mean_pll', 'pll', found 'sum'"
    ):
        model.fill("今天[MASK]", candidates=["气"], scoring="sum")


def test_the_pseudo_log_likelihood_is_that_of_each_token_masked_in_turn(model, reference):
    tokenizer = reference[1]
    texts = ["今天天气真好", "中", ""]
    wanted = []
    for text in texts:
        whole, total = tokenizer(text)["input_ids"], 0.0
        for place in range(1, len(whole) - 1):
            masked = [*whole[:place], tokenizer.mask_token_id, *whole[place + 1 :]]
            total += logs(reference, masked)[place, whole[place]]
        wanted.append(total)
    assert model.pseudo_log_likelihood(texts) == pytest.approx(wanted, abs=1e-4)
    a_token = [wanted[0] / 6, wanted[1], 0.0]
    assert model.pseudo_log_likelihood(texts, per_token=True) == pytest.approx(a_token, abs=1e-4)
    assert model.pseudo_log_likelihood([]).shape == (0,)


def test_the_head_gives_a_row_for_each_mask_and_not_for_each_token(model):
    """Which is why its cost falls with the number of masks."""
    from qingyu.runtime.engine import TokenBatch

    rows = [np.arange(5, 45), np.arange(5, 15)]
    one = model.mask_logits(TokenBatch.pad(rows, 0, chosen=[[3], []]))
    two = model.mask_logits(TokenBatch.pad(rows, 0, chosen=[[3], [7, 8]]))
    assert (len(one), len(two)) == (1, 3)
    assert np.allclose(one[0], two[0], atol=1e-6)
    alone = model.mask_logits(TokenBatch.pad(rows[1:], 0, chosen=[[8]]))
    assert np.allclose(two[2], alone[0], atol=1e-5)


def test_a_text_without_a_mask_is_refused(model):
    with pytest.raises(InvalidTextError, match=r"text 1 has no \[MASK\]: expected \[MASK\] in the place"):
        model.fill(["今天[MASK]", "今天天气"])
    with pytest.raises(InvalidTextError, match="text 0 is not text"):
        model.fill([b"[MASK]"])


def test_a_mask_that_the_model_does_not_read_is_refused(model):
    with pytest.raises(TextTooLongError, match=r"has a \[MASK\] beyond .* found 1 of 2 there"):
        model.fill("[MASK]" + "今天" * 40 + "[MASK]")
    report = Report()
    assert len(model.fill("[MASK]" + "今天" * 40, report=report)[0].masks) == 1
    assert (report.texts, report.truncated) == (1, 1), "cut behind the mask is counted"
    assert report.cut == [(0, 81 - 62)]
    pushed = Report()
    model.fill("[MASK]" + "今" * 61, candidates=["中国人", "我"], report=pushed)
    assert pushed.cut == [(0, 2)], "what a candidate of three tokens pushes out is counted"
    with pytest.raises(TextTooLongError, match="candidate '中国' does not fit"):
        model.fill("今" * 61 + "[MASK]", candidates=["中国"])


@pytest.mark.parametrize("candidates", [[], "今天", ["龘"], ["今", "今龘"], [""], ["[MASK]"]])
def test_candidates_that_cannot_be_ranked_are_refused(model, candidates):
    with pytest.raises(InvalidOptionError, match="candidate"):
        model.fill("今天[MASK]", candidates=candidates)


@pytest.mark.parametrize("candidate", ["\ud800", "今\ud800", 3, None, b"x"])
def test_candidates_that_are_no_text_are_refused(model, candidate):
    with pytest.raises(InvalidTextError, match=r"candidate .* is not (Unicode )?text: expected"):
        model.fill("今天[MASK]", candidates=["气", candidate])


@pytest.mark.parametrize("top_k", [0, -1, True, 2.5])
def test_a_top_k_that_is_no_count_is_refused(model, top_k):
    with pytest.raises(InvalidOptionError, match="top_k"):
        model.fill("今天[MASK]", top_k=top_k)


def test_texts_for_a_likelihood_must_be_whole(model):
    with pytest.raises(InvalidTextError, match=r"text 0 has a \[MASK\]"):
        model.pseudo_log_likelihood("今天[MASK]")
    with pytest.raises(TextTooLongError, match="text 1 is too long"):
        model.pseudo_log_likelihood(["今", "今天" * 40])


def test_a_folder_of_another_task_is_one_clear_error(folder, tiny_model):
    with pytest.raises(
        UnsupportedModelError, match=r"task fill-mask, found the task embedding\. Open it with Embedder"
    ):
        FillMask.open(tiny_model)
    with pytest.raises(
        UnsupportedModelError, match=r"task embedding, found the task fill-mask\. Open it with FillMask"
    ):
        Embedder.open(folder)


def test_it_can_be_pickled_and_is_of_no_use_once_closed(folder):
    with FillMask.open(folder, threads=1) as first, pickle.loads(pickle.dumps(first)) as second:
        assert second.fill(TEXTS[0]) == first.fill(TEXTS[0])
    with pytest.raises(ClosedError):
        first.fill(TEXTS[0])


def golden_row(text: str, mask: int, predictions, shift: float = 0.0) -> str:
    best = [{"token": one.id, "score": one.score + shift, "token_str": one.token} for one in predictions]
    return json.dumps({"text": text, "mask_index": mask, "predictions": best}, ensure_ascii=False)


def test_published_results_are_checked_word_by_word(model, folder, tmp_path):
    text = TEXTS[1]
    masks = model.fill(text, top_k=3)[0].masks
    (tmp_path / "right.jsonl").write_text("\n".join(golden_row(text, n, m) for n, m in enumerate(masks)))
    found = check_golden(folder, tmp_path / "right.jsonl")
    assert (found.predictions, found.passed) == (9, True)
    assert found.worst < 1e-6
    (tmp_path / "wrong.jsonl").write_text(golden_row(text, 0, masks[0], shift=2e-4) + "\n")
    assert len(check_golden(folder, tmp_path / "wrong.jsonl").wrong) == 3
    (tmp_path / "swapped.jsonl").write_text(golden_row(text, 0, masks[0][::-1]))
    assert not check_golden(folder, tmp_path / "swapped.jsonl", tolerance=1.0).passed
    (tmp_path / "broken.jsonl").write_text('{"text": "今"}')
    with pytest.raises(DataFileError, match="line 1 is no fill-mask result"):
        check_golden(folder, tmp_path / "broken.jsonl")


def test_the_published_results_of_bert_base_chinese_can_be_read(shared_models):
    from qingyu.runtime.fill_mask import _golden, _lines, _parsed

    path = shared_models / "bert-base-chinese" / "golden" / "fill_mask.jsonl"
    rows = [_golden(_parsed(line, number, path), number, str(path)) for number, line in _lines(path)]
    assert len(rows) == 14
    assert all(row.text.count("[MASK]") > row.mask for row in rows)


@pytest.fixture(scope="module")
def base_checkpoint(shared_models, tmp_path_factory):
    """bert-base-chinese as it is in config, tokenizer and vocabulary, but two layers, and random weights."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    source, folder = shared_models / "bert-base-chinese", tmp_path_factory.mktemp("base") / "checkpoint"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    network = transformers.BertForMaskedLM(transformers.BertConfig(**{**config, "num_hidden_layers": 2}))
    network.eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_the_shape_of_bert_base_chinese_gives_the_words_of_the_pipeline(base_checkpoint, tmp_path):
    from qingyu.models.export import export

    transformers = pytest.importorskip("transformers")
    spec = export(base_checkpoint, tmp_path / "model")
    assert spec.task == "fill-mask"
    pipe = transformers.pipeline("fill-mask", model=str(base_checkpoint))
    with FillMask.open(tmp_path / "model", threads=1) as model:
        for filled in model.fill(["巴黎是[MASK]国的首都。", "美国的首都是[MASK][MASK][MASK]"]):
            wanted = pipe(filled.text)
            wanted = [wanted] if isinstance(wanted[0], dict) else wanted
            for own, theirs in zip(filled.masks, wanted, strict=True):
                assert [(one.id, one.token) for one in own] == [(w["token"], w["token_str"]) for w in theirs]
                assert [one.score for one in own] == pytest.approx([w["score"] for w in theirs], abs=1e-5)
