"""The front end gives the ids of the reference: transformers' tokenizers, with sentence-transformers' lower-casing."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest

from qingyu.runtime.tokenizer import Tokenizer

MODELS = ("bert-base-chinese", "bge-small-zh-v1.5", "multilingual-e5-small-zh")

# Blocks whose assigned characters are Han characters, their parts or their compatibility forms.
HAN_BLOCKS = (
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B), (0x31C0, 0x31E3)),
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAD9), (0x20000, 0x2A6DF), (0x2A700, 0x2B739)),
    *((0x2B740, 0x2B81D), (0x2B820, 0x2CEA1), (0x2CEB0, 0x2EBE0), (0x2EBF0, 0x2EE5D), (0x2F800, 0x2FA1D)),
    *((0x30000, 0x3134A), (0x31350, 0x323AF)),
)
HAN = [chr(number) for first, last in HAN_BLOCKS for number in range(first, last + 1)]

# tokenizers writes 0x2B920 where BERT's own code has 0x2B820 (huggingface/tokenizers#2395), so these 256
# characters at the start of Extension E are not set apart from their neighbours. transformers' fast
# tokenizers, which made the published vectors, have it too.
GLUED_TO_NEIGHBOURS = [chr(number) for number in range(0x2B820, 0x2B920)]

WRITINGS = [
    "",
    " ",
    "\0",
    "\0\x01中\x7f文",
    "iPhone15 Pro 和 ＩＰＨＯＮＥ",
    "ＡＢＣ１２３，。！",
    "İstanbul ΣΊΣΥΦΟΣ straße",
    "[MASK]是[SEP]中国[CLS]的[PAD]首都[UNK]",
    "[mask] [Mask] ［MASK］ <mask> <s>x</s>",
    "  两边  空格\n\n换行\t制表\u3000全角  ",
    "👨‍👩‍👧‍👦家庭🇨🇳",
    "e\u0301 か\u3099 ｶﾞ ﬁ ㈱ ⼀ 豈",
    "\ufeff零\u200b宽\u200d连\u00ad字",
    "\ue000私用\U0010fffd",
    "a" * 101,
    "一" * 600,
]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, shared_models, tmp_path_factory):
    """A model's reference backend with specials and no truncation, and ours from the effective file."""
    transformers = pytest.importorskip("transformers")
    folder = shared_models / request.param
    reference = transformers.AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = folder / "sentence_bert_config.json"
    if settings.is_file() and json.loads(settings.read_text("utf-8"))["do_lower_case"]:
        from tokenizers import normalizers

        # As sentence_transformers.models.Transformer does it.
        reference.normalizer = normalizers.Sequence([normalizers.Lowercase(), reference.normalizer])
        steps = [{"type": "Lowercase"}, document["normalizer"]]
        document["normalizer"] = {"type": "Sequence", "normalizers": steps}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(document), "utf-8")
    reference.no_truncation()
    reference.no_padding()
    return reference, Tokenizer.from_file(path, max_tokens=512)


def differing(pair, texts):
    reference, ours = pair
    reference.enable_truncation(ours.max_tokens)
    encoded = ours.encode(texts)
    wrong = [t for t, e in zip(texts, encoded, strict=True) if e.ids.tolist() != reference.encode(t).ids]
    reference.no_truncation()
    return wrong


def test_every_han_character_alone_and_between_letters_has_the_ids_of_the_reference(pair):
    assert len(HAN) > 97_000
    assert differing(pair, [text for c in HAN for text in (c, f"a{c}b")]) == []


def test_random_strings_over_all_planes_have_the_ids_of_the_reference(pair):
    draw = random.Random(20240501)
    # Half of the draws from where characters are dense, half from anywhere.
    dense = [*range(0x20, 0x7F), *range(0xA0, 0x3100), *range(0x4E00, 0x5E00), *range(0xFE00, 0xFFF0)]
    planes = [*range(0xD800), *range(0xE000, 0x110000)]
    strings = []
    for _ in range(100_000):
        pool = draw.choice((dense, planes))
        strings.append("".join(map(chr, draw.choices(pool, k=draw.randrange(1, 16)))))
    assert differing(pair, strings) == []


def test_case_width_blanks_specials_and_controls_have_the_ids_of_the_reference(pair):
    assert differing(pair, WRITINGS) == []


def test_real_texts_have_the_ids_of_the_reference(pair, shared_data):
    lines = (shared_data / "sts-b-zh" / "dev.tsv").read_text("utf-8").splitlines()
    assert differing(pair, [line.split("\t")[0] for line in lines]) == []


def test_long_texts_have_the_ids_of_the_reference_truncated(pair, shared_data):
    with (shared_data / "cmrc2018" / "corpus.jsonl").open(encoding="utf-8") as stream:
        passages = [json.loads(next(stream))["text"] for _ in range(60)]
    texts = [*passages, "".join(passages), "\n".join(passages), " ".join(passages).upper()]
    assert differing(pair, texts) == []
    reference, ours = pair
    for text, encoded in zip(texts, ours.encode(texts), strict=True):
        assert encoded.truncated == (len(reference.encode(text).ids) > ours.max_tokens)


def test_a_prompt_is_text_put_before_the_text(pair):
    reference, ours = pair
    got = ours.encode(["你好", ""], prompt="query: ")
    assert [e.ids.tolist() for e in got] == [
        reference.encode("query: 你好").ids,
        reference.encode("query: ").ids,
    ]


def test_offsets_of_han_text_reproduce_the_tokens(pair):
    _, ours = pair
    text = "今天天气真好我们去公园。" * 200
    tokenized = ours.tokenize(text, prompt="为这个句子")
    assert tokenized.truncated
    assert tokenized.ids == tuple(ours.encode([text], prompt="为这个句子")[0].ids)
    inside = [row for row in zip(tokenized.tokens, tokenized.offsets, strict=True) if row[1] != (0, 0)]
    assert len(inside) > 490
    assert [token for token, _ in inside] == [text[start:end] for _, (start, end) in inside]
    assert [start for _, (start, _) in inside[1:]] == [end for _, (_, end) in inside[:-1]]


def test_the_differences_from_berts_own_code_are_a_typo_in_a_range_and_nfc(shared_models, pair, request):
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("4."):
        pytest.skip("transformers 5 has no tokenizer in Python to compare with")
    if "bert-base-chinese" not in request.node.name:
        pytest.skip("one model is enough: the vocabularies are the same")
    vocabulary = shared_models / "bert-base-chinese" / "vocab.txt"
    original = transformers.BertTokenizer(str(vocabulary), do_lower_case=False)
    _, ours = pair
    # A Python older than a character drops it. Every 8th of the others: the original takes 0.2 ms each.
    assigned = [c for c in HAN if unicodedata.category(c) != "Cn"]
    characters = sorted({*assigned[::8], *GLUED_TO_NEIGHBOURS, *map(chr, range(0x2B91F, 0x2BA00))})
    encoded = ours.encode([f"a{c}b" for c in characters])
    different = [
        c for c, e in zip(characters, encoded, strict=True) if original.encode(f"a{c}b") != e.ids.tolist()
    ]
    # transformers' Python code also composes (NFC) first, which Google's and the fast tokenizers do not.
    composed = [c for c in different if unicodedata.normalize("NFC", c) != c]
    assert [c for c in different if c not in composed] == GLUED_TO_NEIGHBOURS
    assert all("CJK COMPATIBILITY IDEOGRAPH" in unicodedata.name(c) for c in composed)
    assert np.array_equal(ours.encode(["a\U0002b820b"])[0].ids, [101, ours.unknown_id, 102])
