"""The tokenizer.json of a model folder gives the ids of the reference, quirks worked in."""

from __future__ import annotations

import json

import pytest

from qingyu.errors import CheckpointError, TokenizerError
from qingyu.models.export import export
from qingyu.models.export.checkpoint import read_checkpoint

TEXTS = [
    "今天天气真好",
    "iPhone15 Pro 很好，ABC abc",
    "Café Ünïted ÀÉÎ naïve",
    "中国[MASK]人 [mask] [SEP] [CLS]x[PAD]",
    "ＡＢＣ１２３ 全角",
    "a中b国c",
    "  空 \t 格\n行  ",
    "𠀀𪚥 ㋿ ① ⅷ Ǆ İ",
    "",
    "\u200b零宽\ufeff \x00控制",
    "x" * 120,
]


def ids_of(tokenizer_json, texts=TEXTS):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    return [tokenizer.encode(text).ids for text in texts]


def reference_ids(tokenizer, texts=TEXTS):
    return [tokenizer(text)["input_ids"] for text in texts]


def copy(source, target, *names, settings=None):
    """A folder with some tokenizer files of a shared model and a tokenizer_config.json of its own."""
    target.mkdir(exist_ok=True)
    for name in ("config.json", *names):
        (target / name).write_bytes((source / name).read_bytes())
    if settings is not None:
        (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def front_end(folder):
    from qingyu.models.export.config import read_config
    from qingyu.models.export.files import read_optional
    from qingyu.models.export.frontend import read_front_end

    settings = read_optional(folder / "sentence_bert_config.json")
    return read_front_end(folder, read_config(folder), settings, "BertTokenizer")


SETTINGS = [
    {"tokenizer_class": "BertTokenizer"},
    {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True},
    {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": False},
    {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True},
    {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False},
    {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, "unk_token": "[UNK]"},
    {"do_lower_case": False},
    {},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokenizer_config_overrules_tokenizer_json_as_in_transformers(
    settings, transformers, shared_models, tmp_path
):
    folder = copy(shared_models / "bert-base-chinese", tmp_path / "x", "tokenizer.json", settings=settings)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids_of(front_end(folder).tokenizer) == reference_ids(reference)


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_a_tokenizer_is_built_from_a_vocabulary_as_in_transformers(
    settings, transformers, shared_models, tmp_path
):
    folder = copy(shared_models / "bert-base-chinese", tmp_path / "x", "vocab.txt", settings=settings)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    built = front_end(folder)
    assert ids_of(built.tokenizer) == reference_ids(reference)
    assert built.lowercase == settings.get("do_lower_case", True)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_sentence_transformers_lower_cases_on_top(
    settings, lowercase, sentence_transformers, make_checkpoint, as_sentence_transformers
):
    folder = as_sentence_transformers(
        make_checkpoint(tokenizer_config=settings), transformer={"do_lower_case": lowercase}
    )
    reference = sentence_transformers.SentenceTransformer(str(folder), device="cpu").tokenizer
    source = read_checkpoint(folder)
    assert ids_of(source.front_end.tokenizer) == reference_ids(reference)
    normalizer = json.loads(reference.backend_tokenizer.to_str())["normalizer"]
    assert json.loads(source.front_end.tokenizer)["normalizer"] == normalizer
    assert source.front_end.lowercase == (lowercase or settings.get("do_lower_case", True))


def test_the_true_bge_lower_cases_text_but_not_a_mask(shared_models):
    made = front_end(shared_models / "bge-small-zh-v1.5")
    assert made.lowercase
    upper, lower, mask = ids_of(made.tokenizer, ["iPhone15 Pro", "iphone15 pro", "[MASK]"])
    assert upper == lower
    assert 100 not in upper  # [UNK]
    assert mask == [101, 103, 102]


@pytest.mark.parametrize("name", ["multilingual-e5-small-zh", "bert-base-chinese"])
def test_a_tokenizer_that_needs_no_change_is_copied_byte_by_byte(name, transformers, shared_models):
    folder = shared_models / name
    made = front_end(folder)
    assert made.tokenizer == (folder / "tokenizer.json").read_bytes()
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids_of(made.tokenizer) == reference_ids(reference)


def test_lower_casing_that_stands_in_tokenizer_json_is_kept(
    make_checkpoint, as_sentence_transformers, tmp_path
):
    """As transformers 4 keeps it; transformers 5.23 drops it on loading what sentence-transformers saved."""
    quirk = {"tokenizer_config": {"do_lower_case": False}}
    lowered = read_checkpoint(
        as_sentence_transformers(make_checkpoint(**quirk), transformer={"do_lower_case": True})
    ).front_end.tokenizer
    saved = make_checkpoint("saved", **quirk)
    (saved / "tokenizer.json").write_bytes(lowered)
    made = read_checkpoint(saved).front_end
    assert made.lowercase
    assert made.tokenizer == lowered


def test_padding_and_truncation_are_removed(shared_models, tmp_path):
    source = shared_models / "bert-base-chinese"
    folder = copy(source, tmp_path / "x", "tokenizer.json", "tokenizer_config.json")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    made = front_end(folder).tokenizer
    assert json.loads(made)["padding"] is json.loads(made)["truncation"] is None
    assert ids_of(made) == ids_of((source / "tokenizer.json").read_bytes())


def test_special_tokens_that_the_file_does_not_mark_are_marked(transformers, shared_models, tmp_path):
    source = shared_models / "bert-base-chinese"
    folder = copy(source, tmp_path / "x", "tokenizer.json", "tokenizer_config.json")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "[MASK]"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    made = front_end(folder).tokenizer
    assert ids_of(made, ["[MASK]"]) == [[101, 103, 102]]
    assert ids_of(made) == reference_ids(transformers.AutoTokenizer.from_pretrained(folder))


def test_an_exported_folder_holds_the_effective_tokenizer(
    make_checkpoint, as_sentence_transformers, tmp_path
):
    folder = as_sentence_transformers(
        make_checkpoint(tokenizer_config={"do_lower_case": False}), transformer={"do_lower_case": True}
    )
    spec = export(folder, tmp_path / "model")
    made = (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert spec.lowercase
    assert ids_of(made, ["aB[MASK]"]) == ids_of(made, ["Ab[MASK]"])
    assert ids_of(made, ["[MASK]"]) == [[2, 4, 3]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"model": 3}',
        b"[" * 100_000,
        b'{"model": {"type": "WordPiece", "vocab": {}}}',
    ],
)
def test_a_hostile_tokenizer_is_one_error(content, make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be"):
        read_checkpoint(folder)


def test_a_tokenizer_that_panics_is_one_error(make_checkpoint):
    # A charsmap of the wrong length makes the library panic with an exception that is no Exception.
    folder = make_checkpoint()
    document = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used"):
        read_checkpoint(folder)


def test_a_folder_without_a_tokenizer_says_how_to_make_one(make_checkpoint):
    folder = make_checkpoint()
    (folder / "vocab.txt").unlink()
    with pytest.raises(TokenizerError) as caught:
        read_checkpoint(folder)
    assert "expected tokenizer.json, or vocab.txt for BERT" in str(caught.value)
    assert "AutoTokenizer" in caught.value.remedy


def test_a_vocabulary_without_special_tokens_is_refused(make_checkpoint):
    folder = make_checkpoint()
    (folder / "vocab.txt").write_text("今\n天\n[UNK]\n", encoding="utf-8")
    with pytest.raises(
        TokenizerError, match=r"lacks special tokens: expected \[CLS\], \[MASK\], \[PAD\], \[SEP\]"
    ):
        read_checkpoint(folder)


def test_a_vocabulary_larger_than_the_embedding_is_refused(make_checkpoint):
    folder = make_checkpoint()
    with (folder / "vocab.txt").open("a", encoding="utf-8") as stream:
        stream.write("龙\n")
    with pytest.raises(TokenizerError, match=r"expected token ids below 123, found the id 123"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": "yes"},
        {"model_max_length": "512"},
        {"model_max_length": -1},
        {"cls_token": 5},
        {"strip_accents": 1},
    ],
)
def test_settings_that_make_no_sense_are_one_error(settings, make_checkpoint):
    with pytest.raises(CheckpointError, match=f"field '{next(iter(settings))}'"):
        read_checkpoint(make_checkpoint(tokenizer_config=settings))
