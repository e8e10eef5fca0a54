"""What names a vector space: stable, and different where vectors are."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from qingyu.errors import InvalidOptionError
from qingyu.runtime.fingerprint import fingerprint
from qingyu.runtime.spec import Architecture, EdgeFile, FileRecord, ModelSpec, Source

SPEC = ModelSpec(
    name="tiny",
    task="embedding",
    architecture=Architecture("bert", 1, 8, 2, 16, 100, 32, "gelu", 1e-12),
    dim=8,
    max_tokens=32,
    pooling="cls",
    normalize=True,
    lowercase=True,
    graph="model.onnx",
    inputs=("input_ids", "attention_mask"),
    outputs=("pooled",),
    precision="int8",
    prompts={"query": "查询：", "passage": ""},
    default_prompt="passage",
    files={"model.onnx": FileRecord(1, "a" * 64), "tokenizer.json": FileRecord(1, "b" * 64)},
)


def test_it_is_this_one_for_ever():
    """Vectors are stored for years beside it; whoever must change this raises FORMAT."""
    assert fingerprint(SPEC) == "qy1-8042bc0c2ea45e1129e2cc795f4951b8"


def test_what_changes_vectors_changes_it():
    other = FileRecord(1, "c" * 64)
    changed = [
        {"files": {**SPEC.files, "model.onnx": other}},
        {"files": {**SPEC.files, "tokenizer.json": other}},
        {"precision": "fp32"},
        {"pooling": "mean"},
        {"max_tokens": 16},
        {"dim": 4},
        {"normalize": False},
        {"default_prompt": "query"},
    ]
    found = {fingerprint(dataclasses.replace(SPEC, **change)) for change in changed}
    found |= {
        fingerprint(SPEC, special_tokens="text"),
        fingerprint(SPEC, unicode_form="NFKC"),
        fingerprint(SPEC, script="simplified"),
        fingerprint(SPEC, script="traditional"),
        fingerprint(SPEC),
    }
    # The same by options as by the manifest.
    assert fingerprint(SPEC, dim=4) == fingerprint(dataclasses.replace(SPEC, dim=4))
    assert len(found) == len(changed) + 5


def test_what_changes_no_vector_does_not_change_it():
    again = dataclasses.replace(
        SPEC,
        name="another",
        source=Source("someone/tiny"),
        graph="renamed.onnx",
        files={"renamed.onnx": FileRecord(1, "a" * 64), "tokenizer.json": FileRecord(1, "b" * 64)},
        edge=EdgeFile("model.ort"),
    )
    assert fingerprint(again) == fingerprint(SPEC)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"prompt": None}, {"prompt": "passage"}),
        ({"prompt": "passage"}, {"prompt": ""}),
        ({"prompt": "query"}, {"prompt": "查询："}),
        ({"dim": 8}, {}),
        ({"normalize": True}, {}),
    ],
)
def test_ways_to_say_the_same_give_the_same(options, same):
    assert fingerprint(SPEC, **options) == fingerprint(SPEC, **same)


def test_a_prompt_that_is_no_unicode_has_one_too():
    assert fingerprint(SPEC, prompt="\ud83d") != fingerprint(SPEC, prompt="?")


@pytest.mark.parametrize(("options", "message"), [({"dim": 9}, "1 to 8"), ({"dim": 0}, "1 to 8")])
def test_options_that_embed_refuses_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=message):
        fingerprint(SPEC, **options)


def test_a_prompt_that_the_model_lacks_is_refused():
    with pytest.raises(InvalidOptionError, match="no prompt 'query'"):
        fingerprint(dataclasses.replace(SPEC, prompts={}, default_prompt=None), prompt="query")


def test_it_takes_no_numpy():
    code = "import sys, qingyu.runtime.fingerprint; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
