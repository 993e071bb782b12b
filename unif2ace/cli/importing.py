"""`unif2ace import`: other projects' weights to parts of a checkpoint, and the parts to one checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ["float32", "bfloat16", "float16"]


def add_import(importing: argparse.ArgumentParser) -> None:
    """The command's verbs and options."""
    verbs = importing.add_subparsers(required=True, metavar="VERB")
    for name, told in (
        ("showo", "a Show-o, exactly, with experts that change nothing yet"),
        ("phi", "Phi-1.5, the text model that Show-o began from, and its tokenizer"),
        ("magvit", "Show-o's image tokenizer, MAGVIT-v2"),
    ):
        verb = verbs.add_parser(name, help=told)
        verb.add_argument("path", type=Path, help="file of weights, index of shards, or the folder of either")
        verb.add_argument("--sha256", action="append", default=[], metavar="NAME=HEX", help="sum that a file must have")
        verb.add_argument("--allow-pickle", action="store_true", help="read .bin files, which are pickles")
        if name != "magvit":
            verb.add_argument("--dense", action="store_true", help="without experts")
            verb.add_argument("--identity", type=int, default=512, help="channels of identity embeddings to come")
            verb.add_argument("--semantic", type=int, default=1024, help="channels of semantic features to come")
        verb.set_defaults(run=_part, kind=name)
    join = verbs.add_parser("assemble", help="join imported parts into one checkpoint that paints and answers")
    join.add_argument("--model", required=True, type=Path, help="folder of an imported Show-o or Phi")
    join.add_argument("--image-tokenizer", required=True, type=Path, help="folder of an imported MAGVIT-v2")
    join.add_argument("--text-tokenizer", type=Path, help="tokenizer.json or its folder (default: the model's)")
    join.add_argument("--semantic", help="clip:PATH, open-clip:PATH, or image_tokenizer")
    join.add_argument("--identity", help="antelopev2:PATH, arcface-mbf or sface")
    join.set_defaults(run=_assemble)
    for verb in verbs.choices.values():
        verb.add_argument("--out", required=True, type=Path, help="new folder to write")
        verb.add_argument("--dtype", choices=DTYPES, default="float32")


# Imports wait until a verb runs, as for every command.


def _part(parsed: argparse.Namespace) -> None:
    from unif2ace import checksums
    from unif2ace.importers import parts
    from unif2ace.importers.magvit import import_magvit
    from unif2ace.importers.phi import Options, import_phi
    from unif2ace.importers.showo import import_showo
    from unif2ace.importers.texts import find_text_tokenizer
    from unif2ace.importers.weights import Weights

    parts.can_write(parsed.out)
    weights = Weights(parsed.path, parsed.allow_pickle, checksums.parse(parsed.sha256))
    text = None
    part: parts.Part
    if parsed.kind == "magvit":
        part, told = import_magvit(weights)
    else:
        options = Options(parsed.dense, parsed.identity, parsed.semantic)
        part, told = (import_showo if parsed.kind == "showo" else import_phi)(weights, options=options)
        text = find_text_tokenizer(weights.path)
    parts.save(part, parsed.out, parsed.dtype, text)
    told += [f"text tokenizer: {text}"] if text else []
    print("\n".join([*told, f"written: {parsed.out}"]))


def _assemble(parsed: argparse.Namespace) -> None:
    from unif2ace.importers.assemble import assemble

    told = assemble(
        parsed.model, parsed.image_tokenizer, parsed.text_tokenizer, parsed.out,
        semantic=parsed.semantic, identity=parsed.identity, dtype=parsed.dtype,
    )  # fmt: skip
    print("\n".join([*told, f"written: {parsed.out}"]))
