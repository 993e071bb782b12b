"""The `unif2ace` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from unif2ace.cli.answering import add_ask, add_caption, add_chat
from unif2ace.cli.building import add_build_dataset, add_serve_language
from unif2ace.cli.evaluating import add_ablate, add_evaluate
from unif2ace.cli.importing import add_import
from unif2ace.cli.painting import add_generate, add_inpaint
from unif2ace.cli.reporting import add_report
from unif2ace.cli.responsible import add_card, add_demo_app, add_watermark
from unif2ace.errors import UserError

EXTRAS = {  # of a package; else demo
    "gradio": "app",
    "starlette": "app",
    "onnxruntime": "faces",
    "open_clip": "clip",
    "jsonschema": "dataset",
    "httpx": "dataset",
    "gguf": "language",
    "accelerate": "language",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 with one line on stderr when the user can mend it, 130 on Ctrl-C."""
    parser = _parser()
    parsed, overrides = parser.parse_known_args(arguments)
    parsed.overrides = overrides
    if parsed.overrides and not getattr(parsed, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(parsed.overrides)}")
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"unif2ace: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "unif2ace":
            raise
        extra = EXTRAS.get(package, "demo")
        print(f"unif2ace: {package} is not installed: pip install 'unif2ace[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nunif2ace: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unif2ace", description="Describe faces, answer questions, paint from text.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make faces, train on them, paint, answer, report; minutes on two cores")
    demo.add_argument("--small", action="store_true", help="the same path in about a minute, too short to learn much")
    demo.add_argument("--out", type=Path, help="folder of the run (default: runs/demo or runs/demo-small)")
    demo.set_defaults(run=_demo)

    add_generate(commands.add_parser("generate", help="paint faces from text"))
    add_inpaint(commands.add_parser("inpaint", help="paint a part of a face anew"))
    add_ask(commands.add_parser("ask", help="ask about the face in a picture"))
    add_caption(commands.add_parser("caption", help="describe the face in a picture"))
    add_chat(commands.add_parser("chat", help="ask one question after another about a face"))
    add_demo_app(commands.add_parser("demo-app", help="all of that on a page in your browser, on this machine alone"))
    add_watermark(commands.add_parser("watermark", help="tell whether pictures carry this project's watermark"))
    add_card(commands.add_parser("card", help="write the model card of a checkpoint, its README.md"))
    add_import(commands.add_parser("import", help="bring in other projects' weights: Show-o, Phi-1.5, MAGVIT-v2"))

    add_evaluate(commands.add_parser("evaluate", help="score runs as the paper does; one report of one or several"))
    add_ablate(commands.add_parser("ablate", help="the paper's ablations on a demo run's faces, with several seeds"))

    init = commands.add_parser("init", help="a fresh checkpoint to train from: both tokenizers, and random weights")
    init.add_argument("config", type=Path, nargs="?", help="YAML file; every key of it can be given as --a.b=c")
    init.set_defaults(run=_later("init"), takes_overrides=True)

    precompute = commands.add_parser("precompute", help="pictures and words to shards that training reads fast")
    precompute.add_argument("config", type=Path, nargs="?", help="YAML file; every key of it can be given as --a.b=c")
    precompute.set_defaults(run=_later("precompute"), takes_overrides=True)

    train = commands.add_parser("train", help="train a model, from a config and its state; torchrun starts many ranks")
    train.add_argument("config", type=Path, help="YAML file; every key of it can be given as --a.b=c")
    train.add_argument("--dry-run", action="store_true", help="print the whole config, sizes, memory, steps")
    train.add_argument("--ranks", type=int, default=1, help="of --dry-run, where torchrun does not say (default: 1)")
    train.set_defaults(run=_later("train", "train"), takes_overrides=True)

    export = commands.add_parser("export", help="a state of a training run as a checkpoint, RUN/checkpoint")
    export.add_argument("run_folder", metavar="RUN", help="folder of the run")
    export.add_argument("--step", type=int, help="the state before this step (default: the newest)")
    export.add_argument("--out", type=Path, metavar="FOLDER", help="(default: RUN/checkpoint)")
    export.set_defaults(run=_later("train", "export"))

    attributes = commands.add_parser("train-attributes", help="train a classifier of face attributes on labelled faces")
    attributes.add_argument("config", type=Path, nargs="?", help="YAML file; every key of it can be given as --a.b=c")
    attributes.set_defaults(run=_later("attributes"), takes_overrides=True)

    add_build_dataset(commands.add_parser("build-dataset", help="pictures to a set with captions and questions"))
    add_serve_language(commands.add_parser("serve-language", help="a small language model as an endpoint, for that"))

    add_report(commands.add_parser("report", help="how a training run went, as one page: RUN/report.html"))

    info = commands.add_parser("info", help="parameters by part, in all and used by a token")
    info.add_argument("checkpoint", help="folder of a checkpoint or of an import; or base, the 1.8B shape")
    info.set_defaults(run=_later("info", "info"))

    planning = commands.add_parser("plan", help="memory of training by part and by GPU, FLOPs, the largest batch")
    planning.add_argument("config", help="base (the 1.8B shape), tiny, or the folder of a checkpoint or of an import")
    planning.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    planning.add_argument("--batch", type=int, help="rows of a GPU in a step (default: the most that fit)")
    planning.add_argument("--length", type=int, help="tokens of a row (default: a t2i row's, up to a multiple of 8)")
    planning.add_argument("--dtype", choices=["fp32", "bf16", "autocast"], default="bf16", help="(default: bf16)")
    planning.add_argument("--optimizer", choices=["adamw", "muon", "sgd"], default="adamw", help="(default: adamw)")
    planning.add_argument("--ema", action="store_true", help="an average of the weights is kept")
    planning.add_argument("--checkpointing", choices=["none", "block"], default="none", help="(default: none)")
    planning.add_argument("--sharding", choices=["fsdp", "ddp"], default="fsdp", help="(default: fsdp)")
    planning.add_argument("--attention", choices=["fused", "math"], default="fused", help="(default: fused)")
    planning.add_argument("--gpu-memory", type=float, default=141, help="GB of a GPU (default: an H200's, 141)")
    words = "also what a step costs on so many GPUs, by a model (64 1024: both)"
    planning.add_argument("--cluster", type=int, nargs="+", default=[], metavar="GPUS", help=words)
    planning.set_defaults(run=_later("plan", "plan"))
    return parser


def _demo(parsed: argparse.Namespace) -> None:
    from unif2ace.demo import FULL, SMALL, run

    settings, folder = (SMALL, "runs/demo-small") if parsed.small else (FULL, "runs/demo")
    run(settings, parsed.out or Path(folder))


def _later(module: str, function: str = "run") -> Callable[[argparse.Namespace], None]:
    """A command whose module waits until it runs, so that --help and a mistyped option answer at once."""
    return lambda parsed: getattr(import_module(f"unif2ace.cli.{module}"), function)(parsed)
