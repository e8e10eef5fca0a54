"""The OpenAPI document, the documentation and the code say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qingyu.__main__ import build_parser
from qingyu.runtime.bodies import BODIES, read_body, schema_of
from qingyu.runtime.serve.openapi import ANSWERS, document, refusals_of
from qingyu.runtime.serve.routes import ROUTES
from qingyu.runtime.statuses import STATUSES, status_number
from qingyu.runtime.wire import RefusedError

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
MOST = 4


@pytest.fixture(scope="module")
def validator():
    return pytest.importorskip(
        "jsonschema_rs", reason="needs schemathesis, which brings it"
    ).Draft202012Validator


def test_every_route_and_refusal_is_described_and_no_other(server):
    found = server.get("/openapi.json").json
    assert found == document(max_inputs=16, keys=False)
    assert set(found["paths"]) == {route.path for route in ROUTES}
    for route in ROUTES:
        operation = found["paths"][route.path][route.method.lower()]
        codes = refusals_of(route, keys=False)
        assert set(codes) <= set(STATUSES)
        assert set(operation["responses"]) == {
            "200",
            *(str(status_number(code, route.style)) for code in codes),
        }
        assert ("requestBody" in operation) == (route.path in BODIES) == (route.method == "POST")
        if route.media == "application/json":
            assert route.path in ANSWERS
    described = {code for route in ROUTES for code in refusals_of(route, keys=True)}
    # What is answered where there is no route.
    assert set(STATUSES) - described == {"not_found", "method_not_allowed"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70000) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


def refused_code(path, body):
    try:
        read_body(path, body, MOST)
    except RefusedError as error:
        return error.code
    return None


@pytest.mark.parametrize("path", BODIES)
def test_a_body_is_read_exactly_if_its_schema_allows_it(path, validator):
    """What the document says of limits and types is what the code does, for arbitrary bodies near and far."""
    fields = BODIES[path]
    schema = validator(schema_of(fields, MOST))
    near = {
        field.name: json_values | st.lists(st.text(max_size=3), max_size=MOST + 2) | st.text(max_size=3)
        for field in fields
    }

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        body=st.fixed_dictionaries({}, optional=near)
        | st.dictionaries(st.text(max_size=6), json_values, max_size=3)
    )
    def check(body):
        code = refused_code(path, json.loads(json.dumps(body)))
        assert code in (None, "invalid_request", "empty_input", "too_many_inputs")
        assert (code is None) == schema.is_valid(body), body

    check()


def test_answers_are_of_the_form_that_the_document_gives(server, validator):
    asked = {
        "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64"},
        "/embed": {"inputs": ["a", "b"]},
        "/embed_all": {"inputs": ["a"]},
        "/rerank": {"query": "a", "texts": ["b", "c"]},
        "/predict": {"inputs": [["a"], ["b", "c"]], "model": "mood"},
        "/tokenize": {"inputs": "今天"},
        "/fill-mask": {"inputs": "今[MASK]"},
        "/tag": {"inputs": "今天"},
        "/answer": {"question": "今", "context": "今天"},
    }
    assert set(asked) == set(BODIES)
    found = server.get("/openapi.json").json
    for route in ROUTES:
        if route.media != "application/json":
            continue
        path = route.path.replace("{model}", "tiny")
        good = server.ask(route.method, path, asked.get(path))
        assert good.status == 200, (path, good.body)
        wanted = found["paths"][route.path][route.method.lower()]["responses"]
        validator(wanted["200"]["content"]["application/json"]["schema"]).validate(good.json)
        if route.method == "POST":
            bad = server.post(path, {"nothing": 1})
            reference = wanted[str(bad.status)]["content"]["application/json"]["schema"]["$ref"]
            validator(found["components"]["schemas"][reference.rpartition("/")[2]]).validate(bad.json)


def test_schemathesis_finds_nothing(server, tmp_path):
    """Generated requests to every route: no answer of 500, and none that the document does not have."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (pip install schemathesis)")
    checks = pytest.importorskip("schemathesis.specs.openapi.checks")
    schema = schemathesis.openapi.from_url(server.address + "/openapi.json")
    for operation in schema.get_all_operations():
        case_of = operation.ok().as_strategy()

        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=case_of)
        def check(case):
            answer = case.call()
            assert answer.status_code < 500
            # A name, a prompt or a text without a mask may be refused though a schema cannot tell.
            case.validate_response(answer, excluded_checks=[checks.positive_data_acceptance])

        check()


def test_the_table_of_statuses_in_the_documentation_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    wanted = [
        (
            code,
            str(status.number),
            str(status_number(code, "openai")),
            "yes" if status.retry else "no",
            status.meaning.replace("|", "\\|"),
        )
        for code, status in STATUSES.items()
    ]
    assert [(code, tei, openai, retry, meaning) for code, tei, openai, retry, meaning in rows] == wanted


def test_the_documentation_has_every_route_flag_and_metric(server):
    for route in ROUTES:
        assert f"`{route.path}`" in PAGE, route.path
    parser = build_parser()
    serving = next(
        action for action in parser._actions if hasattr(action, "choices") and action.choices
    ).choices["serve"]
    for action in serving._actions:
        for name in action.option_strings:
            if name not in ("-h", "--help"):
                assert f"`{name}" in PAGE, name
    server.post("/embed", {"inputs": "a"})
    families = set(
        re.findall(
            r"^# TYPE (qingyu_\w+) (?:counter|gauge|histogram)$",
            server.get("/metrics").body.decode(),
            re.MULTILINE,
        )
    )
    documented = set(re.findall(r"^\| `(qingyu_\w+)`", PAGE, re.MULTILINE))
    assert documented == {name for name in families if not name.endswith("_created")}
