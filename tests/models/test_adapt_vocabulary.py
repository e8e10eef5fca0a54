"""Vocabularies cut to what a corpus needs, and students cut from their teacher."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import (
    CheckpointError,
    InvalidOptionError,
    OutputError,
    TokenizerError,
    UnsupportedModelError,
)
from qingyu.models.adapt import prune_vocabulary
from qingyu.models.adapt.student import cut_checkpoint
from qingyu.models.adapt.vocabulary import chosen_tokens, read_vocabulary
from qingyu.models.export import export

CORPUS = ["今天天气真好", "外面阳光明媚，怎么修改登录密码？", "股票大跌"]
OTHER = "人工智能正在医疗"


def tokens(folder):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def vectors(checkpoint, folder, texts):
    export(checkpoint, folder)
    with Embedder.open(folder) as embedder:
        return embedder.embed(texts)


def table(checkpoint):
    from safetensors.numpy import load_file

    return load_file(checkpoint / "model.safetensors")["embeddings.word_embeddings.weight"]


def test_texts_of_kept_tokens_have_the_same_vectors(tiny_checkpoint, tmp_path):
    size = prune_vocabulary(tiny_checkpoint, tmp_path / "cut", CORPUS, size=120)
    assert size == 120 == len(table(tmp_path / "cut"))
    before = vectors(tiny_checkpoint, tmp_path / "a", CORPUS)
    after = vectors(tmp_path / "cut", tmp_path / "b", CORPUS)
    assert np.abs(before - after).max() < 1e-6


def test_what_the_corpus_lacks_goes_first(tiny_checkpoint, tmp_path):
    prune_vocabulary(tiny_checkpoint, tmp_path / "cut", CORPUS, size=86 + 25)  # what always stays, and theirs
    kept = tokens(tmp_path / "cut").get_vocab()
    assert set("今天气真好外面阳光明媚") <= set(kept)
    assert set(OTHER) & set(kept) == set()
    assert sorted(kept.values()) == list(range(len(kept)))


def test_given_words_stay(tiny_checkpoint, tmp_path):
    prune_vocabulary(tiny_checkpoint, tmp_path / "cut", CORPUS, size=120, words=[OTHER])
    assert set(OTHER) <= set(tokens(tmp_path / "cut").get_vocab())


def test_ascii_and_special_tokens_stay_and_special_ids_follow(tiny_checkpoint, tmp_path):
    prune_vocabulary(tiny_checkpoint, tmp_path / "cut", CORPUS, size=110)
    tokenizer = tokens(tmp_path / "cut")
    encoding = tokenizer.encode("az09?")
    assert "[UNK]" not in encoding.tokens
    assert encoding.tokens[0] == "[CLS]"
    assert encoding.tokens[-1] == "[SEP]"
    assert encoding.ids[0] == tokenizer.token_to_id("[CLS]")


def unigram(tmp_path, tiny_checkpoint):
    """The tiny checkpoint with a Unigram vocabulary of as many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path / "unigram"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "vocab.txt").unlink()
    rows = len(table(folder))
    words = ["今天", "天气", "真好", "外面", "阳光", "明媚", "股票", "大跌", "人工", "智能"]
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -4.0) for word in words)]
    characters = sorted(set("".join([*CORPUS, OTHER])))
    pieces += [(one, -6.0 - 0.01 * n) for n, one in enumerate(characters)]
    pieces += [(f"英{n}", -20.0) for n in range(rows - len(pieces))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 64,
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "cls_token": "<s>",
                "sep_token": "</s>",
            }
        )
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 1}))
    return folder


def test_a_unigram_vocabulary_is_cut_alike(tiny_checkpoint, tmp_path):
    source = unigram(tmp_path, tiny_checkpoint)
    prune_vocabulary(source, tmp_path / "cut", CORPUS, size=60)
    before, after = tokens(source), tokens(tmp_path / "cut")
    assert [before.encode(text).tokens for text in CORPUS] == [after.encode(text).tokens for text in CORPUS]
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["pad_token_id"] == 1
    difference = vectors(source, tmp_path / "a", CORPUS) - vectors(tmp_path / "cut", tmp_path / "b", CORPUS)
    assert np.abs(difference).max() < 1e-6


def test_common_words_that_the_corpus_lacks_stay_in_a_unigram_vocabulary(tiny_checkpoint, tmp_path):
    vocabulary = read_vocabulary(unigram(tmp_path, tiny_checkpoint))
    kept = {vocabulary.pieces[number] for number in chosen_tokens(vocabulary, ["今天"], 40)}
    assert {"人工", "智能"} <= kept
    assert "英0" not in kept


def test_a_larger_size_than_there_is_keeps_all(tiny_checkpoint):
    vocabulary = read_vocabulary(tiny_checkpoint)
    assert chosen_tokens(vocabulary, CORPUS, 10**6) == list(range(len(vocabulary.pieces)))


def test_the_real_vocabulary_keeps_the_tokens_of_its_corpus(shared_models, tmp_path):
    vocabulary = read_vocabulary(shared_models / "multilingual-e5-small-zh")
    kept = chosen_tokens(vocabulary, CORPUS * 50, 10_000)
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabulary.keeping(kept), encoding="utf-8")
    whole, cut = tokens(shared_models / "multilingual-e5-small-zh"), tokens(tmp_path)
    assert [whole.encode(text).tokens for text in CORPUS] == [cut.encode(text).tokens for text in CORPUS]
    assert cut.get_vocab_size() == 10_000


def test_a_student_has_the_chosen_layers(tiny_checkpoint, tmp_path):
    from safetensors.numpy import load_file

    cut_checkpoint(tiny_checkpoint, tmp_path / "student", layers=[1], prompts=False)
    teacher = load_file(tiny_checkpoint / "model.safetensors")
    student = load_file(tmp_path / "student" / "model.safetensors")
    name = "encoder.layer.{}.output.dense.weight"
    assert np.array_equal(student[name.format(0)], teacher[name.format(1)])
    assert name.format(1) not in student
    spec = export(tmp_path / "student", tmp_path / "model")
    assert (spec.architecture.layers, dict(spec.prompts)) == (1, {})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [2]}, InvalidOptionError, "layers"),
        ({"layers": []}, InvalidOptionError, "layers"),
        ({"layers": [1, 0]}, InvalidOptionError, "ascending"),
        ({"vocabulary": 3}, InvalidOptionError, "vocabulary size"),
    ],
)
def test_a_student_that_cannot_be_is_refused(tiny_checkpoint, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        cut_checkpoint(tiny_checkpoint, tmp_path / "student", texts=CORPUS, **options)


def damaged(tiny_checkpoint, tmp_path, name, content):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / name).write_text(content)
    return folder


def test_bad_checkpoints_are_typed_errors(tiny_checkpoint, tmp_path):
    for name, content, error in (
        ("config.json", '{"model_type": "gpt2"}', UnsupportedModelError),
        ("config.json", "{", CheckpointError),
        ("tokenizer.json", "{", TokenizerError),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', UnsupportedModelError),
    ):
        folder = damaged(tiny_checkpoint, tmp_path, name, content)
        with pytest.raises(error):
            prune_vocabulary(folder, tmp_path / "cut", CORPUS, size=120)
        shutil.rmtree(folder)
        assert not (tmp_path / "cut").exists()


def test_a_folder_with_files_in_it_is_not_written_to(tiny_checkpoint, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "mine.txt").write_text("")
    with pytest.raises(OutputError):
        prune_vocabulary(tiny_checkpoint, tmp_path / "cut", CORPUS, size=120)
