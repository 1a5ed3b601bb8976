"""Access control: API keys, names of this server, web pages. Checked before anything of a body is read.

A page in a browser on the same machine can post to a server on loopback, and a name that its owner points at 127.0.0.1
makes it that page's own server (DNS rebinding). So a foreign Origin is refused, and so is a foreign Host.
"""

import functools
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Scope

from workers.context import context_of
from workers.generation.slots import OWNER
from workers.settings import Settings
from workers.web.replies import CLOSE

Endpoint = Callable[..., Any]
NOT_IN_A_HOST = "/?#@\\ \t"  # urlsplit would take what stands before them for the name
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="model"', **CLOSE}  # its body may still come
FOREIGN_HOST = "Host header not allowed; use one of this server's names or add it to ALLOWED_HOSTS"
FOREIGN_ORIGIN = "web pages of this origin are not allowed; the server's owner can add it to CORS_ORIGINS"
NO_KEY = "send a key of this server: Authorization: Bearer KEY, or x-api-key: KEY"
CACHED_BYTES = 512  # longer names are not kept


def public(endpoint: Endpoint) -> Endpoint:
    """Mark an endpoint as open to everybody, whatever the settings: a probe has no key and names any address."""
    endpoint.is_public = True  # type: ignore[attr-defined]
    return endpoint


class AccessControl:
    """Decides which requests are allowed: by key, Host and Origin."""

    def __init__(self, settings: Settings, routes: Iterable[BaseRoute] = ()) -> None:
        self.keys = [hashlib.sha256(key.encode()).digest() for key in words(settings.API_KEY)]
        self.hosts = words(settings.ALLOWED_HOSTS.lower())
        self.origins = words(settings.CORS_ORIGINS)
        self.cached_foreign = functools.lru_cache(maxsize=1024)(self.foreign)  # few clients, the same names
        known = [route for route in routes if isinstance(route, Route)]
        locked = [route for route in known if not getattr(route.endpoint, "is_public", False)]
        self.open_paths = {route.path for route in known} - {route.path for route in locked}
        self.public = {
            (method, route.path) for route in known if route not in locked for method in route.methods or ()
        }

    def __call__(self, scope: Scope) -> HTTPException | None:
        """Return why the request is not allowed: 403 with a foreign Host or Origin, 401 without a key; None if it is."""
        context, server = context_of(scope), scope.get("server")
        host, origin = context.headers.get(b"host"), context.headers.get(b"origin")
        is_short = len(host or b"") + len(origin or b"") <= CACHED_BYTES
        foreign = self.cached_foreign if is_short else self.foreign
        sentence = foreign(host, origin, server[0] if server else None)
        if not sentence and not self.keys:
            return None
        if context.path in self.open_paths or (scope["method"], context.path) in self.public:
            return None
        if sentence:
            return HTTPException(403, sentence, CLOSE)
        return None if self.knows(context.headers) else HTTPException(401, NO_KEY, CHALLENGE)

    def knows(self, fields: dict[bytes, bytes]) -> bool:
        """Return whether one of the keys is there. Takes as long for a key that is nearly right as for any other."""
        scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
        given = [fields.get(b"x-api-key", b""), token.strip() if scheme.lower() == b"bearer" else b""]
        digests = [hashlib.sha256(one).digest() for one in given if one]
        known = [digest for digest in digests for key in self.keys if hmac.compare_digest(digest, key)]
        # No text begins in what another key's left in the KV cache.
        OWNER.set(known[0].hex() if known else "")
        return bool(known)

    def foreign(self, host: bytes | None, origin: bytes | None, address: str | None) -> str:
        """Return the sentence for a foreign Host or Origin; empty if both are allowed. A request without Host is not a browser's."""
        name = host.decode("latin-1").lower() if host else ""
        if name and not self.is_ours(name, address):
            return FOREIGN_HOST
        if origin is None or "*" in self.origins or (said := origin.decode("latin-1")) in self.origins:
            return ""
        return "" if name and said.lower().partition("://")[2] == name else FOREIGN_ORIGIN

    def is_ours(self, host: str, address: str | None) -> bool:
        """Return whether this is a name of this server: an allowed one; by default any, but on loopback only loopback's own."""
        if any(sign in host for sign in NOT_IN_A_HOST):
            return False
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if self.hosts:
            return any(is_like(name, pattern) for pattern in self.hosts)
        return not is_loopback(address or "") or is_loopback(name)


def words(listed: str) -> list[str]:
    """Return what stands between the commas."""
    return [word.strip() for word in listed.split(",") if word.strip()]


def is_like(name: str, pattern: str) -> bool:
    """Return whether it is this name; "*" is any, "*.example.com" any below example.com."""
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def is_loopback(address: str) -> bool:
    """Return whether it is an address or a name of this machine for itself."""
    if address.rstrip(".").lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def with_cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Return the app, with CORS for the pages in CORS_ORIGINS. Any header may be sent: origin and key decide."""
    if not (origins := words(settings.CORS_ORIGINS)):
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_private_network=True,  # a page of these origins may reach a server on its own machine
        expose_headers=["Retry-After", "Server-Timing", "X-Request-ID"],
    )
