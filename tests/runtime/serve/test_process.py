"""How a server starts, ends, refuses, and changes its models."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.__main__ import main
from qingyu.runtime.serve.hosts import Hosts
from qingyu.runtime.spec import read_spec

GOOD = {"inputs": "今天天气真好"}


def together(server, count, body=GOOD, path="/embed"):
    """The answers to as many requests at once; an exception in the place of one that got none."""

    def one(number):
        try:
            return server.post(path, body)
        except OSError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_fifty_requests_under_way_are_answered_after_sigterm_and_new_ones_refused(
    start, tiny_model, tmp_path
):
    gate = tmp_path / "gate"
    arguments = ["--model", f"tiny={tiny_model}", "--threads", "1", "--max-wait", "600"]
    with start(*arguments, gate=gate) as server, ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(server.post, "/embed", GOOD) for _ in range(50)]
        server.until(lambda stats: stats["in_flight"] == 51)
        server.process.send_signal(signal.SIGTERM)
        server.event("draining", unanswered=50)
        for path in ("/ready", "/health"):
            refused = server.get(path)
            assert (refused.status, refused.json["error_type"]) == (503, "draining")
            assert refused.headers["connection"] == "close"
        assert server.get("/live").status == 200
        late = server.post("/embed", GOOD)
        assert (late.status, late.headers["retry-after"]) == (503, "1")
        gate.touch()
        answers = [one.result() for one in asked]
        assert [one.status for one in answers] == [200] * 50
        vectors = np.array([one.json[0] for one in answers])
        assert np.abs(vectors - vectors[0]).max() < 1e-6
        assert server.process.wait(10) == 0
        server.event("stopped", code=0)


def test_idle_connections_do_not_hold_the_end_up(start, tiny_model):
    with start("--model", f"tiny={tiny_model}") as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(100)]
        for connection in idle[:50]:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begun < 5  # not the 75 s that they may stay; below 1 s on an idle machine
        for connection in idle:
            connection.close()


def test_without_threads_requests_are_503_and_the_process_goes_on(start, tiny_model, tmp_path):
    """The limit comes when the models are open, and before the first request starts a thread that runs them."""
    limit = tmp_path / "no-more-threads"
    with start("--model", f"tiny={tiny_model}", "--threads", "1", NO_THREADS=str(limit)) as server:
        limit.touch()
        for _ in range(3):
            answer = server.post("/embed", {"inputs": ["今天天气真好", "股票大跌"]})
            assert (answer.status, answer.json["error_type"]) == (503, "out_of_threads")
            assert int(answer.headers["retry-after"]) >= 1
        assert server.get("/live").status == 200
        server.process.send_signal(signal.SIGHUP)
        assert server.event("reload")["result"] == "failed"
        limit.unlink()
        assert server.post("/embed", {"inputs": ["今天天气真好", "股票大跌"]}).status == 200
        stats = server.stats()
        assert (stats["in_flight"], stats["queued"]) == (1, 0)
        limit.touch()
        assert server.end() == 0  # what frees the models needs no thread


def test_a_clock_that_is_set_by_hours_ends_no_wait(start, tiny_model):
    """Every reading of the clock on the wall is hours or a year away from the one before."""
    one = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n"
    with start("--model", f"tiny={tiny_model}", "--threads", "1", JUMPING_CLOCK="1") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as kept:
            answers = kept.makefile("rb")
            for _ in range(5):
                kept.sendall(one[:40])  # others come and go while this one is half there
                assert all(one.status == 200 for one in together(server, 4))
                kept.sendall(one[40:] + b'{"inputs": ["a","b"]}')
                assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
                length = next(int(line[15:]) for line in answers if line.startswith(b"content-length:"))
                while answers.readline() != b"\r\n":
                    pass
                assert len(json.loads(answers.read(length))) == 2
        server.process.send_signal(signal.SIGHUP)
        assert server.event("reload")["result"] == "same"
        assert server.end() == 0
        told = [line["time"] for line in server.log]
        assert max(told) - min(told) > 3600  # it did jump


def test_a_second_signal_and_the_end_of_the_grace_force_the_end(start, tiny_model, tmp_path):
    arguments = ["--model", f"tiny={tiny_model}", "--threads", "1"]
    with ThreadPoolExecutor(1) as pool:
        with start(*arguments, gate=tmp_path / "gate") as server:
            asked = pool.submit(together, server, 1)
            server.until(lambda stats: stats["in_flight"] == 2)
            server.process.send_signal(signal.SIGTERM)
            server.event("draining")
            assert server.end() == 128 + signal.SIGTERM
            assert isinstance(asked.result()[0], OSError)
            server.event("forced", unanswered=1)
        with start(*arguments, "--grace", "0.1", gate=tmp_path / "gate") as server:
            asked = pool.submit(together, server, 1)
            server.until(lambda stats: stats["in_flight"] == 2)
            assert server.end(signal.SIGINT) == 1
            assert isinstance(asked.result()[0], OSError)
            server.event("grace ended", unanswered=1)


def test_one_slow_request_and_a_queue_of_eight_refuse_exactly_two_of_ten(start, tiny_model, tmp_path):
    gate = tmp_path / "gate"
    arguments = ["--model", f"tiny={tiny_model}", "--threads", "1", "--max-queue", "8", "--max-wait", "600"]
    with start(*arguments, gate=gate) as server, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(server.post, "/embed", GOOD)
        server.until(lambda stats: stats["in_flight"] == 2 and stats["queued"] == 0)
        others = pool.submit(together, server, 10)
        server.until(lambda stats: stats["queued"] == 8 and stats["refused"] == 2)
        gate.touch()
        answers = others.result()
        assert sorted(one.status for one in answers) == [200] * 8 + [429] * 2
        refused = next(one for one in answers if one.status == 429)
        assert refused.json["error_type"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert slow.result().status == 200
        assert server.stats()["refused"] == 2


def test_what_would_wait_too_long_is_refused_fast_and_the_process_stays_live(start, tiny_model):
    """The rate is measured: a second for each micro-batch of one text while it warms up."""
    with start("--model", f"tiny={tiny_model}", "--threads", "1", "--max-wait", "1", slow=0.2) as server:
        answers = together(server, 100, {"inputs": ["今天天气真好" * 10] * 2})
        counts = {status: sum(one.status == status for one in answers) for status in (200, 429)}
        assert counts[200] + counts[429] == 100
        assert counts[200] >= 2
        assert counts[429] > 50
        # No admitted request waits much longer than a second, whatever else is asked.
        for one in answers:
            if one.status == 200:
                assert float(one.headers["x-qingyu-queue-ms"]) < 4000


def test_a_client_that_leaves_is_not_computed_for(start, tiny_model, tmp_path):
    gate = tmp_path / "gate"
    arguments = ["--model", f"tiny={tiny_model}", "--threads", "1", "--max-wait", "600"]
    with start(*arguments, gate=gate) as server:
        body = json.dumps(GOOD).encode()
        request = (
            b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
        )
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(41)]
        clients[0].sendall(request + body)
        server.until(lambda stats: stats["in_flight"] == 2 and stats["queued"] == 0)
        for client in clients[1:]:
            client.sendall(request + body)
        server.until(lambda stats: stats["queued"] == 40)
        for client in clients[1:]:
            client.close()
        server.until(lambda stats: stats["queued"] == 0)
        metrics = server.get("/metrics").body.decode()
        assert "qingyu_cancelled_total 40.0" in metrics
        assert 'qingyu_withdrawn_rows{model="tiny"} 40.0' in metrics
        gate.touch()
        assert clients[0].recv(4096).startswith(b"HTTP/1.1 200")
        clients[0].close()
        assert server.until(lambda stats: stats["in_flight"] == 1)["queued_tokens"] == 0


def test_live_at_once_ready_when_the_models_are(start, tiny_model):
    with start("--model", f"tiny={tiny_model}", ready=False, SLOW_START="1.5") as server:
        assert server.address
        assert server.get("/live").status == 200
        for path in ("/ready", "/health", "/info", "/v1/models"):
            refused = server.get(path)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1"), path
        assert server.post("/embed", GOOD).json["error_type"] == "not_ready"
        assert server.stats()["ready"] is False
        server.event("ready")
        assert server.get("/ready").status == 200
        assert server.post("/embed", GOOD).status == 200


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"0" * 1000), 4, "is damaged"),
        (lambda folder: shutil.rmtree(folder), 5, "no model"),
    ],
)
def test_a_model_that_cannot_be_opened_ends_the_server_with_its_error(
    start, tiny_model, tmp_path, damage, code, words
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with start("--model", f"bad={folder}", ready=False) as server:
        assert server.process.wait(60) == code
        server._reader.join(5)
        assert words in "".join(server.other)
        assert "Traceback" not in "".join(server.other)


def test_keys_are_asked_for_but_for_health_page_and_openapi(start, tiny_model, tmp_path):
    (tmp_path / "keys").write_text("# of the team\nfirst-key\n\nsecond-key\n", encoding="utf-8")
    arguments = ["--model", f"tiny={tiny_model}", "--api-key-file", str(tmp_path / "keys")]
    with start(*arguments, QINGYU_API_KEY="third-key") as server:
        for path in ("/info", "/metrics", "/stats", "/v1/models", "/v1/models/tiny"):
            refused = server.get(path)
            assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer"), path
            assert server.get(path, Authorization="Bearer first-key").status == 200
        for path in ("/", "/live", "/ready", "/health", "/openapi.json"):
            assert server.get(path).status == 200, path
        for key in ("first-key", "second-key", "third-key"):
            assert server.post("/embed", GOOD, Authorization=f"Bearer {key}").status == 200
        for wrong in (
            "Bearer first",
            "Bearer first-key2",
            "Basic first-key",
            "first-key",
            "Bearer",
            "Bearer é",
        ):
            assert server.post("/embed", GOOD, Authorization=wrong).status == 401, wrong
        # Before the body is looked at.
        assert server.post("/embed", b"{").status == 401
        assert server.get("/openapi.json").json["paths"]["/embed"]["post"]["security"] == [{"key": []}]
        assert "key" not in json.dumps([line for line in server.log if line["event"] == "listening"])
        assert not any("first-key" in str(line) for line in server.log)


LOCAL = ("localhost", "LocalHost.:99", "a.localhost:80", "127.0.0.1:1", "127.8.8.8", "[::1]:5")
STRANGE = (
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example:80",
    "10.0.0.1",
    "",
    "[::1",
    "a b",
)


def test_on_loopback_a_request_by_another_name_is_refused_but_for_health(start, tiny_model):
    """A page whose name was made to resolve to this machine (DNS rebinding) reads nothing."""
    with start("--model", str(tiny_model)) as server:
        for host in LOCAL:
            assert server.get("/v1/models", Host=host).status == 200, host
        for host in STRANGE:
            for path in ("/", "/v1/models", "/nowhere"):
                assert server.get(path, Host=host).status == 421, (path, host)
            assert server.post("/embed", {"inputs": "a"}, Host=host).json["error_type"] == "wrong_host"
            assert server.get("/health", Host=host).status == 200
        assert server.raw(b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_names_that_are_allowed_are_answered_and_a_unix_socket_asks_for_none(start, tiny_model, tmp_path):
    with start("--model", str(tiny_model), "--allowed-hosts", "a.example", "*.b.example") as server:
        for host in ("a.example:8000", "x.b.example", "localhost"):
            assert server.get("/v1/models", Host=host).status == 200, host
        for host in ("b.example", "x.a.example", "xb.example"):
            assert server.get("/v1/models", Host=host).status == 421, host
    with start("--model", str(tiny_model), "--unix-socket", str(tmp_path / "s")) as server:
        assert server.get("/v1/models", Host="evil.example").status == 200


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "192.0.2.1"])
def test_elsewhere_any_host_is_answered_unless_some_are_named(bound):
    assert all(Hosts.of(bound, None).admit(host.encode()) for host in (*LOCAL, *STRANGE))
    named = Hosts.of(bound, ["a.example"])
    assert [named.admit(host) for host in (b"a.example:80", b"localhost", b"192.0.2.1")] == [
        True,
        False,
        False,
    ]
    assert Hosts.of(bound, ["*"]).admit(b"evil.example")


def test_a_unix_socket_is_for_this_user_and_one_that_was_left_is_replaced(start, tiny_model, tmp_path):
    path = tmp_path / "qingyu.sock"
    arguments = ["--model", f"tiny={tiny_model}", "--unix-socket", str(path)]
    with start(*arguments) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server.post("/embed", GOOD).status == 200
        with start(*arguments, ready=False) as second:
            assert second.process.wait(60) == 5
            second._reader.join(5)
            assert "another server listens there" in "".join(second.other)
        server.process.kill()
        server.process.wait()
    assert path.exists()
    with start(*arguments) as server:
        assert server.get("/ready").status == 200
        assert server.end() == 0
    assert not path.exists()


def test_a_model_is_replaced_under_load_without_a_failed_or_mixed_answer(
    start, tiny_model, tiny_int8, tmp_path
):
    """Two models in turn in one place, asked all the while for two texts at once; then a damaged one."""
    texts = ["今天天气真好", "股票大跌" * 5]
    vectors = [embedded(folder, texts) for folder in (tiny_model, tiny_int8)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    place = tmp_path / "model"
    shutil.copytree(tiny_model, place)
    with (
        start("--model", f"m={place}", "--max-wait", "60") as server,
        asking(server, {"inputs": texts}) as answers,
    ):
        for number in range(1, 7):
            replace(place, (tiny_model, tiny_int8)[number % 2])
            server.process.send_signal(signal.SIGHUP)
            server.event("reload", count=number, result="changed")
        good = server.get("/info").json["models"][0]["fingerprint"]
        (place / "model.onnx").write_bytes(b"damaged")
        server.process.send_signal(signal.SIGHUP)
        assert "is damaged" in server.event("reload", result="failed")["error"]
        assert server.get("/info").json["models"][0]["fingerprint"] == good
        before = len(answers)
        while len(answers) < before + 8:
            time.sleep(0.01)
        metrics = server.get("/metrics").body.decode()
        assert 'qingyu_reloads_total{model="m",result="failed"} 1.0' in metrics
        assert metrics.count("qingyu_model{") == 1
        assert server.event("freed", count=6)
    assert server.process.wait(10) == 0
    seen = set()
    for one in answers:
        assert one.status == 200
        found = np.array(one.json, dtype=np.float32)
        which = [n for n in (0, 1) if np.abs(found - vectors[n]).max() < 1e-5]
        assert len(which) == 1, "an answer of two models"
        seen.add((which[0], one.headers["x-qingyu-fingerprint"]))
    assert len(seen) == 2


def embedded(folder, texts):
    with Embedder.open(folder) as embedder:
        return embedder.embed(texts)


def replace(place: Path, folder: Path) -> None:
    """Another model in its place, by renaming."""
    new, old = place.with_name("new"), place.with_name("old")
    shutil.copytree(folder, new)
    place.rename(old)
    new.rename(place)
    shutil.rmtree(old)


@contextlib.contextmanager
def asking(server, body):
    """Four clients ask all the while; what they were answered."""
    answers, ended = [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answers.append(server.post("/embed", body))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_numbers_that_are_none_are_500_and_never_json(start, tiny_model, tmp_path):
    """A model whose weights hold a NaN, and says so in a manifest that has its hash."""
    onnx = pytest.importorskip("onnx")
    import hashlib

    folder = tmp_path / "nan"
    shutil.copytree(tiny_model, folder)
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if (
            values.dtype == np.float32
            and values.ndim == 2
            and values.shape[1] == 32
            and values.shape[0] > 100
        ):
            changed = values.copy()
            changed[-1] = np.nan  # of the last word of the vocabulary alone
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, folder / "model.onnx")
    data = (folder / "model.onnx").read_bytes()
    manifest = json.loads((folder / "qingyu.json").read_text(encoding="utf-8"))
    manifest["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "qingyu.json").write_text(json.dumps(manifest), encoding="utf-8")
    word = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    last = max(word, key=word.get)
    assert len(last) == 1
    with start("--model", f"nan={folder}") as server:
        bad = server.post("/embed", {"inputs": ["今天", f"今{last}天"]})
        assert (bad.status, bad.json["error_type"]) == (500, "model_failed")
        assert str(folder) not in bad.json["error"]
        assert "NaN" not in bad.body.decode()
        assert server.post("/v1/embeddings", {"input": last}).json["error"]["type"] == "server_error"
        # Who shares a micro-batch with such a text is not hurt by it.
        answers = together(server, 8) + together(server, 2, {"inputs": f"今{last}天"})
        assert [one.status for one in answers] == [200] * 8 + [500] * 2
        assert "NaN or infinity" in server.event("failed")["error"]


def test_more_connections_than_allowed_are_told(start, tiny_model):
    with start("--model", f"tiny={tiny_model}", "--max-connections", "3") as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3)]
        refused = server.raw(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in refused
        for connection in held:
            connection.close()
        server.until(lambda stats: stats["ready"])


def test_wrong_options_are_refused_before_anything_starts(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("QINGYU_API_KEY", raising=False)
    (tmp_path / "empty").write_text("# none\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for code, *arguments in (
            (3, "--model", "a=x", "--model", "a=y"),
            (3, "--max-inputs", "0"),
            (3, "--grace", "nan"),
            (3, "--api-key-file", str(tmp_path / "none")),
            (3, "--api-key-file", str(tmp_path / "empty")),
            (5, "--port", port, "--model", f"tiny={tiny_model}"),
            (5, "--host", "256.0.0.1"),
            (5, "--unix-socket", str(tmp_path)),
        ):
            assert main(["serve", *arguments]) == code, arguments
            assert capsys.readouterr().err.count("\n") == 1


def test_what_the_server_says_of_a_model_is_what_its_manifest_says(server, tiny_model):
    spec = read_spec(tiny_model)
    found = server.get("/info").json["models"][0]
    assert found["sha256"] == spec.files[spec.graph].sha256
    assert (found["dimensions"], found["pooling"], found["precision"]) == (
        spec.dim,
        spec.pooling,
        spec.precision,
    )
