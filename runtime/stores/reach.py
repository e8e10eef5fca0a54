"""Whether a server can be reached, asked before its client is, which may try for minutes."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from qingyu.errors import StoreError

__all__ = ["check_reachable", "is_server", "unreachable"]


def is_server(address: str) -> bool:
    """Whether an address is that of a server, and not a path."""
    return address.startswith(("http://", "https://"))


def check_reachable(address: str, place: str, timeout: float) -> None:
    """Raise ``StoreError`` unless something listens at http(s)://HOST[:PORT], within so many seconds."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=timeout).close()
    except (OSError, ValueError) as error:
        raise unreachable(place, str(error)) from None


def unreachable(place: str, found: str) -> StoreError:
    """The error for a store that does not answer, or answers with an error of its own."""
    return StoreError(
        f"{place} cannot be used",
        expected="a server, or a file of its own, that answers",
        found=found,
        remedy="Check the address, and whether it runs.",
    )
