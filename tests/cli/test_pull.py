"""`qingyu pull` against a loopback hub: one command from a name to a checked model that opens by that name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qingyu.__main__ import main
from qingyu.cli.pull import NETWORK
from qingyu.models.sources import SOURCES
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.fill_mask import FillMask
from qingyu.runtime.spec import encode_vector, read_spec

pytest.importorskip("huggingface_hub")
pytest.importorskip("filelock")
pytest.importorskip("onnx")

NAME = "someone/tiny-zh"
TEXTS = ["今天天气真好", "外面阳光明媚", "人工智能正在改变医疗、教育和交通。"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def vectors(tiny_model) -> np.ndarray:
    """The golden results of the tiny checkpoint."""
    with Embedder.open(tiny_model) as embedder:
        return embedder.embed(TEXTS, normalize=True)


@pytest.fixture
def entry(tmp_path, monkeypatch, vectors):
    """A function that puts the tiny model into a catalogue of its own, with golden results and what is given."""

    def put(golden=vectors, **changes):
        results = {
            "kind": "embedding",
            "source": "this test",
            "texts": TEXTS,
            "vectors": [encode_vector(vector.tolist()) for vector in golden],
        }
        facts = {
            "name": "tiny",
            "task": "embedding",
            "repositories": {"hub": NAME, "modelscope": NAME},
            "license": "mit",
            "layers": 2,
            "dim": 32,
            "prompts": {"passage": "文："},
            "golden": "golden.json",
            **changes,
        }
        (tmp_path / "golden.json").write_text(json.dumps(results))
        (tmp_path / "catalogue.json").write_text(json.dumps({"format": 1, "models": [facts]}))
        monkeypatch.setenv("QINGYU_CATALOGUE", str(tmp_path / "catalogue.json"))

    return put


def pull(*arguments: str) -> int:
    return main(["pull", *arguments])


def test_the_command_knows_the_sources_that_there_are():
    assert set(NETWORK) == set(SOURCES)


def test_a_model_of_the_catalogue_comes_checked_and_opens_by_its_name(hub, home, entry, vectors, capsys):
    entry()
    assert pull("tiny") == 0
    said = capsys.readouterr()
    assert "FP32 gives its 3 published results: cosine 1.0" in said.out
    assert "bytes/s" not in said.err  # no bar where there is no terminal
    spec = read_spec(home / "models" / "tiny")
    assert (spec.precision, spec.recipe) == ("int8", "rowwise")
    assert (spec.source.repository, spec.source.revision, spec.source.license) == (NAME, hub.commit, "mit")
    assert dict(spec.prompts) == {"query": "查询：", "passage": "文："}
    assert spec.certificate is not None
    assert spec.golden is not None
    with Embedder.open("tiny") as embedder:
        found = embedder.embed(TEXTS, normalize=True)
    assert np.min(np.sum(found * vectors, axis=1)) > 0.99


def test_a_second_pull_changes_nothing_and_says_so(hub, home, entry, capsys):
    entry()
    pull("tiny", "--recipe", "fp32")
    before = (home / "models" / "tiny" / "model.onnx").stat().st_ino
    hub.seen.clear()
    assert pull("tiny", "--recipe", "fp32") == 0
    assert "was there already" in capsys.readouterr().out
    assert (home / "models" / "tiny" / "model.onnx").stat().st_ino == before
    assert not hub.requested("model.safetensors")


def test_another_recipe_needs_no_second_download(hub, home):
    pull(NAME, "--recipe", "fp32")
    assert pull(NAME, "--recipe", "weights-8") == 0
    assert len(hub.requested("model.safetensors")) == 1
    assert {p.name.rpartition(".")[2] for p in (home / "models").glob("tiny-zh@*")} == {"fp32", "weights-8"}


def test_a_repository_outside_the_catalogue_is_pulled_unchecked(hub, home, capsys):
    assert pull(NAME, "--recipe", "fp32", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["dim"], said["made"]) == ("tiny-zh", 32, True)
    assert said["golden"] == "no published results to check against"
    assert Path(said["folder"]).parent == home / "models"


def test_wrong_published_results_are_exit_code_6_and_keep_nothing(hub, home, entry, vectors, capsys):
    turned = vectors[:, ::-1]
    entry(golden=turned)
    assert pull("tiny") == 6
    assert "does not give its published results" in capsys.readouterr().err
    assert not list((home / "models").iterdir())


def test_results_just_below_the_limit_are_refused_and_just_above_accepted(hub, home, entry, vectors):
    """0.99999 is a limit that a small change of the vectors misses."""
    random = np.random.default_rng(3)
    for size, code in ((0.02, 6), (0.0005, 0)):
        changed = vectors + size * random.normal(size=vectors.shape) / np.sqrt(32)
        entry(golden=changed / np.linalg.norm(changed, axis=1, keepdims=True))
        assert pull("tiny", "--recipe", "fp32") == code


def test_results_of_a_kind_that_cannot_be_checked_are_said_to_be_unchecked(
    hub, home, entry, tmp_path, capsys
):
    entry()
    (tmp_path / "golden.json").write_text(json.dumps({"kind": "tags", "source": "x", "results": [1]}))
    assert pull("tiny", "--recipe", "fp32") == 0
    assert "not checked" in capsys.readouterr().out


def fill_results(folder):
    with FillMask.open(folder) as model:
        masks = model.fill("今天[MASK]气真好", top_k=3)[0].masks
    return [
        {
            "text": "今天[MASK]气真好",
            "mask_index": 0,
            "predictions": [{"token": one.id, "score": one.score} for one in masks[0]],
        }
    ]


@pytest.mark.parametrize("change", [0.0, 0.01])
def test_a_fill_mask_model_is_held_against_published_scores(
    change, head_checkpoint, head_model, home, entry, tmp_path, capsys
):
    checkpoint = head_checkpoint("fill-mask")
    results = fill_results(head_model("fill-mask"))
    results[0]["predictions"][1]["score"] += change
    entry(task="fill-mask", prompts={})
    document = {"kind": "fill_mask", "source": "this test", "results": results}
    (tmp_path / "golden.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    assert pull("tiny", "--from", str(checkpoint), "--recipe", "fp32") == (6 if change else 0)
    said = capsys.readouterr()
    assert ("does not give its published results" in said.err) == bool(change)
    if not change:
        with FillMask.open("tiny") as model:
            assert model.spec.task == "fill-mask"


@pytest.mark.parametrize("changes", [{"dim": 512}, {"layers": 4}])
def test_a_checkpoint_of_another_shape_is_not_the_model(changes, hub, home, entry, capsys):
    entry(**changes)
    assert pull("tiny") == 3
    assert "is not tiny" in capsys.readouterr().err
    assert not list((home / "models").iterdir())


def test_a_pinned_hash_is_held_against_every_source(hub, home, entry, capsys):
    size = len(hub.files["model.safetensors"])
    entry(files={"model.safetensors": {"bytes": size, "sha256": "0" * 64}})
    assert pull("tiny") == 4
    assert "by the catalogue" in capsys.readouterr().err
    assert pull("tiny", "--from", "hub,mirror,modelscope") == 5
    assert capsys.readouterr().err.count("by the catalogue") == 3


def test_a_model_for_a_task_that_is_not_made_yet_is_refused_but_downloaded(hub, home, entry, capsys):
    entry(task="fill-mask", exportable=False, note="Later.")
    assert pull("tiny") == 4
    assert not hub.seen
    assert pull("tiny", "--download-only") == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not (home / "models").exists()


def test_weights_that_are_not_those_of_the_catalogue_are_refused_from_a_folder_too(
    tiny_checkpoint, home, capsys
):
    assert pull("bge-small-zh-v1.5", "--from", str(tiny_checkpoint)) == 4
    assert "expected 95827648 bytes" in capsys.readouterr().err


def test_without_the_extra_the_error_has_the_pip_command(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert pull(NAME) == 5
    assert 'pip install "qingyu[pull]"' in capsys.readouterr().err


# --- sources


def test_nothing_but_the_named_sources_is_asked(hub, home, entry, monkeypatch, capsys):
    entry()
    hub.faults["/revision/main"] = hub.Faults(status=404)
    assert pull("tiny") == 5
    assert not [path for path, _ in hub.seen if path.startswith("/api/v1/")]
    assert "404" in capsys.readouterr().err


def test_the_next_source_serves_when_it_may(hub, home, entry, capsys):
    entry()
    hub.faults["/revision/main"] = hub.Faults(status=401)
    assert pull("tiny", "--from", "hub,modelscope", "--recipe", "fp32") == 0
    said = capsys.readouterr()
    assert "not from hub" in said.err
    assert "401" in said.err
    assert read_spec(home / "models" / "tiny").source.revision.startswith("master-")


def test_a_folder_is_a_source_of_a_model_by_name(hub, home, entry, tiny_checkpoint):
    entry()
    assert pull("tiny", "--from", f"hub,{tiny_checkpoint}", "--offline", "--recipe", "fp32") == 0
    assert not hub.seen
    assert read_spec(home / "models" / "tiny").source.repository == NAME


def test_a_folder_is_pulled_as_it_is(hub, home, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "own")
    before = {p: p.read_bytes() for p in (tmp_path / "own").rglob("*") if p.is_file()}
    assert pull(str(tmp_path / "own"), "--name", "mine", "--recipe", "fp32") == 0
    assert {p: p.read_bytes() for p in (tmp_path / "own").rglob("*") if p.is_file()} == before
    assert not hub.seen
    with Embedder.open("mine") as embedder:
        assert embedder.embed(TEXTS).shape == (3, 32)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((NAME, "--from", "ftp"), 3, "hub, mirror, modelscope"),
        ((NAME, "--from", ""), 3, "Separate them by commas"),
        ((), 3, "pull --list"),
        ((NAME, "--name", "../x"), 3, "letters, digits"),
        (("someone/else",), 5, "404"),
        (("not a name",), 3, "Use --name"),
        ((NAME, "--revision", "../../x"), 5, "branch, tag or commit"),
        ((NAME, "--revision", "v7"), 5, "404"),
    ],
)
def test_wrong_arguments_are_one_line_and_an_exit_code(arguments, code, words, hub, home, capsys):
    assert pull(*arguments) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_the_catalogue_is_listed_without_network(capsys, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    assert pull("--list") == 0
    said = capsys.readouterr().out
    assert "bge-small-zh-v1.5" in said
    assert "download only" not in said


# --- offline


class SocketOpenedError(Exception):
    """A socket was opened."""


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_, **__):
        raise SocketOpenedError

    for name in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_opens_no_socket_and_says_what_is_missing(how, hub, home, no_sockets, monkeypatch, capsys):
    if how != "--offline":
        monkeypatch.setenv(how, "1")
    arguments = ["--offline"] if how == "--offline" else []
    assert pull(NAME, "--from", "hub,mirror,modelscope", *arguments) == 5
    assert "not in the cache" in capsys.readouterr().err


def test_the_guard_works(hub, home, no_sockets):
    with pytest.raises(SocketOpenedError):
        pull(NAME)


def test_offline_a_cached_checkpoint_becomes_a_model_without_a_socket(hub, home, monkeypatch, request):
    pull(NAME, "--download-only")
    request.getfixturevalue("no_sockets")
    assert pull(NAME, "--offline", "--recipe", "fp32") == 0
    assert read_spec(home / "models" / "tiny-zh").source.revision == hub.commit
    assert pull(NAME, "--offline", "--revision", "v9", "--recipe", "fp32") == 5


def test_offline_a_model_is_enough_without_its_checkpoint(hub, home, capsys, request):
    pull(NAME, "--recipe", "fp32")
    main(["cache", "remove", NAME])
    request.getfixturevalue("no_sockets")
    capsys.readouterr()
    assert pull(NAME, "--offline", "--recipe", "fp32", "--revision", hub.commit) == 0
    assert "was there already" in capsys.readouterr().out
    assert pull(NAME, "--offline", "--recipe", "fp32", "--revision", "v9") == 5
    assert pull(NAME, "--offline", "--recipe", "rowwise") == 5


# --- kills and crowds


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qingyu", "pull", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_eight_pulls_at_once_all_succeed_and_one_makes_the_model(hub, home):
    running = [start(NAME, "--recipe", "fp32", "--json") for _ in range(8)]
    results = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * 8, results
    said = [json.loads(out) for out, _ in results]
    assert sum(one["made"] for one in said) == 1
    assert len({one["folder"] for one in said}) == 1
    assert len(hub.requested("model.safetensors")) == 1
    with Embedder.open("tiny-zh") as embedder:
        assert embedder.embed(TEXTS).shape == (3, 32)


def test_killed_while_it_makes_the_model_it_succeeds_the_next_time(hub, home):
    process = start(NAME)
    deadline = time.monotonic() + 120
    while not list((home / "models").glob(".building-*/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((home / "models").glob("tiny-zh*"))
    assert pull(NAME) == 0
    with Embedder.open("tiny-zh") as embedder:
        assert embedder.embed(TEXTS).shape == (3, 32)


# --- qingyu cache, bundle, unbundle


def test_the_cache_lists_verifies_heals_and_removes(hub, home, capsys):
    pull(NAME, "--recipe", "fp32")
    capsys.readouterr()
    assert main(["cache", "list", "--json"]) == 0
    kinds = {entry["kind"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(kinds) == {"model", "checkpoint"}
    assert kinds["model"]["current"]
    assert main(["cache", "list"]) == 0
    assert kinds["model"]["label"] in capsys.readouterr().out
    assert main(["cache", "verify"]) == 0
    graph = Path(kinds["model"]["folder"]) / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    assert main(["cache", "verify", "tiny-zh"]) == 4
    said = capsys.readouterr()
    assert "damaged" in said.out
    assert "Pull the model again" in said.err
    assert pull(NAME, "--recipe", "fp32") == 0
    assert main(["cache", "verify"]) == 0
    assert main(["cache", "remove", "--records", "tiny-zh", NAME]) == 0
    capsys.readouterr()
    assert main(["cache", "list"]) == 0
    assert "nothing in" in capsys.readouterr().out
    assert main(["cache", "remove", "tiny-zh"]) == 5
    assert not list((home / "records").iterdir())


def test_a_pulled_model_is_bundled_and_moves(hub, home, tmp_path, capsys, monkeypatch):
    pull(NAME, "--recipe", "fp32")
    assert main(["bundle", "tiny-zh", str(tmp_path / "tiny.qingyu")]) == 0
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path / "other"))
    assert main(["embed", "--model", str(tmp_path / "tiny.qingyu"), "今天"]) == 0
    assert main(["info", str(tmp_path / "tiny.qingyu")]) == 0
    assert main(["unbundle", str(tmp_path / "tiny.qingyu"), str(tmp_path / "out")]) == 0
    assert read_spec(tmp_path / "out").name == "tiny-zh"
    assert main(["cache", "list"]) == 0
    assert "bundle" in capsys.readouterr().out
    assert main(["unbundle", str(tmp_path / "tiny.qingyu"), str(tmp_path / "out")]) == 5


def test_a_bar_is_drawn_on_a_terminal(hub, home):
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "qingyu", "pull", NAME, "--download-only"]
    done = subprocess.run(command, stderr=terminal, stdout=subprocess.DEVNULL, timeout=120, check=False)
    os.close(terminal)
    drawn = os.read(controller, 65536).decode()
    os.close(controller)
    assert done.returncode == 0
    total = sum(map(len, hub.files.values()))
    assert f"{total:,}/{total:,}" in drawn
