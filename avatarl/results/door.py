"""Who may ask the page what: its own scripts, under an address that is this machine's.

gradio serves more than the page uses, to whoever names it in whatever way. A page of somebody else's in the same
browser could send files and prompts, and one whose name is made to point here (DNS rebinding) could read the answers.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

LARGEST_BODY_BYTES = 1 << 22
WRITTEN = {f"/gradio_api/{name}" for name in ("queue/join", "cancel", "reset")}


class Door:
    """ASGI middleware before an app that is served on ``host``."""

    def __init__(self, app: Any, host: str):
        self.app, self.names = app, {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no sockets
            return
        refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
        body, more = b"", scope["method"] == "POST" and refusal is None
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > LARGEST_BODY_BYTES:
                refusal, more = (413, f"more than {LARGEST_BODY_BYTES:,} bytes"), False
        if refusal is not None:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)
            return
        bodies = [{"type": "http.request", "body": body, "more_body": False}] if scope["method"] == "POST" else []

        async def receive_again() -> dict:
            return bodies.pop() if bodies else await receive()

        await self.app(scope, receive_again, send)

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason where a request is none of the page's."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self._is_ours(host):
            return 403, "this page is served under this machine's own names and addresses only"
        if origin is not None and origin.lower().partition("://")[2] != host:
            return 403, "this page answers its own requests only"
        if method not in ("GET", "HEAD") and (method != "POST" or path.rstrip("/") not in WRITTEN):
            return 404, "this page takes nothing of the kind"
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header is an address, which no other page can be under, or a name of this machine."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
