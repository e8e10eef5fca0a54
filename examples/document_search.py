"""Search in a folder of your own texts, on this machine: every .txt and .md file, also long ones.

    python examples/document_search.py notes/ "怎么申请退款"

The index lies in FOLDER/.qingyu. Each run looks for new, changed and deleted files first and embeds only those.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from qingyu.runtime.search import Document, SearchIndex


def documents(folder: Path) -> Iterator[Document]:
    """The files that have text, under their paths."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".txt", ".md") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(str(path.relative_to(folder)), text, {"kind": path.suffix})


def opened(folder: Path) -> SearchIndex:
    """The index of the folder, made if there is none."""
    if (folder / "documents.sqlite").exists():
        return SearchIndex.open(folder, writable=True)
    return SearchIndex.create(folder, chunk_tokens=200, overlap=40)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("query")
    options = parser.parse_args()
    with opened(options.folder / ".qingyu") as index:
        outcome = index.build(documents(options.folder), progress=True)
        print(f"{outcome.added} new, {outcome.updated} changed, {outcome.deleted} deleted")
        for hit in index.search(options.query, k=3, mode="hybrid"):
            line = (options.folder / hit.id).read_text(encoding="utf-8", errors="replace")[: hit.start].count(
                "\n"
            ) + 1
            print(f"{hit.id}, line {line}: {' '.join(hit.text.split())[:80]}")


if __name__ == "__main__":
    main()
