"""One connection in this process: what it keeps of a client that does not read, and how it ends.

The loop is turned by hand instead of waiting: everything here happens on sockets of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

from uvicorn.server import ServerState  # noqa: E402 - behind the check that it is there

from qingyu.runtime.serve.protocol import UNSENT_BYTES, Gate, LimitedProtocol  # noqa: E402

SECONDS = 60.0
ANSWER = 10_000  # bytes
GET = b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Echo:
    """Answers every request with its path and its body, padded to ``ANSWER`` bytes; counts those it has begun."""

    def __init__(self) -> None:
        self.gate = Gate(1_000_000, SECONDS, SECONDS, SECONDS, 10, lambda code: None)
        self.begun = 0

    async def __call__(self, scope, receive, send):
        self.begun += 1
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        said = (scope["path"].encode() + b" " + body + b" ").ljust(ANSWER, b".")
        headers = [(b"content-length", b"%d" % len(said))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback with small buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.connect(listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setblocking(False)
        return client, listener.accept()[0]


@contextlib.asynccontextmanager
async def connection(app, *, keep_alive=SECONDS):
    """The client's socket, and the protocol at the other end."""
    client, accepted = connected()
    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_config=None,
        proxy_headers=False,
        timeout_keep_alive=keep_alive,
    )
    config.load()
    _, protocol = await asyncio.get_running_loop().connect_accepted_socket(
        lambda: LimitedProtocol(config=config, server_state=ServerState(), app_state={}), accepted
    )
    try:
        yield client, protocol
    finally:
        client.close()
        protocol.transport.abort()
        await turns(5)


async def turns(count=200):
    """Let the loop do all that it can: nothing here waits for time."""
    for _ in range(count):
        await asyncio.sleep(0)


async def read(client, size):
    parts, loop = [], asyncio.get_running_loop()
    while size > 0:
        part = await asyncio.wait_for(loop.sock_recv(client, min(size, 65_536)), SECONDS)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


async def answers(client, count):
    """The next answers' paths and bodies."""
    found = []
    data = b""
    while len(found) < count:
        head, separator, rest = data.partition(b"\r\n\r\n")
        if not separator or len(rest) < ANSWER:
            more = await read(client, 1)
            assert more, "it was closed"
            with contextlib.suppress(BlockingIOError):
                more += client.recv(1 << 20)
            data += more
            continue
        assert head.startswith(b"HTTP/1.1 200 ")
        found.append(rest[:ANSWER].rstrip(b".").strip())
        data = rest[ANSWER:]
    assert not data
    return found


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine in a loop of either kind."""
    new_loop = pytest.importorskip(request.param).new_event_loop

    def run(coroutine):
        loop = new_loop()
        try:
            return loop.run_until_complete(asyncio.wait_for(coroutine, 2 * SECONDS))
        finally:
            loop.close()

    return run


def test_a_client_that_does_not_read_is_given_little_and_then_everything_in_order(run):
    """1,000 requests at once: a few are begun, one waits parsed, the rest stay bytes; reading brings all answers."""

    async def tried():
        app = Echo()
        async with connection(app) as (client, protocol):
            await asyncio.get_running_loop().sock_sendall(client, b"".join(GET % n for n in range(1000)))
            at_rest = -1
            while not protocol.flow.write_paused or app.begun != at_rest:
                at_rest = app.begun
                await turns()
            kept = {
                "begun": app.begun,
                "waiting": len(protocol.pipeline),
                "unsent": protocol.transport.get_write_buffer_size(),
                "reading": not protocol.flow.read_paused,
            }
            found = await answers(client, 1000)
            await turns()
            return kept, found, app.begun, protocol.flow.read_paused

    kept, found, begun, paused = run(tried())
    assert kept["begun"] < 100  # what the system's buffers take, 8 kB and what it adds to them
    assert kept["waiting"] <= 1
    assert kept["unsent"] <= UNSENT_BYTES + ANSWER + 500
    assert not kept["reading"]
    assert found == [b"/%d" % n for n in range(1000)]
    assert begun == 1000
    assert not paused


def test_while_one_is_answered_one_request_waits_and_the_rest_is_not_parsed(run):
    async def tried():
        app = Echo()
        gate = asyncio.Event()

        async def slow(scope, receive, send):
            await receive()  # resumes reading, as every application does
            await gate.wait()
            await Echo.__call__(app, scope, _none, send)

        async def _none():
            return {"type": "http.request", "body": b"", "more_body": False}

        slow.gate = app.gate
        async with connection(slow) as (client, protocol):
            for n in range(300):
                await asyncio.get_running_loop().sock_sendall(client, GET % n)
            await turns()
            waiting, paused = len(protocol.pipeline), protocol.flow.read_paused
            gate.set()
            return waiting, paused, await answers(client, 300)

    waiting, paused, found = run(tried())
    assert waiting == 1
    assert paused
    assert found == [b"/%d" % n for n in range(300)]


BODIES = (
    b"",
    b"a",
    b"\r\n\r\n",
    b"GET /9 HTTP/1.1\r\nHost: evil\r\n\r\n",
    b"x" * 3000 + b"\r\n\r\n" + b"y" * 50,
)


def _declared(number: int, body: bytes) -> bytes:
    return b"POST /%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (number, len(body), body)


def _chunked(number: int, body: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:2], body[2:]) if part)
    return (
        b"POST /%d HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % number
        + chunks
        + b"0\r\n\r\n"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 61, 1000, 1 << 20])
def test_bodies_are_whole_however_they_are_cut(run, size):
    """Requests behind each other with bodies that look like the ends of headers, in parts of any size."""
    sent = [(n, body) for n, body in enumerate(BODIES * 2)]
    data = b"".join((_declared, _chunked)[n >= len(BODIES)](n, body) for n, body in sent)

    async def tried():
        async with connection(Echo()) as (_, protocol):
            # Straight into the protocol: the system would put small parts together.
            for begin in range(0, len(data), size):
                protocol.data_received(data[begin : begin + size])
            return await answers(_, len(sent))

    assert run(tried()) == [(b"/%d " % n + body).strip() for n, body in sent]


def test_a_request_that_has_come_when_the_connection_is_to_end_is_answered(run):
    """The end of the keep-alive time, in the turn of the loop in which a request lies in the socket unread."""

    async def tried():
        app = Echo()
        async with connection(app) as (client, protocol):
            client.send(GET % 1)
            await answers(client, 1)
            client.send(GET % 2)
            protocol.timeout_keep_alive_handler()
            return await answers(client, 1)

    assert run(tried()) == [b"/2"]


def test_a_request_that_comes_too_late_finds_an_end_and_no_reset(run):
    async def tried():
        app = Echo()
        async with connection(app) as (client, protocol):
            client.send(GET % 1)
            await answers(client, 1)
            await turns()
            protocol.timeout_keep_alive_handler()
            await turns()
            client.send(GET % 2)
            await turns()
            client.send(GET % 3)  # to a socket that was closed with bytes unread, this is a reset
            ended = await read(client, 1)
            return ended, app.begun

    assert run(tried()) == (b"", 1)


def test_an_idle_connection_is_ended(run):
    async def tried():
        async with connection(Echo(), keep_alive=0.01) as (client, _):
            client.send(GET % 1)
            await answers(client, 1)
            return await read(client, 1)

    assert run(tried()) == b""


def test_a_client_that_reads_slowly_is_kept_and_one_that_does_not_is_not(run):
    """As much is unsent at each look; only where no answer came in between did the client read nothing."""

    async def tried():
        async with connection(Echo()) as (client, protocol):
            client.send(b"".join(GET % n for n in range(100)))
            while not protocol.flow.write_paused:
                await turns(1)
            unsent, answered = protocol.transport.get_write_buffer_size(), protocol._answers
            protocol._check_reading(unsent, answered - 1)
            kept = not protocol.transport.is_closing()
            protocol._check_reading(unsent, answered)
            return kept, protocol.transport.is_closing()

    assert run(tried()) == (True, True)
