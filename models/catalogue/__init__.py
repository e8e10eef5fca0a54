"""Models known by name, as data: where they are, what they are, and what is known for certain of their files.

``catalogue.json`` beside this module; the file that ``QINGYU_CATALOGUE`` names, of the same form, is read after it and
wins. An entry states no hash and no revision that was not checked; where it states none, the first download is recorded
(``qingyu.models.cache``). Not here: every other checkpoint, which needs no entry to be pulled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from qingyu.errors import DataFileError, ManifestError
from qingyu.runtime.spec import FileRecord, Task, decode

__all__ = ["CatalogueEntry", "Published", "catalogue", "find_entry", "published"]

FORMAT = 1
BUILT_IN = "catalogue.json"
GOLDEN_LIMIT = 16 << 20


@dataclass(frozen=True)
class CatalogueEntry:
    """One model.

    ``repositories``: its name at each source, "hub" or "modelscope". ``revisions``: the commit to take at a source,
    where one was checked. ``layers``, ``dim``: what the checkpoint must turn out to have. ``prompts`` are added to
    the checkpoint's own. ``files``: size and SHA-256, where known for certain. ``golden``: a file beside the catalogue
    with results that were published or measured with the true weights. ``exportable``: whether this version makes
    a model for the ``task`` of it. ``origin``: the folder of the catalogue, ``None`` for the built-in one.
    """

    name: str
    task: Task
    repositories: Mapping[str, str]
    license: str | None = None
    layers: int | None = None
    dim: int | None = None
    max_tokens: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    golden: str | None = None
    exportable: bool = True
    note: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Published:
    """Results that a model must give.

    Of the kind "embedding": unit vectors of ``texts``, as ``encode_vector`` writes them. Of the kind "fill_mask":
    ``results`` as ``qingyu.runtime.fill_mask.check_golden`` reads them.
    """

    kind: str
    source: str
    texts: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    least_cosine: float = 0.99999
    results: tuple[Any, ...] = ()


def catalogue() -> dict[str, CatalogueEntry]:
    """All entries by name. Raises ``DataFileError`` for a file of QINGYU_CATALOGUE that is not a catalogue."""
    text = (resources.files(__name__) / BUILT_IN).read_text(encoding="utf-8")
    entries = _read(text, BUILT_IN, None)
    own = os.environ.get("QINGYU_CATALOGUE")
    if own:
        entries += _read(_text(Path(own)), own, str(Path(own).resolve().parent))
    return {entry.name: entry for entry in entries}


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of a name, or of a repository at one of the sources."""
    entries = catalogue()
    by_repository = {
        repository: entry for entry in entries.values() for repository in entry.repositories.values()
    }
    return entries.get(name) or by_repository.get(name)


def published(entry: CatalogueEntry) -> Published | None:
    """The results that come with an entry. Raises ``DataFileError`` for a file that cannot be read."""
    if entry.golden is None:
        return None
    if entry.origin is None:
        text = (resources.files(__name__) / entry.golden).read_text(encoding="utf-8")
    else:
        text = _text(Path(entry.origin) / entry.golden)
    found: Published = _decoded(Published, _json(text, entry.golden), entry.golden)
    return found


def _read(text: str, origin: str, folder: str | None) -> list[CatalogueEntry]:
    document = _json(text, origin)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _not_a_catalogue(origin, f'an object with "format": {FORMAT}', "another")
    models = document.get("models")
    if not isinstance(models, list) or not all(isinstance(item, dict) for item in models):
        raise _not_a_catalogue(origin, 'a list "models" of objects', repr(models)[:80])
    return [_decoded(CatalogueEntry, {**item, "origin": folder}, origin) for item in models]


def _decoded(kind: Any, document: Any, origin: str) -> Any:  # noqa: ANN401 - a dataclass and its instance
    try:
        return decode(kind, document, origin=origin)
    except ManifestError as error:
        raise DataFileError(
            error.problem,
            expected=error.expected,
            found=error.found,
            remedy="Repair the catalogue (QINGYU_CATALOGUE).",
        ) from None


def _json(text: str, origin: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_catalogue(origin, "JSON", str(error) or type(error).__name__) from None


def _text(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > GOLDEN_LIMIT:
            raise _not_a_catalogue(str(path), f"a file of at most {GOLDEN_LIMIT} bytes", "none")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _not_a_catalogue(str(path), "a readable file in UTF-8", str(error)) from None


def _not_a_catalogue(origin: str, expected: str, found: str) -> DataFileError:
    return DataFileError(
        f"{origin} cannot be used",
        expected=expected,
        found=found,
        remedy="Repair the catalogue (QINGYU_CATALOGUE).",
    )
