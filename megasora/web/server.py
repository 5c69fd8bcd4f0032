"""Serves the page on this machine only, without any request to another one."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.errors import MegaSoraError
from megasora.web.studio import Studio

if TYPE_CHECKING:
    from types import ModuleType

HOST = "127.0.0.1"
MAX_UPLOAD = "4gb"
OFFLINE = {  # read by Gradio and huggingface_hub when they are imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# The browser loads nothing from elsewhere, whatever a page asks for; no other page may embed this one.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


class ContentPolicy:
    """ASGI middleware: adds the header Content-Security-Policy to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def send_with_header(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", CONTENT_POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_header if scope["type"] == "http" else send)


def import_gradio() -> ModuleType:
    """Raises MegaSoraError if it is not installed."""
    os.environ.update(OFFLINE)
    try:
        import gradio
    except ImportError as error:
        raise MegaSoraError(f"megasora web needs gradio ({error}): pip install megasora[web]") from None
    return gradio


@contextmanager
def served(studio: Studio, port: int) -> Iterator[str]:
    """Serves the page while the block runs; yields its address. `port`: 0 is any free one. Raises MegaSoraError."""
    port = free_port(port)
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it has started
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    with tempfile.TemporaryDirectory(prefix="megasora-web-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        gradio = import_gradio()
        from starlette.middleware import Middleware

        from megasora.web.page import CSS, build_page, build_theme

        page = build_page(gradio, studio)
        page.queue(default_concurrency_limit=1, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
                run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
                allowed_paths=[str(studio.out)], max_file_size=MAX_UPLOAD, theme=build_theme(gradio), css=CSS,
                app_kwargs={"middleware": [Middleware(ContentPolicy)]},
            )  # fmt: skip
            yield address
        finally:
            page.close(verbose=False)


def free_port(port: int) -> int:
    """`port` itself, or for 0 one that is free. Raises MegaSoraError for a port that cannot be opened."""
    if not 0 <= port < 1 << 16:
        raise MegaSoraError(f"--port {port} must be from 0, any free one, to 65535")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise MegaSoraError(
                f"--port {port} cannot be opened on {HOST} ({error.strerror}); choose another one, or 0 for any"
            ) from None
        return probe.getsockname()[1]


def serve(run: Path, out: Path | None, port: int, weights: str) -> None:
    """Serves the page until Ctrl-C. Raises MegaSoraError."""
    import_gradio()
    free_port(port)
    studio = Studio.open(run, out, weights)
    with served(studio, port) as address:
        print(f"{address}  ({studio.name}; clips go to {studio.out}; Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
