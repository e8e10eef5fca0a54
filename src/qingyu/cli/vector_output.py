"""Vectors as JSON lines, as a .npy file of unknown length, or as a table for a terminal."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qingyu.cli.table import clip, width
from qingyu.errors import OutputError

if TYPE_CHECKING:
    from qingyu.runtime.embedder import Block
    from qingyu.runtime.engine import Floats

__all__ = ["DataType", "Sink", "open_sink"]

DataType = Literal["float32", "float16", "int8", "binary"]
TEXT_CELLS = 40


class Sink(Protocol):
    """Takes blocks of vectors; as a context manager, it finishes on success and undoes on error."""

    def write(self, block: Block) -> None:
        """Add the block's rows."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_sink(output: str | None, dtype: DataType, *, json_lines: bool) -> Sink:
    """The sink for ``--output`` and ``--json``: a file by its suffix, else JSON lines or, on a terminal, a table."""
    if output is None or output == "-":
        return JsonLines(None, dtype) if json_lines or not sys.stdout.isatty() else Table()
    path = Path(output)
    if path.suffix == ".npy":
        return Npy(path, dtype)
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path, dtype)
    raise OutputError(
        f"cannot tell the format of {output}",
        expected="a name ending in .npy or .jsonl",
        found=path.suffix or "no suffix",
        remedy="Rename it, or write JSON lines to standard output without --output.",
    )


def _stored(vectors: Floats, dtype: DataType) -> tuple[Any, Floats | None]:
    """The rows as they are stored, and the scales where the type has any."""
    from qingyu.runtime import vectors as forms

    if dtype == "int8":
        codes, scales = forms.to_int8(vectors)
        return codes, scales
    plain: dict[str, Callable[[Floats], Any]] = {
        "float32": lambda v: v,
        "float16": forms.to_float16,
        "binary": forms.to_binary,
    }
    return plain[dtype](vectors), None


class _File:
    """A file that appears under its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise _unwritable(path, error) from None
        self.temporary = Path(name)
        self.stream = os.fdopen(handle, "wb")

    def finish(self) -> None:
        # mkstemp makes files that only their owner reads; a result should follow the user's umask.
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(self.stream.fileno(), 0o666 & ~mask)
        self.stream.close()
        self.temporary.replace(self.path)

    def undo(self) -> None:
        with suppress(OSError):
            self.stream.close()
        self.temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}",
        expected="a folder that can be written, with room",
        found=error.strerror or str(error),
        remedy="Choose another --output.",
    )


class _FileSink:
    """Writes to a temporary file, renamed at the end; removed when anything fails."""

    def __init__(self, path: Path) -> None:
        self._file = _File(path)

    def __enter__(self) -> Any:  # noqa: ANN401 - the subclass itself
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failure:
            raise _unwritable(self._file.path, failure) from None
        finally:
            self._file.undo()

    def _finish(self) -> None:
        self._file.finish()

    def _append(self, data: bytes) -> None:
        try:
            self._file.stream.write(data)
        except OSError as error:
            raise _unwritable(self._file.path, error) from None


class Npy(_FileSink):
    """A .npy array whose number of rows is filled in at the end; int8 scales go to NAME.scales.npy beside it."""

    def __init__(self, path: Path, dtype: DataType) -> None:
        super().__init__(path)
        self._dtype: DataType = dtype
        self._rows = 0
        self._template: Any = None
        self._scales: list[Floats] = []

    def write(self, block: Block) -> None:
        """Add the block's rows to the file."""
        rows, scales = _stored(block.vectors, self._dtype)
        if self._template is None:
            self._template = rows[:0]
            self._write_header()
        self._append(rows.tobytes())
        self._rows += len(rows)
        if scales is not None:
            self._scales.append(scales)

    def _write_header(self) -> None:
        # numpy pads its headers so that the number of rows can be replaced in place.
        import numpy as np

        descr = np.lib.format.dtype_to_descr(self._template.dtype)
        shape = (self._rows, self._template.shape[1])
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file.stream, header)

    def _finish(self) -> None:
        import numpy as np

        if self._template is None:
            self._template = np.empty((0, 0), dtype=np.float32)
        self._file.stream.seek(0)
        self._write_header()
        if self._dtype == "int8":
            beside = _File(self._file.path.with_suffix(".scales.npy"))
            try:
                np.save(beside.stream, np.concatenate(self._scales or [np.empty(0, np.float32)]))
                beside.finish()
            finally:
                beside.undo()
        super()._finish()


class JsonLines:
    """One object a line: ``index``, ``text``, ``vector`` and, for int8, ``scale``."""

    def __init__(self, path: Path | None, dtype: DataType) -> None:
        self._file = None if path is None else _FileSink(path)
        self._dtype: DataType = dtype
        self._index = 0

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)

    def write(self, block: Block) -> None:
        """Write the block's rows."""
        rows, scales = _stored(block.vectors, self._dtype)
        for n, (text, values) in enumerate(zip(block.texts, _numbers(rows), strict=True)):
            row: dict[str, object] = {"index": self._index, "text": text, "vector": values}
            if scales is not None:
                row["scale"] = float(scales[n])
            self._put(json.dumps(row, ensure_ascii=False) + "\n")
            self._index += 1

    def _put(self, line: str) -> None:
        if self._file is None:
            sys.stdout.write(line)
        else:
            self._file._append(line.encode())


def _numbers(rows: Any) -> list[list[float]]:  # noqa: ANN401 - an array of any of the four types
    """The rows as lists; float32 as the shortest decimals that read back to the same float32."""
    if rows.dtype.kind != "f":
        return rows.tolist()  # type: ignore[no-any-return]
    return [[float(str(value)) for value in row] for row in rows]


class Table:
    """Texts with the first values of their vectors, for people."""

    def __init__(self) -> None:
        self._empty = True

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, block: Block) -> None:
        """Print the block's rows."""
        for text, vector in zip(block.texts, block.vectors, strict=True):
            if self._empty:
                print(f"{'text':<{TEXT_CELLS}}  dim   first values  (all of them: --json or --output FILE.npy)")
                self._empty = False
            shown = clip(text, TEXT_CELLS)
            values = " ".join(f"{value:+.4f}" for value in vector[:5])
            print(f"{shown}{' ' * (TEXT_CELLS - width(shown))}  {len(vector):<4}  {values} …")
