"""A home that others can write to is neither read by name nor written; one of this user's own is made for it alone."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from qingyu import Embedder
from qingyu.errors import UnsafeFolderError
from qingyu.models.cache import Cache
from qingyu.runtime.bundle import bundle, open_bundle
from qingyu.runtime.home import check_home, own_folder

if not hasattr(os, "geteuid"):
    pytest.skip("owners and modes are those of POSIX", allow_module_level=True)

STRANGER = 4242


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_int8) -> Path:
    """A sound home with the tiny model as ``tiny``."""
    home = tmp_path / "home"
    monkeypatch.setenv("QINGYU_HOME", str(home))
    shutil.copytree(tiny_int8, own_folder(home, "models") / "tiny")
    return home


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's from now on; without the right to do that, this process is somebody else from now on."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr("os.geteuid", lambda: STRANGER)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_what_is_made_is_for_this_user_alone_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        own_folder(tmp_path / "deep" / "home", "models", "x")
        assert [mode(tmp_path / "deep" / "home" / name) for name in ("", "models", "models/x")] == [0o700] * 3
        cache = Cache(tmp_path / "other")
        with cache.building() as made:
            assert mode(made) == 0o700
        assert mode(cache.home) == mode(cache.home / "models") == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("place", ["", "models", "models/tiny"])
def test_a_folder_that_everybody_may_write_to_is_refused(home, place):
    with Embedder.open("tiny"):
        pass
    (home / place).chmod(0o777)
    with pytest.raises(UnsafeFolderError, match=r"cannot be trusted: .*, found mode 0777\. Set QINGYU_HOME"):
        Embedder.open("tiny")
    # By its own path it is the caller's choice.
    with Embedder.open(home / "models" / "tiny"):
        pass


@pytest.mark.parametrize("place", ["", "models", "models/tiny"])
def test_a_folder_of_somebody_else_is_refused(home, place, monkeypatch):
    give_away(home / place, monkeypatch)
    with pytest.raises(UnsafeFolderError, match="of the user with the number"):
        Embedder.open("tiny")


def test_a_link_of_somebody_else_is_refused_and_one_of_our_own_followed(home, tmp_path, monkeypatch):
    shutil.move(home / "models" / "tiny", tmp_path / "elsewhere")
    (home / "models" / "tiny").symlink_to(tmp_path / "elsewhere")
    with Embedder.open("tiny"):
        pass
    give_away(home / "models" / "tiny", monkeypatch)
    with pytest.raises(UnsafeFolderError, match="of the user with the number"):
        Embedder.open("tiny")


def test_a_link_to_a_folder_of_somebody_else_is_refused(home, tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a folder of another user")
    (tmp_path / "theirs").mkdir()
    give_away(tmp_path / "theirs", monkeypatch)
    (home / "models" / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(UnsafeFolderError, match="found a link to one of the user with the number 4242"):
        check_home(home, "models", "link")


def test_a_group_may_share_a_home_and_root_may_own_it(home):
    for place in (home, home / "models"):
        place.chmod(0o2775)
    with Embedder.open("tiny"):
        pass


def test_whoever_trusts_such_a_home_says_so(home, monkeypatch):
    home.chmod(0o777)
    monkeypatch.setenv("QINGYU_TRUST_HOME", "1")
    with Embedder.open("tiny"):
        pass


@pytest.mark.parametrize("place", ["", "models", "locks", "records", "checkpoints"])
def test_nothing_is_written_into_a_home_of_others(home, place):
    own_folder(home, *filter(None, [place]))
    (home / place).chmod(0o777)
    before = sorted(home.rglob("*"))
    cache = Cache(home)
    with pytest.raises(UnsafeFolderError):
        _write_everything(cache)
    if place in ("", "models"):
        assert sorted(home.rglob("*")) == before


def _write_everything(cache: Cache) -> None:
    from qingyu.models.cache import Record

    with cache.building():
        pass
    cache._write_record("a@b", Record("hub", "a", "main", "b"))
    with cache.lock("x"):
        pass
    cache.find_checkpoint("a", None)


def test_removing_from_a_home_of_others_is_refused(home):
    (entry,) = Cache(home).find("tiny")
    home.chmod(0o777)
    with pytest.raises(UnsafeFolderError):
        Cache(home).remove(entry)
    assert entry.folder.is_dir()


@pytest.mark.parametrize("place", ["", "bundles"])
def test_a_bundle_is_unpacked_for_the_process_where_others_could_change_it(home, place, tiny_int8, tmp_path):
    path = tmp_path / "tiny.qingyu"
    bundle(tiny_int8, path)
    assert open_bundle(path).is_relative_to(home)
    (home / place).chmod(0o777)
    found = open_bundle(path)
    assert not found.is_relative_to(home)
    assert found.stat().st_uid == os.geteuid()
    assert not mode(found) & 0o022


def test_a_pass_of_the_self_check_is_not_believed_from_a_home_of_others(home, tiny_int8):
    def memos() -> list[Path]:
        return list((home / "selfcheck").glob("*.json"))

    with Embedder.open(tiny_int8) as embedder:
        embedder.load()
    (memo,) = memos()
    memo.unlink()
    home.chmod(0o777)
    with Embedder.open(tiny_int8) as embedder:
        embedder.load()
    assert memos() == [], "it was checked, and nothing noted there"
