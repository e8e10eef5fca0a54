"""The model that travels in the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.__main__ import main
from qingyu.cli import common
from qingyu.errors import ModelNotFoundError
from qingyu.runtime import task as module
from qingyu.runtime.embedder import BUNDLED, find_model
from qingyu.runtime.spec import check_file


@pytest.fixture(scope="module")
def mini():
    with Embedder.open() as embedder:
        yield embedder


def test_it_is_what_opens_where_no_model_is_named(mini):
    assert mini.spec.name == BUNDLED == common.BUNDLED
    assert mini.folder == find_model(BUNDLED)
    assert mini.spec.precision == "int8"


def test_its_files_are_whole_and_take_at_most_16_megabytes(mini):
    for name, record in mini.spec.files.items():
        check_file(mini.folder, name, record)
    assert sum(path.stat().st_size for path in mini.folder.iterdir()) <= 16_000_000


def test_its_manifest_says_what_it_is(mini):
    spec = mini.spec
    assert spec.source.license == "apache-2.0"
    assert spec.architecture.layers <= 4
    assert spec.dim in (256, 384)
    assert not any(spec.prompts.values())
    assert spec.default_prompt is None
    assert spec.certificate is not None


def test_it_passes_its_own_self_check(mini):
    assert mini.self_check().result == "passed"


def test_it_ranks_what_is_meant_above_what_is_not(mini):
    for query, related, unrelated in [
        ("怎么修改登录密码", "忘记密码了怎么办", "明天会下雨吗"),
        ("今天天气真好", "外面阳光明媚", "股票大跌"),
        ("这家餐厅的菜很好吃", "饭店的味道不错", "数据库连接超时"),
        ("How do I reset my password?", "怎么重置密码", "西红柿炒鸡蛋的做法"),
        ("繁體中文的句子", "繁体中文的句子", "下班后一起打球吧"),
    ]:
        near, far = mini.similarity(query, [related, unrelated])[0]
        assert near > far + 0.1, query


def test_unrelated_texts_are_far_below_related_ones(mini):
    unrelated = [
        "明天会下雨吗",
        "股票大跌",
        "红烧肉的做法",
        "数据库连接超时",
        "他在公园里弹吉他",
        "第三条 本法自公布之日起施行",
    ]
    cosines = mini.similarity(unrelated, unrelated)[np.triu_indices(len(unrelated), 1)]
    assert cosines.mean() < 0.3
    assert mini.similarity("怎么修改登录密码", "如何更改登录密码")[0, 0] > 0.8


def test_a_text_has_the_same_vector_alone_and_in_a_batch(mini):
    texts = ["今天天气真好", "外面阳光明媚" * 40, "Hello, world", "怎么修改登录密码？", ""]
    together = mini.embed(texts)
    alone = np.concatenate([mini.embed(text) for text in texts])
    assert np.abs((together * alone).sum(axis=1) - 1).max() < 1e-6


def test_common_chinese_and_english_are_known_to_it(mini):
    text = "我们的一切工作都要从人民的根本利益出发，龘除外。The weather is good today, isn't it? 微信支付 iPhone 15"
    tokens = mini.tokenize(text).tokens
    assert sum("unk" in token for token in tokens) <= 1


def test_a_model_of_the_same_name_in_the_home_comes_first(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path))
    shutil.copytree(tiny_model, tmp_path / "models" / BUNDLED)
    assert find_model(BUNDLED) == tmp_path / "models" / BUNDLED


def test_other_names_are_not_found_and_the_bundled_one_is_offered():
    with pytest.raises(ModelNotFoundError, match=BUNDLED):
        find_model("no-such-model")


def test_an_installation_without_the_file_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "task.py"))
    with pytest.raises(ModelNotFoundError):
        Embedder.open()


def test_commands_use_it_where_no_model_is_named(capsys):
    assert main(["similarity", "--json", "怎么修改登录密码", "忘记密码了怎么办", "明天会下雨吗"]) == 0
    _, near, far = json.loads(capsys.readouterr().out)["cosine"][0]
    assert near > far + 0.3
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == BUNDLED


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    raise SystemExit("a socket was opened")
socket.socket = refuse
from qingyu.__main__ import main
sys.exit(main(["embed", "今天天气真好"]))
"""


def test_it_needs_no_network_and_no_home(tmp_path):
    environment = {"HOME": str(tmp_path / "none"), "PATH": "/usr/bin:/bin"}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    command = [sys.executable, "-c", NO_NETWORK]
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0:
        command = [unshare, "-rn", *command]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[0])["vector"]) in (256, 384)


def test_its_quality_is_what_the_card_says(mini, shared_data):
    from qingyu.quantize.evaluation import SimilaritySet, spearman_of

    measured = 100 * spearman_of(mini, SimilaritySet.read(shared_data / "sts-b-zh" / "dev.tsv"))
    assert measured >= 77
    card = (Path(__file__).parents[2] / "docs" / "qingyu-mini-zh.md").read_text(encoding="utf-8")
    assert f"{measured:.1f}" in card
