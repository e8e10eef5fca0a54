"""The door of an optional dependency: present, or one error with the pip command that brings it.

Not here: what the dependencies are used for, and their versions (pyproject.toml has those).
"""

from __future__ import annotations

import importlib.util

from qingyu.errors import MissingExtraError

__all__ = ["require"]


def require(extra: str, *packages: str) -> None:
    """Raise ``MissingExtraError`` unless every package of the extra can be found; loads none of them."""
    missing = [package for package in packages if not _installed(package)]
    if missing:
        raise MissingExtraError(
            f"the extra {extra!r} is not installed",
            expected=f"the packages {', '.join(packages)}",
            found=f"no {', '.join(missing)}",
            remedy=f'Run: pip install "qingyu[{extra}]"',
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a parent that is missing, or a module set to None in sys.modules
        return False
