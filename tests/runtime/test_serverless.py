"""Events as the platforms document them: one model answers them all, and each mistake has its status."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qingyu.errors import InvalidOptionError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.serverless import handlers
from qingyu.runtime.serverless.app import App, Limits, Settings
from qingyu.runtime.serverless.events import answer_event, answer_wsgi, read_event

TEXTS = ["今天天气真好", "外面阳光明媚"]
BODY = json.dumps({"input": TEXTS, "model": "tiny-zh"}, ensure_ascii=False)


# One event of each platform, cut down from its documentation: AWS Lambda's payload format 2.0 (a function URL's), the
# format 1.0 of API Gateway's REST APIs, an ALB target's, the API gateway trigger of Tencent SCF, and the HTTP trigger
# of Alibaba FC 3.0.
def lambda_url(method: str, path: str, body: str | None, encoded: bool = False) -> dict[str, Any]:
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "cookies": ["a=1"],
        "headers": {
            "content-type": "application/json",
            "x-many": "1,2",
            "host": "id.lambda-url.eu-west-1.on.aws",
        },
        "requestContext": {
            "accountId": "anonymous",
            "apiId": "id",
            "domainName": "id.lambda-url.eu-west-1.on.aws",
            "http": {"method": method, "path": path, "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1"},
            "requestId": "1",
            "routeKey": "$default",
            "stage": "$default",
            "timeEpoch": 1583348638390,
        },
        "isBase64Encoded": encoded,
        **({} if body is None else {"body": body}),
    }


def gateway_rest(method: str, path: str, body: str | None, encoded: bool = False) -> dict[str, Any]:
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": {"Content-Type": "application/json", "X-Many": "2"},
        "multiValueHeaders": {"Content-Type": ["application/json"], "X-Many": ["1", "2"]},
        "queryStringParameters": None,
        "multiValueQueryStringParameters": None,
        "requestContext": {"httpMethod": method, "path": f"/prod{path}", "stage": "prod"},
        "body": body,
        "isBase64Encoded": encoded,
    }


def load_balancer(method: str, path: str, body: str | None, encoded: bool = False) -> dict[str, Any]:
    return {
        "requestContext": {
            "elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu-west-1:1:targetgroup/a/b"}
        },
        "httpMethod": method,
        "path": path,
        "queryStringParameters": {},
        "multiValueHeaders": {"content-type": ["application/json"], "x-many": ["1", "2"]},
        "body": body or "",
        "isBase64Encoded": encoded,
    }


def scf_gateway(method: str, path: str, body: str | None, encoded: bool = False) -> dict[str, Any]:
    return {
        "requestContext": {
            "serviceId": "service-f94sy04v",
            "path": "/embeddings/{path}",
            "httpMethod": method,
            "requestId": "1",
            "identity": {"secretId": "abc"},
            "sourceIp": "192.0.2.1",
            "stage": "release",
        },
        "headers": {"content-type": "application/json", "x-many": "1,2"},
        "body": body or "",
        "pathParameters": {},
        "queryStringParameters": {},
        "headerParameters": {},
        "stageVariables": {"stage": "release"},
        "path": path,
        "queryString": {},
        "httpMethod": method,
        **({"isBase64Encoded": "true"} if encoded else {}),
    }


def fc_trigger(method: str, path: str, body: str | None, encoded: bool = False) -> dict[str, Any]:
    return {
        "version": "v1",
        "rawPath": path,
        "body": body or "",
        "isBase64Encoded": encoded,
        "headers": {"Content-Type": "application/json", "X-Many": "1,2"},
        "queryParameters": {},
        "requestContext": {
            "accountId": "123456",
            "domainName": "id.cn-hangzhou.fcapp.run",
            "http": {"method": method, "path": path, "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1"},
            "requestId": "1",
            "timeEpoch": "1693896071895",
        },
    }


FORMS = [lambda_url, gateway_rest, load_balancer, scf_gateway, fc_trigger]
Form = Callable[..., dict[str, Any]]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@pytest.fixture(scope="module")
def app(tiny_int8):
    return App(Settings(str(tiny_int8), limits=Limits(body_bytes=5000, texts=4, reply_bytes=50_000)))


@pytest.fixture(scope="module")
def expected(tiny_int8):
    with Embedder.open(tiny_int8, profile="edge") as embedder:
        return embedder.embed(TEXTS)


@every_form
@pytest.mark.parametrize("encoded", [False, True], ids=["plain", "base64"])
@pytest.mark.parametrize("prefix", ["", "/release/my-function"], ids=["root", "stage"])
def test_every_platform_gets_the_vectors_of_the_model(form: Form, encoded, prefix, app, expected):
    body = base64.b64encode(BODY.encode()).decode() if encoded else BODY
    answer = answer_event(app, form("POST", f"{prefix}/v1/embeddings", body, encoded))
    assert answer["statusCode"] == 200
    assert answer["isBase64Encoded"] is False
    document = json.loads(answer["body"])
    vectors = np.array([entry["embedding"] for entry in document["data"]], dtype=np.float32)
    assert vectors.tobytes() == expected.tobytes()
    assert document["usage"]["total_tokens"] == 16
    assert json.loads(json.dumps(answer)) == answer


@every_form
def test_headers_that_come_more_than_once_are_joined(form: Form):
    headers = read_event(form("GET", "/health", None)).headers
    assert headers["x-many"] == "1,2"
    assert headers["content-type"] == "application/json"


def test_a_load_balancer_gets_its_status_line_and_lists_of_headers(app):
    answer = answer_event(app, load_balancer("GET", "/health", None))
    assert answer["statusDescription"] == "200 OK"
    assert answer["multiValueHeaders"] == {"content-type": ["application/json"]}
    assert "statusDescription" not in answer_event(app, lambda_url("GET", "/health", None))


def test_the_route_of_tei_gives_rows_alone(app, expected):
    answer = answer_event(app, lambda_url("POST", "/embed", json.dumps({"inputs": TEXTS})))
    assert np.array(json.loads(answer["body"]), dtype=np.float32).tobytes() == expected.tobytes()


def test_base64_vectors_and_cut_dimensions(app, expected, tiny_int8):
    body = json.dumps({"input": TEXTS, "encoding_format": "base64", "dimensions": 8})
    document = json.loads(answer_event(app, lambda_url("POST", "/v1/embeddings", body))["body"])
    vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in document["data"]]
    with Embedder.open(tiny_int8, profile="edge") as embedder:
        assert np.array_equal(vectors, embedder.embed(TEXTS, dim=8))


def test_health_models_and_info_tell_the_model(app, tiny_int8):
    get = {
        path: answer_event(app, lambda_url("GET", path, None)) for path in ("/health", "/v1/models", "/info")
    }
    assert [answer["statusCode"] for answer in get.values()] == [200] * 3
    assert json.loads(get["/v1/models"]["body"])["data"][0]["id"] == "tiny-zh"
    info = json.loads(get["/info"]["body"])
    assert (info["dimensions"], info["precision"], info["max_client_batch_size"]) == (32, "int8", 4)


REFUSED = [
    ("GET", "/v1/embeddings", None, 405, "takes POST"),
    ("POST", "/health", "{}", 405, "takes GET"),
    ("POST", "/nowhere", "{}", 404, "no such path"),
    ("POST", "/embed", "{", 400, "not JSON"),
    ("POST", "/embed", None, 400, "not JSON"),
    ("POST", "/embed", '{"inputs": "a", "inputs": "b"}', 400, "occurs twice"),
    ("POST", "/embed", '{"inputs": []}', 400, "at least one text"),
    ("POST", "/embed", '{"inputs": ["1", "2", "3", "4", "5"]}', 413, "at most 4 texts"),
    ("POST", "/embed", '{"inputs": "\\ud83d"}', 422, "surrogate"),
    ("POST", "/embed", json.dumps({"inputs": "好" * 80}), 413, "too long"),
    ("POST", "/embed", json.dumps({"inputs": "好" * 5000}, ensure_ascii=False), 413, "at most 5000 bytes"),
    ("POST", "/v1/embeddings", '{"input": "a", "dimensions": 99}', 400, "1 to 32"),
    ("POST", "/v1/embeddings", '{"input": "a", "prompt": "passage"}', 400, "no prompt"),
    ("POST", "/v1/embeddings", '{"input": [1, 2]}', 400, "expected a string"),
]


@every_form
@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"), REFUSED, ids=[f"{r[0]} {r[1]} {r[4]}" for r in REFUSED]
)
def test_a_mistake_has_its_status_and_says_what_was_expected(
    form: Form, method, path, body, status, said, app
):
    answer = answer_event(app, form(method, path, body))
    document = json.loads(answer["body"])
    message = document["error"]["message"] if path.startswith("/v1") else document["error"]
    assert (answer["statusCode"], said in message) == (status, True), message
    assert ("allow" in answer["headers"]) == (status == 405)


ALIKE = [
    ("/embed", {"inputs": TEXTS}),
    ("/embed", {"inputs": "今天", "normalize": False, "dimensions": 8}),
    ("/embed", {"inputs": []}),
    ("/embed", {"inputs": "好" * 80}),
    ("/embed", {"inputs": "好" * 80, "truncate": True}),
    ("/embed", {"inputs": "a", "what": 1}),
    ("/embed", {"inputs": "a", "truncation_direction": "left"}),
    ("/v1/embeddings", {"model": "tiny-zh", "input": TEXTS, "encoding_format": "base64"}),
    ("/v1/embeddings", {"model": "tiny-zh", "input": TEXTS, "dimensions": 8, "encoding_format": "base64"}),
    ("/v1/embeddings", {"model": "tiny-zh", "input": [1, 2]}),
    ("/v1/embeddings", {"model": "tiny-zh", "input": "a", "dimensions": 99}),
    ("/v1/embeddings", {"model": "another", "input": "a"}),
    ("/v1/embeddings", {"input": ["a"] * 5}),
    ("/v1/embeddings", {"input": "\ud83d"}),
    ("/v1/embeddings", {"input": "a", "user": 1}),
    ("/embed", {"inputs": "a", "prompt_name": "passage"}),
    ("/embed", []),
]
TYPES = ["application/json; charset=utf-8", "text/plain", ""]


def test_a_function_answers_as_the_server_does(app, tiny_int8):
    """Status, refusal and vectors of the same requests; a server has more routes."""
    for package in ("uvicorn", "httptools", "orjson", "prometheus_client"):
        pytest.importorskip(package)
    from qingyu.bench.load import running_server

    options = ("--profile", "edge", "--max-inputs", "4")
    with running_server("--model", f"tiny-zh={tiny_int8}", *options) as server:
        address = urllib.parse.urlsplit(server.address)
        for path, document in ALIKE:
            connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
            connection.request("POST", path, json.dumps(document), {"content-type": "application/json"})
            theirs = connection.getresponse()
            body = json.loads(theirs.read())
            connection.close()
            ours = answer_event(app, lambda_url("POST", path, json.dumps(document)))
            assert ours["statusCode"] == theirs.status, (path, document)
            mine = json.loads(ours["body"])
            if theirs.status != 200:
                assert mine == body
                continue
            assert ours["headers"]["x-qingyu-fingerprint"] == theirs.headers["x-qingyu-fingerprint"]
            if path == "/embed":
                assert np.array_equal(np.array(mine, np.float32), np.array(body, np.float32))
            else:
                assert mine == {key: body[key] for key in mine}


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        "x",
        {},
        {"source": "aws.events", "detail-type": "Scheduled Event"},
        {"input": "a"},
        {"requestContext": []},
        {"httpMethod": 1, "path": "/embed"},
        {"httpMethod": "POST", "path": "/embed", "body": 1},
    ],
)
def test_what_is_no_http_event_is_answered_with_400(event, app):
    answer = answer_event(app, event)
    assert answer["statusCode"] == 400
    assert "error" in json.loads(answer["body"])


def test_a_body_that_is_not_the_base64_it_says_is_400(app):
    assert answer_event(app, lambda_url("POST", "/embed", "今天", True))["statusCode"] == 400
    assert answer_event(app, lambda_url("POST", "/embed", "abc", True))["statusCode"] == 400


def test_a_body_that_is_not_declared_as_json_is_refused(app):
    event = lambda_url("POST", "/embed", '{"inputs": "a"}')
    for kind, status in zip(TYPES, (200, 415, 415), strict=True):
        event["headers"]["content-type"] = kind
        assert answer_event(app, event)["statusCode"] == status
    del event["headers"]["content-type"]
    assert answer_event(app, event)["statusCode"] == 415
    assert wsgi(app, "POST", "/embed", b'{"inputs": "a"}', CONTENT_TYPE="text/plain")[0].startswith("415")


def test_a_compressed_body_is_refused(app):
    event = lambda_url("POST", "/embed", "", True)
    event["headers"]["content-encoding"] = "gzip"
    assert answer_event(app, event)["statusCode"] == 415


def test_an_answer_over_the_platforms_limit_is_refused(tiny_int8):
    small = App(Settings(str(tiny_int8), limits=Limits(reply_bytes=500)))
    answer = answer_event(small, lambda_url("POST", "/embed", json.dumps({"inputs": TEXTS})))
    assert answer["statusCode"] == 413
    assert "send fewer texts" in json.loads(answer["body"])["error"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [("Bearer key-轻", 200), ("Bearer key", 401), ("key-轻", 401), ("Bearer \ud83d", 401), (None, 401)],
)
def test_with_a_key_only_its_bearer_is_answered_and_health_is_free(sent, status, tiny_int8):
    app = App(Settings(str(tiny_int8), api_key="key-轻"))
    event = lambda_url("POST", "/embed", '{"inputs": "a"}')
    if sent is not None:
        event["headers"]["authorization"] = sent
    assert answer_event(app, event)["statusCode"] == status
    assert answer_event(app, lambda_url("GET", "/health", None))["statusCode"] == 200


def test_a_model_that_cannot_be_opened_is_500_without_its_path_and_is_tried_again(
    tiny_int8, tmp_path, capsys
):
    folder = tmp_path / "secret-place"
    app = App(Settings(str(folder)))
    app.prepare()
    for path in ("/embed", "/health"):
        method, body = ("POST", '{"inputs": "a"}') if path == "/embed" else ("GET", None)
        answer = answer_event(app, lambda_url(method, path, body))
        assert answer["statusCode"] == 500
        assert "secret-place" not in answer["body"]
        assert json.loads(answer["body"])["error_type"] == "model_failed"
    assert "secret-place" in capsys.readouterr().err
    folder.symlink_to(tiny_int8)
    assert answer_event(app, lambda_url("GET", "/health", None))["statusCode"] == 200


def test_the_model_is_opened_once_however_many_ask_at_once(tiny_int8, monkeypatch):
    opened, open_one = [], Embedder.open

    def counted(*arguments, **options):
        opened.append(arguments)
        return open_one(*arguments, **options)

    monkeypatch.setattr(Embedder, "open", counted)
    app = App(Settings(str(tiny_int8)))
    event = lambda_url("POST", "/embed", json.dumps({"inputs": TEXTS}))
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(answer_event(app, event)["body"])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    assert len(answers) == 8
    assert len(set(answers)) == 1


def wsgi(app: App, method: str, path: str, body: bytes, **more: str) -> tuple[str, dict[str, str], bytes]:
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": "application/json",
        "wsgi.input": io.BytesIO(body),
        "fc.context": object(),
        **more,
    }
    started: list[Any] = []
    content = b"".join(
        answer_wsgi(app, environ, lambda status, headers: started.append((status, dict(headers))))
    )
    return started[0][0], started[0][1], content


def test_wsgi_gets_the_same_answer(app, expected):
    status, headers, content = wsgi(app, "POST", "/embed", json.dumps({"inputs": TEXTS}).encode())
    assert status == "200 OK"
    assert headers.pop("x-qingyu-fingerprint").startswith("qy1-")
    assert headers == {"content-type": "application/json", "content-length": str(len(content))}
    assert np.array(json.loads(content), dtype=np.float32).tobytes() == expected.tobytes()


def test_wsgi_reads_no_more_than_the_limit_and_sends_no_body_to_head(app):
    huge = b" " * 100_000
    stream = io.BytesIO(huge)
    status, _, _ = wsgi(app, "POST", "/embed", huge, **{"wsgi.input": stream})
    assert status == "413 Request Entity Too Large" or status == "413 Content Too Large"
    assert stream.tell() == 5001
    assert wsgi(app, "HEAD", "/health", b"")[::2] == ("200 OK", b"")
    assert wsgi(app, "POST", "/embed", b"{}", CONTENT_LENGTH="-1")[0] == "400 Bad Request"


def test_alibabas_handler_tells_bytes_of_json_from_a_wsgi_call(monkeypatch, app):
    monkeypatch.setattr(handlers, "_APPS", [app])
    event = fc_trigger("GET", "/health", None)
    for form in (event, json.dumps(event), json.dumps(event).encode()):
        assert handlers.fc_handler(form, object())["statusCode"] == 200
    assert handlers.fc_handler(b"\xff", object())["statusCode"] == 400
    started = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/health", "fc.context": object()}
    content = handlers.fc_handler(environ, lambda status, headers: started.append(status))
    assert (started, b"".join(content)) == (["200 OK"], b'{"status": "ok"}')


def test_the_environment_is_read(tiny_int8):
    given = {
        "QINGYU_MODEL": "m",
        "QINGYU_MAX_TEXTS": "7",
        "QINGYU_MAX_MEMORY_MB": "300",
        "QINGYU_API_KEY": "k",
    }
    assert Settings.of(given) == Settings("m", limits=Limits(texts=7), max_memory_mb=300, api_key="k")
    assert Settings.of({}) == Settings("qingyu-mini-zh")
    for wrong in ("0", "-1", "many", "9" * 20, "１"):
        with pytest.raises(InvalidOptionError, match="QINGYU_MAX_TEXTS"):
            Settings.of({"QINGYU_MAX_TEXTS": wrong})


SANDBOX = """
import json, os, sys
from qingyu.runtime.serverless.handlers import lambda_handler, prepare
assert "onnxruntime" not in sys.modules and "tokenizers" not in sys.modules  # nothing is opened by the import
assert "random" not in sys.modules and "uuid" not in sys.modules and "secrets" not in sys.modules
import threading
prepare()
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
assert len(os.listdir("/proc/self/task")) == 1, "threads of ours"
event = json.loads(sys.argv[1])
print(lambda_handler(event)["statusCode"])
"""


def test_a_snapshot_of_a_prepared_sandbox_holds_no_threads_and_no_random_state(tiny_int8):
    """What AWS SnapStart copies: one thread, nothing drawn at random, telemetry off, and no home folder needed."""
    environment = {"QINGYU_MODEL": str(tiny_int8), "HOME": "/nonexistent", "PATH": os.environ["PATH"]}
    environment["OPENBLAS_NUM_THREADS"] = (
        "1"  # as the entry file of a bundle sets it, against numpy's own threads
    )
    event = json.dumps(lambda_url("POST", "/embed", '{"inputs": "a"}'))
    done = subprocess.run(
        [sys.executable, "-c", SANDBOX, event],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")
