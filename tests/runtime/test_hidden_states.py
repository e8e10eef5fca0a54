"""States between layers: equal to transformers', with the characters of each token."""

from __future__ import annotations

import numpy as np
import pytest

from qingyu import Embedder, HiddenStates
from qingyu.errors import InvalidOptionError, InvalidTextError, UnsupportedModelError
from qingyu.models.export import export
from qingyu.runtime.embedder import Report

TEXTS = ["今天天气真好", "外面阳光明媚，怎么修改登录密码？", "abc", ""]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    made = tmp_path_factory.mktemp("models") / "hidden"
    export(tiny_checkpoint, made, hidden_states=True)
    return made


@pytest.fixture(scope="module")
def states(folder):
    with HiddenStates.open(folder) as model:
        yield model


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """transformers' hidden states of one text: a list of (tokens, hidden), layer 0 first."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(str(tiny_checkpoint))
    model = transformers.BertModel.from_pretrained(
        str(tiny_checkpoint), add_pooling_layer=False, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def run(text):
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return [layer[0].numpy() for layer in found.hidden_states]

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [(-1,), (0,), (1,), (0, 2), (2, 1, 0), (-1, -1)])
@pytest.mark.parametrize("combine", ["mean", "concatenate"])
def test_token_vectors_are_those_of_transformers(states, reference, layers, combine):
    for found, text in zip(states.tokens(TEXTS, layers=layers, combine=combine), TEXTS, strict=True):
        own = [reference(text)[layer] for layer in layers]
        wanted = np.mean(own, axis=0) if combine == "mean" else np.concatenate(own, axis=-1)
        assert found.vectors.shape == wanted.shape
        assert np.abs(found.vectors - wanted).max() < 1e-5


def test_tokens_come_with_the_characters_they_are_from(states):
    text = "今天 abc好"
    found = states.tokens(text)[0]
    assert found.text == text
    assert found.tokens[0] == "[CLS]"
    assert found.special == (True, *[False] * (len(found.tokens) - 2), True)
    for token, (start, end), special in zip(found.tokens, found.offsets, found.special, strict=True):
        assert special or text[start:end] == token.removeprefix("##")


POOLED = {
    "cls": lambda v: v[0],
    "mean": lambda v: v.mean(axis=0),
    "max": lambda v: v.max(axis=0),
    "weighted_mean": lambda v: np.average(v, axis=0, weights=np.arange(1, len(v) + 1)),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_sentence_vectors_pool_the_token_vectors(states, pooling):
    found = states.embed(TEXTS, layers=(1, 2), pooling=pooling)
    wanted = np.stack([POOLED[pooling](one.vectors) for one in states.tokens(TEXTS, layers=(1, 2))])
    assert np.abs(found - wanted).max() < 1e-5
    lengths = np.linalg.norm(states.embed(TEXTS, pooling=pooling, normalize=True), axis=1)
    assert np.abs(lengths - 1).max() < 1e-5


def test_the_last_layer_pooled_as_the_model_does_is_the_embedders_vector(states, folder):
    with Embedder.open(folder) as embedder:
        wanted = embedder.embed(TEXTS, prompt="")
    assert np.abs(states.embed(TEXTS, pooling="mean", normalize=True) - wanted).max() < 1e-5


def test_many_texts_keep_their_order(states):
    texts = [text * n for n in range(1, 40) for text in TEXTS[:2]]
    alone = np.concatenate([states.embed(text) for text in texts[::7]])
    assert np.abs(states.embed(texts)[::7] - alone).max() < 1e-5


def test_no_texts_give_no_rows_of_the_right_width(states):
    assert states.embed([]).shape == (0, 32)
    assert states.embed([], layers=(0, 1, 2), combine="concatenate").shape == (0, 96)
    assert states.tokens([]) == []


def test_what_was_cut_is_reported(states):
    report = Report()
    found = states.tokens(["今天" * 100, "今天"], report=report)
    assert [one.truncated for one in found] == [True, False]
    assert (report.texts, report.truncated) == (2, 1)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"layers": (3,)}, "layers"),
        ({"layers": (-4,)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"combine": "sum"}, "combine"),
    ],
)
def test_options_out_of_range_are_refused(states, options, option):
    with pytest.raises(InvalidOptionError, match=option):
        states.tokens("今天", **options)
    with pytest.raises(InvalidOptionError, match=option):
        states.embed("今天", **options)


def test_an_unknown_pooling_and_what_is_not_text_are_refused(states):
    with pytest.raises(InvalidOptionError, match="pooling"):
        states.embed("今天", pooling="last")
    with pytest.raises(InvalidTextError):
        states.embed([3])


def test_a_folder_without_hidden_states_is_refused(tiny_model):
    with pytest.raises(UnsupportedModelError, match="--hidden-states"):
        HiddenStates.open(tiny_model)
