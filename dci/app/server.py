"""Serves the page, on this machine alone by default; no telemetry, no network access."""

import atexit
import errno
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path

from dci.app.settings import Settings
from dci.app.walls import Bounds, Walls
from ldm.errors import UserError

LOCAL = ("127.0.0.1", "localhost", "[::1]")
QUEUE = 12
"""Presses of Draw and of Compare that may wait; further ones get the message that the queue is full."""


def serve(settings: Settings, bounds: Bounds = Bounds()) -> None:  # noqa: B008
    """Serve the page until the program is interrupted.

    Raises:
        UserError: the port is taken, or the host cannot be bound to.
    """
    uploads = Path(tempfile.mkdtemp(prefix="dci-app-"))
    atexit.register(shutil.rmtree, uploads, ignore_errors=True)
    _quiet(uploads)
    from dci.app.page import Page  # with Gradio, the extra that may be missing

    from starlette.middleware import Middleware  # isort: skip

    page = Page(settings, uploads)
    hosts = LOCAL if settings.host in LOCAL else ()
    walls = Middleware(Walls, uploads=uploads, hosts=hosts, bounds=bounds)
    try:
        page.blocks.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=1).launch(
            server_name=settings.host,
            server_port=settings.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=True,
            footer_links=[],
            run_history=False,
            max_file_size=bounds.file,
            state_session_capacity=64,
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [walls]},
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            **page.look,
        )
    except OSError as error:  # taken since it was checked
        raise UserError(f"cannot serve on {settings.host}:{settings.port} ({error}): give another --port") from error
    print(f"Open http://{settings.host}:{settings.port} in a browser; Ctrl+C ends the page", flush=True)
    _wait(page)


def check_address(host: str, port: int) -> None:
    """Raise UserError for an address that this machine does not have, and for a port that is taken."""
    try:
        kind, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            trial.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: it is in use on {host}: give another") from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port}: this user may not serve there: give one from 1024 on") from error
        raise UserError(f"--host {host}: not an address of this machine: give 127.0.0.1, or 0.0.0.0 for all") from error


def _quiet(uploads: Path) -> None:
    """Set what Gradio reads when it is imported: where uploads go; and turn telemetry off."""
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("GRADIO_SHARE", "GRADIO_MCP_SERVER", "GRADIO_ALLOWED_PATHS", "GRADIO_SSR_MODE", "GRADIO_VIBE_MODE"):
        os.environ.pop(name, None)


def _wait(page) -> None:
    """Wait for an interrupt; then let a training write its checkpoint."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        signal.pause() if hasattr(signal, "pause") else page.blocks.block_thread()
    except KeyboardInterrupt:
        print("Ending; a training that is running writes a checkpoint first", flush=True)
    finally:
        page.close()
