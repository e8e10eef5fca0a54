"""A bundle is the model folder, whole, and a file of any other form is refused before anything is written."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from qingyu.errors import (
    BundleError,
    CorruptFileError,
    ManifestError,
    ModelNotFoundError,
    OutputError,
    QingyuError,
)
from qingyu.runtime import bundle as module
from qingyu.runtime.bundle import bundle, open_bundle, unbundle
from qingyu.runtime.embedder import Embedder

TEXTS = ["今天天气真好", "外面阳光明媚"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def good(tiny_int8, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "tiny.qingyu"
    bundle(tiny_int8, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_gives_the_vectors_of_its_folder(good, tiny_int8, home):
    with Embedder.open(tiny_int8) as folder, Embedder.open(good) as file:
        assert np.array_equal(folder.embed(TEXTS), file.embed(TEXTS))
        assert file.folder.parent == home / "bundles"


def test_unbundling_gives_back_the_same_files(good, tiny_int8, tmp_path, home):
    unbundle(good, tmp_path / "out" / "back")
    assert files(tmp_path / "out" / "back") == files(tiny_int8)


def test_the_same_folder_gives_the_same_bytes(good, tiny_int8, tmp_path):
    digest = bundle(tiny_int8, tmp_path / "again.qingyu")
    assert (tmp_path / "again.qingyu").read_bytes() == good.read_bytes()
    assert digest == hashlib.sha256(good.read_bytes()).hexdigest()


def test_zip_tools_read_a_bundle(good, tiny_int8):
    with zipfile.ZipFile(good) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == files(tiny_int8)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_damaged_folder_is_not_bundled(tiny_int8, tmp_path):
    shutil.copytree(tiny_int8, tmp_path / "model")
    data = bytearray((tmp_path / "model" / "model.onnx").read_bytes())
    data[100] ^= 1
    (tmp_path / "model" / "model.onnx").write_bytes(data)
    with pytest.raises(CorruptFileError):
        bundle(tmp_path / "model", tmp_path / "x.qingyu")
    assert not list(tmp_path.glob("*.qingyu"))
    assert not list(tmp_path.glob(".x*"))


def test_a_file_that_is_there_is_replaced_only_when_asked(tiny_int8, tmp_path):
    (tmp_path / "x.qingyu").write_text("mine")
    with pytest.raises(OutputError, match="one that is there"):
        bundle(tiny_int8, tmp_path / "x.qingyu")
    assert (tmp_path / "x.qingyu").read_text() == "mine"
    bundle(tiny_int8, tmp_path / "x.qingyu", overwrite=True)
    assert zipfile.is_zipfile(tmp_path / "x.qingyu")


def test_unbundling_leaves_a_folder_with_files_alone(good, tmp_path, home):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="new or empty"):
        unbundle(good, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# --- hostile archives


def rezip(source: Path, target: Path, change=None, *, compression=zipfile.ZIP_STORED, extra=()) -> Path:
    """The same contents by Python's zipfile; ``extra`` are (ZipInfo or name, data) added at the end."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            name = zipfile.ZipInfo(info.filename, (1980, 1, 1, 0, 0, 0))
            name.external_attr = info.external_attr
            name.compress_type = compression
            if change is not None:
                change(name)
            new.writestr(name, old.read(info))
        for name, data in extra:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile's own, about a name that is there twice
                new.writestr(name, data)
    return target


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def as_link(info: zipfile.ZipInfo) -> None:
    if info.filename == "model.onnx":
        info.external_attr = (stat.S_IFLNK | 0o777) << 16


def as_traversal(info: zipfile.ZipInfo) -> None:
    if info.filename == "model.onnx":
        info.filename = "../model.onnx"


HOSTILE = {
    "a path out of the folder": lambda good, to: rezip(good, to, as_traversal),
    "one file more": lambda good, to: rezip(good, to, extra=[("run.py", b"import os")]),
    "an absolute path": lambda good, to: rezip(good, to, extra=[("/etc/x", b"x")]),
    "a folder": lambda good, to: rezip(good, to, extra=[("sub/", b"")]),
    "a link": lambda good, to: rezip(good, to, as_link),
    "a link more": lambda good, to: rezip(good, to, extra=[(link("l"), b"/etc/passwd")]),
    "a name twice": lambda good, to: rezip(good, to, extra=[("qingyu.json", b"{}")]),
    "compression": lambda good, to: rezip(good, to, compression=zipfile.ZIP_DEFLATED),
    "something behind": lambda good, to: to.write_bytes(good.read_bytes() + b"x"),
    "something before": lambda good, to: to.write_bytes(b"#!/bin/sh\n" + good.read_bytes()),
    "nothing": lambda good, to: to.write_bytes(b""),
    "only zeros": lambda good, to: to.write_bytes(bytes(10_000)),
    "an empty archive": lambda good, to: zipfile.ZipFile(to, "w").close(),
    "HTML": lambda good, to: to.write_bytes(b"<html>" * 100),
    "a bomb of zeros": lambda good, to: rezip(
        good, to, compression=zipfile.ZIP_DEFLATED, extra=[("z", bytes(50_000_000))]
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_archive_of_another_form_is_refused_and_nothing_written(kind, good, tmp_path, home):
    path = tmp_path / "hostile.qingyu"
    HOSTILE[kind](good, path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError):
        open_bundle(path)
    with pytest.raises(BundleError):
        unbundle(path, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_bundle_is_refused(share, good, tmp_path, home):
    data = good.read_bytes()
    (tmp_path / "x").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(QingyuError):
        open_bundle(tmp_path / "x")


def test_no_flipped_bit_gets_through(good, tmp_path, home):
    """In headers, names, manifest and directory every byte; in the large files a sample."""
    data = good.read_bytes()
    random = np.random.default_rng(5)
    central = data.rindex(b"PK\5\6") - 400
    places = {*range(0, 120), *range(central, len(data)), *random.integers(0, len(data), 60).tolist()}
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        (tmp_path / "x").write_bytes(changed)
        with pytest.raises((BundleError, CorruptFileError, ManifestError)):
            open_bundle(tmp_path / "x")
    assert not [path for path in (home / "bundles").rglob("*") if path.is_file()]


def test_entries_that_share_bytes_are_refused(good, tmp_path, home):
    """The directory of an overlapping bomb: every entry at the same offset."""
    with good.open("rb") as stream:
        entries = module._read_entries(good, stream)
    forged = [module._Entry(entry.name, entry.size, entry.crc, entries[0].offset) for entry in entries]
    size = good.stat().st_size
    body = good.read_bytes()[: entries[-1].end]
    directory = b"".join(entry.central() for entry in forged)
    end = module._END.pack(b"PK\5\6", 0, 0, len(forged), len(forged), len(directory), len(body), 0)
    (tmp_path / "x").write_bytes(body + directory + end)
    assert (tmp_path / "x").stat().st_size == size
    with pytest.raises(BundleError, match="directory"):
        open_bundle(tmp_path / "x")


def test_sizes_that_promise_more_than_there_is_are_refused(good, tmp_path, home):
    entries = [
        module._Entry(b"qingyu.json", 100, zlib.crc32(b""), 0),
        module._Entry(b"z", 4_000_000_000, 0, 141),
    ]
    (tmp_path / "x").write_bytes(b"".join(e.local() for e in entries) + module._tail(entries))
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "x")


def test_what_is_not_a_file_is_never_opened(tmp_path, home):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelNotFoundError, match="not a file"):
        open_bundle(tmp_path / "pipe")


# --- unpacking


def test_a_damaged_unpacked_folder_is_unpacked_again(good, home):
    folder = open_bundle(good)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[50] ^= 8
    (folder / "model.onnx").write_bytes(data)
    assert open_bundle(good) == folder
    with Embedder.open(good) as embedder:
        assert embedder.embed(TEXTS).shape == (2, 32)
    assert [path.name for path in (home / "bundles").iterdir()] == [folder.name]


def test_where_the_home_cannot_be_written_a_temporary_folder_serves(good, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QINGYU_HOME", str(tmp_path / "file"))
    folder = open_bundle(good)
    assert not folder.is_relative_to(tmp_path / "file")
    assert open_bundle(good) == folder
    with Embedder.open(good) as embedder:
        assert embedder.embed(TEXTS).shape == (2, 32)


PROGRAM = """
import sys
from qingyu.runtime.bundle import open_bundle
from pathlib import Path
print(open_bundle(Path(sys.argv[1])))
"""


def test_the_temporary_folder_is_gone_with_its_process(good, tmp_path):
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "QINGYU_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(good)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_eight_processes_that_open_at_once_leave_one_folder(good, tmp_path):
    environment = {**os.environ, "QINGYU_HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(good)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 8
    assert len(said) == 1
    assert len(list((tmp_path / "bundles").iterdir())) == 1


def test_a_pickled_embedder_of_a_bundle_opens_the_bundle_again(good, home):
    with Embedder.open(good) as embedder:
        data = pickle.dumps(embedder)
    shutil.rmtree(home)
    with pickle.loads(data) as again:
        assert again.embed(TEXTS).shape == (2, 32)


def test_opening_a_bundle_imports_the_runtime_only(good, home):
    others = "('onnx', 'safetensors', 'huggingface_hub', 'filelock')"
    code = PROGRAM + f"\nprint(*[m for m in sys.modules if m.partition('.')[0] in {others}])"
    done = subprocess.run([sys.executable, "-c", code, str(good)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == ""
