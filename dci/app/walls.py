"""What the page's server answers: requests to its own few addresses, files of the upload folder, uploads within bounds.

Gradio checks paths by itself. These walls stand before it, and know less: what is not named here is not there.
"""

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MB = 2**20
_PAGE = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/[^/].*"
    r"|/gradio_api/(info|app_id|startup-events|queue/join|queue/data|run/predict|cancel|reset|upload_progress|theme\.css)/?"
    r"|/gradio_api/heartbeat/\w+"
)
"""Addresses that a browser asks for while it shows the page."""

_UPLOAD = re.compile(r"/gradio_api/upload/?")
_FILE = re.compile(r"/gradio_api/file=(.*)", re.DOTALL)

HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; connect-src 'self'; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
        b"frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
"""Sent with every answer: a browser then fetches nothing from elsewhere, whatever the page may say."""

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Bounds:
    """How much may be uploaded."""

    request: int = 512 * MB  # bytes at once
    file: int = 256 * MB  # bytes of a file; Gradio enforces it
    folder: int = 2048 * MB  # bytes of all files that lie there
    files: int = 400  # that lie there


class Walls:
    """ASGI middleware around Gradio's application.

    Args:
        uploads: the folder that uploads are written to, and the only one that files are served from.
        hosts: names under which the server may be asked for (against DNS rebinding); empty: any.
    """

    def __init__(self, app: Callable, uploads: Path, hosts: tuple[str, ...] = (), bounds: Bounds = Bounds()):  # noqa: B008
        self.app, self.uploads, self.hosts, self.bounds = app, uploads.resolve(), hosts, bounds

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused is not None:
            await _answer(send, *refused)
            return
        if _UPLOAD.fullmatch(scope["path"]):
            receive = self._bounded(receive)

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Status and words for a request that is not passed on."""
        path, headers = scope["path"], dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self.hosts and host not in self.hosts:
            return 403, f"this page is not served as '{host}': give --host to serve it under other names"
        if found := _FILE.fullmatch(path):
            return None if self._is_upload(found[1]) else (403, "only uploaded files can be read")
        if _UPLOAD.fullmatch(path):
            return self._no_room(headers)
        return None if _PAGE.fullmatch(path) and ".." not in path.split("/") else (404, "there is no such address")

    def _is_upload(self, name: str) -> bool:
        """Whether a path leads to a file of the upload folder once everything in it is resolved."""
        try:
            found = Path(unquote(name)).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        return found.is_file() and found.is_relative_to(self.uploads)

    def _no_room(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "an upload must say its length"
        if int(length) > self.bounds.request:
            return 413, f"the upload is larger than {self.bounds.request // MB} MB"
        files, size = contents(self.uploads)
        if files >= self.bounds.files or size + int(length) > self.bounds.folder:
            return 413, "too much has been uploaded: restart the page's server, which empties its upload folder"
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes that arrive: a header may claim fewer."""
        read = 0

        async def counted() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= self.bounds.request else {"type": "http.disconnect"}

        return counted


def contents(folder: Path) -> tuple[int, int]:
    """Return the number of files below a folder, and their bytes; links are not followed."""
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(Path(place) / name).st_size
            except OSError:  # deleted meanwhile
                continue
            files += 1
    return files, size


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
