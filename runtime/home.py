"""Where qingyu keeps models and notes on this machine, and whether what is there can only come from this user.

A folder that somebody else owns, or that everybody may write to, can hold models that somebody else put there, and
a link in it can lead writing elsewhere. Nothing is read from such a home by name, and nothing is written into it.
A model folder that is named by its own path is not asked: whoever names it has chosen it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qingyu.errors import UnsafeFolderError

__all__ = ["check_home", "distrusted", "own_folder", "qingyu_home"]

TRUST = "QINGYU_TRUST_HOME"


def qingyu_home() -> Path:
    """``$QINGYU_HOME``, or ``~/.cache/qingyu``.

    Not absolute, and so no place to write to, for a user without a home folder.
    """
    return Path(os.environ.get("QINGYU_HOME") or Path(os.path.expanduser("~"), ".cache", "qingyu"))  # noqa: PTH111 - Path.expanduser raises where there is no home


def own_folder(home: Path, *inside: str) -> Path:
    """The folder that ``inside`` names in the home, made where it is missing, for this user alone.

    Raises ``UnsafeFolderError``, and ``OSError`` where it cannot be made.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    place = home
    for name in ("", *inside):
        place = place / name
        place.mkdir(mode=0o700, exist_ok=True)
    check_home(home, *inside)
    return place


def check_home(home: Path, *inside: str) -> None:
    """Raise ``UnsafeFolderError`` if others can write to the home, or to the folder that ``inside`` names in it.

    Every folder on the way down from ``home`` is looked at; what is not there is as good as ours.
    """
    found = distrusted(home, *inside)
    if found is not None:
        place, reason = found
        raise UnsafeFolderError(
            f"{place} cannot be trusted",
            expected="a folder of this user or of root that not everybody may write to",
            found=reason,
            remedy=f"Set QINGYU_HOME to a folder of your own, mend its owner and mode, or, if you trust everybody "
            f"who can write there, set {TRUST}=1.",
        )


def distrusted(home: Path, *inside: str) -> tuple[Path, str] | None:
    """The first folder from ``home`` down that others can write to, and how; ``None`` if there is none."""
    if not hasattr(os, "geteuid") or os.environ.get(TRUST) == "1":
        return None
    place = home
    for name in ("", *inside):
        place = place / name
        reason = _reason(place)
        if reason is not None:
            return place, reason
    return None


def _reason(place: Path) -> str | None:
    trusted = {0, os.geteuid()}
    try:
        own, target = place.lstat(), place.stat()
    except OSError:
        return None  # whatever is wrong with it, reading or writing will say
    if own.st_uid not in trusted:
        return f"{'a link' if stat.S_ISLNK(own.st_mode) else 'one'} of the user with the number {own.st_uid}"
    if target.st_uid not in trusted:
        return f"a link to one of the user with the number {target.st_uid}"
    if target.st_mode & stat.S_IWOTH:
        return f"mode {stat.S_IMODE(target.st_mode):04o}"
    return None
