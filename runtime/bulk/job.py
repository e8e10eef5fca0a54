"""A job: which blocks there are, which are finished, and what the run came to.

One output folder is one job. ``_qingyu.json`` in it says what the job is; a run of another one, or with an input
that has changed, is refused, so that the folder never holds a row twice or two kinds of vectors. Input files may be
added. Names that begin with ``_`` or ``.`` are left out by what reads folders of Parquet (pyarrow, Spark, DuckDB).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingyu.errors import ClusterError, DataFileError, InvalidOptionError, OutputError
from qingyu.models.extras import require
from qingyu.runtime.bulk import cluster
from qingyu.runtime.bulk.blocks import Block, InputFile, find_inputs, split
from qingyu.runtime.bulk.parts import PartFacts, bad_lines, part_name, read_facts, write_failures
from qingyu.runtime.bulk.rows import kept_schema
from qingyu.runtime.bulk.worker import BulkOptions, Outcome, Recipe
from qingyu.runtime.progress import progress_bar
from qingyu.runtime.task import BUNDLED, Report

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["BulkOptions", "Done", "bulk_embed"]

MANIFEST = "_qingyu.json"
BAD_ROWS = "_bad_rows.jsonl"
LOCK = "_qingyu.lock"
FORMAT = 1


@dataclass
class Done:
    """What is in the output folder after a run. ``skipped`` parts were there before; ``given_up`` are not there."""

    output: Path
    rows: int = 0
    bad: int = 0
    blank: int = 0
    parts: int = 0
    skipped: int = 0
    given_up: list[Block] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def add(self, facts: PartFacts) -> None:
        """Count a part."""
        self.rows += facts.rows
        self.bad += len(facts.bad)
        self.blank += facts.blank
        self.parts += 1
        self.report.include(facts.report)

    def check(self) -> None:
        """Raise ``ClusterError`` for blocks given up, else ``DataFileError`` for bad rows; both say how many."""
        if self.given_up:
            first = self.given_up[0]
            raise ClusterError(
                f"{len(self.given_up):,} of {self.parts + len(self.given_up):,} blocks were given up",
                expected="workers that live",
                found=f"several dead at each, first at {first.file.path}, rows {first.first + 1:,} to "
                f"{first.first + first.rows:,}",
                remedy="Give workers more memory, or smaller --block-mb into a new folder; the same job again tries "
                "these blocks anew.",
            )
        if self.bad:
            raise DataFileError(
                f"{self.bad:,} of {self.rows + self.bad:,} rows were not embedded",
                expected="a text in every row",
                found=f"rows without one, listed in {self.output / BAD_ROWS}",
                remedy="All other rows are embedded. Put the repaired ones into a new file and run again.",
            )


def bulk_embed(
    pattern: str,
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = BUNDLED,
    address: str = "local",
    workers: int | None = None,
    options: BulkOptions | None = None,
    progress: bool = False,
) -> Done:
    """Embed the texts of JSON lines or Parquet files into a folder of Parquet files, each row exactly once.

    ``pattern`` is a path or a glob. ``address`` is that of a Ray cluster (see ``cluster.connected``), whose machines
    must see inputs, output and model at the same paths. ``workers`` ``None`` is as many as fit. What is finished in
    the folder is not done again, whatever ended the run before; ``Done.check`` raises for what is missing.

    Raises ``MissingExtraError``, ``InvalidOptionError``, ``DataFileError``, ``OutputError``, ``ClusterError``,
    ``VectorSpaceError`` where a machine has another model, and what ``Embedder.open`` raises.
    """
    require("ray", "ray", "pyarrow", "pandas")
    chosen = BulkOptions() if options is None else options
    _check(chosen, workers)
    files = find_inputs(pattern)
    schema = kept_schema(files, chosen.field, chosen.keep)
    recipe = _recipe(model, chosen, schema, Path(output).resolve())
    with _folder(recipe.output):
        _register(recipe, files)
        blocks = [block for file in files for block in split(file, chosen.block_bytes, chosen.field)]
        return _run(blocks, recipe, address=address, workers=workers, progress=progress)


def _check(options: BulkOptions, workers: int | None) -> None:
    numbers = {"block_bytes": options.block_bytes, "attempts": options.attempts, "threads": options.threads}
    for name, value in {**numbers, "workers": 1 if workers is None else workers}.items():
        if value < 1:
            raise InvalidOptionError(name, expected="at least 1", found=str(value), remedy="Leave it out.")


def _recipe(model: str | os.PathLike[str], options: BulkOptions, schema: pa.Schema, output: Path) -> Recipe:
    """The job as workers need it; the bundled model goes by its name, since machines have it in places of their own."""
    place = str(Path(model).resolve()) if Path(model).exists() else str(model)
    # Cores and memory are the workers' affair: this machine may have less of them.
    with replace(options, threads=1, max_memory_mb=None).open(place) as embedder:
        embedder.embed(
            [], prompt=options.prompt, dim=options.dim, long_text=options.long_text, overlap=options.overlap
        )
        return Recipe(place, options.fingerprint(embedder), options, schema, output)


@contextmanager
def _folder(output: Path) -> Iterator[None]:
    """The output folder, made and locked; leftovers of killed workers are gone."""
    with ExitStack() as stack:
        with write_failures(output):
            output.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((output / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{output} is in use",
                expected="a folder that no other run writes into",
                found="one that another process has locked",
                remedy="Wait for it to end, or choose another --output.",
            ) from None
        with write_failures(output):
            for leftover in output.glob(".part-*.attempt-*"):
                leftover.unlink(missing_ok=True)
        yield


def _register(recipe: Recipe, files: Sequence[InputFile]) -> None:
    """Note the job in its folder, or check that it is the one noted there."""
    path = recipe.output / MANIFEST
    job = _job(recipe)
    inputs = {file.name: {"bytes": file.bytes, "modified_ns": file.modified_ns} for file in files}
    if path.exists():
        noted = _noted(path)
        _check_same(recipe.output, noted, job, inputs)
    elif any(recipe.output.glob("part-*")):
        raise _foreign(
            recipe.output, "a new folder, or one with a job of the same kind", f"parts without {MANIFEST}"
        )
    text = json.dumps({"format": FORMAT, "job": job, "inputs": inputs}, ensure_ascii=False, indent=2)
    temporary = path.with_name(f".{MANIFEST}.{os.getpid()}")
    with write_failures(recipe.output):
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)


def _job(recipe: Recipe) -> dict[str, Any]:
    """What makes the rows of two runs the same."""
    options = recipe.options
    return {
        "fingerprint": recipe.fingerprint,
        "field": options.field,
        "columns": {column.name: str(column.type) for column in recipe.schema},
        "dtype": options.dtype,
        "long_text": options.long_text,
        "overlap": options.overlap,
        "block_bytes": options.block_bytes,
    }


def _noted(path: Path) -> dict[str, Any]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if noted["format"] == FORMAT and isinstance(noted["job"], dict) and isinstance(noted["inputs"], dict):
            return {"job": noted["job"], "inputs": noted["inputs"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise _foreign(path.parent, f"{MANIFEST} of format {FORMAT}", "something else in it")


def _check_same(
    output: Path, noted: Mapping[str, Any], job: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    for name, value in job.items():
        if noted["job"].get(name) != value:
            raise _foreign(output, f"a job with {name} {noted['job'].get(name)}", f"{name} {value}")
    for name, facts in noted["inputs"].items():
        if inputs.get(name) != facts:
            found = "another size or time" if name in inputs else "no such file"
            raise _foreign(output, f"the input {name} as it was when the job began", found)


def _foreign(output: Path, expected: str, found: str) -> OutputError:
    return OutputError(
        f"{output} holds another job",
        expected=expected,
        found=found,
        remedy="Choose another --output, or empty the folder.",
    )


def _run(
    blocks: Sequence[Block], recipe: Recipe, *, address: str, workers: int | None, progress: bool
) -> Done:
    done = Done(recipe.output)
    bad: dict[Block, PartFacts] = {}
    finished = {block: facts for block in blocks if (facts := read_facts(recipe.output, block))}
    done.skipped = len(finished)
    with closing(_outcomes(blocks, finished, recipe, address, workers)) as outcomes:
        counted = ((outcome.block.rows, outcome) for outcome in outcomes)
        total = sum(block.rows for block in blocks)
        for outcome in (
            progress_bar(counted, total=total, unit="rows") if progress else (o for _, o in counted)
        ):
            if outcome.error:
                raise outcome.error
            if outcome.facts is None:
                done.given_up.append(outcome.block)
                continue
            done.add(outcome.facts)
            if outcome.facts.bad:
                bad[outcome.block] = outcome.facts
    _check_seen(recipe.output, [block for block in blocks if block not in done.given_up])
    _list_bad(recipe.output, [(block, bad[block]) for block in blocks if block in bad])
    return done


def _outcomes(
    blocks: Sequence[Block],
    finished: Mapping[Block, PartFacts],
    recipe: Recipe,
    address: str,
    workers: int | None,
) -> Generator[Outcome, None, None]:
    """Those of blocks that were finished before, then the others as they end; without any of those, no cluster."""
    for block, facts in finished.items():
        yield Outcome(block, facts)
    if todo := [block for block in blocks if block not in finished]:
        with cluster.connected(address):
            yield from cluster.outcomes(todo, recipe, cluster.places(recipe.options.threads, workers))


def _check_seen(output: Path, blocks: Sequence[Block]) -> None:
    """Raise ``OutputError`` unless every part is in the folder as this machine sees it."""
    seen = {path.name for path in output.iterdir()}
    missing = [block for block in blocks if part_name(block) not in seen]
    if missing:
        raise OutputError(
            f"{output} lacks parts that workers have written",
            expected="one folder that every machine of the job sees at the same path",
            found=f"{len(missing):,} parts missing here, {part_name(missing[0])} first",
            remedy="Put --output on a file system that the machines share.",
        )


def _list_bad(output: Path, bad: Sequence[tuple[Block, PartFacts]]) -> None:
    """Gather the bad rows of all parts into one file, in the order of the input; without any there is none."""
    path = output / BAD_ROWS
    temporary = path.with_name(f".{BAD_ROWS}.{os.getpid()}")
    with write_failures(output):
        if not bad:
            path.unlink(missing_ok=True)
            return
        with temporary.open("w", encoding="utf-8") as stream:
            for block, facts in bad:
                stream.write(bad_lines(block.file.name, facts.bad))
        temporary.replace(path)
