"""The teacher's vectors of the training texts: computed once by the runtime, kept on disk, resumed after a kill.

``vectors.npy`` is float16, whose error (5e-4) is far below what a student reaches. Not here: what is learnt
from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import OutputError
from qingyu.models.adapt.training import write_note
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.progress import progress_bar

__all__ = ["Halves", "teacher_vectors", "texts_digest"]

Halves: TypeAlias = NDArray[np.float16]

CHUNK = 2048  # texts between two notes of how far it is: a few seconds of work


def teacher_vectors(
    model: Path, texts: Sequence[str], folder: Path, *, prompt: str | None = None, progress: bool = False
) -> Halves:
    """Unit vectors of ``texts`` by the model folder ``model``, float16 (n, dim), mapped from ``folder``.

    What ``folder`` already holds for the same texts, model and prompt is not computed again. Raises what
    ``Embedder`` raises, and ``OutputError`` where the disk refuses.
    """
    with Embedder.open(model) as embedder:
        origin = {
            "texts": texts_digest(texts),
            "count": len(texts),
            "model": embedder.spec.files[embedder.spec.graph].sha256,
            "prompt": prompt,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _complete(embedder, texts, folder, origin, progress)
        except OSError as error:
            raise OutputError(
                f"cannot keep the teacher's vectors in {folder}",
                expected=f"room for {len(texts) * embedder.dim * 2 / 1e6:.0f} MB",
                found=str(error),
                remedy="Free space there, and run the same command again: it goes on where it stopped.",
            ) from None
    vectors: Halves = np.load(folder / "vectors.npy", mmap_mode="r")
    return vectors


def texts_digest(texts: Sequence[str]) -> str:
    """sha256 over the texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _complete(
    embedder: Embedder, texts: Sequence[str], folder: Path, origin: dict[str, object], progress: bool
) -> None:
    path, note = folder / "vectors.npy", folder / "progress.json"
    done = _done(note, origin) if path.exists() else 0
    if done == len(texts):
        return
    mode = "r+" if done else "w+"
    vectors = np.lib.format.open_memmap(path, mode, dtype=np.float16, shape=(len(texts), embedder.dim))

    def chunks() -> Iterator[tuple[int, None]]:
        for start in range(done, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            vectors[start : start + len(part)] = embedder.embed(part, prompt=origin["prompt"], normalize=True)  # type: ignore[arg-type]
            vectors.flush()
            write_note(note, {**origin, "done": start + len(part)})
            yield len(part), None

    steps = chunks()
    for _ in progress_bar(steps, total=len(texts) - done) if progress else steps:
        pass


def _done(note: Path, origin: dict[str, object]) -> int:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    done = found.pop("done", 0) if isinstance(found, dict) else 0
    return int(done) if found == origin else 0
