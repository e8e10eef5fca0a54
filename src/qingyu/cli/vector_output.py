"""Vectors as JSON lines, as a .npy file of unknown length, or as a table for a terminal."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qingyu.cli.table import clip, width
from qingyu.errors import OutputError

if TYPE_CHECKING:
    from typing_extensions import Self

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

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_sink(output: str | None, dtype: DataType, *, json_lines: bool) -> Sink:
    """The sink for ``--output`` and ``--json``: a file by its suffix, else JSON lines or, on a terminal, a table."""
    if output is None or output == "-":
        return JsonLines(dtype) if json_lines or not sys.stdout.isatty() else Table()
    path = Path(output)
    if path.suffix == ".npy":
        return Npy(path, dtype)
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLinesFile(path, dtype)
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


class _FileSink:
    """Writes to a temporary file that gets its name when all is well, and is removed when anything fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._reported():
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        self._temporary = Path(name)
        self._stream = os.fdopen(handle, "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._reported():
                    self._finish()
        finally:
            with suppress(OSError):
                self._stream.close()
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {self._path}",
                expected="a folder that can be written, with room",
                found=error.strerror or str(error),
                remedy="Choose another --output.",
            ) from None

    def _finish(self) -> None:
        # mkstemp makes files that only their owner reads; a result should follow the user's umask.
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(self._stream.fileno(), 0o666 & ~mask)
        self._stream.close()
        self._temporary.replace(self._path)


class Npy(_FileSink):
    """A .npy array whose number of rows is filled in at the end; int8 scales go to NAME.scales.npy beside it."""

    def __init__(self, path: Path, dtype: DataType) -> None:
        super().__init__(path)
        self._dtype: DataType = dtype
        self._rows = 0
        self._row: Any = None  # an empty piece of the array: its type and width
        self._scales: list[Floats] = []

    def write(self, block: Block) -> None:
        """Add the block's rows to the file."""
        rows, scales = _stored(block.vectors, self._dtype)
        with self._reported():
            if self._row is None:
                self._row = rows[:0]
                self._write_header()
            self._stream.write(rows.tobytes())
        self._rows += len(rows)
        if scales is not None:
            self._scales.append(scales)

    def _write_header(self) -> None:
        # numpy pads its headers so that the number of rows can be replaced in place.
        import numpy as np

        descr = np.lib.format.dtype_to_descr(self._row.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._rows, self._row.shape[1])}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def _finish(self) -> None:
        import numpy as np

        if self._scales:
            with _FileSink(self._path.with_suffix(".scales.npy")) as beside:
                np.save(beside._stream, np.concatenate(self._scales))
        self._stream.seek(0)
        self._write_header()
        super()._finish()


class JsonLines:
    """One object a line: ``index``, ``text``, ``vector`` and, for int8, ``scale``."""

    def __init__(self, dtype: DataType) -> None:
        self._dtype: DataType = dtype
        self._index = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, block: Block) -> None:
        """Write the block's rows."""
        rows, scales = _stored(block.vectors, self._dtype)
        for n, (text, values) in enumerate(zip(block.texts, _numbers(rows), strict=True)):
            row: dict[str, object] = {"index": self._index, "text": text, "vector": values}
            if scales is not None:
                row["scale"] = float(str(scales[n]))
            self._put(json.dumps(row, ensure_ascii=False) + "\n")
            self._index += 1

    def _put(self, line: str) -> None:
        sys.stdout.write(line)


class JsonLinesFile(JsonLines):
    """The same in a file that appears when it is whole."""

    def __init__(self, path: Path, dtype: DataType) -> None:
        super().__init__(dtype)
        self._file = _FileSink(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def _put(self, line: str) -> None:
        with self._file._reported():
            self._file._stream.write(line.encode())


def _numbers(rows: Any) -> list[list[float]]:  # noqa: ANN401 - an array of any of the four types
    """The rows as lists; float32 as the shortest decimals that read back to the same float32."""
    if rows.dtype.kind != "f":
        return rows.tolist()  # type: ignore[no-any-return]
    return [[float(str(value)) for value in row] for row in rows]


class Table:
    """Texts with the first values of their vectors, for people."""

    def __init__(self) -> None:
        self._empty = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, block: Block) -> None:
        """Print the block's rows."""
        for text, vector in zip(block.texts, block.vectors, strict=True):
            if self._empty:
                print(
                    f"{'text':<{TEXT_CELLS}}  dim   first values  (all of them: --json or --output FILE.npy)"
                )
                self._empty = False
            shown = clip(text, TEXT_CELLS)
            values = " ".join(f"{value:+.4f}" for value in vector[:5])
            print(f"{shown}{' ' * (TEXT_CELLS - width(shown))}  {len(vector):<4}  {values} …")
