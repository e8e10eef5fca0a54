"""What a worker process does with a block: read it, embed its texts, write its part.

Not here: Ray, which carries blocks to workers and outcomes back, and starts another worker where one died.
"""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qingyu.errors import QingyuError, VectorSpaceError
from qingyu.runtime.bulk.blocks import Block
from qingyu.runtime.bulk.parts import (
    DataType,
    PartFacts,
    attempts_at,
    clear_attempts,
    new_attempt,
    read_facts,
    table_of,
    write_part,
)
from qingyu.runtime.bulk.rows import Rows, read_rows
from qingyu.runtime.embedder import Embedder, LongText
from qingyu.runtime.engine import Floats
from qingyu.runtime.fingerprint import fingerprint
from qingyu.runtime.onnxruntime_engine import Profile
from qingyu.runtime.scripts import Script
from qingyu.runtime.task import Report

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["BulkOptions", "Outcome", "Recipe", "Worker"]


@dataclass(frozen=True)
class BulkOptions:
    """How texts are read and embedded. ``field``: the text's; ``keep``: fields to carry along.

    ``block_bytes``: what is embedded, retried and written as one file; ``attempts``: how many workers may die at a
    block until it is given up. ``threads``: cores for each worker; ``max_memory_mb``: resident memory of each. The
    others mean what they mean to ``Embedder.open`` and ``Embedder.embed``.
    """

    field: str = "text"
    keep: tuple[str, ...] = ()
    block_bytes: int = 4 << 20
    attempts: int = 3
    threads: int = 1
    dtype: DataType = "float32"
    prompt: str | None = None
    dim: int | None = None
    normalize: bool | None = None
    long_text: LongText = "truncate"
    overlap: int = 0
    profile: Profile = "throughput"
    max_memory_mb: int | None = None
    special_tokens: Literal["parse", "text"] = "parse"
    unicode_form: Literal["NFKC"] | None = None
    script: Script | None = None

    def open(self, model: str) -> Embedder:
        """The model, opened as the options say."""
        return Embedder.open(
            model,
            profile=self.profile,
            threads=self.threads,
            max_memory_mb=self.max_memory_mb,
            special_tokens=self.special_tokens,
            unicode_form=self.unicode_form,
            script=self.script,
        )

    def fingerprint(self, embedder: Embedder) -> str:
        """The fingerprint of the vectors that the options give."""
        return fingerprint(
            embedder.spec,
            prompt=self.prompt,
            dim=self.dim,
            normalize=self.normalize,
            special_tokens=self.special_tokens,
            unicode_form=self.unicode_form,
            script=self.script,
        )


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs beside its blocks. ``output`` is a folder that every machine sees."""

    model: str
    fingerprint: str
    options: BulkOptions
    schema: pa.Schema
    output: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a block: its facts, or an error that no other attempt would mend, or neither: given up."""

    block: Block
    facts: PartFacts | None = None
    error: QingyuError | None = None


class Worker:
    """Embeds blocks with one model, which is opened for the first of them."""

    def __init__(self, recipe: Recipe) -> None:
        # Before tokenizers is imported: its threads are not among those that Ray counts.
        os.environ["RAYON_NUM_THREADS"] = str(recipe.options.threads)
        self._recipe = recipe
        self._embedder: Embedder | None = None

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """What Ray Data calls: a pickled ``block`` in, a pickled ``outcome`` out."""
        return {"outcome": pickle.dumps(self.process(pickle.loads(row["block"])))}

    def process(self, block: Block) -> Outcome:
        """Embed a block and write its part; one that is there already is left alone."""
        folder, options = self._recipe.output, self._recipe.options
        try:
            if facts := read_facts(folder, block):
                return Outcome(block, facts)
            died = attempts_at(folder, block)
            if len(died) >= options.attempts:
                return Outcome(block)
            attempt = new_attempt(folder, block, len(died) + 1)
            try:
                facts = self._write(block, attempt)
            finally:
                with suppress(OSError):
                    attempt.unlink(missing_ok=True)
            clear_attempts(folder, block)
        except QingyuError as error:
            return Outcome(block, error=error)
        return Outcome(block, facts)

    def _write(self, block: Block, attempt: Path) -> PartFacts:
        recipe = self._recipe
        rows = read_rows(block, recipe.options.field, recipe.schema)
        report = Report()
        vectors = self._embed(rows, report)
        report.cut.clear()  # numbers within a block say nothing to a reader of the whole
        facts = PartFacts(len(rows.texts), tuple(rows.bad), rows.blank, report)
        table = table_of(block, rows, vectors, recipe.options.dtype)
        write_part(attempt, table, facts, recipe.output, block)
        return facts

    def _embed(self, rows: Rows, report: Report) -> Floats:
        embedder, options = self._opened(), self._recipe.options
        if options.long_text == "error":
            rows.drop(_too_long(embedder, rows.texts, options.prompt))
        return embedder.embed(
            rows.texts,
            prompt=options.prompt,
            dim=options.dim,
            normalize=options.normalize,
            long_text=options.long_text,
            overlap=options.overlap,
            report=report,
        )

    def _opened(self) -> Embedder:
        if self._embedder is None:
            embedder = self._recipe.options.open(self._recipe.model)
            found = self._recipe.options.fingerprint(embedder)
            if found != self._recipe.fingerprint:
                raise VectorSpaceError(
                    f"{os.uname().nodename} has another model at {self._recipe.model}",
                    expected=f"vectors with fingerprint {self._recipe.fingerprint}",
                    found=found,
                    remedy="Give every machine the same model folder.",
                )
            self._embedder = embedder
        return self._embedder


def _too_long(embedder: Embedder, texts: list[str], prompt: str | None) -> dict[int, str]:
    """Which texts the model would cut, and what to say of them."""
    most = embedder.spec.max_tokens
    cut = (place for place, text in enumerate(texts) if embedder.tokenize(text, prompt=prompt).truncated)
    return dict.fromkeys(cut, f"longer than {most} tokens")
