"""Weights of a checkpoint from safetensors, one tensor at a time, as float32.

One file or shards with an index; fp32, fp16, bf16 and fp64. Pickle files are refused and never opened.
Not here: which weights a model needs (``checkpoint.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import CheckpointError
from qingyu.models.export.files import Document, read_object, refuse, shown, within
from qingyu.models.extras import require

__all__ = ["TensorFiles", "open_weights"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ckpt.index")
READABLE = ("F32", "F16", "BF16", "F64")

CONVERT = (
    "Convert it on a machine with torch that trusts it: "
    'python -c "from transformers import AutoModel; '
    "AutoModel.from_pretrained('IN').save_pretrained('OUT')\" and copy the other files over."
)

# Names that old checkpoints used, as transformers still renames them.
_OLD_NAMES = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))


class TensorFiles(Mapping[str, NDArray[np.float32]]):
    """The float32 tensors of safetensors files by name; each access reads from the disk.

    ``CheckpointError`` where a tensor is not of a float type, or holds a NaN or an infinity.
    """

    def __init__(self, files: Mapping[str, tuple[Path, str, tuple[int, ...]]]) -> None:
        """``files`` maps a name to the file, the name within it, and the shape."""
        self._files = files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._files[name][2]

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        path, stored, _ = self._files[name]
        array = _read(path, stored)
        if not np.isfinite(array).all():
            refuse(f"{path}: tensor {stored}", expected="finite numbers", found="NaN or an infinity")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_weights(folder: Path, *, prefix: str = "") -> TensorFiles:
    """The weights in a folder, old names made new and ``prefix`` removed where names carry it.

    Raises ``CheckpointError`` where there is no safetensors file, or one that is damaged, and
    ``MissingExtraError`` without the package safetensors.
    """
    require("export", "safetensors")
    files: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in _paths(folder):
        for stored, shape in _header(path).items():
            files[_current_name(stored, prefix)] = (path, stored, shape)
    return TensorFiles(files)


def _current_name(name: str, prefix: str) -> str:
    for old, new in _OLD_NAMES:
        if name.endswith(old):
            name = name[: -len(old)] + new
    return name[len(prefix) :] if prefix and name.startswith(prefix) else name


def _paths(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _shards(read_object(folder / INDEX), folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        refuse(
            f"{folder} holds weights only in a format that can run code when opened",
            expected=SINGLE,
            found=", ".join(pickles[:4]),
            remedy=CONVERT,
        )
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
    return refuse(f"{folder} holds no weights", expected=f"{SINGLE} or {INDEX}", found=found)


def _shards(index: Document, folder: Path) -> list[Path]:
    names = index.object("weight_map").values()
    if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        index.refuse("weight_map", "names of .safetensors files")
    paths = [within(folder, name, index.path) for name in sorted(set(names))]
    for path in paths:
        if not path.is_file():
            refuse(f"{index.path} names a missing file", expected=path.name, found="no such file")
    return paths


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, after the library has checked the file's structure."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from None


def _read(path: Path, name: str) -> NDArray[np.float32]:
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in READABLE:
                refuse(
                    f"{path}: tensor {name}",
                    expected=f"a type among {', '.join(READABLE)}",
                    found=shown(kind),
                )
            if kind != "BF16":
                return np.asarray(file.get_tensor(name), dtype=np.float32)
        return _read_bf16(path, name)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from None


def _read_bf16(path: Path, name: str) -> NDArray[np.float32]:
    # numpy has no bf16, but bf16 is the upper half of a float32. The library has checked these offsets.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        bits = np.frombuffer(file.read(end - start), dtype="<u2")
    values: NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
    values.shape = tuple(entry["shape"])
    return values


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read",
        expected="a whole safetensors file",
        found=str(error) or type(error).__name__,
        remedy="Download the checkpoint again.",
    )
