"""The Embedder against sentence-transformers and transformers on the same checkpoints: the core promise, in FP32."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.runtime.engine import TokenBatch
from qingyu.runtime.onnxruntime_engine import OnnxRuntimeEngine
from qingyu.runtime.spec import read_spec
from qingyu.runtime.tokenizer import Tokenizer

MIXED = [
    "iPhone15 Pro 和 MacBook AIR 哪个更值得买？",
    "ＡＢＣ１２３ｘｙｚ　全角空格",
    "ÉCLAIR café naïve Ünïcödé 中文",
    "繁體中文與簡體中文：憂鬱的臺灣烏龜",
    "👍🏽👨‍👩‍👧‍👦🇨🇳 表情 emoji！！！",
    "C++ / C# / .NET、node.js v18.2.0（2024年3月）",
    "ΣΊΣΥΦΟΣ İstanbul ǅungla ﬁle",
    "Hello WORLD hello world",
    "一\t二\n三\u3000四\u200b五",
    "",
    " ",
    "。",
    "[MASK] 和 [SEP] 与 [UNK]",
]
LONG = ["人工智能正在改变医疗、教育和交通，" * 60, "The Quick brown fox 跳过懒狗 " * 120, "字" * 3000]


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    module.set_num_threads(2)
    return module


def open_reference(folder: Path):
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say while loading is theirs
        return SentenceTransformer(str(folder), device="cpu")


def encode(reference, texts, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reference.encode(texts, batch_size=32, convert_to_numpy=True, show_progress_bar=False, **options)


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() >= 0.999999
    assert np.abs(a - b).max() <= 1e-5


@pytest.fixture(scope="module")
def e5(torch, shared_models):
    return open_reference(shared_models / "multilingual-e5-small-zh")


@pytest.fixture(scope="module")
def sentences(shared_data) -> list[str]:
    rows = (shared_data / "sts-b-zh" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return sorted({cell for row in rows for cell in row.split("\t")[:2]})


def test_every_sts_sentence_has_the_vector_of_sentence_transformers(e5, e5_model, sentences):
    assert len(sentences) > 2000
    with Embedder.open(e5_model) as embedder:
        assert_equal(embedder.embed(sentences), encode(e5, sentences))


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_mixed_case_width_scripts_and_long_texts_have_the_reference_vectors(e5, e5_model):
    with Embedder.open(e5_model) as embedder:
        assert_equal(embedder.embed(MIXED), encode(e5, MIXED))
        assert_equal(embedder.embed(LONG), encode(e5, LONG))


def test_prompts_are_those_of_the_reference(e5, e5_model):
    texts = ["今天天气真好", "怎么修改登录密码"]
    with Embedder.open(e5_model) as embedder:
        for name in ("query", "passage"):
            assert_equal(embedder.embed(texts, prompt=name), encode(e5, texts, prompt_name=name))
        assert_equal(embedder.embed(texts, prompt="问："), encode(e5, texts, prompt="问："))


def test_cut_dimensions_point_where_the_reference_points(e5, e5_model):
    """Ours are normalized after the cut; sentence-transformers leaves the cut vector shorter."""
    texts = ["今天天气真好", "怎么修改登录密码"]
    with Embedder.open(e5_model) as embedder:
        theirs = encode(e5, texts)[:, :128]
        theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
        assert_equal(embedder.embed(texts, dim=128), theirs)


def test_token_states_equal_transformers(torch, shared_models, e5_model, sentences):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(shared_models / "multilingual-e5-small-zh", dtype=torch.float32)
    model.eval()
    spec = read_spec(e5_model)
    tokenizer = Tokenizer.from_file(e5_model / "tokenizer.json", max_tokens=spec.max_tokens)
    encoded = [text.ids for text in tokenizer.encode(sentences[:96])]
    with OnnxRuntimeEngine(e5_model, spec) as engine:
        for start in range(0, len(encoded), 32):
            batch = TokenBatch.pad(encoded[start : start + 32], tokenizer.pad_id)
            ours = engine.run(batch, ("token_states",))[0]
            with torch.no_grad():
                given = {
                    "input_ids": torch.from_numpy(batch.ids),
                    "attention_mask": torch.from_numpy(batch.mask),
                }
                theirs = model(**given).last_hidden_state.numpy()
            difference = np.abs(ours - theirs)[batch.mask == 1]
            assert difference.max() <= 1e-5


def test_a_real_text_has_one_vector_alone_shuffled_and_beside_longer_ones(e5_model, sentences):
    texts = [*sentences[:120], *LONG]
    with Embedder.open(e5_model) as embedder:
        together = embedder.embed(texts)
        order = np.random.default_rng(5).permutation(len(texts))
        assert np.abs(embedder.embed([texts[n] for n in order]) - together[order]).max() <= 1e-6
        alone = np.concatenate([embedder.embed(text) for text in texts[:40]])
        assert np.abs(alone - together[:40]).max() <= 1e-6


@pytest.fixture(scope="module")
def bge_shape(torch, shared_models, tmp_path_factory) -> Path:
    """A checkpoint with random weights in the true shape, and the true other files, of bge-small-zh-v1.5."""
    from transformers import BertConfig, BertModel

    source = shared_models / "bge-small-zh-v1.5"
    folder = tmp_path_factory.mktemp("checkpoints") / "bge"
    folder.mkdir()
    torch.manual_seed(11)
    model = BertModel(BertConfig.from_pretrained(source))
    for parameter in model.parameters():  # LayerNorms and biases, too, which are 1 and 0 at first
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for path in source.rglob("*.*"):
        target = folder / path.relative_to(source)
        if "golden" not in path.parts and path.is_file():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return folder


@pytest.mark.filterwarnings("ignore::qingyu.errors.UnknownTokenWarning")
def test_the_bge_shape_lower_cases_as_the_reference_does(bge_shape, tmp_path, sentences):
    from qingyu.models.export import export

    export(bge_shape, tmp_path / "bge")
    reference = open_reference(bge_shape)
    texts = [*MIXED, *(f"{text} iPhone{n} Pro" for n, text in enumerate(sentences[:280]))]
    with Embedder.open(tmp_path / "bge") as embedder:
        assert embedder.spec.lowercase
        assert_equal(embedder.embed(texts), encode(reference, texts))
        assert_equal(embedder.embed(LONG), encode(reference, LONG))
        shown = embedder.tokenize("[MASK] iPhone15 Pro")
        assert list(shown.tokens[1:-1]) == ["[MASK]", "iphone", "##15", "pro"]
