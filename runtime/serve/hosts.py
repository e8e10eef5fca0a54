"""Which names a server answers to: a web page of elsewhere must not reach one on the visitor's own machine.

A page at evil.example can have its name resolve to 127.0.0.1 once it was loaded (DNS rebinding). The browser then takes
the local server for evil.example's own and lets the page read its answers; all that tells is the ``Host`` header.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

__all__ = ["Hosts"]

ANY = "*"
# A name or an address, IPv6 in brackets, and perhaps a port.
FORM = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]\s/@]+)(:\d*)?")


class Hosts:
    """The hosts that requests may name; ``None`` for any.

    ``*.example.com`` is every name below example.com, and ``*`` any. ``local`` adds localhost, the names below it, and
    loopback addresses: none of them can be made to resolve by somebody else.
    """

    def __init__(self, names: Iterable[str] | None, *, local: bool = False) -> None:
        self._names = None if names is None else {_plain(name) for name in names}
        self._local = local

    @classmethod
    def of(cls, bound: str, given: Iterable[str] | None) -> Hosts:
        """What a server bound to the address ``bound`` answers to, where ``given`` names were allowed.

        On a loopback address: local names and the given ones. Elsewhere what was given, or any: whoever probes its
        health does so by addresses that nobody knows beforehand, and who reaches it needs no rebinding.
        """
        if _is_loopback(bound):
            return cls(given or (), local=True)
        return cls(given or None)

    def admit(self, header: bytes | None) -> bool:
        """Whether a ``Host`` header names one of them. Browsers always send one, so none is nobody's attack."""
        if self._names is None or ANY in self._names or header is None:
            return True
        found = FORM.fullmatch(header.decode("latin-1"))
        if found is None:
            return False
        host = _plain(found[1])
        if self._local and (host == "localhost" or host.endswith(".localhost") or _is_loopback(host)):
            return True
        return host in self._names or any(
            host.endswith(name[1:]) for name in self._names if name.startswith("*.")
        )


def _plain(host: str) -> str:
    """As it is compared: without brackets, the root's dot, or capitals."""
    return host.strip("[]").rstrip(".").lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
