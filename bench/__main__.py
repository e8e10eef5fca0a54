"""``python -m qingyu.bench``: every measurement there is, by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, resources

__all__ = ["listing", "main", "measurements"]

# Run by others here, not by a user.
PARTS = {"__main__", "__init__", "child", "emulate_child", "reliability_child"}


def measurements() -> dict[str, str]:
    """Name -> first line of each module here that has a command line: a ``main`` and a line that shows its use."""
    found = {}
    for file in sorted(resources.files("qingyu.bench").iterdir(), key=lambda one: one.name):
        name = file.name.removesuffix(".py")
        if not file.name.endswith(".py") or name in PARTS:
            continue
        text = file.read_text(encoding="utf-8")
        shown = any(f"python -m qingyu.bench{sign}{name}" in text for sign in ". ")
        if shown and "def main(" in text:
            found[name] = text.partition('"""')[2].partition("\n")[0].rstrip('"')
    return found


def listing() -> str:
    """The help page."""
    lines = [f"  {name:16} {line}" for name, line in measurements().items()]
    example = "example:\n  python -m qingyu.bench compare --quick"
    head = "usage: python -m qingyu.bench NAME [OPTIONS]; each has its own --help\n"
    return "\n".join([head, *lines, "", example])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement that is named, with the other arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(listing())
        return 0 if given else 2
    name = given[0]
    if name not in measurements():
        print(f"error: no measurement {name!r}\n\n{listing()}", file=sys.stderr)
        return 2
    code = import_module(f"qingyu.bench.{name}").main(given[1:])
    return int(code or 0)


if __name__ == "__main__":
    raise SystemExit(main())
