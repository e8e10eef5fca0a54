"""The front end on small tokenizers built here: results, refusals, hostile files, threads and forks."""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from qingyu.errors import InvalidOptionError, InvalidTextError, TokenizerError
from qingyu.runtime.tokenizer import FILE_LIMIT, Tokenizer, _converted

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def added(content, number, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **plain, **flags}


def special_piece(name):
    return {"SpecialToken": {"id": name, "type_id": 0}}


def text_piece(name):
    return {"Sequence": {"id": name, "type_id": 0}}


WORDPIECE = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [added(content, number) for number, content in enumerate(SPECIALS)],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Lowercase"},
            {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": False,
            },
        ],
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [special_piece("[CLS]"), text_piece("A"), special_piece("[SEP]")],
        "pair": [text_piece("A"), text_piece("B")],
        "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
            "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
        },
    },
    "decoder": None,
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {t: n for n, t in enumerate([*SPECIALS, *"中文今天气真好。a[]", "iphone", "##15", "mask"])},
    },
}
UNIGRAM = {
    **WORDPIECE,
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {
        "type": "Unigram",
        "unk_id": 1,
        "byte_fallback": False,
        "vocab": [[t, -1.0] for t in [*SPECIALS, "▁", "a", "中", "文", "中文", "今", "天"]],
    },
}


@pytest.fixture
def build(tmp_path):
    """A function from a tokenizer.json document, and changes to its top level, to a tokenizer."""

    def build(document=WORDPIECE, *, max_tokens=16, special_tokens="parse", unicode_form=None, **changes):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**document, **changes}), "utf-8")
        return Tokenizer.from_file(
            path, max_tokens=max_tokens, special_tokens=special_tokens, unicode_form=unicode_form
        )

    return build


def ids(tokenizer, text, **options):
    return tokenizer.encode([text], **options)[0].ids.tolist()


def test_ids_are_int64_between_the_special_tokens(build):
    [encoded] = build().encode(["今天 iPhone15"])
    assert encoded.ids.dtype == np.int64
    assert encoded.ids.tolist() == [2, 7, 8, 16, 17, 3]
    assert (encoded.unknown, encoded.truncated) == (0, False)


def test_no_texts_give_an_empty_list_and_an_empty_text_gives_the_special_tokens(build):
    assert build().encode([]) == []
    assert ids(build(), "") == [2, 3]
    assert ids(build(), "\0 \n\x01") == [2, 3]


def test_unknown_tokens_are_counted_among_the_ids_that_are_left(build):
    [encoded] = build(max_tokens=4).encode(["中鑫鑫鑫"])
    assert (encoded.ids.tolist(), encoded.unknown, encoded.truncated) == ([2, 5, 1, 3], 1, True)


def test_truncation_keeps_the_special_tokens_and_says_so_only_if_a_token_was_left_over(build):
    tokenizer = build(max_tokens=5)
    full, over, blank = tokenizer.encode(["中文中", "中文中文", "中文中" + " " * 5000])
    assert full.ids.tolist() == over.ids.tolist() == blank.ids.tolist() == [2, 5, 6, 5, 3]
    assert [full.truncated, over.truncated, blank.truncated] == [False, True, False]


def test_a_typed_mask_is_the_special_token_or_plain_text(build):
    assert ids(build(), "中[MASK]") == [2, 5, 4, 3]
    assert ids(build(special_tokens="text"), "中[MASK]") == [2, 5, 14, 18, 15, 3]


def test_nfkc_is_applied_only_when_asked_and_offsets_stay_those_of_the_text(build):
    assert ids(build(), "ＩＰＨＯＮＥ⑮") == [2, 1, 3]
    tokenizer = build(unicode_form="NFKC")
    assert ids(tokenizer, "ＩＰＨＯＮＥ⑮") == [2, 16, 17, 3]
    tokenized = tokenizer.tokenize("中ＩＰＨＯＮＥ⑮")
    assert tokenized.tokens == ("[CLS]", "中", "iphone", "##15", "[SEP]")
    assert tokenized.offsets == ((0, 0), (0, 1), (1, 7), (7, 8), (0, 0))


def test_the_prompt_is_joined_to_the_text_and_has_no_offsets_in_it(build):
    tokenizer = build()
    assert ids(tokenizer, "15中", prompt="今 iPhone") == ids(tokenizer, "今 iPhone15中")
    tokenized = tokenizer.tokenize("15中", prompt="今 iPhone")
    assert tokenized.tokens == ("[CLS]", "今", "iphone", "##15", "中", "[SEP]")
    assert tokenized.offsets == ((0, 0), (0, 0), (0, 0), (0, 2), (2, 3), (0, 0))
    assert tokenized.special == (True, False, False, False, False, True)


def test_offsets_point_into_a_long_text_past_shortened_runs(build):
    text = "中" + " " * 9000 + "文" + "a" * 8000 + "\0" * 7000 + "今" + "Iphone"
    tokenized = build().tokenize(text)
    assert tokenized.tokens == ("[CLS]", "中", "文", "[UNK]", "今", "iphone", "[SEP]")
    pieces = [text[start:end] for start, end in tokenized.offsets[1:-1]]
    assert [pieces[0], pieces[1], pieces[3], pieces[4]] == ["中", "文", "今", "Iphone"]
    assert pieces[2].rstrip("\0") == "a" * 8000


def test_the_padding_id_comes_from_the_file_then_from_usual_names_then_is_zero(build):
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 99}
    assert build(padding={**padding, "pad_type_id": 0, "pad_token": "[MASK]"}).pad_id == 4
    assert ids(build(padding={**padding, "pad_type_id": 0, "pad_token": "[MASK]"}), "中") == [2, 5, 3]
    model = copy.deepcopy(UNIGRAM["model"])
    model["vocab"][3][0], model["vocab"][0][0] = "<pad>", "x"
    nameless = {"added_tokens": [], "post_processor": None}
    assert build(UNIGRAM, model=model, **nameless).pad_id == 3
    model["vocab"][3][0] = "y"
    assert build(UNIGRAM, model=model, **nameless).pad_id == 0


def test_a_tokenizer_without_a_post_processor_adds_no_special_tokens(build):
    assert ids(build(post_processor=None, max_tokens=3), "中文今天") == [5, 6, 7]


def test_vocab_size_reaches_over_holes_in_the_vocabulary(build):
    tokenizer = build()
    assert (tokenizer.vocab_size, tokenizer.unknown_id, tokenizer.max_tokens) == (19, 1, 16)
    model = {**WORDPIECE["model"], "vocab": {**WORDPIECE["model"]["vocab"], "z": 5000}}
    assert build(model=model).vocab_size == 5001


def test_texts_that_are_not_text_are_refused_by_index_and_type(build):
    with pytest.raises(InvalidTextError) as refusal:
        build().encode(["中", None])
    assert str(refusal.value) == (
        "text 1 is not text: expected str, found NoneType. "
        "Decode bytes, and replace missing values, before embedding."
    )
    with pytest.raises(InvalidTextError, match=r"^texts is one str: expected a sequence of str"):
        build().encode("中文")
    with pytest.raises(InvalidTextError, match=r"^the prompt is not text: expected str, found bytes"):
        build().encode(["中"], prompt=b"x")


@pytest.mark.parametrize("position", [1, 70_000])
def test_lone_surrogates_are_refused_by_index_and_position_wherever_they_are(build, position):
    with pytest.raises(InvalidTextError) as refusal:
        build().encode(["中", "中" * position + "\ud83d"])
    assert str(refusal.value) == (
        f"text 1 is not Unicode text: expected no lone surrogates, found U+D83D at position {position}. "
        'Decode the source again, or use text.encode("utf-8", "replace").decode().'
    )


def test_options_out_of_range_are_refused(build):
    with pytest.raises(InvalidOptionError) as refusal:
        build(max_tokens=2)
    assert str(refusal.value) == (
        "max_tokens is out of range: expected at least 3, as special tokens count, found 2. Change max_tokens."
    )
    with pytest.raises(
        InvalidOptionError, match=r'^special_tokens is out of range: expected "parse" or "text"'
    ):
        build(special_tokens="drop")
    with pytest.raises(InvalidOptionError, match=r'^unicode_form is out of range: expected "NFKC" or None'):
        build(unicode_form="NFC")


def changed(document, path, value):
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def charsmap(content):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BPE = {
    "type": "BPE",
    "continuing_subword_prefix": "####",
    "vocab": {"a": 0, "b": 1, "ab": 2},
    "merges": ["a b"],
}
HOSTILE = {
    # Panics of the library, while loading and at the first text:
    "charsmap empty": changed(UNIGRAM, ["normalizer"], charsmap(b"")),
    "charsmap not UTF-8": changed(UNIGRAM, ["normalizer"], charsmap(b"\4\0\0\0" + b"\xff" * 16)),
    "charsmap pointing outside": changed(
        UNIGRAM, ["normalizer"], charsmap(b"\x40\0\0\0" + b"\xff" * 64 + b"ab\0")
    ),
    "BPE prefix longer than a token": changed(WORDPIECE, ["model"], BPE),
    "template without its special tokens": changed(WORDPIECE, ["post_processor", "special_tokens"], {}),
    "template of the second text": changed(WORDPIECE, ["post_processor", "single"], [text_piece("B")]),
    "pieces of length 0": changed(WORDPIECE, ["pre_tokenizer"], {"type": "FixedLength", "length": 0}),
    "added token that normalizes to nothing": changed(
        WORDPIECE, ["added_tokens"], [added("\0", 19, normalized=True, special=False)]
    ),
    # Errors of the library:
    "Unigram without pieces": changed(UNIGRAM, ["model", "vocab"], []),
    "unknown id out of range": changed(UNIGRAM, ["model", "unk_id"], 99),
    "no unknown id": changed(UNIGRAM, ["model", "unk_id"], None),
    "unknown token not in the vocabulary": changed(WORDPIECE, ["model", "unk_token"], "[NO]"),
    "WordPiece without words": changed(WORDPIECE, ["model", "vocab"], {}),
    "broken regular expression": changed(WORDPIECE, ["pre_tokenizer"], {**SPLIT, "pattern": {"Regex": "(("}}),
    "id out of range": changed(WORDPIECE, ["model", "vocab", "z"], 1 << 32),
    "unknown model": changed(WORDPIECE, ["model", "type"], "Oracle"),
    # Nothing that the library minds, but no use to us:
    "template without the text": changed(WORDPIECE, ["post_processor", "single"], [special_piece("[CLS]")]),
    "text twice": changed(WORDPIECE, ["post_processor", "single"], [text_piece("A"), text_piece("A")]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_tokenizer_error_when_it_is_opened(build, capfd, name):
    with pytest.raises(TokenizerError) as refusal:
        build(HOSTILE[name])
    assert refusal.value.found
    assert refusal.value.__cause__ is None
    capfd.readouterr()  # the library prints its panics, which nothing in Python can prevent


def test_a_padding_section_made_to_exhaust_memory_is_not_used(build):
    padding = {"strategy": {"Fixed": 1 << 62}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0}
    assert ids(build(padding={**padding, "pad_type_id": 0, "pad_token": "[PAD]"}), "中") == [2, 5, 3]


def test_a_panic_at_a_later_text_is_a_tokenizer_error(build, capfd):
    tokenizer = build(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a+)+b"}})
    with pytest.raises(TokenizerError, match=r"^the tokenizer failed on a text: .*retry-limit-in-match"):
        tokenizer.encode(["a" * 40])
    assert ids(tokenizer, "a") == [2, 13, 3]
    assert "panicked" in capfd.readouterr().err


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_interruptions_are_not_taken_for_panics(interruption):
    with pytest.raises(interruption), _converted("a problem"):
        raise interruption


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 64, b"<html></html>", b"{}", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "zeros", "html", "object", "null", "bytes", "nested lists", "nested objects"],
)
def test_garbage_is_a_tokenizer_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="is not a usable tokenizer"):
        Tokenizer.from_file(path, max_tokens=8)


def test_files_that_are_absent_too_large_or_no_files_are_not_read(tmp_path):
    huge, pipe = tmp_path / "huge.json", tmp_path / "pipe"
    with huge.open("wb") as stream:
        stream.truncate(FILE_LIMIT + 1)
    os.mkfifo(pipe)
    found = {
        tmp_path / "absent.json": "a readable file, found No such file or directory",
        tmp_path: "a file, found a folder",
        pipe: "a file, found a special file",
        huge: "at most 67108864 bytes, found 67108865 bytes",
    }
    for path, problem in found.items():
        with pytest.raises(TokenizerError) as refusal:
            Tokenizer.from_file(path, max_tokens=8)
        assert str(refusal.value) == (
            f"{path} cannot be read: expected {problem}. Export the model again, from a checkpoint that you trust."
        )


def test_sixteen_threads_get_the_same_ids(build):
    tokenizer = build(UNIGRAM, max_tokens=64)
    texts = ["中文今天" * n + "鑫 a" * (n % 7) for n in range(120)]
    alone = [e.ids.tolist() for e in tokenizer.encode(texts)]
    results: list[bool] = []
    barrier = threading.Barrier(16)

    def work():
        barrier.wait()
        results.append([e.ids.tolist() for e in tokenizer.encode(texts)] == alone)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 16


FORK = """
import os, sys
from pathlib import Path
from qingyu.runtime.tokenizer import Tokenizer
tokenizer = Tokenizer.from_file(Path(sys.argv[1]), max_tokens=16)
texts = ["中文今天"] * 300
before = [e.ids.tolist() for e in tokenizer.encode(texts)]
assert len(os.listdir("/proc/self/task")) == 1, "started threads"
for _ in range(10):
    child = os.fork()
    if child == 0:
        sys.exit([e.ids.tolist() for e in tokenizer.encode(texts)] != before)
    assert os.waitpid(child, 0)[1] == 0
assert "TOKENIZERS_PARALLELISM" not in os.environ
print("done")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's list of threads")  # noqa: PTH112 - at import
def test_forked_children_encode_without_a_hang_or_a_word(build, tmp_path):
    build()
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    run = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "tokenizer.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # numpy's threads are not ours
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_the_module_loads_no_tokenizers():
    code = "import sys, qingyu.runtime.tokenizer; print('tokenizers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize("prompt", ["", "今 "])
def test_what_is_left_of_a_truncated_text_without_its_dropped_characters_is_what_was_read(build, prompt):
    """By every way to encode, with and without windows, runs of blanks and a prompt."""
    short, tokenizer = build(max_tokens=5), build()
    for text in (
        "中文中",
        "中文中文天气",
        "中 文" + " " * 9000 + "今" * 9,
        "中" + "文" * 9000,
        "今天" + "\0" * 5000 + "气好中",
    ):
        for one in (short, tokenizer):
            encoded = one.encode([text], prompt=prompt)[0]
            kept = text[: len(text) - encoded.dropped]
            assert encoded.truncated == (encoded.dropped > 0)
            again = one.encode([kept], prompt=prompt)[0]
            assert again.ids.tolist() == encoded.ids.tolist()
            assert not again.truncated
            assert one.tokenize(text, prompt=prompt).dropped == encoded.dropped
        beginning = short.beginning(text)
        assert beginning.dropped(short.room) == short.encode([text])[0].dropped
    assert short.encode(["中文"], prompt="今天气好")[0].dropped == 2, (
        "a prompt that fills it all leaves no text"
    )
