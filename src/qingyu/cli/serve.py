"""``qingyu serve``: models over HTTP."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from qingyu.cli.common import BUNDLED, add_running_arguments, new_command
from qingyu.errors import DataFileError, InvalidOptionError

__all__ = ["add", "run"]

EXAMPLE = """\
qingyu serve
qingyu serve --model bge=out/bge-int8 --model words=out/bert-base-chinese --port 8000
QINGYU_API_KEY=... qingyu serve --host 0.0.0.0"""

PACKAGES = ("uvicorn", "httptools", "orjson", "prometheus_client")
KEY = "QINGYU_API_KEY"


def add(commands: Any) -> None:  # noqa: ANN401 - argparse's private sub-parsers type
    """Add the command."""
    parser = new_command(commands, "serve", "serve models over HTTP (extra: serve)", EXAMPLE)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a model of any task and the name that clients call it by (without NAME=, the folder's own); may be "
        f"given several times; the first of a task is its default (default: {BUNDLED})",
    )
    where = parser.add_argument_group("where to listen")
    where.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    where.add_argument("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    where.add_argument(
        "--allowed-hosts",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names that requests may come by (their Host header), *.example.com for all below one, * for any "
        "(default: localhost on a loopback address, which is always allowed there; any on others)",
    )
    where.add_argument(
        "--unix-socket", metavar="PATH", help="listen there instead, for this user's processes only"
    )
    where.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"one key a line; clients send one as a bearer token. ${KEY} is one more key",
    )
    _add_opening(parser.add_argument_group("how models run"))
    _add_limits(parser.add_argument_group("limits"))
    parser.set_defaults(run=run)


def _add_opening(group: Any) -> None:  # noqa: ANN401 - argparse's private groups
    add_running_arguments(group)
    group.add_argument(
        "--special-tokens",
        choices=("parse", "text"),
        default="parse",
        help="whether a typed [MASK] is the special token, or plain text (embedding, predicting, reranking)",
    )


def _add_limits(group: Any) -> None:  # noqa: ANN401
    numbers: tuple[tuple[str, type, float, str, str], ...] = (
        ("--max-wait", float, 1.0, "S", "refuse a request when what waits would take longer"),
        ("--max-queue", int, 1024, "N", "requests that may wait"),
        ("--max-delay", float, 0.0, "S", "how long a text may wait for others while the machine is idle"),
        ("--max-inputs", int, 256, "N", "texts of one request"),
        ("--max-body", int, 2_000_000, "BYTES", "size of one request"),
        ("--max-connections", int, 1000, "N", "open connections"),
        ("--keep-alive", float, 75.0, "S", "how long an idle connection is kept"),
        ("--header-timeout", float, 10.0, "S", "until the headers of a request must have arrived"),
        ("--body-timeout", float, 30.0, "S", "until its body must have arrived, from then on"),
        ("--write-timeout", float, 30.0, "S", "how long a client may read nothing of its answer"),
        ("--grace", float, 30.0, "S", "time for answers under way when the server is told to end"),
    )
    for name, kind, default, unit, about in numbers:
        group.add_argument(
            name, type=kind, default=default, metavar=unit, help=f"{about} (default: %(default)s)"
        )


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; the log is JSON lines on standard error."""
    from qingyu.models.extras import require

    require("serve", *PACKAGES)
    from qingyu.runtime.serve.server import ServerSettings, serve
    from qingyu.runtime.serve.service import Configuration
    from qingyu.runtime.task import OpenOptions

    keys = _keys(options.api_key_file)
    _check(options)
    configuration = Configuration(
        models=_models(options.model or [BUNDLED]),
        options=OpenOptions(
            profile=options.profile,
            threads=options.threads,
            max_memory_mb=options.max_memory_mb,
            special_tokens=options.special_tokens,
            unicode_form="NFKC" if options.nfkc else None,
            script=options.script,
            engine=options.engine,
        ),
        max_wait=options.max_wait,
        max_queue=options.max_queue,
        max_delay=options.max_delay,
        max_inputs=options.max_inputs,
        max_body=options.max_body,
        keyed=bool(keys),
    )
    settings = ServerSettings(
        host=options.host,
        port=options.port,
        unix_socket=options.unix_socket,
        allowed_hosts=options.allowed_hosts,
        keys=keys,
        grace=options.grace,
        keep_alive=options.keep_alive,
        header_timeout=options.header_timeout,
        body_timeout=options.body_timeout,
        write_timeout=options.write_timeout,
        max_connections=options.max_connections,
    )
    return serve(configuration, settings)


def _models(given: list[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for one in given:
        name, separator, folder = one.partition("=")
        if not separator:
            name, folder = Path(one).name, one
        if not name or not folder or name in models:
            raise InvalidOptionError(
                "--model",
                expected="NAME=FOLDER, each name once",
                found=repr(one),
                remedy="Give every model a name of its own.",
            )
        models[name] = folder
    return models


def _keys(path: str | None) -> list[str]:
    keys = [os.environ[KEY]] if os.environ.get(KEY) else []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataFileError(
                f"{path} cannot be read",
                expected="a file with one API key a line",
                found=str(error),
                remedy="Name another file.",
            ) from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            # Serving without keys where some were meant would be worse than not serving.
            raise DataFileError(
                f"{path} has no keys", expected="one API key a line", found="none", remedy="Write one."
            )
        keys += found
    return keys


def _check(options: argparse.Namespace) -> None:
    """Refuse limits that nothing could pass."""
    least = {
        "max_wait": 0.0,
        "max_queue": 1,
        "max_delay": 0.0,
        "max_inputs": 1,
        "max_body": 1,
        "max_connections": 1,
        "keep_alive": 0.0,
        "header_timeout": 0.01,
        "body_timeout": 0.01,
        "write_timeout": 0.01,
        "grace": 0.0,
        "port": 0,
    }
    for name, smallest in least.items():
        value = getattr(options, name)
        if not smallest <= value < float("inf"):
            raise InvalidOptionError(
                "--" + name.replace("_", "-"),
                expected=f"at least {smallest:g}",
                found=str(value),
                remedy="Raise it.",
            )
