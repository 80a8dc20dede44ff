"""A web server for one person on one machine: a token, no foreign origins, nothing beyond loopback.

`Guard` wraps any ASGI application. Opening the printed URL trades its token for an HttpOnly, SameSite cookie;
everything else needs that cookie. A page of another site cannot talk to it (Origin), nor can a name that was
rebound to this address (Host). Shared by `daif view` and `daif session`.
"""

from __future__ import annotations

import http.cookies
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capture.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; frame-src 'self'; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


class Guard:
    """ASGI middleware: 401 without the token, 403 for a foreign Origin or Host.

    Args:
        app: the application behind it.
        token: the secret in the printed URL.
        hosts: host names that the server may be addressed by.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: tuple[str, ...] = LOOPBACK) -> None:
        self.app = app
        self.token = token
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        if host.rsplit(":", 1)[0] not in self.hosts or (origin is not None and _place(origin) != host):
            await _refuse(scope, receive, send, 403, "this page may not talk to daif")
            return
        cookie_name = f"daif-{host.rsplit(':', 1)[-1]}"
        if scope["type"] == "http" and self._matches(_query_token(scope)):
            response = RedirectResponse(scope["path"], status_code=303)
            response.set_cookie(cookie_name, self.token, httponly=True, samesite="strict")
            await response(scope, receive, send)
            return
        cookies = http.cookies.SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except http.cookies.CookieError:
            cookies.clear()
        if not self._matches(cookies[cookie_name].value if cookie_name in cookies else ""):
            await _refuse(
                scope, receive, send, 401, "open the address that daif printed; it holds the key to this page"
            )
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "no-referrer"
                out["Cache-Control"] = "no-store"
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _matches(self, offered: str) -> bool:
        return secrets.compare_digest(offered.encode("utf-8", "replace"), self.token.encode())


def _place(origin: str) -> str | None:
    """Host and port of an Origin, None if it is not one."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _query_token(scope: Scope) -> str:
    return parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket" and "websocket.http.response" in scope.get("extensions", {}):
        await receive()  # the handshake, which this answers
        await send({"type": "websocket.http.response.start", "status": status, "headers": []})
        await send({"type": "websocket.http.response.body", "body": text.encode()})
        return
    await PlainTextResponse(text, status_code=status)(scope, receive, send)


def file_below(root: Path, relative: str) -> Path | None:
    """The file `relative` inside `root`, or None if it does not exist or lies outside (`..`, links)."""
    try:
        path = (root / relative).resolve()
        return path if path.is_relative_to(root.resolve()) and path.is_file() else None
    except (OSError, ValueError):  # a name longer than names can be, a NUL in it
        return None


def not_found(what: str = "there is no such file") -> Response:
    """A 404 in plain words."""
    return PlainTextResponse(what, status_code=404)


def serve(app: ASGIApp, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve `app` behind a `Guard` until interrupted; `ready` gets the URL with its token once it listens.

    Raises UsageError if the address cannot be bound.
    """
    import uvicorn

    if not host.strip():
        raise UsageError(f"--host is {host!r}, which would listen to everybody; leave it out for this machine alone")
    if not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}; it must be 0 to 65535, where 0 picks a free one")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # before the URL is out: whoever opens it early waits instead of being refused
    except (OSError, UnicodeError) as error:  # the second: a host name that cannot be one
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None
    token = secrets.token_urlsafe(24)
    hosts = LOOPBACK if host == "127.0.0.1" else (*LOOPBACK, host, socket.gethostname())
    ready(f"http://{host}:{listener.getsockname()[1]}/?token={token}")
    config = uvicorn.Config(
        Guard(app, token, hosts), log_level="warning", ws_max_size=1 << 16, server_header=False, lifespan="on"
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
