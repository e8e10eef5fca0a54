from __future__ import annotations

import collections
import gzip
import re
import subprocess
import sys
import unicodedata
from importlib import resources
from pathlib import Path

import pytest

from qingyu.errors import InputError, InvalidOptionError, InvalidTextError
from qingyu.quantize.texts import SAMPLE, calibration_texts, checked_texts, sample

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"question", "dialogue", "chat", "statute", "technical", "exam", "recipe", "poetry", "medical"}
KINDS |= {"product", "news", "daily", "code", "science", "finance"}
ALL = len(sample())


def packed() -> bytes:
    return resources.files("qingyu.quantize").joinpath(SAMPLE).read_bytes()


def test_the_sample_is_some_600_texts_in_less_than_150_kilobytes() -> None:
    assert 550 <= ALL <= 650
    assert len(packed()) < 150_000


def test_no_text_is_there_twice() -> None:
    assert len({entry.text for entry in sample()}) == ALL


def test_texts_are_clean_utf_8_in_nfc() -> None:
    gzip.decompress(packed()).decode("utf-8")
    for entry in sample():
        assert unicodedata.is_normalized("NFC", entry.text)
        assert entry.text == entry.text.strip()
        assert "\ufffd" not in entry.text
        # No control, format, private-use or unassigned characters, nor line breaks.
        assert {unicodedata.category(c)[0] for c in entry.text} <= set("LMNPSZ")
        assert {unicodedata.category(c) for c in entry.text}.isdisjoint({"Zl", "Zp"})


def test_no_text_holds_an_address_or_a_number_that_could_be_a_persons() -> None:
    personal = re.compile(r"https?:|www\.|\S@\S+\.\w|\d{7,}|\d{3,4}-\d{4,}|微信号|QQ")
    assert [entry.text for entry in sample() if personal.search(entry.text)] == []


def test_every_kind_is_there_several_times() -> None:
    counts = collections.Counter(entry.kind for entry in sample())
    assert set(counts) == KINDS
    assert min(counts.values()) >= 4


def test_notice_names_every_source_and_nothing_more() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert set(re.findall(r"^\* `([\w-]+)`", notice, re.MULTILINE)) == {entry.source for entry in sample()}


def test_lengths_cover_every_band_of_bge_tokens(shared_models: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_models / "bge-small-zh-v1.5" / "tokenizer.json"))
    tokenizer.no_truncation()
    lengths = [len(tokenizer.encode(entry.text).ids) for entry in sample()]
    assert min(lengths) >= 4
    assert max(lengths) <= 512
    for lower, upper in ((1, 16), (17, 64), (65, 256), (257, 512), (300, 512)):
        assert sum(lower <= length <= upper for length in lengths) >= 50
    # Log-uniform, roughly: each doubling from 4 to 512 has between a half and twice its share.
    shares = collections.Counter((length - 1).bit_length() for length in lengths if length > 4)
    assert set(shares) == set(range(3, 10))
    assert all(0.5 < count / (ALL / 7) < 2 for count in shares.values())


def test_all_texts_are_given_once_each() -> None:
    assert sorted(calibration_texts()) == sorted(entry.text for entry in sample())


def test_the_same_seed_gives_the_same_texts_also_in_another_process() -> None:
    program = "from qingyu.quantize.texts import calibration_texts as c; print(ascii(c(40, seed=5)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ascii(calibration_texts(40, seed=5))


def test_another_seed_gives_other_texts() -> None:
    assert set(calibration_texts(40, seed=5)) != set(calibration_texts(40, seed=6))


def test_fewer_texts_are_the_first_of_more() -> None:
    assert calibration_texts(10) == calibration_texts(300)[:10]


@pytest.mark.parametrize("count", [16, 64, 200])
@pytest.mark.parametrize("seed", range(5))
def test_short_and_long_texts_are_alike_in_any_selection(count: int, seed: int) -> None:
    lengths = [len(text) for text in calibration_texts(count, seed=seed)]
    for lower, upper in ((0, 16), (17, 64), (65, 256), (257, 4096)):
        assert sum(lower <= length <= upper for length in lengths) >= count // 16


def test_the_callers_list_is_their_own() -> None:
    calibration_texts().clear()
    assert len(calibration_texts()) == ALL


@pytest.mark.parametrize("count", [0, -1, ALL + 1])
def test_a_count_that_the_sample_has_not_is_refused(count: int) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        calibration_texts(count)
    assert str(caught.value) == (
        f"count of calibration texts: expected 1 to {ALL}, found {count}. "
        "Give a file of your own texts for more."
    )


def test_good_texts_come_back_as_they_are_repetitions_and_blanks_included() -> None:
    texts = ("今天", "明天", "今天", "")
    assert checked_texts(texts, least=2) == list(texts)


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([], "none"),
        (["今天"], "1 different among 1"),
        (["今天"] * 5, "one text, 5 times"),
        (["今天", "", " \n\t\u3000"], "1 different among 3"),
        (["", " "], "0 different among 2"),
        (["今天", "明天", "今天"], "2 different among 3"),
    ],
)
def test_too_few_different_texts_are_refused(texts: list[str], found: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_texts(texts, least=3)
    assert type(caught.value) is InputError
    assert str(caught.value) == (
        "too few texts to calibrate and measure on: expected at least 3 different texts that are not blank, "
        f"found {found}. Give texts like those that the model will read, or use the built-in sample."
    )


def test_a_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="expected a list of texts, found one str"):
        checked_texts("今天天气真好", least=2)


@pytest.mark.parametrize("wrong", [None, 3, b"text", ["nested"]])
def test_what_is_not_a_text_is_named_by_position(wrong: object) -> None:
    with pytest.raises(InvalidTextError, match=r"^text 1: expected a str, found "):
        checked_texts(["今天", wrong, "明天"], least=2)  # type: ignore[list-item]


def test_reading_the_sample_loads_no_onnx() -> None:
    program = "import sys, qingyu.quantize.texts as t; t.calibration_texts(3); print('onnx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"
