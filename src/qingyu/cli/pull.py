"""``qingyu pull``: a model by name, repository or folder: fetched, exported, quantized and verified, into the cache."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.cli.common import new_command
from qingyu.cli.quantize import RECIPES
from qingyu.errors import (
    CorruptFileError,
    FidelityError,
    InvalidOptionError,
    MismatchError,
    OfflineError,
    QingyuError,
    SourceError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from qingyu.models.cache import Cache
    from qingyu.models.catalogue import CatalogueEntry
    from qingyu.models.sources import Snapshot
    from qingyu.runtime.spec import ModelSpec

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu pull bge-small-zh-v1.5
qingyu pull bge-small-zh-v1.5 --from hub,modelscope
qingyu embed --model bge-small-zh-v1.5 "今天天气真好\""""

NETWORK = ("hub", "mirror", "modelscope")  # those of qingyu.models.sources (a test compares)
CHECKPOINT_NAMES = ("*.json", "*.txt", "*.safetensors", "*/*.json", "*/*.safetensors")


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    summary = "get a model by name: download, export, quantize, verify (extra: pull)"
    parser = new_command(commands, "pull", summary, EXAMPLE)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a name of the catalogue (--list shows them), OWNER/NAME of a repository, or a checkpoint's folder",
    )
    parser.add_argument("--list", action="store_true", help="show the catalogue")
    parser.add_argument(
        "--from",
        dest="sources",
        default="hub",
        metavar="A,B,...",
        help="where to look, in this order: hub, mirror, modelscope, or the path of a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit (default: the catalogue's, or the newest)"
    )
    parser.add_argument("--offline", action="store_true", help="open no connection; use what is in the cache")
    parser.add_argument(
        "--recipe",
        choices=("fp32", *RECIPES),
        default="rowwise",
        help="fp32, or how to quantize (default: %(default)s)",
    )
    parser.add_argument("--name", help="name in the cache (default: the catalogue's, or the repository's)")
    parser.add_argument(
        "--download-only", action="store_true", help="only get the checkpoint; print its folder"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Pull, and say where the model is and what was checked."""
    if options.list:
        print(_listed())
        return 0
    if options.model is None:
        raise InvalidOptionError("MODEL", expected="a model", found="none", remedy="See qingyu pull --list.")
    from qingyu.models.cache import Cache
    from qingyu.models.extras import require
    from qingyu.runtime.home import qingyu_home

    require("pull", "huggingface_hub", "filelock", "onnx", "safetensors")
    wanted = _wanted(options)
    cache = Cache(qingyu_home())
    outcome = _download(wanted, cache) if options.download_only else _model(wanted, cache)
    print(json.dumps(outcome, ensure_ascii=False) if options.json else _described(outcome))
    return 0


@dataclass(frozen=True)
class _Wanted:
    """What the command line asks for; ``sources`` are names of NETWORK, or folders."""

    name: str
    repository: str
    entry: CatalogueEntry | None
    sources: Sequence[str | Path]
    revision: str | None
    offline: bool
    recipe: str

    def repository_at(self, source: str) -> str | None:
        """The model's name at a source; the mirror has the hub's."""
        if self.entry is None:
            return self.repository
        return self.entry.repositories.get("hub" if source == "mirror" else source)

    def revision_at(self, source: str) -> str | None:
        """The revision to ask for; the catalogue's is the hub's, as the mirror has it, or the source's own."""
        if self.revision is not None or self.entry is None:
            return self.revision
        return self.entry.revisions.get("hub" if source == "mirror" else source)

    @property
    def known(self) -> Mapping[str, Any]:
        """Hashes that files must have; they are of the catalogue's revision, and say nothing of another."""
        return {} if self.entry is None or self.revision is not None else self.entry.files


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint's folder, and what it is of."""

    folder: Path
    source: str
    repository: str | None
    revision: str


def _wanted(options: argparse.Namespace) -> _Wanted:
    from qingyu.models.catalogue import find_entry
    from qingyu.models.sources import is_offline

    entry = find_entry(options.model)
    offline = options.offline or is_offline()
    if entry is not None and not entry.exportable and not options.download_only:
        raise UnsupportedModelError(
            f"{entry.name} is for {entry.task}",
            expected="a task that `qingyu pull` makes models for",
            found=entry.note or "another",
            remedy="Use --download-only, and `qingyu export` on the folder it names.",
        )
    sources: list[str | Path] = [_source(item) for item in options.sources.split(",")]
    folder = Path(options.model)
    if entry is None and folder.is_dir():
        sources = [folder]
    name = options.name or (entry.name if entry is not None else folder.resolve().name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) is None:
        raise InvalidOptionError(
            "the model's name",
            expected="letters, digits, dots, hyphens",
            found=repr(name),
            remedy="Use --name.",
        )
    return _Wanted(name, options.model, entry, sources, options.revision, offline, options.recipe)


def _source(item: str) -> str | Path:
    if item in NETWORK:
        return item
    if item and Path(item).is_dir():
        return Path(item)
    raise InvalidOptionError(
        "--from",
        expected=f"some of {', '.join(NETWORK)}, or a folder that is there",
        found=repr(item),
        remedy="Separate them by commas, for example --from hub,modelscope.",
    )


# --- the checkpoint


def _checkpoint(wanted: _Wanted, cache: Cache) -> _Checkpoint:
    """From the first source that has it. What other sources said is on standard error by then."""
    failures: list[QingyuError] = []
    for source in wanted.sources:
        found = _attempt(source, wanted, cache)
        if isinstance(found, _Checkpoint):
            return found
        if found is not None:
            failures.append(found)
            if len(wanted.sources) > 1:
                print(f"not from {source}: {found}", file=sys.stderr)
    if wanted.offline and not failures:
        raise _not_here(wanted, cache)
    if len(failures) == 1:
        raise failures[0]
    raise SourceError(
        f"no source has {wanted.name}",
        expected=f"it at one of {', '.join(map(str, wanted.sources))}",
        found="; ".join(error.problem for error in failures) or "a model that is at none of them",
        remedy="Name others with --from: hub, mirror, modelscope, or a folder.",
    )


def _attempt(source: str | Path, wanted: _Wanted, cache: Cache) -> _Checkpoint | QingyuError | None:
    """``_from_source``, the errors that another source may mend returned."""
    try:
        return _from_source(source, wanted, cache)
    except (SourceError, CorruptFileError, UnsupportedModelError) as error:
        return error


def _from_source(source: str | Path, wanted: _Wanted, cache: Cache) -> _Checkpoint | None:
    """``None`` where the model is not known to be at the source, or not in the cache when working offline."""
    if isinstance(source, Path):
        return _from_folder(source, wanted)
    repository = wanted.repository_at(source)
    if repository is None:
        print(f"not from {source}: the catalogue knows no repository of {wanted.name} there", file=sys.stderr)
        return None
    if wanted.offline:
        found = cache.find_checkpoint(repository, wanted.revision_at(source))
        if found is None:
            return None
        folder, record = found
        return _Checkpoint(folder, record.source, repository, record.revision)
    return _from_network(source, repository, wanted, cache)


def _from_network(source: str, repository: str, wanted: _Wanted, cache: Cache) -> _Checkpoint:
    from qingyu.models.sources import Limits, find_snapshot
    from qingyu.runtime.progress import progress_bar

    limits = Limits()
    snapshot: Snapshot = find_snapshot(source, repository, wanted.revision_at(source), limits)
    pieces = cache.download(snapshot, known=wanted.known, limits=limits)
    for _ in progress_bar(((count, None) for count in pieces), total=snapshot.bytes, unit="bytes"):
        pass
    return _Checkpoint(cache.checkpoint(snapshot), source, repository, snapshot.revision)


def _from_folder(folder: Path, wanted: _Wanted) -> _Checkpoint:
    """The folder itself, its revision a digest of the files that it has."""
    import hashlib

    from qingyu.runtime.spec import check_file, sha256_of

    for name, record in wanted.known.items():
        check_file(folder, name, record)
    paths = sorted({path for pattern in CHECKPOINT_NAMES for path in folder.glob(pattern) if path.is_file()})
    try:
        facts = [[str(path.relative_to(folder)), sha256_of(path)] for path in paths]
    except OSError as error:
        raise SourceError(
            f"{folder} cannot be read",
            expected="a readable checkpoint",
            found=str(error),
            remedy="Mend its permissions.",
        ) from None
    digest = hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()[:12]
    repository = None if wanted.entry is None else wanted.entry.repositories.get("hub")
    return _Checkpoint(folder, "folder", repository, f"folder-{digest}")


def _not_here(wanted: _Wanted, cache: Cache) -> OfflineError:
    return OfflineError(
        f"{wanted.name} is not in the cache",
        expected=f"a whole checkpoint of it in {cache.home}",
        found="none" if wanted.revision is None else f"none of revision {wanted.revision}",
        remedy="Pull it once without --offline and HF_HUB_OFFLINE, or from a folder: --from FOLDER.",
    )


# --- the model


def _download(wanted: _Wanted, cache: Cache) -> dict[str, object]:
    checkpoint = _checkpoint(wanted, cache)
    return {"checkpoint": str(checkpoint.folder), "revision": checkpoint.revision}


def _model(wanted: _Wanted, cache: Cache) -> dict[str, object]:
    """Make the model unless it is there, whole, already; what is to be said of it."""
    try:
        checkpoint = _checkpoint(wanted, cache)
    except OfflineError:
        there = cache.find_model(wanted.name, wanted.revision, wanted.recipe)
        if there is None:
            raise
        cache.make_current(wanted.name, there)
        return {"model": wanted.name, "folder": str(there), "made": False, **_facts(there)}
    folder = cache.model_folder(wanted.name, checkpoint.revision, wanted.recipe)
    said: dict[str, object] = {}
    with cache.lock(folder.name):
        if not cache.is_whole(folder):
            with cache.building() as work:
                made, said = _make(wanted, checkpoint, work)
                cache.publish(made, folder)
        cache.make_current(wanted.name, folder)
    return {"model": wanted.name, "folder": str(folder), "made": bool(said), **_facts(folder), **said}


def _make(wanted: _Wanted, checkpoint: _Checkpoint, work: Path) -> tuple[Path, dict[str, object]]:
    from qingyu.models.export import export
    from qingyu.models.export.folder import write_manifest
    from qingyu.quantize import quantize, quantize_task
    from qingyu.runtime.spec import MANIFEST, Source

    fp32 = work / "fp32"
    prompts = {} if wanted.entry is None else wanted.entry.prompts
    task = None if wanted.entry is None else wanted.entry.task
    spec = export(checkpoint.folder, fp32, name=wanted.name, prompts=prompts, task=task)
    _check_identity(spec, wanted.entry)
    licence = spec.source.license or (None if wanted.entry is None else wanted.entry.license)
    source = Source(checkpoint.repository or spec.source.repository, checkpoint.revision, licence)
    (fp32 / MANIFEST).unlink()
    write_manifest(fp32, dataclasses.replace(spec, source=source))
    said: dict[str, object] = {"golden": _golden(fp32, wanted.entry)}
    if wanted.recipe == "fp32":
        return fp32, said
    if spec.task == "embedding":
        quantize(fp32, work / "quantized", recipe=wanted.recipe, speed_rounds=0, progress=True)
    else:
        quantize_task(fp32, work / "quantized", recipe=wanted.recipe, speed_rounds=0)
    return work / "quantized", said


def _check_identity(spec: ModelSpec, entry: CatalogueEntry | None) -> None:
    if entry is None:
        return
    stated = {"layers": entry.layers, "dim": entry.dim}
    found = {"layers": spec.architecture.layers, "dim": spec.dim}
    wrong = [name for name, value in stated.items() if value is not None and value != found[name]]
    if wrong:
        raise MismatchError(
            f"this checkpoint is not {entry.name}",
            expected=", ".join(f"{name} {stated[name]}" for name in wrong),
            found=", ".join(f"{name} {found[name]}" for name in wrong),
            remedy="Check the source; to use it all the same, pull its folder or repository by another --name.",
        )


def _golden(fp32: Path, entry: CatalogueEntry | None) -> str:
    """The outcome of the comparison with published results, in words; ``FidelityError`` when they are missed."""
    from qingyu.models.catalogue import published
    from qingyu.quantize.published import check_published

    results = None if entry is None else published(entry)
    if results is None:
        return "no published results to check against"
    found = check_published(fp32, results)
    if found.passed is None:
        return f"not checked: {found.worst}"
    if not found.passed:
        raise FidelityError(
            f"{entry.name if entry else fp32} does not give its published results",
            expected=f"the {found.count} results of its catalogue entry",
            found=found.worst,
            remedy="Nothing was kept. Check the source, and this machine with `qingyu doctor`.",
        )
    return f"FP32 gives its {found.count} published results: {found.worst}"


def _facts(folder: Path) -> dict[str, object]:
    from qingyu.runtime.spec import read_spec

    spec = read_spec(folder)
    return {
        "revision": spec.source.revision,
        "license": spec.source.license,
        "precision": spec.precision,
        "recipe": spec.recipe,
        "dim": spec.dim,
        "bytes": spec.files[spec.graph].bytes,
    }


def _described(outcome: Mapping[str, Any]) -> str:
    if "checkpoint" in outcome:
        return str(outcome["checkpoint"])
    precision = "FP32" if outcome["recipe"] is None else f"{outcome['recipe']}, {outcome['precision']}"
    state = "" if outcome["made"] else " (was there already, whole)"
    lines = [
        f"{outcome['model']}: {outcome['dim']} dimensions, {precision}, {outcome['bytes'] / 1e6:.1f} MB{state}",
        f"  revision {outcome['revision']}, licence {outcome['license'] or 'not stated'}",
        f"  in {outcome['folder']}",
    ]
    return "\n".join([*lines, f"  {outcome['golden']}"] if "golden" in outcome else lines)


def _listed() -> str:
    from qingyu.cli.table import render
    from qingyu.models.catalogue import catalogue

    header = ("name", "task", "dimensions", "licence", "sources", "")
    rows = [
        (
            entry.name,
            entry.task,
            str(entry.dim or ""),
            entry.license or "",
            ", ".join(f"{source} {name}" for source, name in entry.repositories.items()),
            "" if entry.exportable else "download only",
        )
        for entry in catalogue().values()
    ]
    return render(header, rows, right=frozenset({2}))
