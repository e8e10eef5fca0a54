"""``qingyu bundle-app``: a model and all that runs it, in one small folder or zip for a function or a board."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import BUNDLED, new_command
from qingyu.errors import InvalidOptionError

if TYPE_CHECKING:
    from qingyu.runtime.serverless.app_bundle import Machine

__all__ = ["add", "run"]

TARGETS = ("lambda", "scf", "fc", "pi")  # qingyu.runtime.serverless.targets' (a test compares)


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(
        commands,
        "bundle-app",
        "make a small folder or zip with a model and all that runs it, for a serverless function or a board",
        "qingyu bundle-app function.zip --model out/bge-int8 --target lambda --zip",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="folder, or with --zip file, to write")
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="FOLDER",
        help="an INT8 model folder, or a name in $QINGYU_HOME (default: %(default)s); it gets an edge file in the "
        "bundle if it has none (extra quantize)",
    )
    parser.add_argument("--target", choices=TARGETS, required=True, help="where it is to run")
    parser.add_argument("--zip", action="store_true", help="one zip file instead of a folder")
    parser.add_argument(
        "--wheels",
        metavar="DIR",
        type=Path,
        help="take numpy, onnxruntime, tokenizers and psutil from wheels there instead of this Python; nothing is "
        "downloaded, the error without it says the pip command that does",
    )
    parser.add_argument(
        "--machine",
        choices=("x86_64", "aarch64"),
        help="the processor it is for (default: this one); for another one --wheels is needed, and it cannot be tried",
    )
    parser.add_argument("--python", metavar="X.Y", help="the Python it is for (default: this one)")
    parser.add_argument(
        "--edge-only",
        action="store_true",
        help="leave out the plain graph, which CPUs with AVX2 and without VNNI need",
    )
    parser.add_argument("--server", action="store_true", help="with what `qingyu serve` needs (pi only)")
    parser.add_argument(
        "--no-edge", action="store_true", help="take the model as it is, without an edge file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the bundle, and say how large it is and what to do with it."""
    from qingyu.runtime.serverless.app_bundle import bundle_app
    from qingyu.runtime.task import find_model

    with _with_edge(find_model(options.model), wanted=not options.no_edge) as model:
        made = bundle_app(
            model,
            options.output,
            options.target,
            wheels=options.wheels,
            machine=_machine(options.machine, options.python),
            edge_only=options.edge_only,
            server=options.server,
            as_zip=options.zip,
            overwrite=options.overwrite,
            progress=sys.stderr.isatty(),
        )
    zipped = "" if made.zip_bytes is None else f", zipped {made.zip_bytes / 1e6:.1f} MB"
    print(f"{made.path}: {made.unpacked_bytes / 1e6:.1f} MB{zipped}, {made.model} for {made.target}")
    if made.handler is not None:
        print(f"handler: {made.handler}")
    python = ".".join(map(str, made.machine.python))
    tried = (
        "tried here, alone in a fresh process" if made.tried else "NOT tried: it cannot run on this machine"
    )
    print(f"for {made.machine.name} and Python {python}, {tried}")
    return 0


def _machine(name: str | None, python: str | None) -> Machine:
    from qingyu.runtime.serverless.app_bundle import Machine

    here = Machine.here()
    if python is not None and not re.fullmatch(r"3\.\d{1,2}", python):
        raise InvalidOptionError(
            "option python", expected="a version as 3.12", found=repr(python), remedy="Write it so."
        )
    version = here.python if python is None else (3, int(python[2:]))
    return Machine(name or here.name, version)


@contextmanager
def _with_edge(model: Path, *, wanted: bool) -> Iterator[Path]:
    """The model folder, or where an INT8 one has no edge file a copy with one."""
    import shutil

    from qingyu.runtime.spec import MANIFEST, read_spec

    spec = read_spec(model)
    if not wanted or spec.edge is not None or spec.precision != "int8":
        yield model
        return
    from qingyu.quantize.edge import add_edge

    with tempfile.TemporaryDirectory(prefix="qingyu-bundle-app-") as scratch:
        copy = Path(scratch) / "model"
        copy.mkdir()
        for name in (MANIFEST, *spec.files):
            shutil.copyfile(model / name, copy / name)
        add_edge(copy)
        yield copy
