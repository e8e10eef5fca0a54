"""The catalogue states nothing that it does not know, and its published results are results."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qingyu.errors import DataFileError
from qingyu.models.catalogue import catalogue, find_entry, published
from qingyu.models.sources.listing import check_repository
from qingyu.models.sources.places import SHA1, SHA256, SOURCES
from qingyu.runtime.spec import decode_vector

ENTRIES = catalogue()


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_names_repositories_of_known_sources_and_sound_hashes(name):
    entry = ENTRIES[name]
    assert entry.repositories
    assert set(entry.repositories) <= set(SOURCES)
    for source, repository in entry.repositories.items():
        check_repository(repository, entry.revisions.get(source))
    assert all(SHA1.fullmatch(revision) for revision in entry.revisions.values())
    assert all(SHA256.fullmatch(record.sha256) for record in entry.files.values())
    assert entry.license


def test_the_models_of_the_mission_are_there():
    wanted = {"bge-small-zh-v1.5", "bge-base-zh-v1.5", "bge-large-zh-v1.5", "bert-base-chinese"}
    wanted |= {"multilingual-e5-small", "bge-reranker-base"}
    assert wanted <= set(ENTRIES)
    assert all(entry.exportable for entry in ENTRIES.values())


def test_published_fill_mask_results_are_those_of_the_golden_file(shared_models):
    golden = shared_models / "bert-base-chinese" / "golden" / "fill_mask.jsonl"
    rows = [json.loads(line) for line in golden.read_text(encoding="utf-8").splitlines()]
    found = published(ENTRIES["bert-base-chinese"])
    assert found is not None
    assert (found.kind, list(found.results)) == ("fill_mask", rows)


def test_the_one_hash_that_is_known_is_pinned():
    record = ENTRIES["bge-small-zh-v1.5"].files["model.safetensors"]
    assert record.bytes == 95_827_648
    assert record.sha256 == "354763b9b1357bc9c44f62c6be2276321081ed2567773608c0d0785b61d5a026"
    assert [name for name, entry in ENTRIES.items() if entry.files] == ["bge-small-zh-v1.5"]


def test_an_entry_is_found_by_its_repository_too():
    assert find_entry("BAAI/bge-small-zh-v1.5") is ENTRIES["bge-small-zh-v1.5"] or (
        find_entry("BAAI/bge-small-zh-v1.5") == ENTRIES["bge-small-zh-v1.5"]
    )
    assert find_entry("someone/else") is None


def test_sizes_agree_with_the_true_configurations(shared_models):
    for name in ("bge-small-zh-v1.5", "bert-base-chinese"):
        config = json.loads((shared_models / name / "config.json").read_bytes())
        assert (ENTRIES[name].layers, ENTRIES[name].dim) == (
            config["num_hidden_layers"],
            config["hidden_size"],
        )


def test_published_vectors_are_those_of_the_golden_files(shared_models):
    """float16 changes the cosine by less than 1e-6, a tenth of what the check allows."""
    results = published(ENTRIES["bge-small-zh-v1.5"])
    assert results is not None
    golden = shared_models / "bge-small-zh-v1.5" / "golden"
    lines = (golden / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {json.loads(line)["text"]: number for number, line in enumerate(lines)}
    vectors = np.load(golden / "vectors.npy")
    for text, vector in zip(results.texts, results.vectors, strict=True):
        true = vectors[rows[text]].astype(np.float64)
        own = np.array(decode_vector(vector, 512))
        assert 1 - own @ true / np.linalg.norm(own) / np.linalg.norm(true) < 1e-6


def test_published_texts_try_the_front_end():
    """Upper and lower case must be among them: the true tokenizer lower-cases, its file does not say so."""
    results = published(ENTRIES["bge-small-zh-v1.5"])
    assert results is not None
    assert any(any("A" <= c <= "Z" for c in text) for text in results.texts)
    assert max(map(len, results.texts)) > 400


def test_a_catalogue_of_ones_own_is_added_and_wins(tmp_path, monkeypatch):
    own = {"name": "gte-base-zh", "task": "embedding", "repositories": {"hub": "us/gte"}, "golden": "g.json"}
    (tmp_path / "c.json").write_text(json.dumps({"format": 1, "models": [own]}))
    (tmp_path / "g.json").write_text(
        json.dumps({"kind": "fill_mask", "source": "us", "results": [{"score": 1}]})
    )
    monkeypatch.setenv("QINGYU_CATALOGUE", str(tmp_path / "c.json"))
    entry = catalogue()["gte-base-zh"]
    assert entry.repositories == {"hub": "us/gte"}
    results = published(entry)
    assert results is not None
    assert results.results == ({"score": 1},)
    assert set(catalogue()) == set(ENTRIES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"format": 2, "models": []}',
        '{"format": 1, "models": {}}',
        '{"format": 1, "models": [{"name": "x"}]}',
        '{"format": 1, "models": [{"name": "x", "task": "cook", "repositories": {}}]}',
        '{"format": 1, "models": [{"name": "x", "task": "embedding", "repositories": {}, "code": "import os"}]}',
    ],
)
def test_a_file_that_is_no_catalogue_is_an_error_that_names_it(text, tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text(text)
    monkeypatch.setenv("QINGYU_CATALOGUE", str(tmp_path / "c.json"))
    with pytest.raises(DataFileError, match=r"c\.json.*QINGYU_CATALOGUE"):
        catalogue()


def test_a_catalogue_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("QINGYU_CATALOGUE", str(tmp_path / "c.json"))
    with pytest.raises(DataFileError):
        catalogue()
