"""Requests in the forms of OpenAI and text-embeddings-inference: read strictly, answered exactly."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qingyu.runtime import wire
from qingyu.runtime.bodies import EmbeddingRequest, embedding_of, read_body
from qingyu.runtime.wire import RefusedError

MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read_openai(document):
    return embedding_of("/v1/embeddings", read_body("/v1/embeddings", document, 3))


def read_tei(document):
    return embedding_of("/embed", read_body("/embed", document, 3))


def outcome_of(call):
    """What a call gives, or the code that it refuses with."""
    try:
        return call()
    except RefusedError as refused:
        return refused.code


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"input": "a"} x', "Extra data"),
        (b'{"input": NaN}', "NaN or infinity"),
        (b'{"input": -Infinity}', "NaN or infinity"),
        (b'{"input": 1, "input": 2}', "a key that occurs twice"),
        (b'{"a": {"b": 1, "b": 2}}', "a key that occurs twice"),
        (b'{"input": "\xff"}', "not UTF-8"),
        ('{"input": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"input": ' + b"1" * 100_000 + b"}", "a number of too many digits"),
        (b'["a"]', "a list instead of a JSON object"),
        (b'"a"', "a string instead of a JSON object"),
        (b"null", "nothing instead of a JSON object"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:16]),
)
def test_what_is_not_one_strict_json_object_is_400(body, said):
    with pytest.raises(RefusedError, match=said) as caught:
        wire.parse_json(body)
    assert caught.value.code == "invalid_json"


@MANY
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_400(body):
    found = outcome_of(lambda: wire.parse_json(body))
    assert found == "invalid_json" or isinstance(found, dict)


def test_openai_requests_are_read():
    document = {"input": "a", "model": "any", "dimensions": 8, "encoding_format": "base64", "user": "u"}
    asked = read_openai(document)
    assert asked == EmbeddingRequest(("a",), model="any", dim=8, encoding="base64")
    assert read_openai({"input": ["a", "b"], "truncate": False}).long_text == "error"


def test_tei_requests_are_read_with_its_defaults():
    asked = read_tei({"inputs": ["a", ""]})
    assert asked == EmbeddingRequest(("a", ""), normalize=True, long_text="error")
    other = {"inputs": "a", "truncate": True, "normalize": False, "truncation_direction": "Right"}
    assert read_tei({**other, "prompt_name": "query"}) == EmbeddingRequest(
        ("a",), prompt="query", normalize=False
    )


WRONG = [
    ({}, "invalid_request", "input: expected a value, found nothing"),
    ({"input": []}, "empty_input", "input: expected at least one text, found none"),
    ({"input": ["a", 1]}, "invalid_request", "input[1]: expected a string, found a number"),
    ({"input": [101, 102]}, "invalid_request", "input[0]: expected a string, found a number"),
    ({"input": ["a"] * 4}, "too_many_inputs", "input: expected at most 3 texts, found 4"),
    (
        {"input": "a", "dimensions": 1.5},
        "invalid_request",
        "dimensions: expected a whole number from 1 to 65536, found a number",
    ),
    (
        {"input": "a", "dimensions": True},
        "invalid_request",
        "dimensions: expected a whole number from 1 to 65536, found a truth value",
    ),
    (
        {"input": "a", "encoding_format": "hex"},
        "invalid_request",
        "encoding_format: expected 'float' or 'base64', found a string",
    ),
    (
        {"input": "a", "encoding_format": []},
        "invalid_request",
        "encoding_format: expected 'float' or 'base64', found a list",
    ),
    ({"input": "a", "model": 1}, "invalid_request", "model: expected a string, found a number"),
    (
        {"input": "a", "inptu": 1},
        "invalid_request",
        "unknown field 'inptu': expected fields among input, model, encoding_format",
    ),
]


@pytest.mark.parametrize(("document", "code", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_a_wrong_field_is_named_and_its_value_is_not(document, code, message):
    with pytest.raises(RefusedError) as caught:
        read_openai(document)
    assert caught.value.code == code
    assert str(caught.value).startswith(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "input",
    "inputs",
    "model",
    "dimensions",
    "encoding_format",
    "normalize",
    "truncate",
    "prompt_name",
    "?",
)


@MANY
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_object_is_a_request_or_a_refusal(document):
    for read in (read_openai, read_tei):
        found = outcome_of(lambda read=read: read(document))
        if found not in ("empty_input", "too_many_inputs", "invalid_request"):
            assert all(isinstance(text, str) for text in found.texts)
            assert 1 <= len(found.texts) <= 3


VECTORS = np.random.default_rng(5).standard_normal((3, 40)).astype(np.float32)
VECTORS[0, :5] = [0, -0.0, 1e-30, np.float32(2) ** -149, np.finfo(np.float32).max]


def test_numbers_read_back_to_the_same_float32():
    rows = json.loads(wire.embeddings_tei(VECTORS))
    assert np.array_equal(np.array(rows, dtype=np.float32), VECTORS)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_openai_answer_holds_the_same_float32_and_the_tokens(encoding):
    body = json.loads(
        wire.embeddings_openai(VECTORS, model="轻", fingerprint="qy1-0", tokens=7, encoding=encoding)
    )
    assert body["object"] == "list"
    assert (body["model"], body["fingerprint"]) == ("轻", "qy1-0")
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    rows = [entry["embedding"] for entry in body["data"]]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert np.array_equal(np.array(rows, dtype=np.float32), VECTORS)


def test_no_vectors_are_an_empty_list():
    assert wire.embeddings_tei(np.empty((0, 4), np.float32)) == b"[]"
