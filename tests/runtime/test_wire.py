"""Requests in the forms of OpenAI and text-embeddings-inference: read strictly, answered exactly."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qingyu.errors import GraphError, InvalidTextError, KernelError, MemoryBudgetError
from qingyu.runtime import wire
from qingyu.runtime.wire import Limits, RequestError

LIMITS = Limits(texts=3)
MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def status_of(call):
    """What a call gives, or the status that it refuses with."""
    try:
        return call()
    except RequestError as refused:
        return refused.status


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
    with pytest.raises(RequestError, match=said) as caught:
        wire.parse_json(body)
    assert caught.value.status == 400


@MANY
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_400(body):
    found = status_of(lambda: wire.parse_json(body))
    assert found == 400 or isinstance(found, dict)


def test_openai_requests_are_read():
    document = {"input": "a", "model": "any", "dimensions": 8, "encoding_format": "base64", "user": "u"}
    asked = wire.read_openai(document, LIMITS)
    assert asked == wire.EmbeddingRequest(("a",), dim=8, encoding="base64")
    assert wire.read_openai({"input": ["a", "b"], "truncate": False}, LIMITS).long_text == "error"


def test_tei_requests_are_read_with_its_defaults():
    asked = wire.read_tei({"inputs": ["a", ""]}, LIMITS)
    assert asked == wire.EmbeddingRequest(("a", ""), normalize=True, long_text="error")
    other = {"inputs": "a", "truncate": True, "normalize": False, "truncation_direction": "Right"}
    assert wire.read_tei({**other, "prompt_name": "query"}, LIMITS) == wire.EmbeddingRequest(
        ("a",), prompt="query", normalize=False
    )


WRONG = [
    ({}, 422, "input: expected a string or a list of strings, found nothing"),
    ({"input": []}, 422, "input: expected at least one text, found none"),
    ({"input": ["a", 1]}, 422, "input: expected a string or a list of strings, found a list"),
    ({"input": [101, 102]}, 422, "input: expected a string or a list of strings, found a list"),
    ({"input": ["a"] * 4}, 413, "input: expected at most 3 texts, found 4"),
    ({"input": "a", "dimensions": 1.5}, 422, "dimensions: expected a whole number, found a number"),
    ({"input": "a", "dimensions": True}, 422, "dimensions: expected a whole number, found a truth value"),
    (
        {"input": "a", "encoding_format": "hex"},
        422,
        "encoding_format: expected 'float' or 'base64', found a string",
    ),
    (
        {"input": "a", "encoding_format": []},
        422,
        "encoding_format: expected 'float' or 'base64', found a list",
    ),
    ({"input": "a", "model": 1}, 422, "model: expected a string, found a number"),
    (
        {"input": "a", "inptu": 1},
        422,
        "unknown field 'inptu': expected fields among input, model, dimensions",
    ),
]


@pytest.mark.parametrize(("document", "status", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_a_wrong_field_is_named_and_its_value_is_not(document, status, message):
    with pytest.raises(RequestError) as caught:
        wire.read_openai(document, LIMITS)
    assert caught.value.status == status
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
    for read in (wire.read_openai, wire.read_tei):
        found = status_of(lambda read=read: read(document, LIMITS))
        if found not in (413, 422):
            assert all(isinstance(text, str) for text in found.texts)
            assert 1 <= len(found.texts) <= 3


VECTORS = np.random.default_rng(5).standard_normal((3, 40)).astype(np.float32)
VECTORS[0, :5] = [0, -0.0, 1e-30, np.float32(2) ** -149, np.finfo(np.float32).max]


def test_numbers_read_back_to_the_same_float32():
    rows = json.loads(wire.embeddings_tei(VECTORS))
    assert np.array_equal(np.array(rows, dtype=np.float32), VECTORS)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_openai_answer_holds_the_same_float32_and_the_tokens(encoding):
    body = json.loads(wire.embeddings_openai(VECTORS, model="轻", tokens=7, encoding=encoding))
    assert body["object"] == "list"
    assert body["model"] == "轻"
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    rows = [entry["embedding"] for entry in body["data"]]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert np.array_equal(np.array(rows, dtype=np.float32), VECTORS)


def test_no_vectors_are_an_empty_list():
    assert wire.embeddings_tei(np.empty((0, 4), np.float32)) == b"[]"


PARTS = {"expected": "e", "found": "f /home/secret", "remedy": "r"}


@pytest.mark.parametrize(
    ("kind", "openai", "tei"),
    [
        (InvalidTextError, 400, 422),
        (MemoryBudgetError, 503, 503),
        (KernelError, 500, 500),
        (GraphError, 500, 500),
    ],
)
def test_the_status_says_who_must_act_and_paths_stay_inside(kind, openai, tei):
    error = kind("text 0", **PARTS)
    replies = [wire.refusal_of(error, style) for style in ("openai", "tei")]
    assert [reply.status for reply in replies] == [openai, tei]
    messages = [json.loads(replies[0].body)["error"]["message"], json.loads(replies[1].body)["error"]]
    for status, message in zip((openai, tei), messages, strict=True):
        assert ("secret" in message) == (status < 500)
        assert (kind.__name__ in message) == (status >= 500)


def test_a_refusal_that_holds_half_a_character_is_still_utf_8():
    reply = wire.refusal(RequestError(422, "\ud83d"), "tei")
    assert json.loads(reply.body.decode("utf-8"))["error"] == "?"
