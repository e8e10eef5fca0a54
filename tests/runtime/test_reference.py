"""Vectors equal those of sentence-transformers, token states those of transformers, on the same checkpoints."""

from __future__ import annotations

import csv
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import read_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LEAST_COSINE = 0.999999
MOST_DIFFERENCE = 1e-5

MIXED = [
    "iPhone15 Pro 和 ＭａｃＢｏｏｋ　Ａｉｒ 哪个好？",
    "ＡＢＣ１２３ ABC123 abc123",
    "请把 README.md 发到 Zhang.San@Example.COM",
    "今天好开心😀👨‍👩‍👧🇨🇳！",
    "繁體中文：臺灣的颱風與龍捲風",
    "ｶﾀｶﾅ カタカナ ㈱ ① Ⅷ ㎏ ﬁ",
    "Ünïcödé naïve café — ГОСТ Ελλάδα",
    "查询　全角空格\t制表符\n换行",
    "𠀀𠮷𡃁 生僻字 㐀䶵",
    "𝐀𝟙²₃ ½ €£¥",
    "a\u0301e\u0300 A\u030a",
    "",
    " ",
    "。",
    "\u200b零宽\u00ad软连字符\ufeff",
    "HTTP/2.0 GET /Index.HTML?Q=中文%20UTF-8",
]
LONG = [
    "好" * 511,
    "今天天气真好，外面阳光明媚。" * 100,
    "The Quick Brown Fox 跳过了懒狗 " * 200,
    "123456789" * 300,
    "中文 English 混排，" * 3000,
]


@pytest.fixture(scope="module")
def torch():
    """torch on one thread; its setting is put back.

    On two cores with other work, two threads take three times as long: they wait for each other.
    """
    module = pytest.importorskip("torch", reason="compares with torch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


@pytest.fixture(scope="module")
def transformers(torch):
    module = pytest.importorskip("transformers", reason="compares with transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def open_reference(transformers):
    """A function that opens a checkpoint with sentence-transformers, in FP32 whatever its weights are kept in."""
    module = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")

    def reference(folder: Path):
        # transformers 5 keeps the checkpoint's FP16 otherwise, which is off by 2e-4.
        return module.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})

    return reference


@pytest.fixture(scope="module")
def e5_reference(open_reference, shared_models):
    return open_reference(shared_models / "multilingual-e5-small-zh")


@pytest.fixture(scope="module")
def e5(e5_model):
    with Embedder.open(e5_model) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def sentences(shared_data) -> list[str]:
    """All different sentences of STS-B dev, both columns, in their order."""
    with (shared_data / "sts-b-zh" / "dev.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = list(dict.fromkeys(row[name] for row in rows for name in ("sentence1", "sentence2")))
    assert len(texts) == 2798
    return texts


def encode(reference, texts, **options) -> np.ndarray:
    # Longest first, so that small batches keep a few long texts from padding all others.
    return reference.encode(texts, batch_size=8, show_progress_bar=False, **options)


def assert_equal_vectors(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    wide, other = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(other, axis=1)
    assert ((wide * other).sum(axis=1) / lengths).min() >= LEAST_COSINE
    assert np.abs(wide - other).max() <= MOST_DIFFERENCE


def test_all_sentences_of_sts_b_dev(e5, e5_reference, sentences):
    theirs = e5_reference.encode(sentences, batch_size=64, show_progress_bar=False)
    assert_equal_vectors(e5.embed(sentences), theirs)


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
@pytest.mark.parametrize("name", [None, "query", "passage"])
def test_mixed_and_long_text_with_and_without_prompts(name, e5, e5_reference):
    texts = [*MIXED, *LONG]
    assert_equal_vectors(e5.embed(texts, prompt=name), encode(e5_reference, texts, prompt_name=name))


def test_a_prompt_changes_the_vector_and_equals_its_text_put_before(e5, sentences):
    some = sentences[:10]
    prompted = e5.embed(some, prompt="query")
    assert np.abs(prompted - e5.embed([f"query: {text}" for text in some])).max() <= 1e-6
    assert np.abs(prompted - e5.embed(some, prompt="query: ")).max() <= 1e-6
    assert np.abs(prompted - e5.embed(some)).max() > 1e-3


def test_a_cut_dimension_is_theirs_made_unit_length_again(e5, e5_reference, sentences):
    """sentence-transformers cuts a normalized vector and leaves it shorter; with its own option it agrees."""
    some = sentences[:50]
    ours = e5.embed(some, dim=128)
    theirs = encode(e5_reference, some, truncate_dim=128)
    assert np.linalg.norm(theirs, axis=1).max() < 0.99
    assert_equal_vectors(ours, theirs / np.linalg.norm(theirs, axis=1, keepdims=True))
    assert_equal_vectors(ours, encode(e5_reference, some, truncate_dim=128, normalize_embeddings=True))
    assert_equal_vectors(e5.embed(some)[:, :128], theirs)


def test_token_states_equal_those_of_transformers(
    e5_model, e5, transformers, torch, shared_models, sentences
):
    folder = shared_models / "multilingual-e5-small-zh"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with OnnxRuntimeEngine(e5_model, read_spec(e5_model)) as engine:
        for start in range(0, 100, 20):
            texts = sentences[start : start + 20]
            ids = [np.array(e5.tokenize(text).ids, dtype=np.int64) for text in texts]
            batch = TokenBatch.pad(ids, tokenizer.pad_token_id)
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            assert np.array_equal(inputs["input_ids"].numpy(), batch.ids)
            with torch.inference_mode():
                theirs = model(**inputs).last_hidden_state.numpy()
            (ours,) = engine.run(batch, ("token_states",))
            assert np.abs(ours - theirs)[batch.mask == 1].max() <= MOST_DIFFERENCE


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_a_text_has_one_vector_alone_shuffled_and_beside_longer_neighbours(e5, sentences):
    texts = [*MIXED, *sentences[:80]]
    together = e5.embed(texts)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = e5.embed([texts[n] for n in order])
    assert np.abs(shuffled - together[order]).max() <= 1e-6
    alone = np.concatenate([e5.embed(text) for text in texts])
    assert np.abs(alone - together).max() <= 1e-6
    beside = e5.embed([text for short in texts[:30] for text in (short, "好" * 300)])
    assert np.abs(beside[::2] - together[:30]).max() <= 1e-6


@pytest.fixture(scope="module")
def bge_checkpoint(shared_models, transformers, torch, tmp_path_factory) -> Path:
    """Random weights in the true shape of bge-small-zh-v1.5, with its own configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bge-small-zh-v1.5"
    source = shared_models / "bge-small-zh-v1.5"
    for path in source.rglob("*"):
        if path.is_file() and "golden" not in path.parts:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.BertModel(transformers.BertConfig.from_pretrained(source))
    model.save_pretrained(folder)
    shutil.copyfile(source / "config.json", folder / "config.json")  # save_pretrained wrote its own
    return folder


@pytest.fixture(scope="module")
def bge(bge_checkpoint, tmp_path_factory):
    pytest.importorskip("onnx", reason="exports a checkpoint")
    from qingyu.models.export import export

    folder = tmp_path_factory.mktemp("models") / "bge"
    export(bge_checkpoint, folder)
    with Embedder.open(folder) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def bge_reference(bge_checkpoint, open_reference):
    return open_reference(bge_checkpoint)


@pytest.fixture(scope="module")
def mixed_texts(sentences) -> list[str]:
    """300 texts, Latin upper case in two thirds of them."""
    source = random.Random(5)
    words = ["iPhone15", "Pro", "ＡＰＰ", "WiFi", "GitHub", "CPU", "T恤", "Ünder", "ÀÉÎ", "X光", "NBA2024"]
    texts = [text + " ".join(source.sample(words, 2)) + source.choice(sentences) for text in sentences[:200]]
    return [*texts, *sentences[200 : 300 - len(MIXED) - len(LONG)], *MIXED, *LONG]


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_mixed_texts_on_the_shape_of_bge(bge, bge_reference, mixed_texts):
    assert len(mixed_texts) == 300
    assert_equal_vectors(bge.embed(mixed_texts), encode(bge_reference, mixed_texts))


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_lower_casing_decides_the_vector_of_bge(bge, bge_reference):
    """Its tokenizer.json alone would read upper case as unknown; sentence_bert_config.json says to lower it."""
    upper, lower = "iPhone15 Pro 和 GitHub", "iphone15 pro 和 github"
    ours = bge.embed([upper, lower])
    assert np.abs(ours[0] - ours[1]).max() <= 1e-6
    assert_equal_vectors(ours, encode(bge_reference, [upper, lower]))
    assert "[UNK]" not in bge.tokenize(upper).tokens
    assert np.abs(bge.embed("[UNK][UNK] 和 [UNK]") - ours[0]).max() > 1e-3


def test_a_typed_mask_stays_the_special_token_under_lower_casing(bge, bge_reference):
    texts = ["北京是[MASK]国的首都。", "ABC[MASK]DEF"]
    for text in texts:
        assert bge.tokenize(text).ids.count(bge_reference.tokenizer.mask_token_id) == 1
    assert_equal_vectors(bge.embed(texts), encode(bge_reference, texts))
    assert np.abs(bge.embed(texts) - bge.embed([text.replace("M", "m") for text in texts])).max() > 1e-3
