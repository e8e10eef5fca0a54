"""What an application bundle holds for each place it is made for, as data: entry files, packages, what is left out.

Not here: making the bundle (``app_bundle``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DROPPED", "PACKAGES", "SERVER_PACKAGES", "TARGETS", "Target", "entry_files"]

MEGABYTE = 1_000_000

# Distributions that a bundle is made of, besides qingyu itself.
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "psutil")

# What the extra `serve` brings, with what those need, for a board that serves others.
SERVER_PACKAGES = ("uvicorn", "click", "h11", "httptools", "uvloop", "orjson", "prometheus_client")

# What is never loaded, as patterns of paths in site-packages ("*" crosses folders). Licences are kept before these.
DROPPED: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": (
        # The Python module holds the whole runtime and is not linked with this library.
        "onnxruntime/capi/libonnxruntime.so*",
        "onnxruntime/transformers/*",
        "onnxruntime/quantization/*",
        "onnxruntime/tools/*",
        "onnxruntime/backend/*",
        "onnxruntime/datasets/*",
        "onnxruntime/capi/convert_npz_to_onnx_adapter.py",
        "onnxruntime/capi/onnxruntime_collect_build_info.py",
    ),
    "numpy": (
        "numpy/f2py/*",
        "numpy/distutils/*",
        "numpy/testing/*",
        "numpy/_pyinstaller/*",
        "numpy/doc/*",
        "numpy/conftest.py",
        # Loaded only when somebody names them; nothing here does.
        "numpy/random/*",
        "numpy/fft/*",
        "numpy/ma/*",
        "numpy/polynomial/*",
        "numpy/ctypeslib/*",
        "numpy/_core/_simd*.so",
        "numpy/_core/*_tests*.so",
        "numpy/_core/include/*",
        "numpy/_core/lib/*",
    ),
    "tokenizers": ("tokenizers/tools/*",),
    "uvloop": ("uvloop/loop.c", "*/_testbase.py"),
}
# In every package: tests, types for other people's checkers, sources of other languages, and what pip writes.
DROPPED_EVERYWHERE = (
    "*/tests/*",
    "*.pyi",
    "*.pyx",
    "*.pxd",
    "*.h",
    "*.c",
    "*.cpp",
    "*.a",
    "*.pyc",
    "*/py.typed",
    "*.dist-info/RECORD",
    "*.dist-info/INSTALLER",
    "*.dist-info/REQUESTED",
    "*.dist-info/direct_url.json",
    "*.dist-info/entry_points.txt",
    "*.dist-info/sboms/*",
)
KEPT = (
    "*LICENSE*",
    "*LICENCE*",
    "*NOTICE*",
    "*Notices*",
    "*COPYING*",
    "*AUTHORS*",
    "*Privacy.md",
    "*/METADATA",
)

# Of qingyu: what runs a model, and for machines with a shell the command line. Never the model in the package. A "*"
# stays within its folder here.
RUNTIME_FILES = (
    "qingyu/__init__.py",
    "qingyu/errors.py",
    "qingyu/runtime/*.py",
    "qingyu/runtime/*.onnx",
    "qingyu/runtime/serverless/*.py",
)
COMMAND_FILES = ("qingyu/__main__.py", "qingyu/cli/*.py")
SERVER_FILES = ("qingyu/runtime/serve/*", "qingyu/models/__init__.py", "qingyu/models/extras.py")

FUNCTION = '''"""Entry of the function: {platform} calls ``{handler}``."""

import os
from pathlib import Path

os.environ.setdefault("QINGYU_MODEL", str(Path(__file__).with_name("model")))
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads would only take memory

from qingyu.runtime.serverless.handlers import prepare
from qingyu.runtime.serverless.handlers import {function} as {name}

__all__ = ["{name}"]

prepare()
'''

COMMAND = """#!/bin/sh
# qingyu with the packages beside this file; the same options and commands as anywhere.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
export PYTHONPATH="$here/lib" ORT_DISABLE_TELEMETRY="${ORT_DISABLE_TELEMETRY:-1}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
exec "${QINGYU_PYTHON:-python3}" -m qingyu "$@"
"""


@dataclass(frozen=True)
class Target:
    """One place: the file that it starts, where packages lie, and how large all may be there, in bytes.

    ``handler`` is what to enter at the platform; ``None`` for a machine with a shell. ``limit`` is the platform's own,
    unzipped.
    """

    name: str
    platform: str
    limit: int | None
    handler: str | None = None
    function: str | None = None
    libraries: str = ""

    def files(self, *, server: bool) -> tuple[str, ...]:
        """Patterns of what of qingyu is taken."""
        commands = COMMAND_FILES if self.handler is None else ()
        return (*RUNTIME_FILES, *commands, *(SERVER_FILES if server else ()))


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("lambda", "AWS Lambda", 250 << 20, "lambda_function.lambda_handler", "lambda_handler"),
        Target("scf", "Tencent SCF", 500 << 20, "index.main_handler", "scf_handler"),
        Target("fc", "Alibaba FC", 500 << 20, "index.handler", "fc_handler"),
        Target("pi", "a Pi-class board", None, libraries="lib"),
    )
}


def entry_files(target: Target) -> dict[str, str]:
    """The files that a target starts, by name."""
    if target.handler is None:
        return {"qingyu": COMMAND}
    module, _, name = target.handler.partition(".")
    text = FUNCTION.format(
        platform=target.platform, handler=target.handler, function=target.function, name=name
    )
    return {f"{module}.py": text}
