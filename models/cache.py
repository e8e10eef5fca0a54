"""Checkpoints and models under ``$QINGYU_HOME``, one folder a model and revision.

    checkpoints/OWNER--NAME@REVISION/       files as the source gave them
    records/OWNER--NAME@REVISION.json       size and SHA-256 of each; stays when the files are removed
    models/NAME@REVISION.RECIPE/            a model folder
    models/NAME                             a link to the one that was pulled last: what ``Embedder.open(NAME)`` opens
    bundles/                                unpacked bundles, which ``qingyu.runtime.bundle`` keeps
    locks/                                  so that two processes do not do the same work twice

Nothing depends on the locks but that work. Every file and folder is made under a name of its process's own and
renamed when it is whole and checked; a folder never mixes revisions, because the revision is in its name. Where the
catalogue and the source tell no hash, the first download is recorded and later ones must match it.

A home that others can write to is refused (``qingyu.runtime.home``), for reading by name as for writing.

Not here: where files come from (``qingyu.models.sources``), and making models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qingyu.errors import CorruptFileError, ManifestError, ModelNotFoundError, OutputError
from qingyu.models.sources.download import download, git_sha1
from qingyu.models.sources.http import Limits
from qingyu.models.sources.listing import RemoteFile, Snapshot
from qingyu.runtime.home import check_home, own_folder
from qingyu.runtime.spec import FileRecord, check_file, decode, read_spec, sha256_of

__all__ = ["Cache", "CacheEntry", "Record"]

Kind = Literal["model", "checkpoint", "bundle"]
KIND_FOLDERS: Mapping[Kind, str] = {"model": "models", "checkpoint": "checkpoints", "bundle": "bundles"}
LOCK_SECONDS = 1800.0  # then the holder is taken for dead, and the work is done twice at worst
LEFTOVER_SECONDS = 86_400.0  # of a building folder whose process cannot be asked
BUILDING = ".building-"
CHANGED = {
    "the catalogue": "Do not use it; try another source with --from.",
    "the first download": "Find out why before you trust it; `qingyu cache remove --records NAME` forgets the first.",
}


@dataclass(frozen=True)
class Record:
    """What was downloaded of a repository at a revision; ``asked`` is the branch, tag or commit that was asked for."""

    source: str
    repository: str
    asked: str
    revision: str
    files: Mapping[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache; ``label`` is its name there, ``current`` whether its model's name leads to it."""

    kind: Kind
    label: str
    folder: Path
    bytes: int
    current: bool = False


class Cache:
    """The cache in one home folder, which is made when something is written."""

    def __init__(self, home: Path) -> None:
        self.home = home

    # --- checkpoints

    def checkpoint(self, snapshot: Snapshot) -> Path:
        """Where the files of a snapshot are, or will be."""
        return self.home / "checkpoints" / _key(snapshot.repository, snapshot.revision)

    def download(
        self,
        snapshot: Snapshot,
        *,
        known: Mapping[str, FileRecord] | None = None,
        limits: Limits | None = None,
    ) -> Iterator[int]:
        """Bring what is missing or damaged of a snapshot, yielding bytes as they come; at the end all are there.

        ``known`` are sizes and hashes that files must have, whatever the source says. Yields less than nothing when
        a transfer begins anew. Raises ``SourceError``, ``CorruptFileError`` and ``OutputError``.
        """
        folder = self.checkpoint(snapshot)
        key = _key(snapshot.repository, snapshot.revision)
        with self._writing(folder):
            own_folder(self.home, "checkpoints", key)
        with self.lock(key):
            record = self._record(key) or _new_record(snapshot)
            wanted = [_expected(file, known or {}, record, snapshot) for file in snapshot.files]
            for file in wanted:
                yield from _bring(file, snapshot, folder, limits or Limits())
                found = FileRecord((folder / file.path).stat().st_size, sha256_of(folder / file.path))
                record = dataclasses.replace(record, files={**record.files, file.path: found})
                self._write_record(key, record)

    def find_checkpoint(self, repository: str, asked: str | None) -> tuple[Path, Record] | None:
        """The whole checkpoint of a repository that is here: of the revision, or the one downloaded last."""
        found = []
        check_home(self.home, "records")
        check_home(self.home, "checkpoints")
        for path in (self.home / "records").glob("*.json"):
            record = self._record(path.stem)
            if record is None or record.repository != repository:
                continue
            folder = self.home / "checkpoints" / path.stem
            matches = asked is None or asked in (record.asked, record.revision)
            if matches and not list(_damage(folder, record)):
                found.append((path.stat().st_mtime_ns, folder, record))
        return max(found, key=lambda item: item[0])[1:] if found else None

    def _record(self, key: str) -> Record | None:
        path = self.home / "records" / f"{key}.json"
        try:
            return decode(Record, json.loads(path.read_bytes()), origin=str(path))
        except (OSError, ValueError, RecursionError, ManifestError):
            return None

    def _write_record(self, key: str, record: Record) -> None:
        path = self.home / "records" / f"{key}.json"
        text = json.dumps(dataclasses.asdict(record), ensure_ascii=False, indent=1) + "\n"
        with self._writing(path):
            self._folder("records")
            handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(name).replace(path)

    # --- models

    def model_folder(self, name: str, revision: str, recipe: str) -> Path:
        """Where the model of a name, revision and recipe is, or will be."""
        return self.home / "models" / f"{_plain(name)}@{_short(revision)}.{recipe}"

    def find_model(self, name: str, revision: str | None, recipe: str) -> Path | None:
        """The whole model folder of a name and recipe that is here: of the revision, or the one made last."""
        found = []
        check_home(self.home, "models")
        for folder in (self.home / "models").glob(f"{_plain(name)}@*.{recipe}"):
            of = folder.name.removeprefix(f"{_plain(name)}@").removesuffix(f".{recipe}")
            if (revision is None or of == _short(revision)) and self.is_whole(folder):
                found.append((folder.stat().st_mtime_ns, folder))
        return max(found)[1] if found else None

    def is_whole(self, folder: Path) -> bool:
        """Whether a model folder has all its files with their hashes."""
        return folder.is_dir() and not list(_model_damage(folder))

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """A folder to make models in, gone at the end; what killed processes left there is removed first."""
        with self._writing(self.home / "models"):
            parent = self._folder("models")
            for left in parent.glob(f"{BUILDING}*"):
                if _is_left(left):
                    shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=f"{BUILDING}{_host()}-{os.getpid()}-", dir=parent))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def publish(self, built: Path, folder: Path) -> None:
        """Move a whole model folder to its place. One that is there already and sound stays; a damaged one goes."""
        with self._writing(folder):
            if folder.exists() and not self.is_whole(folder):
                self._put_aside(folder)
            try:
                built.rename(folder)
            except OSError:
                if not self.is_whole(folder):  # else another process was first
                    raise

    def make_current(self, name: str, folder: Path) -> None:
        """Let the plain name lead to a model folder."""
        link = folder.parent / _plain(name)
        if link.is_dir() and not link.is_symlink():
            raise OutputError(
                f"cannot let {name!r} name the model that was pulled",
                expected=f"no folder at {link}",
                found="a model folder that was put there otherwise",
                remedy=f"Move it away, or use the name {folder.name}.",
            )
        with self._writing(link):
            new = Path(tempfile.mkdtemp(prefix=BUILDING, dir=folder.parent))
            try:
                (new / "link").symlink_to(folder.name, target_is_directory=True)
                (new / "link").replace(link)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    # --- all of it

    def entries(self) -> list[CacheEntry]:
        """What is here, by kind and name."""
        return [
            CacheEntry(kind, folder.name, folder, _size(folder), self._is_current(folder))
            for kind, place in KIND_FOLDERS.items()
            for folder in sorted(_visible(self.home / place))
        ]

    def find(self, name: str) -> list[CacheEntry]:
        """The entries that a label, a model's name or a repository means.

        Raises ``ModelNotFoundError`` when there are none.
        """
        plain = name.replace("/", "--")
        found = [entry for entry in self.entries() if plain in (entry.label, entry.label.partition("@")[0])]
        if not found:
            raise ModelNotFoundError(
                f"no {name!r} in the cache",
                expected=f"a name that `qingyu cache list` shows, in {self.home}",
                found=", ".join(entry.label for entry in self.entries()[:8]) or "an empty cache",
                remedy="Get it with `qingyu pull`.",
            )
        return found

    def damage(self, entry: CacheEntry) -> list[CorruptFileError]:
        """What is wrong with the files of an entry."""
        if entry.kind != "checkpoint":
            return list(_model_damage(entry.folder))
        record = self._record(entry.label)
        if record is None:
            return [_no_record(entry)]
        return list(_damage(entry.folder, record))

    def remove(self, entry: CacheEntry) -> None:
        """Take an entry away: out of sight at once, then from the disk. Records of hashes stay."""
        with self._writing(entry.folder):
            for link in _links(entry.folder):
                link.unlink(missing_ok=True)
            self._put_aside(entry.folder)

    def forget(self, name: str) -> list[str]:
        """Remove the records of a repository, or of one label; which they were."""
        plain = name.replace("/", "--")
        found = [
            path
            for path in sorted((self.home / "records").glob("*.json"))
            if plain in (path.stem, path.stem.partition("@")[0])
        ]
        for path in found:
            with self._writing(path):
                path.unlink(missing_ok=True)
        return [path.stem for path in found]

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time, where the file system can; nobody waits for ever."""
        try:
            from filelock import FileLock, Timeout
        except ImportError:
            yield
            return
        with self._writing(self.home):
            held = FileLock(self._folder("locks") / f"{_plain(name)}.lock", timeout=LOCK_SECONDS)
        with contextlib.ExitStack() as stack:
            try:
                held.acquire()
                stack.callback(held.release)
            except (Timeout, OSError, NotImplementedError) as error:
                warnings.warn(f"going on without a lock: {error}", stacklevel=3)
            yield

    def _folder(self, name: str) -> Path:
        return own_folder(self.home, name)

    def _put_aside(self, folder: Path) -> None:
        aside = Path(tempfile.mkdtemp(prefix=BUILDING, dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):
            folder.rename(aside / "old")
        shutil.rmtree(aside, ignore_errors=True)

    def _is_current(self, folder: Path) -> bool:
        return bool(_links(folder))

    @contextlib.contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        if not self.home.is_absolute():
            raise _cannot_write(place, "a home folder that is not known")
        check_home(self.home)
        try:
            yield
        except OSError as error:
            raise _cannot_write(place, error.strerror or str(error)) from None


def _cannot_write(place: Path, found: str) -> OutputError:
    remedy = "Free space (see `qingyu cache list`), or set QINGYU_HOME to a folder that can be written."
    return OutputError(
        f"cannot write {place}", expected="a place that can be written", found=found, remedy=remedy
    )


def _bring(file: RemoteFile, snapshot: Snapshot, folder: Path, limits: Limits) -> Iterator[int]:
    target = folder / file.path
    if _is_as_expected(target, file):
        yield target.stat().st_size
        return
    try:
        yield from download(file, snapshot.requests[file.path], target, limits=limits)
    except OutputError:
        if not _is_as_expected(target, file):  # else another process was first, and took our beginning away
            raise


def _is_as_expected(path: Path, file: RemoteFile) -> bool:
    """Whether a file is there that the source, or the record, says is right; a file nothing is known of is not."""
    if not path.is_file() or path.is_symlink() or file.bytes != path.stat().st_size:
        return False
    if file.sha256 is not None:
        return sha256_of(path) == file.sha256
    return file.git_sha1 is not None and git_sha1(path) == file.git_sha1


def _expected(
    file: RemoteFile, known: Mapping[str, FileRecord], record: Record, snapshot: Snapshot
) -> RemoteFile:
    """The file with all that is known of it; ``CorruptFileError`` when the source says otherwise."""
    told = {"the catalogue": known.get(file.path), "the first download": record.files.get(file.path)}
    for who, fact in told.items():
        if fact is None:
            continue
        pairs = (("bytes", file.bytes, fact.bytes), ("sha256", file.sha256, fact.sha256))
        for what, found, expected in pairs:
            if found is not None and found != expected:
                raise CorruptFileError(
                    f"{file.path} of {snapshot.repository} at {snapshot.source} has changed",
                    expected=f"{what} {expected}, by {who}",
                    found=f"{what} {found}",
                    remedy=CHANGED[who],
                )
        file = dataclasses.replace(file, bytes=fact.bytes, sha256=fact.sha256)
    return file


def _new_record(snapshot: Snapshot) -> Record:
    return Record(snapshot.source, snapshot.repository, snapshot.asked, snapshot.revision)


def _damage(folder: Path, record: Record) -> Iterator[CorruptFileError]:
    yield from _damaged_files(folder, record.files)
    if not record.files:
        yield from _damaged_files(folder, {"config.json": FileRecord(0, "")})


def _model_damage(folder: Path) -> Iterator[CorruptFileError]:
    try:
        spec = read_spec(folder)
    except (ManifestError, ModelNotFoundError, OSError) as error:
        yield CorruptFileError(
            f"{folder} is damaged",
            expected="a model folder",
            found=str(error),
            remedy="Pull the model again.",
        )
        return
    yield from _damaged_files(folder, spec.files)


def _damaged_files(folder: Path, files: Mapping[str, FileRecord]) -> Iterator[CorruptFileError]:
    for name, file in files.items():
        found = _damaged_file(folder, name, file)
        if found is not None:
            yield found


def _damaged_file(folder: Path, name: str, file: FileRecord) -> CorruptFileError | None:
    try:
        check_file(folder, name, file)
    except CorruptFileError as error:
        return error
    return None


def _no_record(entry: CacheEntry) -> CorruptFileError:
    return CorruptFileError(
        f"{entry.folder} cannot be checked",
        expected="a record of its hashes",
        found="none",
        remedy="Pull the model again.",
    )


def _key(repository: str, revision: str) -> str:
    return f"{_plain(repository.replace('/', '--'))}@{_short(revision)}"


def _plain(name: str) -> str:
    """A name as a file's: whatever else is in it becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9._@-]", "-", name).lstrip(".-") or "-"


def _short(revision: str) -> str:
    """A commit cut to the twelve digits that name it in practice; another revision as it is."""
    return revision[:12] if re.fullmatch(r"[0-9a-f]{40}", revision) else _plain(revision)


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."
    ]


def _links(folder: Path) -> list[Path]:
    return [
        path for path in folder.parent.iterdir() if path.is_symlink() and path.readlink() == Path(folder.name)
    ]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:24] or "host"


def _is_left(folder: Path) -> bool:
    """Whether a building folder is an hour old and its process, if of this host, gone; or a day old."""
    age = 0.0
    with contextlib.suppress(OSError):
        age = time.time() - folder.stat().st_mtime
    host, _, rest = folder.name.removeprefix(BUILDING).partition("-")
    pid = rest.partition("-")[0]
    if host == _host() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return age > 3600
        except OSError:
            pass
    return age > LEFTOVER_SECONDS
