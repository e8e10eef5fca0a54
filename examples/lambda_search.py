"""AWS Lambda behind API Gateway (payload 2.0) or a function URL: GET ?q=... answers from an index in the package.

Build the index beside this file (`qingyu index build documents.jsonl kb`), name its folder in QINGYU_INDEX, and enter
`lambda_search.handler`. It is only read. Not tried on AWS itself; vectors over HTTP: see docs/serverless.md.
"""

import dataclasses
import json
import os
from typing import Any

from qingyu.errors import InputError
from qingyu.runtime.search import SearchIndex

INDEX = SearchIndex.open(os.environ["QINGYU_INDEX"])  # while the sandbox starts, not at the first request
INDEX.embedder.load()


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """The hits for the query ``q``, at most ``k`` (5)."""
    given = event.get("queryStringParameters") or {}
    if not given.get("q") or not str(given.get("k", 5)).isdecimal():
        return answer(400, {"error": "expected ?q=TEXT and maybe &k=NUMBER"})
    try:
        hits = INDEX.search(given["q"], k=min(20, int(given.get("k", 5))), mode="hybrid")
    except InputError as error:
        return answer(400, {"error": str(error)})
    return answer(200, {"hits": [dataclasses.asdict(hit) for hit in hits]})


def answer(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """An answer as API Gateway expects it."""
    headers = {"content-type": "application/json; charset=utf-8"}
    return {"statusCode": status, "headers": headers, "body": json.dumps(body, ensure_ascii=False)}
