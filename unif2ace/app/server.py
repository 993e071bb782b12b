"""Serves the page on this machine alone: no link to share, no telemetry, and no browser may fetch from elsewhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from unif2ace.app.actions import Studio
from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.safety.checker import SafetyChecker

# What the page may load and whom it may talk to: itself. gradio's own script needs inline code, and workers from blobs.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'"
)


class HomeOnly:
    """ASGI middleware that sends `POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def serve(
    checkpoint: Checkpoint,
    host: str = "127.0.0.1",
    port: int = 7860,
    checker: SafetyChecker | None = None,
    marked: bool = True,
    wait: bool = True,
) -> Any:
    """Show the page until Ctrl-C; without `wait` at once give gradio's Blocks, whose `close()` ends it.

    Pictures lie in a folder of their own that goes with the server.

    Raises:
        UserError: the port is taken.
    """
    # Read by gradio when it is imported
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1"}
    folder = tempfile.TemporaryDirectory(prefix="unif2ace-app-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    from starlette.middleware import Middleware

    from unif2ace.app.page import CSS, THEME, page

    blocks = page(Studio(checkpoint, Path(folder.name), checker, marked))
    blocks.pictures = folder  # lives as long as they do
    try:
        blocks.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, footer_links=[], theme=THEME, css=CSS, enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(HomeOnly)]}, max_file_size="32mb",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}; choose another --port") from error
    print(f"http://{host}:{port} (Ctrl-C stops it)", flush=True)
    if wait:
        try:
            blocks.block_thread()
        finally:
            blocks.close()
            folder.cleanup()
    return blocks
