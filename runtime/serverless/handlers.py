"""The functions that platforms call, over one model for the process.

An entry file is two lines, and ``qingyu bundle-app`` writes it::

    from qingyu.runtime.serverless.handlers import lambda_handler as handler, prepare
    prepare()

``prepare`` opens the model and checks the machine while the sandbox starts: with a full CPU there (AWS Lambda's INIT
phase), and before a snapshot of it is taken. Without it the first request does.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from typing import Any

from qingyu.runtime.serverless.app import App, Settings
from qingyu.runtime.serverless.events import StartResponse, answer_event, answer_wsgi

__all__ = ["fc_handler", "lambda_handler", "prepare", "scf_handler"]

_APPS: list[App] = []
_LOCK = threading.Lock()


def _app() -> App:
    """The one app of this process, made from its environment when first needed."""
    with _LOCK:
        if not _APPS:
            _APPS.append(App(Settings.of(os.environ)))
        return _APPS[0]


def prepare() -> None:
    """Open the model now. What is wrong with it is logged, and answered at each request.

    Raises ``InvalidOptionError`` for an environment variable that is wrong.
    """
    _app().prepare()


def lambda_handler(event: object, context: object = None) -> dict[str, Any]:
    """AWS Lambda's HTTP answer to an event of a function URL, API Gateway or ALB."""
    return answer_event(_app(), event)


def scf_handler(event: object, context: object = None) -> dict[str, Any]:
    """Tencent SCF's HTTP answer ("integrated response") to an event of an API gateway or function URL trigger."""
    return answer_event(_app(), event)


def fc_handler(event: Any, context: Any = None) -> dict[str, Any] | Iterable[bytes]:  # noqa: ANN401 - two protocols
    """Alibaba FC's answer to an event of an HTTP trigger (FC 3.0: bytes of JSON), or to a WSGI call (FC 2.0)."""
    if isinstance(event, dict) and "REQUEST_METHOD" in event:
        start_response: StartResponse = context
        return answer_wsgi(_app(), event, start_response)
    return answer_event(_app(), _parsed(event))


def _parsed(event: object) -> object:
    if not isinstance(event, bytes | bytearray | str):
        return event
    try:
        return json.loads(event)
    except (ValueError, RecursionError):
        return None
