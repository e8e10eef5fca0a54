"""The cache holds whole files with their hashes or nothing, whatever happens to those who fill it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qingyu.errors import CorruptFileError, ModelNotFoundError, OutputError, SourceError
from qingyu.models.cache import BUILDING, Cache, _host
from qingyu.models.sources import Limits, find_snapshot
from qingyu.runtime.spec import FileRecord

pytest.importorskip("huggingface_hub")

NAME = "someone/tiny-zh"
QUICK = Limits(wait=5, attempts=2, pause=0.01)


def fill(cache: Cache, source: str = "hub", known: dict[str, FileRecord] | None = None) -> Path:
    snapshot = find_snapshot(source, NAME, None, QUICK)
    for _ in cache.download(snapshot, known=known, limits=QUICK):
        pass
    return cache.checkpoint(snapshot)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "home")


@pytest.mark.parametrize("source", ["hub", "mirror", "modelscope"])
def test_a_checkpoint_comes_whole_and_once(source, hub, cache):
    folder = fill(cache, source)
    assert contents(folder) == hub.files
    hub.seen.clear()
    assert fill(cache, source) == folder
    assert not hub.requested("model.safetensors")


def test_progress_adds_up_to_the_size_also_after_a_new_start(hub, cache):
    hub.faults["model.safetensors"] = hub.Faults(cut_after=[5000], no_range=True)
    snapshot = find_snapshot("hub", NAME, None, QUICK)
    assert sum(cache.download(snapshot, limits=QUICK)) == snapshot.bytes == sum(map(len, hub.files.values()))
    assert sum(cache.download(snapshot, limits=QUICK)) == snapshot.bytes


@pytest.mark.parametrize("path", ["model.safetensors", "vocab.txt", "1_Pooling/config.json"])
def test_a_damaged_or_missing_file_heals_at_the_next_pull_and_alone(path, hub, cache):
    folder = fill(cache)
    for damage in (lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]), Path.unlink):
        damage(folder / path)
        (entry,) = cache.find(NAME)
        assert len(cache.damage(entry)) == 1
        hub.seen.clear()
        fill(cache)
        assert contents(folder) == hub.files
        assert not cache.damage(entry)
        assert len([p for p, _ in hub.seen if "/resolve/" in p]) == 1


def test_a_symbolic_link_in_place_of_a_file_is_replaced_and_its_target_left(hub, cache, tmp_path):
    folder = fill(cache)
    (tmp_path / "other").write_bytes(hub.files["config.json"])
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "other")
    fill(cache)
    assert not (folder / "config.json").is_symlink()
    assert (tmp_path / "other").read_bytes() == hub.files["config.json"]


def test_another_revision_has_a_folder_of_its_own(hub, cache):
    first = fill(cache)
    hub.files["config.json"] += b"\n"
    second = fill(cache)
    assert first != second
    assert contents(second) == hub.files
    assert contents(first)["config.json"] + b"\n" == hub.files["config.json"]


# --- hashes


def test_a_hash_of_the_catalogue_refuses_other_weights_before_they_are_fetched(hub, cache):
    size = len(hub.files["model.safetensors"])
    known = {"model.safetensors": FileRecord(size, "0" * 64)}
    with pytest.raises(CorruptFileError, match="by the catalogue"):
        fill(cache, known=known)
    assert not hub.requested("model.safetensors")


def test_a_hash_of_the_catalogue_refuses_other_weights_where_the_source_tells_none(hub, cache):
    hub.tell_hashes = False
    known = {"model.safetensors": FileRecord(len(hub.files["model.safetensors"]), "0" * 64)}
    with pytest.raises(CorruptFileError, match="not what it should be"):
        fill(cache, known=known)
    assert not list((cache.home / "checkpoints").rglob("model.safetensors*"))


@pytest.mark.parametrize("tell", [True, False])
def test_what_the_first_download_had_later_ones_must_have(tell, hub, cache, monkeypatch):
    """Also after the files were removed, and where the server calls other content by the same commit."""
    hub.tell_hashes = tell
    commit = hub.commit
    fill(cache)
    (entry,) = cache.find(NAME)
    cache.remove(entry)
    monkeypatch.setattr(type(hub), "commit", commit)
    good = hub.files["model.safetensors"]
    hub.files["model.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(CorruptFileError):
        fill(cache)
    assert not list((cache.home / "checkpoints").rglob("model.safetensors"))
    assert cache.forget(NAME)
    fill(cache)


def test_a_record_holds_the_hashes(hub, cache):
    folder = fill(cache)
    record = json.loads((cache.home / "records" / f"{folder.name}.json").read_bytes())
    assert record["revision"] == hub.commit
    assert {name: file["sha256"] for name, file in record["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in hub.files.items()
    }


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"source": 1}', b"[" * 100_000])
def test_a_damaged_record_is_no_record(damage, hub, cache):
    folder = fill(cache)
    (cache.home / "records" / f"{folder.name}.json").write_bytes(damage)
    (entry,) = cache.find(NAME)
    assert "record" in cache.damage(entry)[0].expected
    fill(cache)
    assert not cache.damage(entry)


def test_offline_a_checkpoint_is_found_whole_or_not_at_all(hub, cache):
    assert cache.find_checkpoint(NAME, None) is None
    folder = fill(cache)
    for asked in (None, "main", hub.commit):
        found = cache.find_checkpoint(NAME, asked)
        assert found is not None
        assert found[0] == folder
    assert cache.find_checkpoint(NAME, "v2") is None
    (folder / "config.json").unlink()
    assert cache.find_checkpoint(NAME, None) is None


# --- other processes

DRIVER = """
import sys
from pathlib import Path
if sys.argv[2] == "broken":
    import contextlib, filelock
    class Lying:
        def __init__(self, *_, **__): pass
        def acquire(self): pass
        def release(self): pass
    filelock.FileLock = Lying
from qingyu.models.cache import Cache
from qingyu.models.sources import Limits, find_snapshot
limits = Limits(wait=20, attempts=4, pause=0.05)
snapshot = find_snapshot("hub", "someone/tiny-zh", None, limits)
for _ in Cache(Path(sys.argv[1])).download(snapshot, limits=limits):
    pass
print("done")
"""


def start(home: Path, locks: str = "honest") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(home), locks]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "done\n"), err


@pytest.mark.parametrize("locks", ["honest", "broken"])
def test_eight_processes_at_once_give_one_good_copy(locks, hub, cache):
    running = [start(cache.home, locks) for _ in range(8)]
    for process in running:
        finish(process)
    (folder,) = (cache.home / "checkpoints").iterdir()
    assert contents(folder) == hub.files
    if locks == "honest":
        assert len(hub.requested("model.safetensors")) == 1


def test_killed_in_the_middle_and_started_again_it_goes_on_from_there(hub, cache):
    event = threading.Event()
    hub.faults["model.safetensors"] = hub.Faults(hold=event)
    process = start(cache.home)
    half = len(hub.files["model.safetensors"]) // 2
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size >= half // 2 for p in (cache.home / "checkpoints").glob("*/.model*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    event.set()
    assert not list((cache.home / "checkpoints").glob("*/model.safetensors"))
    finish(start(cache.home))
    (folder,) = (cache.home / "checkpoints").iterdir()
    assert contents(folder) == hub.files
    assert "Range" in hub.requested("model.safetensors")[-1]


def test_writers_whose_files_are_taken_away_still_end_with_a_whole_file(hub, cache):
    """What happens where locks lie: the slower one's beginning is cleaned up by the faster one."""
    event = threading.Event()
    hub.faults["model.safetensors"] = hub.Faults(hold=event)
    slow = start(cache.home, "broken")
    while not list((cache.home / "checkpoints").glob("*/.model*.part")):
        time.sleep(0.02)
        assert slow.poll() is None
    hub.faults.clear()
    finish(start(cache.home, "broken"))
    event.set()
    finish(slow)
    (folder,) = (cache.home / "checkpoints").iterdir()
    assert contents(folder) == hub.files


# --- models


def put(cache: Cache, model: Path, revision: str = "a" * 40) -> Path:
    folder = cache.model_folder("tiny", revision, "rowwise")
    with cache.building() as work:
        shutil.copytree(model, work / "m")
        cache.publish(work / "m", folder)
    cache.make_current("tiny", folder)
    return folder


def test_a_published_model_is_found_by_its_name(cache, tiny_int8, monkeypatch):
    from qingyu import Embedder

    folder = put(cache, tiny_int8)
    assert folder.name == "tiny@aaaaaaaaaaaa.rowwise"
    monkeypatch.setenv("QINGYU_HOME", str(cache.home))
    for name in ("tiny", folder.name):
        with Embedder.open(name) as embedder:
            assert embedder.embed("今天天气真好").shape == (1, 32)


def test_the_name_leads_to_the_model_that_came_last(cache, tiny_int8):
    first, second = put(cache, tiny_int8), put(cache, tiny_int8, "v2")
    assert (cache.home / "models" / "tiny").resolve() == second.resolve()
    assert {entry.label: entry.current for entry in cache.entries()} == {first.name: False, second.name: True}


def test_a_sound_model_stays_and_a_damaged_one_is_replaced(cache, tiny_int8):
    folder = put(cache, tiny_int8)
    before = (folder / "model.onnx").stat().st_ino
    put(cache, tiny_int8)
    assert (folder / "model.onnx").stat().st_ino == before
    (folder / "model.onnx").write_bytes(b"x")
    (entry,) = cache.find("tiny")
    assert cache.damage(entry)
    put(cache, tiny_int8)
    assert not cache.damage(entry)
    assert [p.name for p in (cache.home / "models").iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_was_put_there_otherwise_is_left_alone(cache, tiny_int8):
    (cache.home / "models" / "tiny").mkdir(parents=True)
    (cache.home / "models" / "tiny" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="put there otherwise"):
        put(cache, tiny_int8)
    assert (cache.home / "models" / "tiny" / "mine").read_text() == "mine"


def test_leftovers_of_killed_builders_go_and_those_of_the_living_stay(cache):
    models = cache.home / "models"
    host = _host()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive, young = (
        models / f"{BUILDING}{host}-{ended.pid}-a",
        models / f"{BUILDING}{host}-{os.getpid()}-b",
        models / f"{BUILDING}{host}-{ended.pid}-c",
    )
    for folder in (dead, alive, young):
        folder.mkdir(parents=True)
    for folder in (dead, alive):
        os.utime(folder, (time.time() - 7200,) * 2)
    with cache.building():
        pass
    assert {p for p in models.iterdir() if p.is_dir()} == {alive, young}


def test_removing_takes_the_folder_and_its_name(cache, tiny_int8):
    put(cache, tiny_int8)
    (entry,) = cache.find("tiny")
    cache.remove(entry)
    assert list((cache.home / "models").iterdir()) == []
    with pytest.raises(ModelNotFoundError, match="an empty cache"):
        cache.find("tiny")


@pytest.mark.parametrize("name", ["..", ".", "/etc", "../models", "*", ""])
def test_removing_reaches_nothing_else(name, cache, tiny_int8):
    put(cache, tiny_int8)
    with pytest.raises(ModelNotFoundError):
        cache.find(name)


def test_a_home_that_cannot_be_written_is_one_typed_error(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="QINGYU_HOME"):
        fill(Cache(tmp_path / "file"))
    with pytest.raises(OutputError, match="QINGYU_HOME"):
        fill(Cache(Path("~/.cache/qingyu")))


def test_a_source_that_fails_leaves_the_cache_usable(hub, cache):
    hub.faults["model.safetensors"] = hub.Faults(status=404)
    with pytest.raises(SourceError):
        fill(cache)
    hub.faults.clear()
    assert contents(fill(cache)) == hub.files
