"""The window cut gives the ids of full tokenization then truncation, at a bounded price."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qingyu.runtime.tokenizer import Tokenizer
from qingyu.runtime.windows import LIMIT, SPACES, WORD, condense, encode_head, rules_for

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# What has been a trap for one tokenizer or the other, each alone or many times over.
FRAGMENTS = [
    *(
        "今天天气真好",
        "中",
        "人民共和国",
        "习近平新时代中国特色社会主义思想",
        "𠮷",
        "㐀㐁",
        "\U00030000",
        "豈",
        "⼀",
    ),
    *(
        " ",
        "\n",
        "\t",
        "\r",
        "\r\n",
        "\u3000",
        "\xa0",
        "\u2028",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\xad",
        "\x85",
    ),
    *(
        "\0",
        "\x01",
        "\x0b",
        "\ufffd",
        "\U0010fffd",
        "abc",
        "The ",
        "iPhone15",
        "a",
        "3f9c0b",
        "é",
        "İ",
        "ß",
        "Σ",
    ),
    *(
        "e\u0301",
        "\u0301",
        "\u3099",
        "か\u3099",
        "ｶﾞ",
        "ＡＢ１",
        "！",
        "，",
        "。",
        "“",
        "!",
        "?",
        "[",
        "]",
        "<",
        ">",
    ),
    *(
        "=",
        "\u0338",
        "≠",
        "😀",
        "👨‍👩‍👧",
        "🇨🇳",
        "한국",
        "ᄒ",
        "ᅡ",
        "\u0600",
        "กิ",
        "々",
        "ﬁ",
        "²",
        "…",
        "......",
        "▁",
        "##a",
    ),
    *("[MASK]", "[SEP]", "[MASK", "MASK]", "<mask>", " <mask> ", "<s>", "</s>", "<unk>"),
]
TEXTS = st.lists(
    st.tuples(st.sampled_from(FRAGMENTS) | st.text(max_size=3), st.integers(1, 3) | st.integers(60, 140)),
    max_size=25,
).map(lambda pairs: "".join(fragment * times for fragment, times in pairs))


def wordpiece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = [*SPECIALS, *"中今天气真好。!?abc[]<", "##a", "##b", "the", "iphone", "##15", "mask", "abc"]
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.BertNormalizer(lowercase=False)]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finished(backend, "[MASK]")


def unigram():
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pieces = [
        *SPECIALS,
        "▁",
        *"中今天气真好人民国abcde0123",
        "▁中",
        "今天",
        "天天",
        "天气",
        "真好",
        "ab",
        "aaa",
        "人民",
    ]
    scored = [(piece, -1.0 - 0.37 * (n % 7)) for n, piece in enumerate([*pieces, "<mask>"])]
    backend = Tokenizer(models.Unigram(scored, unk_id=1, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return finished(backend, "<mask>", lstrip=True)


def finished(backend, mask, *, lstrip=False):
    from tokenizers import AddedToken, processors

    backend.add_special_tokens(
        [*SPECIALS[:4], AddedToken(mask, lstrip=lstrip, normalized=False, special=True)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


@pytest.fixture(scope="module")
def backends():
    return {"wordpiece": wordpiece(), "unigram": unigram()}


def windowed(backend, text, max_tokens, window, run):
    tokenizer = Tokenizer(backend, max_tokens=max_tokens, window=window)
    rules = rules_for(backend, run=run)
    assert rules is not None
    vars(tokenizer)["_rules"] = rules
    return tokenizer.encode([text])[0]


def assert_as_if_whole(backend, text, max_tokens, window, run):
    whole, bare = backend.encode(text).ids, backend.encode(text, add_special_tokens=False).ids
    got = windowed(backend, text, max_tokens, window, run)
    assert got.ids.tolist() == [whole[0], *bare[: max_tokens - 2], whole[-1]]
    assert got.truncated == (len(whole) > max_tokens)


CASE = (TEXTS, st.integers(3, 24), st.integers(1, 90), st.sampled_from([2, 3, 8, 64]))
QUICK = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
@QUICK
@given(*CASE)
@example("<mask>\u0338" + "iPhone15" * 15 + " 中", 16, 1, 2)
@example("abc  \0 <mask> abc", 8, 1, 2)
def test_windows_give_the_ids_of_full_tokenization_then_truncation(backends, kind, text, tokens, window, run):
    assert_as_if_whole(backends[kind], text, tokens, window, run)


def effective(folder, *, lowercase, nfkc):
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    steps = [normalizers.NFKC()] if nfkc else []
    steps += [normalizers.Lowercase()] if lowercase else []
    backend.normalizer = normalizers.Sequence([*steps, backend.normalizer])
    return backend


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "NFKC"])
def real_wordpiece(request, shared_models):
    return effective(shared_models / "bge-small-zh-v1.5", lowercase=True, nfkc=request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "NFKC"])
def real_unigram(request, shared_models):
    return effective(shared_models / "multilingual-e5-small-zh", lowercase=False, nfkc=request.param)


@QUICK
@given(*CASE)
@example("<mask>\u0338" + "iPhone15" * 15 + " 中", 16, 1, 2)
def test_windows_of_the_bge_tokenizer_change_no_id(real_wordpiece, text, tokens, window, run):
    assert_as_if_whole(real_wordpiece, text, tokens, window, run)


@QUICK
@given(*CASE)
def test_windows_of_the_e5_tokenizer_change_no_id(real_unigram, text, tokens, window, run):
    assert_as_if_whole(real_unigram, text, tokens, window, run)


@given(TEXTS, st.integers(0, 40), st.integers(0, 400), st.integers(2, 9))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_every_position_of_a_shortened_window_leads_back_to_its_character(backends, text, start, size, run):
    start = min(start, len(text))
    view = condense(text, start, min(start + size, len(text)), rules_for(backends["wordpiece"], run=run))
    origins = [view.origin(position) for position in range(len(view.text))]
    assert "".join(text[origin] for origin in origins) == view.text
    assert origins == sorted(set(origins))
    assert view.origin(len(view.text)) == view.stop


def expanded(character_class):
    characters = []
    left = list(character_class)
    while left:
        first = left.pop(0)
        last = first
        if left and left[0] == "-":
            last = left[1]
            left = left[2:]
        characters += map(chr, range(ord(first), ord(last) + 1))
    return characters


@pytest.mark.parametrize("case", [False, True])
@pytest.mark.parametrize("form", [None, "NFKC"])
def test_a_long_run_of_letters_is_one_word_for_bert_however_it_normalizes(case, form):
    # Shortening takes this for granted of every character in WORD.
    from tokenizers import normalizers, pre_tokenizers

    steps = [normalizers.NFKC()] if form else []
    normalizer = normalizers.Sequence([*steps, normalizers.BertNormalizer(lowercase=case)])
    characters = expanded(WORD)
    assert len(characters) > 11_000
    for character in characters:
        [(word, _)] = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(
            normalizer.normalize_str(character * 9)
        )
        assert len(word) >= 9


def test_only_the_needed_start_of_a_text_is_tokenized(backends):
    seen: list[int] = []
    backend = backends["wordpiece"]

    def encode(text):
        seen.append(len(text))
        return backend.encode(text, add_special_tokens=False)

    head = encode_head("今天天气真好。" * 10_000, 100, encode, rules_for(backend), 70)
    assert sum(len(part.encoding) for part in head.parts) >= 100
    assert sum(seen) < 150
    assert not head.limited


def test_a_run_without_a_safe_cut_ends_the_text_at_the_limit_and_says_so(backends):
    rare = "\U00030000\U00030001" * LIMIT
    for backend in backends.values():
        got = windowed(backend, rare, 16, 64, 64)
        assert got.truncated
        assert got.unknown >= 1


def test_tokenizers_whose_cuts_are_not_known_to_be_safe_are_left_whole():
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    refused = [
        Tokenizer(models.BPE()),
        wordpiece(),
        wordpiece(),
        wordpiece(),
        unigram(),
        unigram(),
        unigram(),
    ]
    refused[1].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    refused[2].add_tokens([AddedToken("今天", normalized=True)])
    refused[3].add_tokens([AddedToken("ab", normalized=False, single_word=True)])
    refused[4].normalizer = normalizers.Replace(Regex("中.*文"), "x")
    refused[5].pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    refused[6].add_special_tokens([AddedToken("<end>", normalized=False, rstrip=True)])
    assert [rules_for(backend) for backend in refused] == [None] * len(refused)
    whole = Tokenizer_of(refused[2], 8).encode(["今天" * 3000])[0]
    assert (len(whole.ids), whole.truncated) == (8, True)


def Tokenizer_of(backend, max_tokens):  # noqa: N802 - beside the class of `tokenizers` of the same name
    return Tokenizer(backend, max_tokens=max_tokens)


def test_spaces_are_spaces_for_python_too():
    assert SPACES.isspace()


COST = """
import json, sys, time
from pathlib import Path
from qingyu.runtime.tokenizer import Tokenizer

def memory(name):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(name)) / 1024

pieces = {"chinese": ("今天天气真好，我们去公园散步。", 10_000_000 // 45), "letters": ("a", 10_000_000),
          "spaces": (" ", 10_000_000), "newlines": ("\\n", 10_000_000), "NUL": ("\\0", 10_000_000),
          "english": ("the quick brown fox jumps over ", 322_580), "hex": ("3f9c0b7e1d24a85", 666_666)}
piece, times = pieces[sys.argv[2]]
text = piece * times
best, grown = [], []
for _ in range(3):
    # A new tokenizer each time, so that what the first long text builds is counted.
    tokenizer = Tokenizer.from_file(Path(sys.argv[1]), max_tokens=512)
    tokenizer.encode(["中文"])
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = memory("VmRSS")
    # Processor time: one thread does it all, so this is what it takes on a machine with nothing else to do.
    start = time.process_time()
    [encoded] = tokenizer.encode([text])
    best.append(time.process_time() - start)
    grown.append(memory("VmHWM") - before)
print(json.dumps({"ms": 1000 * min(best), "MB": max(grown), "tokens": len(encoded.ids)}))
"""


def cost(path, text):
    command = [sys.executable, "-c", COST, str(path), text]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def files(shared_models, tmp_path_factory):
    bge = tmp_path_factory.mktemp("bge") / "tokenizer.json"
    effective(shared_models / "bge-small-zh-v1.5", lowercase=True, nfkc=False).save(str(bge))
    return {"bge": bge, "e5": shared_models / "multilingual-e5-small-zh" / "tokenizer.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to measure the peak of memory")
@pytest.mark.parametrize("model", ["bge", "e5"])
def test_ten_megabytes_of_chinese_take_50_ms_and_32_megabytes_at_most(files, model):
    measured = cost(files[model], "chinese")
    assert measured["tokens"] == 512
    assert measured["ms"] <= 50
    assert measured["MB"] <= 32


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to measure the peak of memory")
@pytest.mark.parametrize("text", ["letters", "spaces", "newlines", "NUL", "english", "hex"])
@pytest.mark.parametrize("model", ["bge", "e5"])
def test_ten_megabytes_of_anything_take_32_megabytes_at_most(files, model, text):
    assert cost(files[model], text)["MB"] <= 32
