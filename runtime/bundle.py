"""A model folder as one file: a zip archive without compression, of one form only.

The form is canonical: the manifest first, then its files by name, stored, with fixed dates and attributes, nothing
before, between or behind them. A reader writes down what the headers of such an archive must be and compares bytes;
so links, paths, duplicates, overlaps, hidden or trailing data and compression bombs need no rules of their own, and
every zip tool can read what is written. Each file must have the SHA-256 that the manifest gives. Nothing in a
bundle is code.

A bundle is opened by unpacking it once, into ``$QINGYU_HOME/bundles`` under the hash of its manifest, or into a
temporary folder where that cannot be written, or others can write there. Not here: archives of 4 GiB and more (zip64).
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from qingyu.errors import BundleError, CorruptFileError, ManifestError, ModelNotFoundError, OutputError
from qingyu.runtime.home import distrusted, own_folder, qingyu_home
from qingyu.runtime.spec import (
    MANIFEST,
    MANIFEST_LIMIT,
    FileRecord,
    ModelSpec,
    check_file,
    read_spec,
    sha256_of,
)

__all__ = ["bundle", "open_bundle", "unbundle"]

MOST_BYTES = (1 << 32) - 1
MOST_FILES = 64
PIECE = 1 << 18

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_VERSION = 20  # what any unzip of the last thirty years reads
_UNIX = 3 << 8
_DATE = 0x21  # 1980-01-01, the first that a zip archive can hold
_MODE = 0o100644 << 16


@dataclass(frozen=True)
class _Entry:
    """One file of the archive; ``offset`` is that of its local header."""

    name: bytes
    size: int
    crc: int
    offset: int

    @property
    def start(self) -> int:
        """Where its bytes begin."""
        return self.offset + _LOCAL.size + len(self.name)

    @property
    def end(self) -> int:
        """Where they end, and the next header begins."""
        return self.start + self.size

    def local(self) -> bytes:
        sizes = (self.crc, self.size, self.size, len(self.name), 0)
        return _LOCAL.pack(b"PK\3\4", _VERSION, 0, 0, 0, _DATE, *sizes) + self.name

    def central(self) -> bytes:
        sizes = (self.crc, self.size, self.size, len(self.name), 0, 0, 0, 0, _MODE, self.offset)
        return _CENTRAL.pack(b"PK\1\2", _UNIX | _VERSION, _VERSION, 0, 0, 0, _DATE, *sizes) + self.name


def bundle(folder: Path, output: Path, *, overwrite: bool = False) -> str:
    """Write the model folder as the one file ``output``, whole or not at all; the SHA-256 of that file.

    The same folder gives the same bytes. Raises what ``read_spec`` raises, ``CorruptFileError`` for a file that does
    not have its hash, and ``OutputError``.
    """
    spec = read_spec(folder)
    for name, record in spec.files.items():
        check_file(folder, name, record)
    names = [MANIFEST, *sorted(spec.files)]
    if os.path.lexists(output) and not (overwrite and output.is_file()):
        _cannot_write(output, "a new file", "one that is there", "Name another, or allow overwriting.")
    with _writing(output), _beside(output) as temporary:
        with temporary.open("wb") as stream:
            _write_archive(stream, folder, names)
            _sync(stream)
        _check_contents(temporary, spec)
        found = sha256_of(temporary)
        temporary.replace(output)
    return found


def unbundle(path: Path, folder: Path) -> ModelSpec:
    """Write the model folder that a bundle holds, whole or not at all; ``folder`` must be new or empty.

    Raises ``BundleError``, ``ManifestError``, ``ModelNotFoundError``, ``CorruptFileError`` and ``OutputError``.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        _cannot_write(folder, "a new or empty folder", "something that is there", "Name another folder.")
    with _opened(path) as archive, _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = _unpack(archive, folder.parent)
        try:
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return archive.spec


def open_bundle(path: Path) -> Path:
    """The folder of an unpacked bundle, its files checked against their hashes; it is unpacked when it must be.

    Several processes may do so at once: each unpacks for itself, and a rename decides. A damaged folder is
    replaced. Raises ``BundleError``, ``ManifestError``, ``CorruptFileError``, and ``OutputError`` when not even a
    temporary folder can be written.
    """
    with _opened(path) as archive:
        home = qingyu_home() / "bundles"
        target = home / archive.digest
        ours = home.is_absolute() and not distrusted(qingyu_home(), "bundles", archive.digest)
        if ours and _is_whole(target, archive.spec):
            return target
        if ours:
            with contextlib.suppress(OSError):
                own_folder(qingyu_home(), "bundles")
                return _unpack_to(archive, target)
        return _unpack_for_process(archive)


@dataclass(frozen=True)
class _Archive:
    """A bundle whose form and manifest were found sound; ``digest`` is the manifest's SHA-256."""

    path: Path
    stream: BinaryIO
    entries: Sequence[_Entry]
    manifest: bytes
    spec: ModelSpec

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.manifest).hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    # A pipe or a device is never opened: reading it might not end.
    if not path.is_file():
        found = "something that is not a file" if path.exists() else "nothing there"
        raise ModelNotFoundError(
            f"no bundle at {path}", expected="a file", found=found, remedy="Check the path."
        )
    try:
        with path.open("rb") as stream:
            yield _read_archive(path, stream)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read",
            expected="a readable file",
            found=error.strerror or type(error).__name__,
            remedy="Make the file readable for this user.",
        ) from None


def _read_archive(path: Path, stream: BinaryIO) -> _Archive:
    entries = _read_entries(path, stream)
    if entries[0].name != MANIFEST.encode() or entries[0].size > MANIFEST_LIMIT:
        _refuse(path, f"{MANIFEST} first", repr(entries[0].name))
    stream.seek(entries[0].start)
    manifest = stream.read(entries[0].size)
    try:
        spec = ModelSpec.from_json(manifest.decode("utf-8"), origin=f"{path}: {MANIFEST}")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: {MANIFEST} is not text", expected="UTF-8", found=str(error), remedy=_REMEDY
        ) from None
    wanted = [(MANIFEST, len(manifest)), *((name, spec.files[name].bytes) for name in sorted(spec.files))]
    if [(entry.name.decode("latin-1"), entry.size) for entry in entries] != wanted:
        _refuse(path, "the files that its manifest names", f"{len(entries)} others")
    if zlib.crc32(manifest) != entries[0].crc:
        _refuse(path, f"the checksum of {MANIFEST}", "another")
    return _Archive(path, stream, entries, manifest, spec)


def _read_entries(path: Path, stream: BinaryIO) -> list[_Entry]:
    """The entries, when the bytes around them are exactly those that this module writes for them."""
    size = stream.seek(0, os.SEEK_END)
    if not _END.size < size <= MOST_BYTES:
        _refuse(path, f"{_END.size + 1} to {MOST_BYTES:,} bytes", f"{size:,} bytes")
    stream.seek(size - _END.size)
    fields = _END.unpack(stream.read(_END.size))
    count, directory_size, directory = fields[4], fields[5], fields[6]
    if fields[0] != b"PK\5\6" or directory + directory_size + _END.size != size:
        _refuse(path, "a zip archive with nothing behind it", "something else")
    if not 1 <= count <= MOST_FILES:
        _refuse(path, f"1 to {MOST_FILES} files", str(count))
    stream.seek(directory)
    tail = stream.read(directory_size + _END.size)
    entries = _parse_directory(path, tail, count)
    if tail != _tail(entries):
        _refuse(path, "the directory of a bundle", "another form of zip archive")
    for entry in entries:
        stream.seek(entry.offset)
        if stream.read(_LOCAL.size + len(entry.name)) != entry.local():
            _refuse(path, "the same header twice for each file", "two that differ")
    return entries


def _parse_directory(path: Path, tail: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    position = offset = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(tail):
            _refuse(path, f"{count} files", f"{len(entries)}")
        fields = _CENTRAL.unpack_from(tail, position)
        crc, size, length = fields[7], fields[9], fields[10]
        position += _CENTRAL.size + length
        entries.append(_Entry(tail[position - length : position], size, crc, offset))
        offset = entries[-1].end  # not what the archive says: entries must follow one another
        if offset > MOST_BYTES:
            _refuse(path, f"at most {MOST_BYTES:,} bytes", "files that say they are larger")
    return entries


def _tail(entries: Sequence[_Entry]) -> bytes:
    """The directory and the end record."""
    directory = b"".join(entry.central() for entry in entries)
    counts = (0, 0, len(entries), len(entries))
    return directory + _END.pack(b"PK\5\6", *counts, len(directory), entries[-1].end, 0)


def _write_archive(stream: BinaryIO, folder: Path, names: Sequence[str]) -> None:
    entries: list[_Entry] = []
    for name in names:
        path = folder / name
        offset = entries[-1].end if entries else 0
        entry = _Entry(name.encode(), path.stat().st_size, _crc(path), offset)
        if entry.end > MOST_BYTES - (MOST_FILES << 8):
            _cannot_write(folder, "less than 4 GiB", "more", "Bundle a quantized model.")
        entries.append(entry)
        stream.write(entry.local())
        with path.open("rb") as source:
            shutil.copyfileobj(source, stream, PIECE)
    stream.write(_tail(entries))


def _check_contents(path: Path, spec: ModelSpec) -> None:
    """That what was written is what will be read, whatever happened to the folder meanwhile."""
    with _opened(path) as archive:
        if archive.spec != spec:
            _refuse(path, "the manifest that was read first", "another")
        for entry in archive.entries[1:]:
            for _ in _checked(archive, entry):
                pass


def _unpack_to(archive: _Archive, target: Path) -> Path:
    made = _unpack(archive, target.parent)
    try:
        if target.exists() and not _is_whole(target, archive.spec):
            aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=target.parent))
            target.rename(aside / "model")
            shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            made.rename(target)
    except OSError:
        if not _is_whole(target, archive.spec):  # else another process was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


# Folders of this process alone, by manifest hash: (owner's pid, folder).
_OWN: dict[str, tuple[int, Path]] = {}


def _unpack_for_process(archive: _Archive) -> Path:
    """A temporary folder that lasts as long as the process."""
    owner, folder = _OWN.get(archive.digest, (0, Path()))
    if owner == os.getpid() and _is_whole(folder, archive.spec):
        return folder
    with _writing(Path(tempfile.gettempdir())):
        folder = _unpack(archive, Path(tempfile.gettempdir()))
    _OWN[archive.digest] = (os.getpid(), folder)
    atexit.register(_remove_own, os.getpid(), folder)
    return folder


def _remove_own(owner: int, folder: Path) -> None:
    if owner == os.getpid():  # a forked child must leave it to its parent
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: _Archive, parent: Path) -> Path:
    """A new folder in ``parent`` with the bundle's files, or none: what fails leaves nothing behind."""
    made = Path(tempfile.mkdtemp(prefix=".bundle-", dir=parent))
    try:
        for entry in archive.entries:
            with (made / entry.name.decode()).open("xb") as stream:
                for piece in _checked(archive, entry):
                    stream.write(piece)
        made.chmod(0o755)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return made


def _checked(archive: _Archive, entry: _Entry) -> Iterator[bytes]:
    """The bytes of an entry in pieces; ``CorruptFileError`` at their end when they lack the manifest's hash."""
    name = entry.name.decode()
    record = archive.spec.files.get(name) or FileRecord(entry.size, archive.digest)
    digest, crc, left = hashlib.sha256(), 0, entry.size
    archive.stream.seek(entry.start)
    while left and (piece := archive.stream.read(min(PIECE, left))):
        digest.update(piece)
        crc = zlib.crc32(piece, crc)
        left -= len(piece)
        yield piece
    if digest.hexdigest() != record.sha256 or crc != entry.crc:
        raise CorruptFileError(
            f"{archive.path}: {name} is damaged",
            expected=f"sha256 {record.sha256}",
            found=f"sha256 {digest.hexdigest()}",
            remedy=_REMEDY,
        )


def _is_whole(folder: Path, spec: ModelSpec) -> bool:
    try:
        if read_spec(folder) != spec:
            return False
        for name, record in spec.files.items():
            check_file(folder, name, record)
    except (ModelNotFoundError, ManifestError, CorruptFileError, OSError):
        return False
    return True


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A new name in the same folder, gone at the end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    os.close(handle)
    try:
        Path(name).chmod(0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _cannot_write(
            place, "a place that can be written", error.strerror or str(error), "Free space, or name another."
        )


_REMEDY = "The file is damaged or was changed: copy it again, or make it anew with `qingyu bundle`."


def _refuse(path: Path, expected: str, found: str) -> NoReturn:
    raise BundleError(f"{path} is not a sound bundle", expected=expected, found=found, remedy=_REMEDY)


def _cannot_write(place: Path, expected: str, found: str, remedy: str) -> NoReturn:
    raise OutputError(f"cannot write {place}", expected=expected, found=found, remedy=remedy)
