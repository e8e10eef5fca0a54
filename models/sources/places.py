"""The sources by name, each as the function that asks it for a repository's files.

- ``hub``: the Hugging Face endpoint, HF_ENDPOINT if set; huggingface_hub knows the token (HF_TOKEN or the login).
- ``mirror``: another server that speaks the hub's language, QINGYU_MIRROR or hf-mirror.com; it gets no token.
- ``modelscope``: ModelScope over plain HTTPS, MODELSCOPE_ENDPOINT or modelscope.cn; public models only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from qingyu.errors import SourceError
from qingyu.models.sources.http import Limits, Request, get_json
from qingyu.models.sources.listing import RemoteFile, Snapshot, check_repository, choose, is_set

__all__ = ["SOURCES", "find_snapshot"]

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://modelscope.cn"

SHA256 = re.compile(r"[0-9a-f]{64}")
SHA1 = re.compile(r"[0-9a-f]{40}")


def find_snapshot(source: str, repository: str, revision: str | None, limits: Limits) -> Snapshot:
    """What the named source has of a repository; ``revision`` ``None`` is the source's default branch.

    Raises ``SourceError`` and ``UnsupportedModelError``. Opens sockets: whoever works offline does not call it.
    """
    check_repository(repository, revision)
    return SOURCES[source](repository, revision, limits)


def _hub(repository: str, revision: str | None, limits: Limits) -> Snapshot:
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    return _hub_like("hub", repository, revision or "main", limits, endpoint, _token())


def _token() -> str | None:
    """The user's token, unless HF_HUB_DISABLE_IMPLICIT_TOKEN asks for none to be sent."""
    from huggingface_hub import get_token

    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    try:
        token: str | None = get_token()
    except Exception as error:  # noqa: BLE001 - a login may be renewed over the network, and fail in any way there
        raise SourceError(
            "no token can be had",
            expected="HF_TOKEN, or a login that is valid",
            found=str(error) or type(error).__name__,
            remedy="Log in again, or set HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to go on without.",
        ) from None
    return token


def _mirror(repository: str, revision: str | None, limits: Limits) -> Snapshot:
    endpoint = (os.environ.get("QINGYU_MIRROR") or MIRROR).rstrip("/")
    return _hub_like("mirror", repository, revision or "main", limits, endpoint, None)


def _hub_like(
    source: str, repository: str, revision: str, limits: Limits, endpoint: str, token: str | None
) -> Snapshot:
    from huggingface_hub import hf_hub_url

    origin = f"{endpoint}/{repository}"
    url = f"{endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    answer = get_json(Request(url, token), limits=limits)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or SHA1.fullmatch(commit) is None:
        raise _strange(origin, "a commit of 40 hexadecimal digits", commit)
    files = choose((_hub_file(item, origin) for item in _list(answer, "siblings", origin)), origin)
    try:
        urls = {
            file.path: hf_hub_url(repository, file.path, revision=commit, endpoint=endpoint) for file in files
        }
    except ValueError as error:  # huggingface_hub knows more about names than we do
        raise _strange(origin, "a name that the hub allows", str(error)) from None
    requests = {path: Request(url, token) for path, url in urls.items()}
    return Snapshot(source, repository, revision, commit, files, requests)


def _hub_file(item: Any, origin: str) -> RemoteFile:  # noqa: ANN401 - JSON
    if not isinstance(item, dict) or not isinstance(item.get("rfilename"), str):
        raise _strange(origin, "files with names", item)
    stored = item.get("lfs")
    if isinstance(stored, dict):
        return RemoteFile(
            item["rfilename"],
            _size(stored.get("size", item.get("size"))),
            _digest(stored.get("sha256"), SHA256),
        )
    return RemoteFile(item["rfilename"], _size(item.get("size")), None, _digest(item.get("blobId"), SHA1))


def _modelscope(repository: str, revision: str | None, limits: Limits) -> Snapshot:
    endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE).rstrip("/")
    origin, branch = f"{endpoint}/models/{repository}", revision or "master"
    url = f"{endpoint}/api/v1/models/{repository}/repo/files?Revision={quote(branch, safe='')}&Recursive=True"
    answer = get_json(Request(url), limits=limits)
    data = answer.get("Data") if isinstance(answer, dict) else None
    listed = _list(data, "Files", origin)
    blobs = [item for item in listed if isinstance(item, dict) and item.get("Type") != "tree"]
    files = choose((_modelscope_file(item, origin) for item in blobs), origin)
    requests = {
        file.path: Request(f"{origin}/resolve/{quote(branch, safe='')}/{quote(file.path)}") for file in files
    }
    return Snapshot("modelscope", repository, branch, f"{branch}-{_list_digest(files)}", files, requests)


def _modelscope_file(item: Mapping[str, Any], origin: str) -> RemoteFile:
    if not isinstance(item.get("Path"), str):
        raise _strange(origin, "files with paths", item)
    return RemoteFile(item["Path"], _size(item.get("Size")), _digest(item.get("Sha256"), SHA256))


def _list_digest(files: tuple[RemoteFile, ...]) -> str:
    """Twelve digits that change when a listed file does: ModelScope's branches tell no commit."""
    facts = [[file.path, file.bytes, file.sha256] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _list(answer: Any, name: str, origin: str) -> list[Any]:  # noqa: ANN401 - JSON
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise _strange(origin, f"a list {name!r} of files", answer)
    return found


def _size(value: Any) -> int | None:  # noqa: ANN401
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _digest(value: Any, form: re.Pattern[str]) -> str | None:  # noqa: ANN401
    return value.lower() if isinstance(value, str) and form.fullmatch(value.lower()) else None


def _strange(origin: str, expected: str, found: object) -> SourceError:
    shown = repr(found)
    return SourceError(
        f"{origin} answers strangely",
        expected=expected,
        found=shown if len(shown) <= 80 else shown[:77] + "...",
        remedy="Check HF_ENDPOINT, QINGYU_MIRROR or MODELSCOPE_ENDPOINT, or try another source with --from.",
    )


SOURCES: Mapping[str, Callable[[str, str | None, Limits], Snapshot]] = {
    "hub": _hub,
    "mirror": _mirror,
    "modelscope": _modelscope,
}
