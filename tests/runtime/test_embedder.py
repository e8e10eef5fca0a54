"""The public API on a tiny real model: shapes, order, invariance, options, refusals."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.errors import (
    ClosedError,
    CorruptFileError,
    InvalidOptionError,
    InvalidTextError,
    MemoryBudgetError,
    ModelNotFoundError,
    TextTooLongError,
    UnknownTokenWarning,
)
from qingyu.runtime.embedder import Report
from qingyu.runtime.vectors import unit

TEXTS = [
    "今天天气真好",
    "外面阳光明媚。",
    "股票大跌!",
    "怎么修改登录密码",
    "a",
    "",
    "人工智能正在改变医疗、教育和交通。" * 3,
]


@pytest.fixture(scope="module")
def embedder(tiny_model):
    with Embedder.open(tiny_model, threads=2 if os.cpu_count() != 1 else 1) as opened:
        yield opened


def mixed(count: int) -> list[str]:
    random = np.random.default_rng(count)
    alphabet = list("今天气真好外面阳光明媚股票大跌怎么修改登录密码，。")
    return ["".join(random.choice(alphabet, random.integers(0, 50))) for _ in range(count)]


def test_vectors_are_float32_rows_for_a_list_one_text_and_none(embedder):
    assert embedder.embed(TEXTS).shape == (len(TEXTS), 32)
    assert embedder.embed("今天天气真好").shape == (1, 32)
    assert embedder.embed([]).shape == (0, 32)
    assert embedder.embed([], dim=8).shape == (0, 8)
    assert embedder.embed(iter(TEXTS)).dtype == np.float32


def test_the_same_text_has_the_same_vector_alone_shuffled_and_beside_longer_ones(embedder):
    texts = mixed(300)
    together = embedder.embed(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    assert np.abs(embedder.embed([texts[n] for n in order]) - together[order]).max() <= 1e-6
    alone = np.concatenate([embedder.embed(text) for text in texts[:50]])
    assert np.abs(alone - together[:50]).max() <= 1e-6


def test_vectors_have_length_one_unless_told_otherwise(embedder):
    assert np.allclose(np.linalg.norm(embedder.embed(TEXTS), axis=1), 1, atol=1e-6)
    raw = embedder.embed(TEXTS, normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.01
    assert np.allclose(unit(raw), embedder.embed(TEXTS), atol=1e-6)


def test_dim_cuts_before_it_normalizes(embedder):
    raw = embedder.embed(TEXTS, normalize=False)
    assert np.allclose(embedder.embed(TEXTS, dim=8), unit(raw[:, :8]), atol=1e-6)
    assert np.allclose(embedder.embed(TEXTS, dim=8, normalize=False), raw[:, :8], atol=1e-6)


def test_a_prompt_is_put_before_the_text(embedder):
    plain = embedder.embed("查询：今天天气真好")
    assert np.array_equal(embedder.embed("今天天气真好", prompt="query"), plain)
    assert np.array_equal(embedder.embed("今天天气真好", prompt="查询："), plain)
    assert not np.allclose(embedder.embed("今天天气真好"), plain)


def test_a_prompt_that_the_model_does_not_have_is_refused(embedder):
    with pytest.raises(InvalidOptionError, match="expected one of \\['query'\\], found 'passage'"):
        embedder.embed("今天", prompt="passage")


def test_a_stream_gives_the_texts_and_vectors_of_a_list(embedder):
    texts = mixed(500)
    blocks = list(embedder.embed_stream(iter(texts)))
    assert [text for block in blocks for text in block.texts] == texts
    assert np.array_equal(np.concatenate([block.vectors for block in blocks]), embedder.embed(texts))
    assert all(len(block.texts) == len(block.vectors) for block in blocks)


def test_an_error_in_the_callers_generator_comes_back_as_it_is(embedder):
    def texts():
        yield from mixed(100)
        raise LookupError("the database went away")

    with pytest.raises(LookupError, match="database"):
        list(embedder.embed_stream(texts()))
    assert embedder.embed("今天").shape == (1, 32), "the embedder stays usable"


def test_similarity_is_the_table_of_cosines(embedder):
    table = embedder.similarity(TEXTS[:3], TEXTS)
    assert table.shape == (3, len(TEXTS))
    assert np.allclose(np.diag(table), 1, atol=1e-6)
    assert embedder.similarity("今天", "今天").shape == (1, 1)


def test_long_texts_are_cut_or_refused(embedder):
    long = "今天天气真好" * 100
    report = Report()
    cut = embedder.embed([TEXTS[0], long], report=report)
    assert report.truncated == 1
    assert report.texts == 2
    assert report.dropped == len(long) - (embedder.spec.max_tokens - 2)
    assert report.cut == [(1, report.dropped)]
    assert np.allclose(cut[1], embedder.embed(long[: embedder.spec.max_tokens - 2])[0], atol=1e-6)
    with pytest.raises(TextTooLongError, match="text 70 is too long: expected at most 64 tokens"):
        embedder.embed([*mixed(70), long], long_text="error")


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "NoneType"), (7, "int"), (b"\xe4", "bytes"), (["a"], "list"), ("a\ud800", "surrogate")],
)
def test_what_is_not_text_is_refused_by_its_place(embedder, text, found):
    with pytest.raises(InvalidTextError, match="text 100") as refused:
        embedder.embed([*mixed(100), text])
    assert found in str(refused.value)


def test_one_thing_that_is_not_text_at_all_is_refused(embedder):
    with pytest.raises(InvalidTextError, match="NoneType"):
        embedder.embed(None)


def test_nul_and_empty_texts_have_vectors(embedder):
    vectors = embedder.embed(["", "\0", " "])
    assert np.isfinite(vectors).all()
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)


def test_unknown_tokens_are_counted_and_warned_of_above_a_tenth(embedder):
    report = Report()
    with pytest.warns(UnknownTokenWarning, match="50% of 8 tokens are unknown"):
        embedder.embed(["今天天气", "魑魅魍魉"], report=report)
    assert report.unknown == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.embed(["今天天气真好外面阳光明媚股票大跌魑"])


def test_tokenize_shows_what_the_model_reads(embedder):
    shown = embedder.tokenize("今天abc")
    assert list(shown.tokens) == ["[CLS]", "今", "天", "a", "##b", "##c", "[SEP]"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "fast"}, "one of 'throughput', 'latency', 'edge'"),
        ({"special_tokens": "drop"}, "one of 'parse', 'text'"),
        ({"unicode_form": "NFD"}, "one of None, 'NFKC'"),
        ({"max_memory_mb": 0}, "at least 1"),
        ({"threads": 0}, "threads"),
        ({"threads": 10_000}, "threads"),
    ],
)
def test_options_out_of_range_are_refused(tiny_model, options, message):
    with pytest.raises(InvalidOptionError, match=message):
        Embedder.open(tiny_model, **options)


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 33}, {"long_text": "cut"}])
def test_call_options_out_of_range_are_refused(embedder, options):
    with pytest.raises(InvalidOptionError, match=next(iter(options))):
        embedder.embed(TEXTS, **options)


@pytest.mark.parametrize("profile", ["throughput", "latency", "edge"])
def test_every_profile_gives_the_same_vectors(tiny_model, embedder, profile):
    with Embedder.open(tiny_model, profile=profile) as other:
        assert np.abs(other.embed(mixed(200)) - embedder.embed(mixed(200))).max() <= 1e-6


def test_a_memory_budget_is_kept_or_refused(tiny_model):
    with Embedder.open(tiny_model, max_memory_mb=2000) as opened:
        assert opened.embed(TEXTS).shape == (len(TEXTS), 32)
    with pytest.raises(MemoryBudgetError, match="Raise max_memory_mb by"):
        Embedder.open(tiny_model, max_memory_mb=20)


def test_after_close_calls_are_refused(tiny_model):
    opened = Embedder.open(tiny_model)
    opened.embed("今天")
    opened.close()
    opened.close()
    with pytest.raises(ClosedError, match="Open it again"):
        opened.embed("今天")


def test_sixteen_threads_get_what_one_gets(embedder):
    texts = mixed(64)
    expected = embedder.embed(texts)
    wrong = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(texts))
        results = [embedder.embed([texts[n] for n in order]) for _ in range(5)]
        wrong.extend(seed for result in results if np.abs(result - expected[order]).max() > 1e-6)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pickled_embedder_opens_the_same_model(embedder):
    with pickle.loads(pickle.dumps(embedder)) as copy:
        assert np.array_equal(copy.embed(TEXTS), embedder.embed(TEXTS))


def test_a_forked_child_embeds_and_exits(tiny_model):
    program = f"""
import os, sys, numpy as np
from qingyu import Embedder
e = Embedder.open({str(tiny_model)!r})
texts = ["今天天气真好", "股票大跌"] * 200
before = e.embed(texts)
pid = os.fork()
if pid == 0:
    sys.exit(0 if np.allclose(e.embed(texts), before, atol=1e-6) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert np.allclose(e.embed(texts), before, atol=1e-6)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plain_name_is_found_under_qingyu_home(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model)
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Embedder.open("tiny") as opened:
        assert opened.dim == 32
    with pytest.raises(ModelNotFoundError, match="Make one with `qingyu export"):
        Embedder.open("absent")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_changed_file_is_refused(tiny_model, tmp_path, name):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptFileError, match=f"{name} is damaged: expected sha256"):
        Embedder.open(tmp_path).embed("今天")


def test_a_folder_without_a_manifest_is_refused(tiny_checkpoint):
    with pytest.raises(ModelNotFoundError, match=r"expected qingyu.json, found .*config.json"):
        Embedder.open(tiny_checkpoint)


def test_int8_vectors_do_not_depend_on_their_neighbours(tiny_int8):
    with Embedder.open(tiny_int8) as embedder:
        texts = mixed(200)
        together = embedder.embed(texts)
        alone = np.concatenate([embedder.embed(text) for text in texts])
    assert (together * alone).sum(axis=1).min() >= 0.999999


MEMORY_PROGRAM = r"""
import re, sys
from qingyu import Embedder
from qingyu.runtime.memory import resident_bytes
counts = [int(n) for n in sys.argv[2:]]
def texts(n):
    for i in range(n):
        yield "今天天气真好" * (i % 9) + str(i)
e = Embedder.open(sys.argv[1], threads=1)
for count in counts:
    for block in e.embed_stream(texts(count)):
        pass
    # Not ru_maxrss, which starts at the peak of the process that started this one.
    print(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
"""


def test_a_stream_of_any_length_takes_constant_memory(tiny_model):
    """The bar of the issue is 10^6 texts; here 10^4 and then 5 x 10^4, and bench/ has the long run."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY_PROGRAM, str(tiny_model), "10000", "50000"]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, check=True)
    first, last = map(int, done.stdout.split())
    assert last - first < 20 * 1024, "kilobytes of growth in the peak"


def test_importing_the_package_loads_no_heavy_library():
    program = """
import sys, json
import qingyu
heavy = {"numpy", "onnxruntime", "tokenizers", "psutil", "onnx", "torch", "transformers"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_runtime_loads_only_its_four_dependencies(tiny_model):
    program = f"""
import sys, json
before = set(sys.modules)
from qingyu import Embedder
Embedder.open({str(tiny_model)!r}).embed("今天")
print(json.dumps(sorted({{m.partition(".")[0] for m in set(sys.modules) - before}})))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # cython_runtime is a part of numpy.
    ours = {"numpy", "onnxruntime", "tokenizers", "psutil", "qingyu", "cython_runtime"}
    third_party = {
        name
        for name in json.loads(done.stdout)
        if name not in sys.stdlib_module_names and not name.startswith("_") and name not in ours
    }
    assert third_party == set()


def test_public_names_are_all_there():
    import qingyu

    for name in qingyu.__all__:
        assert getattr(qingyu, name) is not None
    assert set(dir(qingyu)) == set(qingyu.__all__)
    with pytest.raises(AttributeError):
        qingyu.Nonsense  # noqa: B018 - the access is the test


def test_the_fixture_model_is_not_changed_by_the_tests(tiny_model):
    assert sorted(path.name for path in Path(tiny_model).iterdir()) == [
        "model.onnx",
        "qingyu.json",
        "tokenizer.json",
    ]


def test_a_model_that_nobody_uses_is_freed_at_once(tiny_model, head_model):
    """Not when Python next looks for cycles: a server that replaces models would keep several."""
    import gc
    import weakref

    from qingyu.runtime.fill_mask import FillMask
    from qingyu.runtime.question_answerer import QuestionAnswerer
    from qingyu.runtime.sequences import SequenceModel
    from qingyu.runtime.task import open_model
    from qingyu.runtime.token_classifier import TokenClassifier

    tasks = ("fill-mask", "question-answering", "reranking")
    folders = [tiny_model, *map(head_model, tasks), head_model("tagging", ("O", "B-人", "I-人"))]
    kinds = {Embedder, FillMask, QuestionAnswerer, SequenceModel, TokenClassifier}
    gc.disable()
    try:
        for folder in folders:
            model = open_model(folder)
            kinds -= set(type(model).__mro__)
            model.load()
            model.close()
            known = weakref.ref(model)
            del model
            assert known() is None, folder
    finally:
        gc.enable()
    assert not kinds
