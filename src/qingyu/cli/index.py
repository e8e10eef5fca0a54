"""``qingyu index``: documents into a folder that can be searched, and changes to it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qingyu.cli.common import BUNDLED, add_opening_arguments, new_command, opening, place
from qingyu.errors import CorruptFileError, DataFileError, DocumentError, InvalidOptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qingyu.runtime.search.documents import BadRow
    from qingyu.runtime.search.index import Outcome, SearchIndex

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu index build documents.jsonl kb
qingyu index info kb
qingyu search kb "怎么重置密码\""""

EXAMPLES = {
    "build": "qingyu index build documents.jsonl kb --chunk-tokens 256 --overlap 32",
    "add": "qingyu index add new.jsonl kb",
    "update": "qingyu index update changed.jsonl kb",
    "delete": "qingyu index delete kb faq-12 faq-13",
    "info": "qingyu index info kb --json",
    "verify": "qingyu index verify kb",
    "compact": "qingyu index compact kb",
}

# Options of build that an index keeps: name of the option -> name of the fact.
KEPT = ("metric", "precision", "words", "chunk_tokens", "overlap")
PROMPTS = ("query_prompt", "passage_prompt")
OF_FOLDERS = ("precision", "words")  # of KEPT: what stores at an address do in their own way, or not at all
SHOWN = ("model", "fingerprint", "query_fingerprint", "dim", *KEPT, *PROMPTS, "unicode_form", "script")
DATABASE = "documents.sqlite"  # qingyu.runtime.search.database's (a test compares)


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command and its own commands."""
    parser = new_command(commands, "index", "make and change an index of documents (extra: search)", EXAMPLE)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_build(kinds)
    summaries = {
        "add": "embed and store new documents; ids that are there are refused",
        "update": "embed and store documents that are new or have changed",
    }
    for name, summary in summaries.items():
        changing = _new_kind(kinds, name, summary, _change)
        _add_source(changing)
        _add_model(changing)
    deleting = _new_kind(kinds, "delete", "remove documents", _delete)
    _add_folder(deleting)
    deleting.add_argument("ids", nargs="+", metavar="ID", help="ids of documents")
    info = _new_kind(kinds, "info", "show what an index holds, and how it was made", _info)
    _add_folder(info)
    info.add_argument("--json", action="store_true", help="JSON instead of a table")
    _add_folder(_new_kind(kinds, "verify", "read all files, and look for damage", _verify))
    summary = "make graph and terms anew from the database, without what was removed; repairs them, too"
    _add_folder(_new_kind(kinds, "compact", summary, _compact))


def run(options: argparse.Namespace) -> int:
    """Run one of the commands."""
    code: int = options.work(options)
    return code


def _new_kind(
    kinds: Any,  # noqa: ANN401
    name: str,
    summary: str,
    work: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = new_command(kinds, name, summary, EXAMPLES[name])
    parser.set_defaults(run=run, work=work)
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", type=place, help="folder of the index, or address of a store"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "documents", metavar="DOCUMENTS", help=".jsonl or .tsv, also .gz; - for JSON lines on standard input"
    )
    _add_folder(parser)
    parser.add_argument("--id-field", default="id", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--rejected",
        type=Path,
        metavar="FILE",
        help="where bad rows are listed (default: FOLDER/rejected.jsonl; rejected.jsonl here for a store)",
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_opening_arguments(parser, default=BUNDLED)
    parser.set_defaults(model=None)
    parser.epilog = (parser.epilog or "") + (
        "\n\nAn index that is there keeps the model that it was made with; --model says where that is now."
    )


def _add_build(kinds: Any) -> None:  # noqa: ANN401
    summary = "make an index hold the documents of a file; only new and changed ones are embedded"
    parser = _new_kind(kinds, "build", summary, _build)
    parser.epilog = (parser.epilog or "") + (
        "\n\nA build that was stopped goes on when the same command is given again. Documents that are in the index\n"
        "but not in the file are deleted at its end. The exit code is 3 when rows were rejected."
    )
    _add_source(parser)
    _add_model(parser)
    parser.add_argument("--metric", choices=("cosine", "dot", "euclidean"), help="(default: cosine)")
    parser.add_argument(
        "--precision", choices=("int8", "bf16", "float32"), help="of stored vectors (default: int8)"
    )
    parser.add_argument(
        "--words", choices=("bigrams", "jieba"), help="terms to search by (default: pairs of characters)"
    )
    parser.add_argument("--query-prompt", metavar="P", help="put before queries (default: the model's)")
    parser.add_argument("--passage-prompt", metavar="P", help="put before documents (default: the model's)")
    parser.add_argument(
        "--chunk-tokens", type=int, metavar="N", help="cut longer documents (default: what the model reads)"
    )
    parser.add_argument("--overlap", type=int, metavar="N", help="tokens that pieces share (default: 0)")


def _build(options: argparse.Namespace) -> int:
    return _take(options, _opened if _is_there(options.folder) else _made)


def _is_there(folder: Path | str) -> bool:
    if isinstance(folder, Path):
        return (folder / DATABASE).exists()
    from qingyu.runtime.stores import store_exists

    return store_exists(folder)


def _change(options: argparse.Namespace) -> int:
    return _take(options, _opened)


def _take(options: argparse.Namespace, opened: Callable[[argparse.Namespace], SearchIndex]) -> int:
    """Read the documents into the index; the exit code is 3 when any were rejected."""
    from qingyu.runtime.search.documents import read_documents

    documents = read_documents(options.documents, id_field=options.id_field, text_field=options.text_field)
    beside = options.folder if isinstance(options.folder, Path) else Path()
    with opened(options) as index, _Rejections(options.rejected or beside / "rejected.jsonl") as bad:
        if options.kind == "build":
            total = _count_lines(options.documents)
            outcome = index.build(documents, rejected=bad.write, progress=True, total=total)
        else:
            change = index.add if options.kind == "add" else index.update
            outcome = change(documents, rejected=bad.write, progress=True)
    return _say(outcome, options, bad.path)


def _made(options: argparse.Namespace) -> SearchIndex:
    from qingyu.runtime.embedder import Embedder
    from qingyu.runtime.search.index import SearchIndex

    given = {name: getattr(options, name) for name in (*KEPT, *PROMPTS)}
    if isinstance(options.folder, str):
        for name in OF_FOLDERS:
            if given[name] is not None:
                raise _of_folders(f"--{name}", options.folder)
    embedder = Embedder.open(options.model or BUNDLED, **opening(options))
    index = SearchIndex.create(
        options.folder, embedder, **{name: value for name, value in given.items() if value is not None}
    )
    index.close_too(embedder)
    return index


def _opened(options: argparse.Namespace) -> SearchIndex:
    from qingyu.runtime.search.index import SearchIndex

    index = SearchIndex.open(
        options.folder,
        options.model,
        writable=True,
        profile=options.profile,
        threads=options.threads,
        max_memory_mb=options.max_memory_mb,
        **{name: getattr(options, name, None) for name in PROMPTS},
    )
    try:
        _check_kept(options, index.facts)
    except BaseException:
        index.close()
        raise
    return index


def _check_kept(options: argparse.Namespace, facts: Mapping[str, str]) -> None:
    """Refuse options that an index which is there was not made with."""
    given = {name: getattr(options, name, None) for name in KEPT}
    given |= {name: opening(options)[name] for name in ("unicode_form", "script")}
    for name, value in given.items():
        if value is not None and str(value) != facts.get(name, ""):
            raise InvalidOptionError(
                f"--{name.replace('_', '-')} for {options.folder}",
                expected=facts.get(name) or "none, as it was made",
                found=str(value),
                remedy="Leave it out, or build another index.",
            )


class _Rejections:
    """A file of JSON lines, one for each bad row, which is there only if there are any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[str] | None = None

    def __enter__(self) -> _Rejections:
        with self._reported():
            self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            with self._reported():
                self._stream.close()

    def write(self, row: BadRow) -> None:
        """Add a row; it is in the file when this returns, so that a long job can be watched."""
        error = row.error
        facts = {
            "line": row.line,
            "id": row.id,
            "problem": error.problem,
            "expected": error.expected,
            "found": error.found,
            "remedy": error.remedy,
        }
        with self._reported():
            if self._stream is None:
                self._stream = self.path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._stream.write(json.dumps(facts, ensure_ascii=False) + "\n")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}",
                expected="a folder that can be written, with room",
                found=error.strerror or str(error),
                remedy="Choose another place with --rejected.",
            ) from None


def _count_lines(source: str) -> int | None:
    """How many lines a plain file has, for the progress bar; ``None`` where that is not known without reading it."""
    path = Path(source)
    if not sys.stderr.isatty() or source.endswith(".gz") or not path.is_file():
        return None
    with path.open("rb") as stream:
        return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 20), b""))


def _say(outcome: Outcome, options: argparse.Namespace, rejected: Path) -> int:
    counts = dataclasses.asdict(outcome)
    if options.json:
        print(json.dumps(counts))
    else:
        told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "added")
        print(f"{options.folder}: {told}")
    if not outcome.rejected:
        return 0
    print(f"{outcome.rejected:,} rows were rejected; see {rejected}", file=sys.stderr)
    return DataFileError.exit_code


def _of_folders(what: str, found: str) -> InvalidOptionError:
    return InvalidOptionError(
        what, expected="an index in a folder", found=found, remedy="Leave it to the store."
    )


def _delete(options: argparse.Namespace) -> int:
    from qingyu.runtime.search.index import store_at

    with closing(store_at(options.folder, writable=True)) as store:
        deleted = store.delete(options.ids)
    print(f"{options.folder}: {deleted:,} deleted")
    if deleted < len(set(options.ids)):
        raise DocumentError(
            "not all documents were there",
            expected=f"{len(set(options.ids)):,} documents",
            found=f"{deleted:,}",
            remedy="Check the ids.",
        )
    return 0


def _info(options: argparse.Namespace) -> int:
    from qingyu.cli.table import facts as table
    from qingyu.runtime.search.index import store_at
    from qingyu.runtime.search.local import LocalStore

    shown: dict[str, object] = {}
    with closing(store_at(options.folder, writable=False)) as store:
        facts = store.facts
        shown["documents"] = store.count()
        if isinstance(store, LocalStore):
            shown |= {"pieces": store.count_pieces(), "in the graph": int(facts["graph_entries"])}
        shown |= {name.replace("_", " "): facts[name] for name in SHOWN if facts.get(name)}
        if isinstance(store, LocalStore):
            shown["bytes"] = sum(path.stat().st_size for path in store.folder.iterdir() if path.is_file())
    print(json.dumps(shown, ensure_ascii=False) if options.json else table(shown))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from qingyu.runtime.search.local import LocalStore

    if isinstance(options.folder, str):
        raise _of_folders("verify", options.folder)
    with LocalStore.open(options.folder) as store:
        damage = store.damage()
        count = store.count()
    if damage:
        raise CorruptFileError(
            f"{options.folder} is damaged",
            expected="files that agree",
            found="; ".join(damage),
            remedy="Run `qingyu index compact FOLDER`; where that does not help, build it anew.",
        )
    print(f"{options.folder}: whole, {count:,} documents")
    return 0


def _compact(options: argparse.Namespace) -> int:
    from qingyu.runtime.search.local import LocalStore

    if isinstance(options.folder, str):
        raise _of_folders("compact", options.folder)
    with LocalStore.open(options.folder, writable=True) as store:
        store.compact()
        print(f"{options.folder}: {store.count_pieces():,} pieces")
    return 0
