"""Which addresses a webhook may call: hosts that the operator names, and public ones only.

A name is resolved once, every address that it has is checked, and the call goes to one of the
addresses that were checked: a name that resolves to something else a moment later (DNS rebinding)
gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urlsplit

from engine.errors import InvalidRequestError
from server.errors import ForbiddenError, ServerError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_URL_CHARS = 2000
_ENTRY = re.compile(r"(?P<host>(\*\.)?[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)(:(?P<port>\d{1,5}))?")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class ForbiddenAddressError(ServerError):
    """The name resolves to an address that a webhook must not call."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL whose host is allowed."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == {"https": 443, "http": 80}[self.scheme]
        return host if usual else f"{host}:{self.port}"

    def url_at(self, address: str) -> str:
        """The URL with the host replaced by an address."""
        literal = f"[{address}]" if ":" in address else address
        return f"{self.scheme}://{literal}:{self.port}{self.path}"


class AllowedHosts:
    """The operator's list.

    Args:
        entries: ``hooks.example.com``, ``*.example.com`` (every name below it), either with
            ``:port`` (else the usual ones only), and addresses or networks, as ``10.1.2.0/24``.
            Only those make private addresses allowed, also for names that resolve into them.

    Raises:
        InvalidRequestError: an entry of another form.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._names: list[tuple[str, int | None]] = []
        self._networks: list[Network] = []
        for entry in entries:
            self._add(entry.strip().lower())

    def check(self, url: str) -> Target:
        """A client's URL.

        Raises:
            InvalidRequestError: no URL that can be called.
            ForbiddenError: a host or port that is not on the list.
        """
        target = _parse(url)
        address = _address(target.host)
        if address is not None:
            if not any(address in network for network in self._networks):
                raise _forbidden()
        elif not any(_matches(target, host, port) for host, port in self._names):
            raise _forbidden()
        return target

    async def resolve(self, target: Target, resolve: Resolve | None = None) -> str:
        """An address to call for ``target``.

        Raises:
            ForbiddenAddressError: any of its addresses is private, and on no list.
            OSError: the name does not resolve.
        """
        found = await (resolve or _resolve)(target.host, target.port)
        for text in found:
            if not self._may_call(ipaddress.ip_address(text)):
                raise ForbiddenAddressError("the webhook's host has an address that is not public")
        if not found:
            raise OSError("the webhook's host has no address")
        return found[0]

    def _may_call(self, address: Address) -> bool:
        listed = any(address in network for network in self._networks)
        return listed or all(_is_public(item) for item in _meanings(address))

    def _add(self, entry: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(entry, strict=False))
            return
        except ValueError:
            found = _ENTRY.fullmatch(entry)
        if found is None:
            raise InvalidRequestError(
                f"jobs.webhook_hosts: {entry!r} is neither a host nor an address",
                field="jobs.webhook_hosts",
            )
        port = found["port"]
        self._names.append((found["host"], None if port is None else int(port)))


def _parse(url: str) -> Target:
    wrong = InvalidRequestError(
        "webhook.url must be an https:// or http:// address without credentials or fragment",
        field="webhook.url",
    )
    if len(url) > MAX_URL_CHARS or not url.isascii() or re.search(r"[\s\\\x00-\x1f\x7f]", url):
        raise wrong
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise wrong from None
    host = (parts.hostname or "").rstrip(".").lower()
    if parts.scheme not in ("https", "http") or not host or "@" in parts.netloc or parts.fragment:
        raise wrong
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    usual = 443 if parts.scheme == "https" else 80
    return Target(parts.scheme, host, usual if port is None else port, path)


def _matches(target: Target, host: str, port: int | None) -> bool:
    if port is None and target.port not in (80, 443):
        return False
    if port is not None and target.port != port:
        return False
    if host.startswith("*."):
        return target.host.endswith(host[1:])
    return target.host == host


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _meanings(address: Address) -> list[Address]:
    """The address, and the IPv4 ones that it carries: tunnels and translators lead there."""
    carried: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            carried = [address.ipv4_mapped]
        if address.sixtofour is not None:
            carried.append(address.sixtofour)
        if address.teredo is not None:
            carried += address.teredo
        if address in _NAT64:
            carried.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return carried


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]).partition("%")[0] for item in found))


def _forbidden() -> ForbiddenError:
    return ForbiddenError(
        "the host of webhook.url is not among those that this server may call; its operator"
        " lists them in jobs.webhook_hosts",
        field="webhook.url",
    )
