"""One file, brought whole: to a temporary name, taken up where it broke off, checked, renamed.

A temporary file has one writer, ever. What a killed process left is copied by the next one, not continued in place;
so two writers never meet in a file, even where file locks do not work, and the rename of a checked file is the only
moment that others see. Whoever comes last wins with the same content.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qingyu.errors import CorruptFileError, OutputError
from qingyu.models.sources.http import (
    PIECE,
    BrokenTransferError,
    Limits,
    Request,
    opened,
    pieces,
    unreachable,
)
from qingyu.models.sources.listing import RemoteFile
from qingyu.runtime.spec import FileRecord

__all__ = ["download", "git_sha1"]


def download(file: RemoteFile, request: Request, target: Path, *, limits: Limits) -> Iterator[int]:
    """Bring ``file`` to ``target``, yielding the bytes that are new there, those taken over included.

    ``file`` holds what is known: the size and hashes that it has are checked. What was fetched before a failure stays
    in a hidden file beside ``target`` for the next time. Raises ``SourceError``, ``CorruptFileError``, ``OutputError``.
    """
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_space(target.parent, file)
        with _Partial(target, _identity(file, request)) as partial:
            yield from _filled(partial, file, request, limits)
            partial.commit()
    except OSError as error:
        raise _cannot_write(target, error, file) from None


def git_sha1(path: Path) -> str:
    """The hash that git gives to a file's content."""
    digest = _git_hasher(path.stat().st_size)
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


class _Partial:
    """A temporary file of this process alone, beginning with what others left of the same content."""

    def __init__(self, target: Path, identity: str) -> None:
        self._target = target
        self._prefix = f".{target.name}.{identity}."
        self._done = False
        self.size = 0

    def __enter__(self) -> _Partial:
        left = self._others()
        handle, name = tempfile.mkstemp(prefix=self._prefix, suffix=".part", dir=self._target.parent)
        self.path = Path(name)
        self._stream: BinaryIO = os.fdopen(handle, "w+b")
        for other in sorted(left, key=_size_of, reverse=True)[:1]:
            # It may be gone by now, or still growing: whatever is copied is a beginning.
            with contextlib.suppress(FileNotFoundError), other.open("rb") as stream:
                shutil.copyfileobj(stream, self._stream, PIECE)
        self.size = self._stream.tell()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # the disk that refused a piece refuses it again
            self._stream.close()
        refused = kind is not None and issubclass(kind, OSError)
        if self._done or refused or not self.size:
            self.path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        self._stream.write(piece)
        self.size += len(piece)

    def restart(self) -> None:
        """Forget what is there."""
        self._stream.seek(0)
        self._stream.truncate()
        self.size = 0

    def discard(self) -> None:
        """Forget what is there, and what others left of it: it is not what it should be."""
        self.restart()
        for other in self._others():
            if other != self.path:
                other.unlink(missing_ok=True)

    def record(self, git: bool) -> tuple[FileRecord, str | None]:
        """Size and SHA-256 of all of it, and git's hash if that is asked for."""
        self._stream.flush()
        self._stream.seek(0)
        digest, blob = hashlib.sha256(), _git_hasher(self.size)
        while piece := self._stream.read(PIECE):
            digest.update(piece)
            if git:
                blob.update(piece)
        return FileRecord(self.size, digest.hexdigest()), blob.hexdigest() if git else None

    def commit(self) -> None:
        """Give it the target's name, and remove what others left of it."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.path.chmod(0o644)
        self.path.replace(self._target)
        self._done = True
        for other in self._others():
            other.unlink(missing_ok=True)

    def _others(self) -> list[Path]:
        # A writer that is alive, as two are where locks do not work, may lose its file here: ``download`` fails
        # for it, and its caller finds the target whole.
        return [path for path in self._target.parent.glob(".*.part") if path.name.startswith(self._prefix)]


def _filled(partial: _Partial, file: RemoteFile, request: Request, limits: Limits) -> Iterator[int]:
    """Fill the partial file until it is what it should be, yielding what comes."""
    yield partial.size
    resumed = partial.size > 0
    for attempt in range(limits.attempts):
        if attempt:
            time.sleep(limits.pause * 2 ** (attempt - 1))
        try:
            if file.bytes is None or partial.size != file.bytes:
                yield from _transfer(partial, file, request, limits)
        except BrokenTransferError as error:
            reason, resumed = str(error), True
            continue
        wrong = _difference(partial, file)
        if wrong is None:
            return
        yield -partial.size
        partial.discard()
        # What was put together from two transfers gets one more chance, as one.
        if not resumed:
            raise _corrupt(request, file, *wrong)
        reason, resumed = f"{wrong[1]} after a transfer that was taken up", False
    raise unreachable(request.url, reason)


def _transfer(partial: _Partial, file: RemoteFile, request: Request, limits: Limits) -> Iterator[int]:
    """One request's bytes. ``BrokenTransferError`` when it ends before the file does."""
    if file.bytes is not None and partial.size > file.bytes:
        yield -partial.size
        partial.restart()
    with opened(request, limits=limits, start=partial.size) as response:
        if partial.size and not _continues(
            response.status, response.headers.get("Content-Range"), partial.size
        ):
            yield -partial.size
            partial.restart()
            if response.status == 206:
                raise BrokenTransferError("a part of the file that was not asked for")
        most = limits.file if file.bytes is None else file.bytes
        for piece in pieces(response, request.url, most - partial.size):
            partial.write(piece)
            yield len(piece)
    if file.bytes is not None and partial.size < file.bytes:
        raise BrokenTransferError(f"{partial.size:,} of {file.bytes:,} bytes came")


def _continues(status: int, content_range: str | None, start: int) -> bool:
    return status == 206 and (content_range or "").replace(" ", "").startswith(f"bytes{start}-")


def _difference(partial: _Partial, file: RemoteFile) -> tuple[str, str] | None:
    """What was expected and what was found, where they differ."""
    record, blob = partial.record(file.git_sha1 is not None)
    facts = (
        ("bytes", file.bytes, record.bytes),
        ("sha256", file.sha256, record.sha256),
        ("git hash", file.git_sha1, blob),
    )
    for name, expected, found in facts:
        if expected is not None and expected != found:
            return f"{name} {expected}", f"{name} {found}"
    return None


def _corrupt(request: Request, file: RemoteFile, expected: str, found: str) -> CorruptFileError:
    return CorruptFileError(
        f"{file.path} from {request.url} is not what it should be",
        expected=expected,
        found=found,
        remedy="Nothing was kept of it. Try again, or another source with --from.",
    )


def _identity(file: RemoteFile, request: Request) -> str:
    """Sixteen digits that two transfers of the same content share, whatever the server."""
    known = file.sha256 or file.git_sha1 or request.url
    return hashlib.sha256(f"{file.path} {file.bytes} {known}".encode()).hexdigest()[:16]


def _git_hasher(size: int) -> hashlib._Hash:
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _check_space(folder: Path, file: RemoteFile) -> None:
    if file.bytes is not None and shutil.disk_usage(folder).free < file.bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cannot_write(target: Path, error: OSError, file: RemoteFile) -> OutputError:
    found = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        with contextlib.suppress(OSError):
            found += f", {shutil.disk_usage(target.parent).free:,} bytes are free"
    size = "" if file.bytes is None else f" of {file.bytes:,} bytes"
    return OutputError(
        f"cannot write {target}",
        expected=f"a place for a file{size}",
        found=found,
        remedy="Free space (see `qingyu cache list`), or set QINGYU_HOME to another folder.",
    )
