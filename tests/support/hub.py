"""A loopback server that plays a Hugging Face endpoint and ModelScope, and can misbehave in the ways of networks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Faults:
    """What goes wrong with a file whose path ends in the key that this is put under.

    ``cut_after``: bytes of each next transfer, the connection then closed, until the list is used up. ``flip``: one
    bit of every transfer. ``drip``: seconds after each byte. ``hold``: an event to wait for half-way. The first
    ``times`` requests get ``status``.
    """

    cut_after: list[int] = field(default_factory=list)
    flip: bool = False
    drip: float | None = None
    status: int | None = None
    times: int = 1 << 30
    redirect: str | None = None
    no_range: bool = False
    wrong_range: bool = False
    hold: threading.Event | None = None
    size_lie: int = 0


class Hub:
    """The server; ``folder`` is what it serves as the repository ``repository``."""

    def __init__(self, repository: str, folder: Path) -> None:
        self.repository = repository
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.faults: dict[str, Faults] = {}
        self.token: str | None = None
        self.tell_hashes = True
        self.list_answer: bytes | None = None
        self.seen: list[tuple[str, dict[str, str]]] = []
        self._scheme = "http"
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def use_tls(self, context: ssl.SSLContext) -> None:
        """From now on speak TLS; handshakes are made by the thread of a connection."""
        self._scheme = "https"
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )

    @property
    def commit(self) -> str:
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.files.items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def requested(self, ending: str) -> list[dict[str, str]]:
        """The headers of all requests for paths that end so."""
        return [headers for path, headers in self.seen if path.endswith(ending)]

    def fault(self, path: str) -> Faults | None:
        return next((fault for ending, fault in self.faults.items() if path.endswith(ending)), None)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def handle(self):
        with contextlib.suppress(OSError):  # a client that went away, or did not like the certificate
            super().handle()

    def log_message(self, *_):
        pass

    def do_GET(self):
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        hub = self.server_hub
        hub.seen.append((path, dict(self.headers)))
        fault = hub.fault(path)
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fault is not None and fault.redirect is not None:
                return self._answer(302, b"", {"Location": fault.redirect})
            if fault is not None and fault.status is not None and fault.times > 0:
                fault.times -= 1
                return self._answer(fault.status, b"no")
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._answer(401, b"who?")
            return self._route(hub, path, parse_qs(parts.query), fault)
        return None

    def _route(self, hub, path, query, fault):
        name = hub.repository
        if hub.list_answer is not None and path.startswith("/api/"):
            return self._answer(200, hub.list_answer)
        revisions = ("main", "master", "v1", hub.commit)
        if path.startswith(f"/api/models/{name}/revision/"):
            known = path.rpartition("/")[2] in revisions and query.get("blobs")
            return (
                self._answer(200, json.dumps(self._hub_list(hub)).encode())
                if known
                else self._answer(404, b"")
            )
        if path == f"/api/v1/models/{name}/repo/files":
            return self._answer(200, json.dumps(self._modelscope_list(hub)).encode())
        for prefix in (f"/{name}/resolve/", f"/models/{name}/resolve/", "/elsewhere/"):
            if path.startswith(prefix):
                file = path[len(prefix) :].partition("/")[2]
                if file in hub.files:
                    return self._file(hub.files[file], fault or Faults())
        return self._answer(404, b"not here")

    def _hub_list(self, hub):
        siblings = []
        for path, data in hub.files.items():
            size = len(data) + getattr(hub.fault(path), "size_lie", 0)
            item = {"rfilename": path, "size": size}
            if hub.tell_hashes and path.endswith(".safetensors"):
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size}
            elif hub.tell_hashes:
                item["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(item)
        return {"id": hub.repository, "sha": hub.commit, "siblings": siblings}

    def _modelscope_list(self, hub):
        files = [
            {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for path, data in hub.files.items()
        ]
        return {"Code": 200, "Data": {"Files": [*files, {"Path": "1_Pooling", "Type": "tree", "Size": 0}]}}

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, data, fault):
        start = 0
        wanted = self.headers.get("Range")
        if wanted and not fault.no_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) and start:
            return self._answer(416, b"")
        body = bytearray(data[start:])
        if fault.flip:
            body[len(body) // 2] ^= 4
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            first = start + 1 if fault.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self._body(bytes(body), fault)
        return None

    def _body(self, body, fault):
        if fault.cut_after:
            body = body[: fault.cut_after.pop(0)]
        if fault.drip is not None:
            for number in range(len(body)):
                self.wfile.write(body[number : number + 1])
                time.sleep(fault.drip)
        elif fault.hold is not None:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            fault.hold.wait(30)
            self.wfile.write(body[len(body) // 2 :])
        else:
            self.wfile.write(body)
