"""What comes from a network is what was asked for, or an error; nothing else is read, written or sent."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qingyu.errors import CorruptFileError, OutputError, SourceError, UnsupportedModelError
from qingyu.models.sources import SOURCES, Limits, RemoteFile, find_snapshot
from qingyu.models.sources.download import download
from qingyu.models.sources.http import Request, _may_carry_token, get_json
from qingyu.models.sources.listing import choose

pytest.importorskip("huggingface_hub")

NAME = "someone/tiny-zh"
QUICK = Limits(wait=2, window=0.4, rate=200, attempts=3, pause=0.01)
ONCE = Limits(wait=2, window=0.4, rate=200, attempts=1, pause=0.01)


def fetch(
    hub, target: Path, path: str = "model.safetensors", limits: Limits = QUICK, source: str = "hub"
) -> int:
    snapshot = find_snapshot(source, NAME, None, limits)
    file = next(file for file in snapshot.files if file.path == path)
    return sum(download(file, snapshot.requests[path], target, limits=limits))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".part"]


# --- lists


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_lists_the_checkpoint_with_sizes_and_hashes(source, hub):
    snapshot = find_snapshot(source, NAME, None, QUICK)
    assert {file.path for file in snapshot.files} == set(hub.files)
    for file in snapshot.files:
        data = hub.files[file.path]
        assert file.bytes == len(data)
        assert file.sha256 in (None, hashlib.sha256(data).hexdigest())
        assert file.sha256 or file.git_sha1
    assert snapshot.revision == hub.commit or snapshot.revision.startswith("master-")


def test_a_modelscope_revision_changes_with_its_files(hub):
    first = find_snapshot("modelscope", NAME, None, QUICK).revision
    hub.files["config.json"] += b" "
    assert find_snapshot("modelscope", NAME, None, QUICK).revision != first


def test_only_the_files_of_a_checkpoint_are_chosen():
    names = [
        "config.json",
        "pytorch_model.bin",
        "model.safetensors",
        "onnx/model.onnx",
        "run.py",
        ".gitattributes",
    ]
    names += [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "a/b/config.json",
    ]
    names += [
        "../config.json",
        "/etc/config.json",
        "1_Pooling/../config.json",
        "model-00001-of-00002.safetensors",
    ]
    names += ["C:\\config.json", "con\nfig.json", "1_Pooling\\config.json", "tokenizer.json\0"]
    chosen = choose([RemoteFile(name, 1) for name in names], "here")
    assert [file.path for file in chosen] == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "config.json",
        "model.safetensors",
    ]


def test_shards_are_chosen_where_there_is_no_single_file():
    names = [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert len(choose([RemoteFile(name, 1) for name in names], "here")) == 3


def test_a_repository_of_pickles_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"found pytorch_model\.bin"):
        choose([RemoteFile("config.json", 1), RemoteFile("pytorch_model.bin", 1)], "here")


def test_a_file_listed_twice_is_refused():
    with pytest.raises(SourceError, match="twice"):
        choose([RemoteFile("model.safetensors", 1), RemoteFile("model.safetensors", 2)], "here")


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b/c", "a b/c", "-x/y", "a/..", "http://x/y", "a/b?c=d", "a/b#c"]
)
def test_a_name_that_no_repository_has_is_refused_before_it_is_asked_for(name, hub):
    with pytest.raises(SourceError, match="OWNER/NAME"):
        find_snapshot("hub", name, None, QUICK)
    assert not hub.seen


def test_a_revision_is_asked_for(hub):
    find_snapshot("hub", NAME, "v1", QUICK)
    assert hub.seen[0][0].endswith("/revision/v1")
    with pytest.raises(SourceError, match="404"):
        find_snapshot("hub", NAME, "v2", QUICK)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"sha": 5}', b'{"sha": "x", "siblings": {}}'])
def test_an_answer_of_another_form_is_refused(answer, hub, monkeypatch):
    monkeypatch.setattr(
        "qingyu.models.sources.places.get_json", lambda *_, **__: __import__("json").loads(answer)
    )
    for source in SOURCES:
        with pytest.raises((SourceError, ValueError)):
            find_snapshot(source, NAME, None, QUICK)


# --- refusals


def test_an_unknown_model_is_a_404(hub):
    with pytest.raises(SourceError, match=r"404.*Check the name"):
        find_snapshot("hub", "someone/else", None, QUICK)


def test_a_gated_model_needs_the_token_and_only_the_hub_gets_it(hub, monkeypatch, tmp_path):
    hub.token = "hf_secret"
    with pytest.raises(SourceError, match=r"401.*HF_TOKEN"):
        find_snapshot("hub", NAME, None, QUICK)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path / "weights")
    assert "hf_secret" not in repr(find_snapshot("hub", NAME, None, QUICK))
    hub.seen.clear()
    for source in ("mirror", "modelscope"):
        with pytest.raises(SourceError, match="401"):
            find_snapshot(source, NAME, None, QUICK)
    assert not any("Authorization" in headers for _, headers in hub.seen)


def test_a_server_that_fails_at_first_is_asked_again(hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(status=503, times=2)
    assert fetch(hub, tmp_path / "weights") == len(hub.files["model.safetensors"])


def test_a_server_that_goes_on_failing_is_an_error_after_three_attempts(hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(status=503)
    with pytest.raises(SourceError, match="503"):
        fetch(hub, tmp_path / "weights")
    assert len(hub.requested("model.safetensors")) == 3
    assert not list(tmp_path.iterdir())


def test_nobody_there_is_an_error(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(SourceError, match=r"refused.*HF_ENDPOINT"):
        find_snapshot("hub", NAME, None, QUICK)


# --- addresses


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "/etc/passwd", "http:///x"]
)
def test_only_http_and_https_are_opened(address):
    with pytest.raises(SourceError, match="http"):
        get_json(Request(address), limits=QUICK)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"])
def test_a_redirect_leads_to_http_or_nowhere(address, hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(redirect=address)
    with pytest.raises(SourceError, match="redirect"):
        fetch(hub, tmp_path / "weights")
    assert not list(tmp_path.iterdir())


def test_redirects_without_end_are_an_error(hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(redirect=f"/{NAME}/resolve/main/model.safetensors")
    with pytest.raises(SourceError, match="redirect"):
        fetch(hub, tmp_path / "weights")


def test_a_token_is_not_sent_on_to_another_host_but_to_the_same(hub, monkeypatch, tmp_path):
    """localhost and 127.0.0.1 are two hosts to HTTP, and one machine to this test."""
    port = hub.url.rpartition(":")[2]
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for host, sent in (("localhost", False), ("127.0.0.1", True)):
        hub.seen.clear()
        hub.faults["/resolve/" + hub.commit + "/model.safetensors"] = hub.Faults(
            redirect=f"http://{host}:{port}/elsewhere/x/model.safetensors"
        )
        fetch(hub, tmp_path / host)
        last = hub.requested("/elsewhere/x/model.safetensors")
        assert [("Authorization" in headers) for headers in last] == [sent]


@pytest.fixture
def secure(hub, tmp_path):
    """The hub over TLS with a certificate of its own; its file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl, to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hub.use_tls(context)
    return certificate


def test_over_tls_a_trusted_server_serves_with_the_token_and_no_other_does(
    secure, hub, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(SourceError, match="certificate verify failed"):
        find_snapshot("hub", NAME, None, ONCE)
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    hub.faults["model.safetensors"] = hub.Faults(cut_after=[5000])
    fetch(hub, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == hub.files["model.safetensors"]


def test_modelscope_is_asked_and_read_over_tls(secure, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    fetch(hub, tmp_path / "x", source="modelscope")
    assert (tmp_path / "x").read_bytes() == hub.files["model.safetensors"]


def test_a_redirect_from_https_to_http_is_refused(secure, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    hub.faults["model.safetensors"] = hub.Faults(redirect="http://127.0.0.1:9/x")
    with pytest.raises(SourceError, match="redirect"):
        fetch(hub, tmp_path / "x")


@pytest.mark.parametrize(
    ("url", "sent"),
    [("http://hub.example/x", False), ("https://hub.example/x", True), ("http://localhost:80/x", True)],
)
def test_a_token_goes_over_plain_http_to_this_machine_only(url, sent):
    assert _may_carry_token(url) is sent


# --- content


def test_a_file_comes_as_it_is(hub, tmp_path):
    for path, data in hub.files.items():
        assert fetch(hub, tmp_path / "x", path) == len(data)
        assert (tmp_path / "x").read_bytes() == data
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("path", ["model.safetensors", "vocab.txt"])
def test_a_flipped_bit_is_an_error_and_leaves_nothing(path, hub, tmp_path):
    hub.faults[path] = hub.Faults(flip=True)
    with pytest.raises(CorruptFileError, match="not what it should be"):
        fetch(hub, tmp_path / "x", path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lie", [-10, 10])
def test_a_wrong_length_is_an_error(lie, hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(size_lie=lie)
    with pytest.raises((SourceError, CorruptFileError)):
        fetch(hub, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_connection_cut_at_twenty_offsets_is_taken_up_each_time(hub, tmp_path):
    """Each time by a new call, as after a restart; nothing is fetched twice."""
    data = hub.files["model.safetensors"]
    step = len(data) // 21
    hub.faults["model.safetensors"] = hub.Faults(cut_after=[step] * 20)
    for count in range(1, 21):
        with pytest.raises(SourceError, match="ended after"):
            fetch(hub, tmp_path / "x", limits=ONCE)
        assert max(path.stat().st_size for path in leftovers(tmp_path)) == count * step
    fetch(hub, tmp_path / "x", limits=ONCE)
    assert (tmp_path / "x").read_bytes() == data
    assert not leftovers(tmp_path)
    starts = [headers.get("Range") for headers in hub.requested("model.safetensors")]
    assert starts == [None, *(f"bytes={count * step}-" for count in range(1, 21))]


def test_cuts_within_one_call_are_mended_by_it(hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(cut_after=[1, 5000])
    assert fetch(hub, tmp_path / "x") == len(hub.files["model.safetensors"])
    assert (tmp_path / "x").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("fault", ["no_range", "wrong_range"])
def test_a_server_that_cannot_go_on_begins_again(fault, hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(cut_after=[5000], **{fault: True})
    assert fetch(hub, tmp_path / "x") == len(hub.files["model.safetensors"])
    assert (tmp_path / "x").read_bytes() == hub.files["model.safetensors"]


def test_a_damaged_beginning_is_fetched_again(hub, tmp_path):
    hub.faults["model.safetensors"] = hub.Faults(cut_after=[5000])
    with pytest.raises(SourceError):
        fetch(hub, tmp_path / "x", limits=ONCE)
    (left,) = leftovers(tmp_path)
    left.write_bytes(bytes(5000))
    fetch(hub, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == hub.files["model.safetensors"]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("path", ["model.safetensors", "/revision/main"])
def test_a_slow_drip_ends_soon(path, hub, tmp_path):
    """A byte every 30 ms never makes a socket wait for its time-out."""
    if path == "/revision/main":
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=drip_headers, args=(server,), daemon=True).start()
        with pytest.raises(SourceError, match="too slow"):
            get_json(Request(f"http://127.0.0.1:{server.getsockname()[1]}/"), limits=ONCE)
        server.close()
        return
    hub.faults[path] = hub.Faults(drip=0.03)
    start = time.monotonic()
    with pytest.raises(SourceError, match="too slow"):
        fetch(hub, tmp_path / "x", limits=ONCE)
    assert time.monotonic() - start < 20  # the whole of it would take a quarter of an hour


def drip_headers(server: socket.socket) -> None:
    connection, _ = server.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    try:
        while True:
            connection.sendall(b"x")
            time.sleep(0.03)
    except OSError:
        connection.close()


def test_a_silent_server_ends_at_the_time_limit(hub):
    server = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(SourceError, match="timed out"):
        get_json(
            Request(f"http://127.0.0.1:{server.getsockname()[1]}/"),
            limits=Limits(wait=0.2, attempts=1, pause=0),
        )
    server.close()


def test_a_list_without_end_is_cut_off(hub):
    hub.files = {f"{n:0100d}": b"" for n in range(1000)}
    with pytest.raises(SourceError, match="at most 1,000 bytes"):
        find_snapshot("hub", NAME, None, Limits(listing=1000))


def test_a_full_disk_is_said_and_leaves_nothing(hub, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="10 bytes are free"):
        fetch(hub, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_in_the_middle_is_said_and_leaves_nothing(hub, tmp_path):
    """The process may write no file above 50 kB, which fails as a full disk does."""
    code = f"""
import resource
from pathlib import Path
from qingyu.errors import OutputError
from qingyu.models.sources import Limits, find_snapshot
from qingyu.models.sources.download import download
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
snapshot = find_snapshot("hub", {NAME!r}, None, Limits())
file = next(file for file in snapshot.files if file.path == "model.safetensors")
try:
    for _ in download(file, snapshot.requests[file.path], Path({str(tmp_path)!r}) / "x", limits=Limits()):
        pass
except OutputError as error:
    print(error.found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert not list(tmp_path.iterdir())


def test_a_login_that_fails_is_one_typed_error(hub, monkeypatch):
    def fail() -> str:
        raise RuntimeError("the login has ended")

    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", fail)
    with pytest.raises(SourceError, match="the login has ended"):
        find_snapshot("hub", NAME, None, QUICK)
