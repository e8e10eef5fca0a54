"""What every contender is: how its files are made from a checkpoint, how it is opened, how it embeds.

Nothing heavy is imported here or by a contender's module, so that a process holds its own library alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qingyu.errors import MissingExtraError, UnsupportedModelError

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = [
    "BATCH",
    "Contender",
    "Embed",
    "Files",
    "Opened",
    "batches_in_order",
    "pip_install",
    "require_checkpoint",
    "require_packages",
    "sorted_batches",
    "write_once",
]

TOKENS = 2048  # of a batch by hand: without a bound, a few documents are one batch, and all but one CPU idle
BATCH = 32  # rows of a batch where a contender has no batching of its own: the default of most libraries

Embed = Callable[[Sequence[str]], "Floats"]


@dataclass(frozen=True)
class Files:
    """Where the forms of one model lie: the checkpoint, our folders made of it, and the contender's own folder.

    ``checkpoint`` and ``fp32`` are ``None`` for a model that exists as INT8 only. ``pooling`` is "cls" or "mean".
    ``prompt`` stands before each text.
    """

    model: str
    checkpoint: Path | None
    fp32: Path | None
    int8: Path
    own: Path
    pooling: str
    dim: int
    max_tokens: int
    prompt: str = ""

    @classmethod
    def read(cls, document: dict[str, Any]) -> Files:
        """From what ``written`` gives."""
        paths = {key: None if document[key] is None else Path(document[key]) for key in PATHS}
        return cls(**{**document, **paths})

    def written(self) -> dict[str, Any]:
        """As JSON."""
        paths = {key: None if getattr(self, key) is None else str(getattr(self, key)) for key in PATHS}
        return {**vars(self), **paths}


PATHS = ("checkpoint", "fp32", "int8", "own")


class Opened(NamedTuple):
    """A model ready for use: ``embed`` gives unit vectors (n, dim) of any number of texts, ``stream`` in blocks.

    ``stream`` is there where the library has a way to embed without holding all texts and vectors.
    """

    embed: Embed
    stream: Callable[[Sequence[str]], Iterator[Floats]] | None = None


@dataclass(frozen=True)
class Contender:
    """One way of getting vectors.

    ``needs`` are the packages by import name, ``distributions`` what pip installs for it, whose sizes count with all
    that they depend on; ``prepare_needs`` and ``prepare_distributions`` are what preparing takes besides. ``prepare``
    makes the contender's files in ``files.own``, once, in a process of its own. ``open`` is given how many threads it
    may use. ``own_weights``: not made from the checkpoint. ``adds_prompt``: it puts the model's prompt before each text
    by itself. ``compiles_shapes``: it compiles kernels for each new shape of a batch, so that it is warmed up with all
    texts. ``how`` says what is done, for the results.
    """

    name: str
    title: str
    precision: str
    needs: tuple[str, ...]
    distributions: tuple[str, ...]
    how: str
    open: Callable[[Files, int], Opened]
    prepare: Callable[[Files], None] | None = None
    prepare_needs: tuple[str, ...] = ()
    prepare_distributions: tuple[str, ...] = ()
    models: tuple[str, ...] = ()  # those that it can run, where it cannot run any
    own_weights: bool = False
    adds_prompt: bool = False
    compiles_shapes: bool = False

    def check(self, model: str) -> None:
        """Raise unless its packages are installed and it can run the model."""
        require_packages(self)
        if self.models and model not in self.models:
            raise UnsupportedModelError(
                f"{self.name} cannot run {model}",
                expected=f"one of {', '.join(self.models)}",
                found=model,
                remedy="Its weights are its own.",
            )


def pip_install(distributions: Sequence[str]) -> str:
    """The command that installs them."""
    return f"pip install {' '.join(distributions)}"


def require_packages(one: Contender, *, preparing: bool = False) -> None:
    """Raise ``MissingExtraError`` unless what a contender runs with, or is prepared with, is installed."""
    wanted = (*one.needs, *(one.prepare_needs if preparing else ()))
    distributions = (*one.distributions, *(one.prepare_distributions if preparing else ()))
    missing = [package for package in wanted if not installed(package)]
    if missing:
        raise MissingExtraError(
            f"{one.name} is not installed",
            expected=f"the packages {', '.join(wanted)}",
            found=f"no {', '.join(missing)} in {sys.executable}",
            remedy=f"Run: {pip_install(distributions)}",
        )


def installed(package: str) -> bool:
    """Whether a package, or one inside another, can be imported; loads its parents only."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require_checkpoint(files: Files) -> Path:
    """The checkpoint folder, or ``UnsupportedModelError`` for a model that has none."""
    if files.checkpoint is None:
        raise UnsupportedModelError(
            f"{files.model} cannot be converted",
            expected="a checkpoint in FP32",
            found="an INT8 model of qingyu's only",
            remedy="Measure another model with this contender.",
        )
    return files.checkpoint


def write_once(path: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is there whole or not at all: ``write`` fills another, which is then renamed."""
    if not path.is_dir():
        beside = path.with_name(path.name + ".part")
        if beside.is_dir():
            import shutil

            shutil.rmtree(beside)
        beside.mkdir(parents=True)
        write(beside)
        beside.rename(path)
    return path


def batches_in_order(count: int, rows: int = BATCH) -> Iterator[range]:
    """Positions in the order given, ``rows`` at a time."""
    for start in range(0, count, rows):
        yield range(start, min(start + rows, count))


def sorted_batches(lengths: Sequence[int], *, rows: int = BATCH, tokens: int = TOKENS) -> list[list[int]]:
    """Positions by falling length, up to ``rows`` and ``tokens``, padding counted: what one does against padding.

    >>> sorted_batches([1, 9, 5, 5, 1], rows=2, tokens=10)
    [[1], [2, 3], [0, 4]]
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        full = not batches or len(batches[-1]) == rows or (len(batches[-1]) + 1) * longest > tokens
        if full:
            batches.append([])
            longest = lengths[position]
        batches[-1].append(position)
    return batches
