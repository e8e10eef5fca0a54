"""The page works in a real browser, on a desk and on a phone, and loads nothing from elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qingyu.runtime import serve

SOURCE = (Path(serve.__file__).parent / "page.html").read_text(encoding="utf-8")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


class Browser:
    """Chromium by the commands of WebDriver, which need no package."""

    def __init__(self, port: int, width: int, height: int, language: str, home: str) -> None:
        self._port = port
        metrics = {"width": width, "height": height, "pixelRatio": 1, "touch": False, "mobile": width < 500}
        options: dict[str, Any] = {"args": [*FLAGS, f"--user-data-dir={home}", f"--lang={language}"]}
        options["mobileEmulation"] = {"deviceMetrics": metrics}
        options["prefs"] = {"intl.accept_languages": language}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self._session = ""
        self._session = self._do("POST", "session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _do(self, method: str, command: str, body: object = None) -> Any:
        path = f"/session/{self._session}/{command}".rstrip("/") if self._session else f"/{command}"
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, address: str) -> None:
        self._do("POST", "url", {"url": address})

    def run(self, script: str) -> Any:
        return self._do("POST", "execute/sync", {"script": script, "args": []})

    def until(self, script: str) -> Any:
        deadline = time.monotonic() + 30
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"{script}\n{self.log('browser')}"
            time.sleep(0.05)
        return found

    def log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._do("POST", "se/log", {"type": kind})
        return found

    def picture(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self._do("GET", "screenshot")))

    def close(self) -> None:
        self._do("DELETE", "")


@pytest.fixture(scope="module")
def driver() -> Iterator[int]:
    """The port of a chromedriver."""
    program = shutil.which("chromedriver")
    if program is None or shutil.which("chromium") is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([program, f"--port={port}"], stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def browsing(driver: int, size: str = "desktop", language: str = "zh-CN") -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        browser = Browser(driver, *SIZES[size], language, home)
        try:
            yield browser
        finally:
            browser.close()


def test_the_page_names_no_other_place():
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+", SOURCE))
    assert addresses <= {"http://www.w3.org"}  # the name of SVG, not a place to load from
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=(?!\"data:)", SOURCE)
    assert "innerHTML" not in SOURCE  # what models and users write is text, never markup


@pytest.mark.parametrize("size", SIZES)
def test_it_compares_sentences_fills_masks_and_shows_the_server(server, driver, size):
    with browsing(driver, size) as browser:
        browser.open(server.address + "/")
        browser.until("return document.querySelectorAll('#map td').length === 25")
        browser.until("return document.querySelectorAll('#bars .bar').length >= 6")
        assert browser.run("return document.documentElement.lang") == "zh-CN"
        assert browser.until("return document.getElementById('state').textContent") == "就绪"
        assert browser.until("return document.getElementById('memory').textContent > 10")
        # Nothing is wider than the window.
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), size
        same = browser.run("return [...document.querySelectorAll('#map td.same')].map(td => td.textContent)")
        assert same == ["1.00"] * 5
        # Another text, with markup in it that must stay text.
        browser.run(
            "document.getElementById('sentences').value = '<b>今天</b>\\n天气\\n股票';"
            "document.getElementById('similarity-form').requestSubmit()"
        )
        browser.until("return document.querySelectorAll('#map td').length === 9")
        assert browser.run("return document.querySelectorAll('#map b').length") == 3  # the numbers of lines
        folder = os.environ.get("QINGYU_SCREENSHOTS")
        if folder:
            browser.picture(Path(folder) / f"{size}.png")
        problems = [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"]
        assert not problems
        asked = [
            event["params"]["request"]["url"]
            for event in (json.loads(entry["message"])["message"] for entry in browser.log("performance"))
            if event["method"] == "Network.requestWillBeSent"
        ]
        own = [url for url in asked if url.startswith(server.address)]
        assert own
        # The browser's own pages (chrome:) have other schemes.
        assert own == [url for url in asked if url.startswith(("http:", "https:", "ws:", "wss:"))]


def test_errors_are_shown_and_a_key_is_asked_for(start, driver, tiny_model):
    with (
        start("--model", f"tiny={tiny_model}", "--max-inputs", "2", QINGYU_API_KEY="open-sesame") as server,
        browsing(driver, language="en-US") as browser,
    ):
        browser.open(server.address + "/")
        browser.until("return !document.getElementById('key-card').hidden")
        browser.run(
            "document.getElementById('key').value = 'open-sesame';"
            "document.getElementById('key-form').requestSubmit()"
        )
        wrong = browser.until("return document.getElementById('similarity-wrong').textContent")
        assert wrong == "input: expected at most 2 texts, found 5"
        assert browser.run("return document.getElementById('fill').hidden")
        assert (
            browser.run("return document.querySelector('#similarity h2').textContent")
            == "Similarity of sentences"
        )
        assert server.end() == 0
        browser.until("return document.getElementById('state').textContent === 'no connection'")
