"""mteb's own measures on local files: STS and retrieval as custom tasks, run on a qingyu model.

``python -m qingyu.bench.mteb_tasks DATA --model FOLDER``, where DATA holds ``sts-b-zh/dev.tsv`` (sentence1, sentence2,
label) and folders of ``queries.jsonl``, ``corpus.jsonl`` and ``qrels.tsv``. Needs mteb. The data of C-MTEB itself is
on a hub, and is not touched; where that can be reached, ``mteb.get_tasks`` gives its tasks and the model is the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qingyu.runtime.task import BUNDLED

__all__ = ["main", "retrieval_task", "run_tasks", "sts_task"]

FACTS = {
    "description": "A local file",
    "reference": None,
    "category": "t2t",
    "modalities": ["text"],
    "eval_splits": ["test"],
    "eval_langs": ["cmn-Hans"],
    "date": ("2018-01-01", "2026-12-31"),
    "domains": ["Written"],
    "task_subtypes": [],
    "license": "not specified",
    "annotations_creators": "human-annotated",
    "dialect": [],
    "sample_creation": "found",
    "bibtex_citation": "",
}


def sts_task(name: str, path: Path) -> Any:  # noqa: ANN401 - mteb is untyped here
    """A task of pairs with a label from 0 to 5, measured by Spearman's correlation with the cosine."""
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS

    class Pairs(AbsTaskSTS):  # type: ignore[misc]
        metadata = _metadata(name, path, "STS", "cosine_spearman")
        min_score = 0
        max_score = 5

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **_: Any) -> None:  # noqa: ANN401
            with path.open(encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
            columns: dict[str, list[Any]] = {
                name: [row[name] for row in rows] for name in ("sentence1", "sentence2")
            }
            self.dataset = {
                "test": Dataset.from_dict(columns | {"score": [float(row["label"]) for row in rows]})
            }
            self.data_loaded = True

    return Pairs()


def retrieval_task(name: str, folder: Path) -> Any:  # noqa: ANN401
    """A task of queries, a corpus and which of it is relevant, measured by nDCG at 10."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Retrieval(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = _metadata(name, folder, "Retrieval", "ndcg_at_10")

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **_: Any) -> None:  # noqa: ANN401
            relevant: dict[str, dict[str, int]] = defaultdict(dict)
            with (folder / "qrels.tsv").open(encoding="utf-8") as stream:
                for row in csv.DictReader(stream, delimiter="\t"):
                    relevant[row["query_id"]][row["doc_id"]] = int(row["rel"])
            queries = [row for row in _rows(folder / "queries.jsonl") if row["id"] in relevant]
            split = {
                "corpus": Dataset.from_list([{**row, "title": ""} for row in _rows(folder / "corpus.jsonl")]),
                "queries": Dataset.from_list(queries),
                "relevant_docs": dict(relevant),
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Retrieval()


def _rows(path: Path) -> Iterable[dict[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"id": str(row["id"]), "text": row["text"]}


def _metadata(name: str, path: Path, kind: str, score: str) -> Any:  # noqa: ANN401
    from mteb.abstasks.task_metadata import TaskMetadata

    source = {"path": path.as_posix(), "revision": "local"}
    return TaskMetadata(name=name, dataset=source, type=kind, main_score=score, **FACTS)


def run_tasks(tasks: Iterable[Any], model: Any) -> dict[str, float]:  # noqa: ANN401
    """The main score of each task, from 0 to 1, by its name."""
    import mteb

    found = mteb.evaluate(model, list(tasks), cache=None, show_progress_bar=False, co2_tracker=False)
    return {one.task_name: float(one.get_score()) for one in found.task_results}


def main(arguments: list[str] | None = None) -> int:
    """Run the tasks whose files are there; prints a JSON line for each."""
    from qingyu.runtime.integrations.mteb import MtebEncoder

    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.mteb_tasks", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=BUNDLED)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    tasks = []
    if (pairs := options.data / "sts-b-zh" / "dev.tsv").exists():
        tasks.append(sts_task("stsb-zh-dev", pairs))
    folders = sorted(path.parent for path in options.data.glob("*/qrels.tsv"))
    tasks += [retrieval_task(folder.name, folder) for folder in folders]
    for name, score in run_tasks(tasks, MtebEncoder(options.model)).items():
        print(json.dumps({"task": name, "score": round(score, 4)}, ensure_ascii=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
