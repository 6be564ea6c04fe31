"""What stands between the network and the application: which requests are answered at all, and with which headers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HEADERS", "Guard", "host_of", "is_loopback"]

# only the page's own files may run or be loaded, nobody may frame it, and nothing of it is kept
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]*)?", re.IGNORECASE | re.ASCII)


def host_of(header: str) -> str | None:
    """The host in a Host header, lower case and without its port; None where it is malformed.

    Example:
        >>> host_of("LocalHost:8765"), host_of("[::1]:80"), host_of("a b")
        ('localhost', '::1', None)
    """
    found = HOST.fullmatch(header)
    return None if found is None else (found[1] or found[2]).lower().removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Guard:
    """Refuses requests that a page of ours cannot have sent, before the application sees them.

    A stranger's web page can reach a server on this machine in two ways. It can have its own name resolve to
    127.0.0.1 (DNS rebinding): a Host that is neither an address, nor localhost, nor among ``names`` is refused. And
    it can send requests whose answers it cannot read: an Origin that is not the Host is refused.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] = ()) -> None:
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        hosts = headers.getlist("host")
        host = host_of(hosts[0]) if len(hosts) == 1 else None
        if host is None or not (host in self.names or _is_address(host)):
            return JSONResponse({"error": "this host name is not served here; use localhost or an address"}, 421)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            return JSONResponse({"error": "requests from other sites are refused"}, 403)
        return None
