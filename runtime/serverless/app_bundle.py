"""An application in one folder or zip: a model, the packages that run it, and an entry file, made small and tried.

What is never loaded is left out (``targets``), licences stay. The finished tree is tried in a fresh process that sees
nothing but the tree and Python's own library, and gets its name only when its vectors are those of the model here.

Packages come from this Python's own installation, or from a folder of wheels, which may be for another machine or
another version of Python; then the tree cannot be tried here, and says so. Nothing is downloaded. Not here: making an
INT8 model (``qingyu quantize``) and its edge file (``qingyu.quantize.edge``).
"""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from qingyu.errors import InvalidOptionError, OperatorError, OutputError, UnsupportedModelError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.progress import progress_bar
from qingyu.runtime.serverless.targets import (
    DROPPED,
    DROPPED_EVERYWHERE,
    KEPT,
    PACKAGES,
    SERVER_PACKAGES,
    TARGETS,
    Target,
    entry_files,
)
from qingyu.runtime.spec import MANIFEST, ModelSpec, check_file, read_spec
from qingyu.runtime.vectors import cosine

__all__ = ["AppBundle", "Machine", "bundle_app", "download_command"]

TEXTS = ("今天天气真好", "怎么修改登录密码？", "iPhone15 Pro 的电池能用多久")
LEAST_COSINE = 0.99999  # of the tree's vectors with those of the same files on the same CPU
SECONDS = 120
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Machine:
    """Where a bundle is to run: ``x86_64`` or ``aarch64``, and the version of Python, as (3, 11)."""

    name: str
    python: tuple[int, int]

    @classmethod
    def here(cls) -> Machine:
        """The machine and the Python that run here."""
        return cls(platform.machine(), (sys.version_info.major, sys.version_info.minor))

    @property
    def tag(self) -> str:
        """As in the names of wheels: cp311."""
        return f"cp{self.python[0]}{self.python[1]}"


@dataclass(frozen=True)
class AppBundle:
    """What was made: sizes in bytes, and whether it was tried on a machine of its kind."""

    path: Path
    target: str
    handler: str | None
    machine: Machine
    packages: Mapping[str, str]
    model: str
    unpacked_bytes: int
    zip_bytes: int | None
    tried: bool


@dataclass(frozen=True)
class _File:
    """A file of a distribution: its path in site-packages, and where its bytes are (in a wheel, if one is named)."""

    name: str
    path: Path
    wheel: Path | None = None


def bundle_app(
    model: Path,
    output: Path,
    target: str,
    *,
    wheels: Path | None = None,
    machine: Machine | None = None,
    edge_only: bool = False,
    server: bool = False,
    as_zip: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> AppBundle:
    """Makes ``output``, a folder or a zip file, for a target from the INT8 model folder ``model``.

    ``wheels`` is a folder of wheels of numpy, onnxruntime, tokenizers and psutil to take instead of this Python's
    own; needed where ``machine`` is not this one. ``edge_only`` leaves out the plain graph where the folder has an
    edge file: smaller, and refused by CPUs with AVX2 and without VNNI, which need the graph. ``server`` adds what
    ``qingyu serve`` needs, on machines with a shell.

    Raises ``InvalidOptionError``, ``OutputError`` (also for a bundle over the target's limit),
    ``UnsupportedModelError`` for a model that is not INT8 or not for embeddings, ``OperatorError`` for packages that
    are missing or a tree that does not run, and what opening the model raises. Whatever fails leaves no output.
    """
    place = _target(target)
    if server and place.handler is not None:
        raise InvalidOptionError(
            "server",
            expected="a machine with a shell",
            found=place.platform,
            remedy="Leave it out, or use pi.",
        )
    where = Machine.here() if machine is None else machine
    spec = _checked_model(model, edge_only)
    files, versions = _dependencies(wheels, where, (*PACKAGES, *(SERVER_PACKAGES if server else ())))
    _check_output(output, overwrite)
    expected = _vectors(model)
    with (
        _writing(output),
        tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch,
    ):
        tree = Path(scratch) / "tree"
        tree.mkdir()
        _fill(tree, place, [*_own_files(place, server), *files], progress=progress)
        _copy_model(model, tree / "model", spec, edge_only)
        tried = where == Machine.here()
        if tried:
            _compile(tree)
            _try(tree, place, expected)
        _describe(tree, place, where, versions, spec)
        size = _size(tree)
        _check_limit(place, size, output)
        result = Path(scratch) / "zip" if as_zip else tree
        if as_zip:
            _zip(tree, result, progress=progress)
        zip_bytes = result.stat().st_size if as_zip else None
        _publish(result, output, overwrite)
    return AppBundle(output, place.name, place.handler, where, versions, spec.name, size, zip_bytes, tried)


def download_command(machine: Machine, folder: str, names: Sequence[str] = PACKAGES) -> str:
    """The pip command that brings wheels for a machine into a folder, in the versions that are installed here."""
    pins = " ".join(f"{name}=={importlib.metadata.version(name)}" for name in names)
    platforms = " ".join(f"--platform {kind}_{machine.name}" for kind in ("manylinux_2_28", "manylinux_2_27"))
    return (
        f"pip download --only-binary :all: --no-deps --implementation cp --abi {machine.tag} --abi abi3 "
        f"--python-version {machine.python[0]}.{machine.python[1]} {platforms} "
        f"--platform manylinux2014_{machine.name} -d {folder} {pins}"
    )


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise InvalidOptionError(
            "target", expected=f"one of {', '.join(TARGETS)}", found=repr(name), remedy="Use one of them."
        )
    return TARGETS[name]


def _checked_model(model: Path, edge_only: bool) -> ModelSpec:
    spec = read_spec(model)
    wrong = None
    if spec.task != "embedding":
        wrong = ("a model for embeddings", f"one for {spec.task}", "The handlers give embeddings only.")
    elif spec.precision != "int8":
        wrong = ("an INT8 model", f"an {spec.precision.upper()} one", "Make one with `qingyu quantize`.")
    elif edge_only and spec.edge is None:
        wrong = ("an edge file", "none", "Make one with `qingyu quantize --edge`, or leave --edge-only out.")
    if wrong is not None:
        raise UnsupportedModelError(
            f"{model} cannot be bundled", expected=wrong[0], found=wrong[1], remedy=wrong[2]
        )
    for name in _model_files(spec, edge_only):
        check_file(model, name, spec.files[name])
    return spec


def _model_files(spec: ModelSpec, edge_only: bool) -> list[str]:
    """What is copied. An FP32 graph for CPUs that fail would be as large as all the rest, so it stays behind."""
    named = [
        "tokenizer.json",
        None if edge_only else spec.graph,
        None if spec.edge is None else spec.edge.file,
    ]
    return [name for name in named if name is not None]


def _vectors(model: Path) -> Floats:
    with Embedder.open(model, profile="edge") as embedder:
        return embedder.embed(TEXTS)


def _dependencies(
    wheels: Path | None, machine: Machine, names: Sequence[str]
) -> tuple[list[_File], dict[str, str]]:
    """The files that are kept of all packages, and the packages' versions."""
    if wheels is None and machine != Machine.here():
        raise OperatorError(
            f"no packages for {machine.name} and Python {machine.python[0]}.{machine.python[1]} here",
            expected="a folder of wheels for it",
            found=f"packages for {Machine.here().name} and Python {sys.version_info.major}.{sys.version_info.minor}",
            remedy=f"Run: {download_command(machine, 'wheels', names)} ; then pass --wheels wheels.",
        )
    files: list[_File] = []
    versions = {}
    for name in names:
        found, versions[name] = _installed(name) if wheels is None else _in_wheels(wheels, name, machine)
        files += [file for file in found if _kept(name, file.name)]
    return files, versions


def _kept(package: str, name: str) -> bool:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT):
        return not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in DROPPED.get(package, ()) if "libonnx" in pattern
        )
    return not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in (*DROPPED.get(package, ()), *DROPPED_EVERYWHERE)
    )


def _installed(package: str) -> tuple[list[_File], str]:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise _no_package(package, "not installed") from None
    files = [
        _File(file.as_posix(), Path(str(distribution.locate_file(file))))
        for file in distribution.files or ()
        if ".." not in file.parts and not file.is_absolute()
    ]
    if not files or not all(file.path.is_file() for file in files if not file.name.endswith(".pyc")):
        raise _no_package(package, "an installation that does not list its files")
    return files, distribution.version


def _in_wheels(folder: Path, package: str, machine: Machine) -> tuple[list[_File], str]:
    fitting = sorted(wheel for wheel in folder.glob(f"{package}-*.whl") if _fits(wheel, machine))
    if len(fitting) != 1:
        raise _no_package(package, f"{len(fitting)} such wheels in {folder}", machine)
    try:
        with zipfile.ZipFile(fitting[0]) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise _no_package(package, f"{fitting[0]}: {error}", machine) from None
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
        raise _no_package(package, f"{fitting[0]} with a path that leads out of it", machine)
    files = [
        _File(re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name), fitting[0] / name, fitting[0])
        for name in names
    ]
    return files, fitting[0].name.split("-")[1]


def _fits(wheel: Path, machine: Machine) -> bool:
    """Whether the tags in a wheel's name admit the machine (packaging.python.org, "binary distribution format")."""
    parts = wheel.stem.split("-")
    if len(parts) not in (5, 6):
        return False
    pythons, abis, platforms = (set(part.split(".")) for part in parts[-3:])
    stable = "abi3" in abis and any(
        tag[:3] == "cp3" and tag[3:].isdigit() and (3, int(tag[3:])) <= machine.python for tag in pythons
    )
    exact = machine.tag in pythons and machine.tag in abis
    pure = "none" in abis and platforms == {"any"}
    return pure or (
        (stable or exact) and any(p.startswith("many") and p.endswith(machine.name) for p in platforms)
    )


def _no_package(package: str, found: str, machine: Machine | None = None) -> OperatorError:
    command = f"pip install {package}" if machine is None else download_command(machine, "wheels")
    return OperatorError(
        f"cannot bundle {package}",
        expected="one package with its list of files"
        if machine is None
        else f"one wheel for {machine.name}, {machine.tag}",
        found=found,
        remedy=f"Run: {command}",
    )


def _own_files(target: Target, server: bool) -> Iterator[_File]:
    """What of qingyu runs; however it is installed, its modules say where they lie."""
    import qingyu
    import qingyu.runtime
    import qingyu.runtime.serverless

    folders = {
        "qingyu": Path(qingyu.__file__).parent,
        "qingyu/cli": Path(qingyu.__file__).parent / "cli",
        "qingyu/runtime": Path(qingyu.runtime.__file__).parent,
        "qingyu/runtime/serverless": Path(qingyu.runtime.serverless.__file__).parent,
        "qingyu/runtime/serve": Path(qingyu.runtime.__file__).parent / "serve",
        "qingyu/models": Path(qingyu.__file__).parent / "models",
    }
    wanted = target.files(server=server)
    for name, folder in folders.items():
        for path in sorted(folder.iterdir()):
            place = f"{name}/{path.name}"
            if path.is_file() and any(PurePosixPath(place).match(pattern) for pattern in wanted):
                yield _File(place, path)
    for path in _licences():
        yield _File(f"qingyu-licenses/{path.name}", path)


def _licences() -> list[Path]:
    try:
        files = importlib.metadata.files("qingyu") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    paths = [Path(str(file.locate())) for file in files if file.name in ("LICENSE", "NOTICE")]
    return [path for path in paths if path.is_file()]


def _fill(tree: Path, target: Target, files: Sequence[_File], *, progress: bool) -> None:
    root = tree / target.libraries
    steps: Any = ((1, file) for file in files)
    archives: dict[Path, zipfile.ZipFile] = {}
    with contextlib.ExitStack() as stack:
        for file in (
            progress_bar(steps, total=len(files), unit="files") if progress else (f for _, f in steps)
        ):
            place = root / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.wheel is None:
                shutil.copyfile(file.path, place)
                continue
            if file.wheel not in archives:
                archives[file.wheel] = stack.enter_context(zipfile.ZipFile(file.wheel))
            inner = file.path.relative_to(file.wheel).as_posix()
            with archives[file.wheel].open(inner) as source, place.open("xb") as copy:
                shutil.copyfileobj(source, copy)
    for name, text in entry_files(target).items():
        (tree / name).write_text(text, encoding="utf-8")
        (tree / name).chmod(0o644 if name.endswith(".py") else 0o755)


def _copy_model(model: Path, place: Path, spec: ModelSpec, edge_only: bool) -> None:
    """The model's files. The record of the graph stays in the manifest, also where the graph does not."""
    place.mkdir()
    names = _model_files(spec, edge_only)
    for name in names:
        shutil.copyfile(model / name, place / name)
    records = {name: spec.files[name] for name in {*names, spec.graph}}
    slim = dataclasses.replace(spec, files=dict(sorted(records.items())), fallback=None)
    (place / MANIFEST).write_text(slim.to_json(), encoding="utf-8")


def _compile(tree: Path) -> None:
    """Compiled modules beside all sources: the tree will be read-only, and a cold start should not compile.

    They are valid whatever becomes of the sources' dates on the way (PEP 552, unchecked hashes).
    """
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(tree, quiet=2, invalidation_mode=mode, stripdir=str(tree), workers=1)


# Runs in the finished tree, isolated (-I) and without site-packages (-S). $1 is what to import or "", then texts.
TRIAL = """
import json, os, sys
sys.dont_write_bytecode = True
root, entry, name = sys.argv[1:4]
texts = json.loads(sys.argv[4])
sys.path.insert(0, os.path.join(root, "lib") if not entry else root)
if entry:
    handler = getattr(__import__(entry), name)
    event = {
        "httpMethod": "POST", "path": "/embed", "headers": {"content-type": "application/json"}, "requestContext": {},
        "body": json.dumps({"inputs": texts}),
    }
    answer = handler(event, None)
    assert answer["statusCode"] == 200, answer["body"]
    vectors = json.loads(answer["body"])
else:
    import qingyu.__main__
    from qingyu import Embedder
    with Embedder.open(os.path.join(root, "model"), profile="edge") as embedder:
        vectors = embedder.embed(texts).tolist()
library = (os.path.dirname(os.__file__), root)
for module in list(sys.modules.values()):
    place = getattr(module, "__file__", None)
    assert not place or os.path.abspath(place).startswith(library), "from outside: " + place
print(json.dumps(vectors))
"""


def _try(tree: Path, target: Target, expected: Floats) -> None:
    """Run the tree alone in a fresh process; ``OperatorError`` unless it gives the model's vectors."""
    entry, _, name = (target.handler or ".").partition(".")
    command = [sys.executable, "-I", "-S", "-c", TRIAL, str(tree.resolve()), entry, name, json.dumps(TEXTS)]
    environment = {"PATH": os.defpath, "HOME": "/nonexistent", "ORT_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _does_not_run(f"nothing within {SECONDS} s") from None
    if done.returncode or not done.stdout:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _does_not_run(lines[-1] if lines else f"exit status {done.returncode}")
    vectors = np.array(json.loads(done.stdout), dtype=np.float32)
    least = float(np.diag(cosine(vectors, expected)).min())
    if not least >= LEAST_COSINE:
        raise _does_not_run(f"vectors of cosine {least:.6f}")


def _does_not_run(found: str) -> OperatorError:
    return OperatorError(
        "the bundle does not run",
        expected="the vectors of the model, from the bundle alone",
        found=found,
        remedy="Other versions of the packages may need what is left out of these: report the versions "
        "that `qingyu doctor` prints.",
    )


def _describe(
    tree: Path, target: Target, machine: Machine, versions: Mapping[str, str], spec: ModelSpec
) -> None:
    from qingyu import __version__

    document = {
        "target": target.name,
        "handler": target.handler,
        "machine": machine.name,
        "python": ".".join(map(str, machine.python)),
        "packages": {"qingyu": __version__, **versions},
        "model": spec.name,
        "graph_sha256": spec.files[spec.graph].sha256,
    }
    (tree / "bundle.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _size(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def _check_limit(target: Target, size: int, output: Path) -> None:
    if target.limit is not None and size > target.limit:
        raise OutputError(
            f"{output} would be too large for {target.platform}",
            expected=f"at most {target.limit / 1e6:.0f} MB unpacked",
            found=f"{size / 1e6:.0f} MB",
            remedy="Use a smaller model, or --edge-only.",
        )


def _zip(tree: Path, place: Path, *, progress: bool) -> None:
    """All of the tree with fixed dates and order: the same tree gives the same bytes."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    steps: Any = ((1, path) for path in paths)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (
            progress_bar(steps, total=len(paths), unit="files") if progress else (p for _, p in steps)
        ):
            info = zipfile.ZipInfo(path.relative_to(tree).as_posix(), ZIP_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (0o100755 if path.stat().st_mode & 0o100 else 0o100644) << 16
            with path.open("rb") as source, archive.open(info, "w") as copy:
                shutil.copyfileobj(source, copy, 1 << 18)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise OutputError(
            f"cannot write {output}",
            expected="a folder to write into",
            found="no such folder",
            remedy="Make it.",
        )
    if os.path.lexists(output) and not overwrite and not _is_empty_folder(output):
        raise OutputError(
            f"{output} exists",
            expected="a new name",
            found="something there",
            remedy="Pass --overwrite to replace it.",
        )
    if os.path.lexists(output) and overwrite and not _is_ours(output):
        raise OutputError(
            f"{output} is not replaced",
            expected="a bundle or a zip file",
            found="something else",
            remedy="Name another, or remove it yourself.",
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _is_ours(path: Path) -> bool:
    return (
        _is_empty_folder(path)
        or (path.is_dir() and (path / "bundle.json").is_file())
        or (path.is_file() and zipfile.is_zipfile(path))
    )


def _publish(result: Path, output: Path, overwrite: bool) -> None:
    """Give the result its name. What was there goes away first into the scratch folder, and with it."""
    if result.is_dir():
        result.chmod(0o755)
    if os.path.lexists(output) and (overwrite or _is_empty_folder(output)):
        output.rename(result.with_name("old"))
    result.rename(output)


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {output}",
            expected="a folder that can be written, with room",
            found=error.strerror or str(error),
            remedy="Free space, or name another place.",
        ) from None
