"""`unif2ace build-dataset` and `unif2ace serve-language`."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unif2ace.errors import UserError

_SPARE = 1.2  # of 230 pictures 208 became samples: a caption that is wrong three times is quarantined
# What synthetic faces and a model of 135 M parameters without eyes need; every key can be given another value.
_SYNTHETIC: dict[str, Any] = {
    "out": "runs/synthetic-set",
    "faces": {"side": 40, "blur": 1.0, "same": 0.9},
    "attributes": {"sources": ["measured"]},
    "captions": {"facts": 4, "least_facts": 2, "longest": 80},
    "questions": {"prompt": "question-lines", "facts": 1, "count": 2, "apart": True, "unsupported": False},
    "card": {
        "name": "synthetic-faces",
        "license": "other",
        "consent": "no person is in the pictures: a generator made them",
        "source": "the generator random-face (MobileStyleGAN), trained by the looks of it on FFHQ (CC BY-NC-SA 4.0)",
        "contact": "whoever gives this set to others, who puts their address here",
    },
}
_PACKAGED: dict[str, Any] = {
    "temperature": 0.3,
    "top_p": 0.9,
    "max_tokens": 48,
    "timeout": 600.0,
    "answers": 6,
    "mend": False,
}


def add_build_dataset(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unif2ace build-dataset`."""
    parser.add_argument("config", type=Path, nargs="?", help="YAML file; every key of it can be given as --a.b=c")
    parser.add_argument(
        "--synthetic", type=int, default=0, metavar="N",
        help="about N synthetic faces, from a fifth more, by the packaged language model: no service, no config",
    )  # fmt: skip
    parser.set_defaults(run=_build, takes_overrides=True)


def add_serve_language(parser: argparse.ArgumentParser) -> None:
    """Arguments of `unif2ace serve-language`."""
    parser.add_argument(
        "model", nargs="?", help="folder of a model of transformers (default: the packaged SmolLM2-135M)"
    )
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default: 8000)")
    parser.add_argument("--batch", type=int, default=16, help="texts written at once (default: 16)")
    parser.set_defaults(run=_serve)


def _build(parsed: argparse.Namespace) -> None:
    from unif2ace.curation.build import build
    from unif2ace.curation.config import BuildConfig
    from unif2ace.settings import merged, parse, read_settings

    values = read_settings(parsed.config, parsed.overrides)
    with contextlib.ExitStack() as stack:
        if parsed.synthetic:
            values = merged(_SYNTHETIC, values)
            images = values.setdefault("images", {})
            images.setdefault("limit" if "faces" in images else "synthetic", math.ceil(_SPARE * parsed.synthetic))
            if "captioner" not in values or "url" not in values["captioner"]:
                values["captioner"] = {**stack.enter_context(_packaged()), **values.get("captioner", {})}
        report = build(parse(BuildConfig, values, ""))
    for name, before, after in report["stages"]:
        print(f"{name}: {after} of {before}")
    print(f"{report['pairs']} questions with answers; {values['out']}/README.md has the rest")


@contextlib.contextmanager
def _packaged() -> Iterator[dict[str, Any]]:
    """What reaches the packaged language model, which is served meanwhile."""
    from unif2ace.endpoint.language import PACKAGED, Language
    from unif2ace.endpoint.serving import LanguageServer

    with LanguageServer(Language()) as server:
        # two batches under way: one that is written, one that waits
        where = {"url": server.url, "model": PACKAGED, "known_as": PACKAGED, "concurrency": 2 * server.batch}
        try:
            yield {**_PACKAGED, **where}
        finally:
            told = server.written
            rate = told["tokens"] / max(told["seconds"], 1e-9)
            print(
                f"{PACKAGED}: {told['texts']} texts, {told['read']} tokens read, {told['tokens']} written in "
                f"{told['seconds']:.0f} s: {rate:.1f} tokens a second",
                file=sys.stderr,
            )


def _serve(parsed: argparse.Namespace) -> None:
    from unif2ace.endpoint.language import PACKAGED, Language
    from unif2ace.endpoint.serving import LanguageServer

    if parsed.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {parsed.batch}")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with LanguageServer(Language(parsed.model or PACKAGED), parsed.port, parsed.batch) as server:
        print(f"{server.language.name} at {server.url}; Ctrl-C ends it", flush=True)
        stop.wait()
