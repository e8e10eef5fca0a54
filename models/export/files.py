"""JSON files of a checkpoint folder, and their numbers within limits; each defect is one ``CheckpointError``.

Not here: what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from qingyu.errors import CheckpointError

__all__ = ["Document", "read_json", "read_optional", "refuse", "within"]

JSON_LIMIT = 64 << 20  # configurations are kilobytes; a shard index of a very large model is a few MB

REPAIR = "Download the checkpoint again, or repair this file."


class Document:
    """The object of one JSON file, whose fields are read with their type and limits checked."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def updated(self, fields: Mapping[str, Any]) -> Document:
        """The same document with ``fields`` put over its own."""
        return Document(self.path, {**self.fields, **fields})

    def integer(self, name: str, least: int, most: int, *, default: int | None = None) -> int:
        """A whole number from ``least`` to ``most``; ``default`` where the field is absent or null."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, *, default: float) -> float:
        """A number above 0 and below 1; ``default`` where the field is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            self.refuse(name, "a number between 0 and 1")
        return float(value)

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string; ``default`` where the field is absent or null."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false; ``default`` where the field is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def optional_flag(self, name: str) -> bool | None:
        """True, false, or ``None`` where the field is absent or null."""
        return None if self.fields.get(name) is None else self.flag(name, default=False)

    def object(self, name: str) -> dict[str, Any]:
        """An object; empty where the field is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return value

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise ``CheckpointError`` about one field."""
        found = shown(self.fields[name]) if name in self.fields else "no such field"
        raise CheckpointError(f"{self.path}: field {name!r}", expected=expected, found=found, remedy=REPAIR)


def shown(value: object) -> str:
    """A value as a message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_unicode(text: object) -> bool:
    """Whether a value is a string that UTF-8 can hold, which a lone surrogate is not."""
    try:
        return isinstance(text, str) and text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def refuse(problem: str, *, expected: str, found: str, remedy: str = REPAIR) -> NoReturn:
    """Raise ``CheckpointError``."""
    raise CheckpointError(problem, expected=expected, found=found, remedy=remedy)


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON
    """The value in a JSON file."""
    if not path.is_file():
        refuse(
            f"{path} is missing",
            expected="a JSON file",
            found="something else" if path.exists() else "nothing",
        )
    try:
        if path.stat().st_size > JSON_LIMIT:
            refuse(
                f"{path} is too large",
                expected=f"at most {JSON_LIMIT} bytes",
                found=f"{path.stat().st_size} bytes",
            )
        value = json.loads(path.read_bytes().decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for an escaped lone surrogate
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path} cannot be read", expected="JSON in UTF-8", found=str(error) or type(error).__name__)
    return value


def read_object(path: Path) -> Document:
    """A JSON file that holds an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        refuse(f"{path} cannot be read", expected="a JSON object", found=shown(value))
    return Document(path, value)


def read_optional(path: Path) -> Document:
    """A JSON file that holds an object, or an empty one where there is no such file."""
    return read_object(path) if path.exists() else Document(path, {})


def within(root: Path, name: str, origin: Path) -> Path:
    """``root / name``, refused when the name leads out of ``root``; symbolic links are followed."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        refuse(
            f"{origin} names a file outside its folder",
            expected="a path inside the folder",
            found=shown(name),
        )
    return root / name
