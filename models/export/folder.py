"""A model folder, written whole or not at all: a temporary sibling folder, renamed at the end.

Not here: what is in the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from qingyu.errors import ManifestError, ModelNotFoundError, OutputError
from qingyu.runtime.spec import MANIFEST, FileRecord, ModelSpec, read_spec, sha256_of

__all__ = ["check_output", "new_folder", "write_manifest"]


def check_output(output: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Raise ``OutputError`` unless a model may be written at ``output`` without touching the checkpoint."""
    target, source = output.resolve(), checkpoint.resolve()
    if target == source or source in target.parents:
        _refuse(
            output,
            "a folder outside the checkpoint",
            "the checkpoint or a folder in it",
            "Name another folder.",
        )
    if target in source.parents:
        _refuse(output, "a folder beside the checkpoint", "a folder that holds it", "Name another folder.")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        _refuse(output, "a new folder", "a file", "Name another folder.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        _refuse(
            output,
            "a new or empty folder",
            "a folder with files in it",
            "Name another, or allow overwriting.",
        )
    try:
        read_spec(output)
    except (ModelNotFoundError, ManifestError):
        _refuse(output, "a model folder to replace", "a folder of something else", "Name another folder.")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``, moved there when the block ends well, else removed.

    A model folder that was there stays until the new one is whole. ``OutputError`` for what the disk refuses.
    """
    parent = output.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    except OSError as error:
        _refuse(
            output, "a place that can be written", str(error), "Name another folder, or mend its permissions."
        )
    try:
        yield made
        made.chmod(0o777 & ~_umask())
        _replace(made, output.resolve())
    except OSError as error:
        _refuse(
            output, "a place that can be written", str(error), "Free space there, or name another folder."
        )
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_manifest(folder: Path, spec: ModelSpec) -> ModelSpec:
    """Write qingyu.json for the files that are in ``folder``; the spec with their sizes and hashes."""
    files = {path.name: FileRecord(path.stat().st_size, sha256_of(path)) for path in sorted(folder.iterdir())}
    complete = dataclasses.replace(spec, files=files)
    text = complete.to_json()
    ModelSpec.from_json(text, origin=str(folder / MANIFEST))  # what is written is what can be read
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return complete


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _replace(made: Path, output: Path) -> None:
    if not output.exists():
        made.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    try:
        output.rename(aside / "model")
        try:
            made.rename(output)
        except OSError:
            (aside / "model").rename(output)
            raise
    finally:
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _refuse(output: Path, expected: str, found: str, remedy: str) -> NoReturn:
    raise OutputError(f"cannot write a model to {output}", expected=expected, found=found, remedy=remedy)
