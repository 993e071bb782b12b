"""Serves the page: by default to this machine alone, no link to share, no telemetry, nothing fetched from elsewhere."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
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


class Server:
    """The page at `url`, until `close`; its pictures lie in a folder of their own, which goes with it.

    Raises:
        UserError: the port is taken.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        host: str = "127.0.0.1",
        port: int = 7860,
        checker: SafetyChecker | None = None,
        marked: bool = True,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="unif2ace-app-")
        # Read by gradio when it is imported, the last one whenever it writes
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", DISABLE_TELEMETRY="1")
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name
        from starlette.middleware import Middleware

        from unif2ace.app.page import CSS, THEME, page

        self._blocks = page(Studio(checkpoint, Path(self._folder.name), checker, marked))
        try:
            self._blocks.launch(
                server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
                ssr_mode=False, footer_links=[], theme=THEME, css=CSS, enable_monitoring=False,
                app_kwargs={"middleware": [Middleware(HomeOnly)]}, max_file_size="32mb",
            )  # fmt: skip
        except OSError as error:
            self._folder.cleanup()
            raise UserError(f"cannot listen at {host}:{port} ({error}): choose another --port") from error
        self.url = f"http://{host}:{port}"

    def wait(self) -> None:
        """Until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()

    def close(self) -> None:
        """Stop, and delete the pictures."""
        self._blocks.close(verbose=False)
        self._folder.cleanup()
