"""What clients do wrong, on purpose or not, ends in a documented answer, and hurts nobody else."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import BinaryIO

import pytest

from qingyu.runtime.statuses import STATUSES

GOOD = {"inputs": "今天天气真好"}


def head(length: int, *more: str) -> bytes:
    lines = [
        "POST /embed HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


CHUNKED = (
    b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


def one_answer(stream: BinaryIO) -> bytes:
    """The next answer of a connection, in however many parts it comes; its body is as long as its head says."""
    lines = list(iter(stream.readline, b"\r\n"))
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:"))
    return b"".join(lines) + b"\r\n" + stream.read(length)


BAD_JSON = {
    "nothing": b"",
    "no JSON": b"{inputs: 1}",
    "deep": b'{"inputs": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "a number of many digits": b'{"inputs": ' + b"9" * 90_000 + b"}",
    "NaN": b'{"inputs": NaN}',
    "infinity": b'{"inputs": [1e999, "a"]}',
    "a key twice": b'{"inputs": "a", "inputs": "b"}',
    "UTF-16": '{"inputs": "今天"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"inputs": "a"}',
    "something behind it": b'{"inputs": "a"} {}',
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "an overlong form": b'{"inputs": "\xc0\xaf"}',
    "a list": b'["a"]',
    "a string": b'"a"',
    "a lone surrogate": b'{"inputs": "\\ud83d"}',
    "a control character": b'{"inputs": "a\x01b"}',
    "an unknown field": b'{"inputs": "a", "input": "b"}',
    "a wrong type": b'{"inputs": 5}',
    "a wrong type within": b'{"inputs": ["a", 5]}',
    "a list in a list": b'{"inputs": [["a"]]}',
    "a truth value as a number": b'{"inputs": "a", "dimensions": true}',
    "a huge number": b'{"inputs": "a", "dimensions": 1e400}',
    "a long whole number": b'{"inputs": "a", "dimensions": ' + b"9" * 400 + b"}",
    "half": b'{"inputs": "a", "dimensions": 1.5}',
    "a negative number": b'{"inputs": "a", "dimensions": -1}',
    "too many dimensions": b'{"inputs": "a", "dimensions": 33}',
    "no prompt of the model": b'{"inputs": "a", "prompt_name": "passage"}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bad_body_is_400_or_422_with_a_body_that_says_so(server, name):
    answer = server.post("/embed", BAD_JSON[name])
    assert answer.status in (400, 422), answer.body[:300]
    assert set(answer.json) == {"error", "error_type"}
    code = STATUSES[answer.json["error_type"]]
    assert code.number == answer.status
    assert len(answer.body) < 500
    # The form and the status of OpenAI's API on its routes.
    answer = server.post("/v1/embeddings", BAD_JSON[name].replace(b"inputs", b"input", 1))
    assert answer.status == 400
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_null_is_the_same_as_leaving_a_field_out(server):
    everything = {
        **GOOD,
        "normalize": None,
        "truncate": None,
        "prompt_name": None,
        "dimensions": None,
        "model": None,
    }
    assert server.post("/embed", everything).json == server.post("/embed", GOOD).json


@pytest.mark.parametrize(
    ("count", "expected"), [(0, (400, "empty_input")), (16, (200, None)), (17, (413, "too_many_inputs"))]
)
def test_none_the_limit_and_one_more(server, count, expected):
    """The fixture's --max-inputs is 16."""
    for path, body in (
        ("/embed", {"inputs": ["a"] * count}),
        ("/tokenize", {"inputs": ["a"] * count}),
        ("/rerank", {"query": "a", "texts": ["a"] * count}),
        ("/predict", {"inputs": [["a"]] * count, "model": "mood"}),
        ("/fill-mask", {"inputs": ["[MASK]"] * count}),
    ):
        answer = server.post(path, body)
        code = None if answer.status == 200 else answer.json["error_type"]
        assert (answer.status, code) == expected, path


def test_a_body_over_the_limit_is_refused_before_it_is_sent(server):
    """The fixture's --max-body is 100,000 bytes."""
    before = server.stats()["resident_bytes"]
    answer = server.raw(head(1_000_000_000))
    assert status(answer) == 413
    assert b'"error_type": "body_too_large"' in answer
    assert status(server.raw(head(1_000_000_000, "Expect: 100-continue"))) == 413
    assert status(server.raw(CHUNKED + (b"fff0\r\n" + b"a" * 0xFFF0 + b"\r\n") * 2)) == 413
    assert server.stats()["resident_bytes"] - before < 8e6
    text = "天" * ((100_000 - len('{"inputs": ""}')) // 3)
    just = server.post("/embed", json.dumps({"inputs": text}, ensure_ascii=False).encode())
    assert (just.status, just.json["error_type"]) == (413, "text_too_long")
    over = server.post("/embed", json.dumps({"inputs": text + "天"}, ensure_ascii=False).encode())
    assert (over.status, over.json["error_type"]) == (413, "body_too_large")


def test_an_endless_chunked_body_is_cut_off_while_it_is_sent(server):
    before = server.stats()["resident_bytes"]
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(CHUNKED)
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(1000):
                connection.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
                sent += 0x10000
                time.sleep(0.005)
    assert sent < 50_000_000
    assert server.stats()["resident_bytes"] - before < 8e6


def test_only_plain_json_is_taken(server):
    body = json.dumps(GOOD).encode()
    for headers in (
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "application/json", "Content_Encoding": "gzip"},
    ):
        assert server.post("/embed", body, **headers).status == 415
    assert server.post("/embed", body, Content_Type="application/json; charset=utf-8").status == 200
    assert "access-control-allow-origin" not in server.post("/embed", GOOD, Origin="http://evil").headers
    assert server.ask("OPTIONS", "/embed").status == 405


def test_unknown_paths_and_methods(server):
    assert server.get("/nothing").json["error_type"] == "not_found"
    for path in ("/../etc/passwd", "//", "/%2e%2e/info", "/v1/models/" + "x" * 3000, "/v1/models/a%2Fb"):
        assert server.get(path).status == 404
    answer = server.get("/embed")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert server.post("/info", {}).headers["allow"] == "GET"


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no version": b"GET /live\r\n\r\n",
    "no host": b"GET /live HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /live HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n",
    "a version to come": b"GET /live HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "two lengths": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabc",
    "a length and chunks": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 3\r\n\r\n0\r\n\r\n",
    "a negative length": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: -3\r\n\r\nabc",
    "a length with a plus": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: +3\r\n\r\nabc",
    "a length of no number": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3a\r\n\r\nabc",
    "a length of many digits": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    + b"9" * 30
    + b"\r\n\r\n",
    "a bad chunk": b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "a folded header": b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n c\r\n\r\n",
    "a space before a colon": b"GET /live HTTP/1.1\r\nHost : x\r\n\r\n",
    "a NUL in a header": b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: b\x00c\r\n\r\n",
    "a bare return": b"GET /live HTTP/1.1\r\nHost: localhost\rX-A: b\r\n\r\n",
    "a path that is none": b"GET http:// HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_not_http_is_400_and_closed(server, name):
    answer = server.raw(MALFORMED[name])
    assert status(answer) == 400
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1 4") == 1
    assert b'"error_type": "bad_request"' in answer


def test_headers_of_64_kilobytes_are_431_and_closed(server):
    many = b"GET /live HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
        b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(64)
    )
    assert status(server.raw(many + b"\r\n")) == 431
    assert (
        status(server.raw(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 65536)) == 431
    )  # without an end
    assert status(server.raw(b"GET /live?" + b"a" * 65536)) == 431
    assert (
        status(
            server.raw(
                b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: "
                + b"a" * 8000
                + b"\r\nConnection: close\r\n\r\n"
            )
        )
        == 200
    )


def test_requests_behind_each_other_are_answered_in_order(server):
    one = head(len(json.dumps(GOOD).encode())) + json.dumps(GOOD).encode()
    last = b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = server.raw(one + one + last)
    parts = answer.split(b"HTTP/1.1 200")
    assert len(parts) == 4
    assert b'{"status":"live"}' in parts[-1]


@pytest.mark.parametrize(
    "sent",
    [b"POST /embed HTTP/1.1\r\nHost: localhost\r\n", head(50) + b'{"inputs"'],
    ids=["headers", "body"],
)
def test_what_does_not_arrive_in_time_is_408_and_closed(server, sent):
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent)
        answer = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(4096):
                answer += part
                # Dripping does not help.
    assert status(answer) == 408
    assert 0.8 < time.monotonic() - start < 8


def test_slow_senders_hold_nobody_up_and_are_closed(server):
    """200 connections that send a byte now and then; the fixture's header timeout is 1 s."""
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(200)]
    ended = threading.Event()

    def drip():
        number = 0
        while not ended.is_set():
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.send(
                        b"POST /embed HTTP/1.1\r\nX-Slow: aaaaaaaa"[number % 40 : number % 40 + 1]
                    )
            number += 1
            time.sleep(0.1)

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        times = []
        for _ in range(20):
            start = time.monotonic()
            assert server.post("/embed", GOOD).status == 200
            times.append(time.monotonic() - start)
        assert sorted(times)[10] < 3.0  # and not the seconds that the others take
        deadline = time.monotonic() + 20
        while server.stats()["in_flight"] > 1 or b"qingyu_connections 1.0" not in server.get("/metrics").body:
            assert time.monotonic() < deadline, "slow connections were not closed"
            time.sleep(0.1)
    finally:
        ended.set()
        thread.join()
        for connection in slow:
            connection.close()


def test_a_client_that_never_reads_is_closed(server):
    """Answers of half a megabyte and more; the fixture's write timeout is 1 s."""
    body = json.dumps({"inputs": ["今天天气真好" * 9] * 16}).encode()
    one = head(len(body)).replace(b"/embed ", b"/embed_all ") + body
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(one * 40)  # more than the buffers of both ends hold
        deadline = time.monotonic() + 20
        while b"qingyu_connections 1.0" not in server.get("/metrics").body:
            assert time.monotonic() < deadline, "it was not closed"
            time.sleep(0.1)
    assert server.post("/embed", GOOD).status == 200


def test_an_answer_before_the_body_leaves_the_connection_good(server):
    """Refused by its type, with the body still to come; then another request on the same connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head(8, "X-A: b").replace(b"application/json", b"text/plain"))
        answers = connection.makefile("rb")
        assert status(one_answer(answers)) == 415
        connection.sendall(b"abcdefgh" + b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status(one_answer(answers)) == 200
