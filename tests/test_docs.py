"""What the documentation shows is run, and what it links to is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qingyu.__main__ import COMMANDS

TRAINING = ("torch", "transformers", "sentence_transformers", "peft", "datasets", "accelerate")
# What a command looks like that needs packages beyond the usual test environment, and which.
NEEDED = {
    r"milvus\+": ("pymilvus", "milvus_lite"),
    "^qingyu adapt (contrast|classify|tag|distil)": TRAINING,
    "--script": ("opencc",),
    "--ray ": ("ray",),
}
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
SENTENCES = [
    "今天天气真好",
    "外面阳光明媚",
    "股票大跌",
    "怎么修改登录密码",
    "人工智能正在改变医疗、教育和交通。",
]

# Checkpoints with a head: their task and labels.
CHECKPOINTS = {
    "bert-base-chinese": ("fill-mask", ()),
    "sentiment": ("classification", ("好", "坏")),
    "ner": ("tagging", ("O", "B-人", "I-人", "B-地", "I-地")),
    "qa": ("question-answering", ()),
    "reranker": ("reranking", ()),
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[str]:
    """The shell lines of a page, continued lines joined; installing is what .ci/run does with the README."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "pip install", "python -m pytest"))]


@pytest.fixture
def desk(tiny_checkpoint, tiny_model, head_checkpoint, tmp_path):
    """A folder with what the documentation takes for granted."""
    shutil.copytree(tiny_checkpoint, tmp_path / "bge-small-zh-v1.5")
    for name, (task, labels) in CHECKPOINTS.items():
        shutil.copytree(head_checkpoint(task, labels), tmp_path / name)
    lines = [sentence + str(n) for sentence in SENTENCES for n in range(20)]
    labelled = [f"{line}\t{n % 2}" for n, line in enumerate(lines)]
    entities = [{"text": line, "entities": [{"start": 0, "end": 2, "label": "词"}]} for line in lines]
    faq = [{"id": f"doc-{n}", "text": line, "type": "faq", "year": 2024} for n, line in enumerate(lines)]
    files = {
        "documents.jsonl": [json.dumps(row, ensure_ascii=False) for row in faq],
        "texts.txt": lines,
        "pairs.tsv": ["anchor\tpositive", *(f"{line}\t{line[::-1]}" for line in lines)],
        "reviews.tsv": ["text\tlabel", *labelled],
        "entities.jsonl": [json.dumps(row, ensure_ascii=False) for row in entities],
    }
    questions = [json.dumps({"id": n, "text": line}, ensure_ascii=False) for n, line in enumerate(lines[:20])]
    files |= {
        "sts.tsv": [
            "sentence1\tsentence2\tlabel",
            *(f"{a}\t{b}\t{n % 6}" for n, (a, b) in enumerate(zip(lines, lines[7:], strict=False))),
        ],
        "questions/queries.jsonl": questions,
        "questions/corpus.jsonl": questions,
        "questions/qrels.tsv": ["query_id\tdoc_id\trel", *(f"{n}\t{n}\t1" for n in range(20))],
    }
    (tmp_path / "questions").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    (tmp_path / "docs").mkdir()
    rows = [json.dumps({"id": n, "text": line}, ensure_ascii=False) for n, line in enumerate(lines)]
    (tmp_path / "docs" / "all.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def run(arguments: list[str], desk: Path) -> None:
    done = subprocess.run(arguments, cwd=desk, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_examples_of_a_page_work_in_order(page, desk, tiny_model, tiny_int8):
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash")
    lines = commands(page)
    for pattern, packages in NEEDED.items():
        if any(re.search(pattern, line) for line in lines):
            for package in packages:
                pytest.importorskip(package)
    for command, name, model in (("export", "bge", tiny_model), ("quantize", "bge-int8", tiny_int8)):
        if not any(f"qingyu {command} " in line for line in lines):
            shutil.copytree(model, desk / "out" / name)
    if lines:
        # Programs and not functions of the shell: a signal to one in the background reaches it itself.
        for program, call in (("python", ""), ("qingyu", " -m qingyu")):
            path = desk / "bin" / program
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}"{call} "$@"\n', encoding="utf-8")
            path.chmod(0o755)
        run([shell, "-c", 'set -euo pipefail\nPATH="$PWD/bin:$PATH"\n' + "\n".join(lines)], desk)
    for block in blocks(page, "python"):
        run([sys.executable, "-W", "error::SyntaxWarning", "-c", block], desk)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_command_is_documented():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        assert f"qingyu {name}" in text, name


def test_every_page_is_reached_from_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, page.name
