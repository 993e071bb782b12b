"""The model card of a checkpoint: README.md in its folder, from its config, its run's results and a fixed template.

A card that someone edited is theirs: it is told by the digest that ours end with, and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unif2ace.errors import UserError
from unif2ace.files import digest, read_json, replacing
from unif2ace.parsing import reading

NAME = "README.md"
_SEAL = "<!-- written by unif2ace card {} -->"

_TEMPLATE = """---
library_name: unif2ace
pipeline_tag: any-to-any
license: {license}
language: en
tags:
- face
- text-to-image
- visual-question-answering
- discrete-diffusion
- mixture-of-experts
---

# {name}

One transformer that paints faces from text (masked discrete diffusion) and answers questions about a face (next
token), an open implementation of [UniF2ace](https://arxiv.org/abs/2503.08120).

```
unif2ace generate --checkpoint {folder} --prompt "a person with dark hair, big smile" --out face.png
unif2ace ask --checkpoint {folder} --image face.png --question "how light is the hair?"
```

## The model

{sizes}

{asked}

## Results

{results}

## Intended use

Research on models that understand and generate, on mixtures of experts and on discrete diffusion; teaching; pictures
of faces that belong to nobody.

Not for, and not fit for:

- **identifying** anybody, or telling whether two pictures show one person; the identity embeddings inside the model
  are a conditioning signal, are never written to logs, and are not to be stored as a means of recognition
- **impersonating** real people, making pictures that pass for photographs of them, or putting words to their faces
- **judging** people: hiring, credit, insurance, policing, education, health, or any decision about a person
- surveillance, and the pictures of anyone who did not agree, children above all

Every painting saved by `unif2ace` carries an invisible watermark (`unif2ace watermark FILE` reads it; it outlives
JPEG at quality 90 and cropping, not resizing or someone's will to remove it), and says in its metadata that a model
made it. Use `--safety MODULE:FUNCTION` to refuse prompts and pictures by rules of your own.

## Attributes are perceived

Answers and captions name what a picture looks like to a model: lighting, hair, expression. They are not facts about
a person. The model knows a few coarse classes, answers in them even where none fits, and is less sure of, and less fair
to, faces that its training pictures hold few of. Nothing here measures error by skin tone, age or gender.

## Data and consent

{data}
"""

_SYNTHETIC = """Trained on {faces} synthetic faces, made at run time by a generator (`random-face`, MobileStyleGAN); no
photograph of a person was collected. That generator was itself trained on photographs of people, by the looks of it
Flickr-Faces-HQ (CC BY-NC-SA 4.0), who were not asked about this use. Whoever publishes these weights checks what that
licence asks of them."""
_UNKNOWN = """To be filled in by whoever trained this checkpoint: which pictures, whose they are, whether the people in
them agreed, under which licences, and who is missing from them."""


def text(
    name: str,
    folder: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    license: str,
) -> str:
    """The card, with its seal.

    Args:
        name: of the model. folder: as the commands in the card name it.
        config, processor: what its config.json (every size in it) and its processor_config.json say.
        results: a run's results.json, or None.
        license: of the weights, as Hugging Face names it.
    """
    body = _TEMPLATE.format(
        license=license,
        name=name,
        folder=folder,
        sizes=_sizes(config, results),
        asked=_asked(processor),
        results=_results(results),
        data=_SYNTHETIC.format(faces=results["faces"]) if results and "faces" in results else _UNKNOWN,
    )
    return f"{body}\n{_SEAL.format(digest(body.encode()))}\n"


def write(folder: Path, results: Path | None = None, license: str = "other", force: bool = False) -> str:
    """Write the card of the checkpoint in `folder`; a card of the user's own stays.

    Args:
        results: the run's results.json; the one beside the folder, if there is one, when None.

    Returns:
        What was done, a line.

    Raises:
        UserError: there is no checkpoint, or, without `force`, a card that someone wrote or edited.
    """
    folder = Path(folder)
    from unif2ace.checkpoint import read_config

    config = read_config(folder).to_dict()
    beside = folder.resolve().parent / "results.json"
    found = read_json(results) if results is not None else read_json(beside) if beside.exists() else None
    processor = folder / "processor_config.json"
    path = folder / NAME
    if not force and not is_ours(path):
        raise UserError(f"{path} was written or edited by hand and is left as it is: --force replaces it")
    whole = folder.resolve()
    name = whole.parent.name if whole.name == "checkpoint" else whole.name
    card = text(name, str(folder), config, read_json(processor) if processor.exists() else {}, found, license)
    with replacing(path) as partial:
        partial.write_text(card, encoding="utf-8")
    return f"{path}: model card" + ("" if found else " without results, there is no results.json; see --results")


def is_ours(path: Path) -> bool:
    """Whether the card at `path` is as this module wrote it; True where there is none."""
    if not Path(path).exists():
        return True
    with reading(path, "model card", "name another file"):
        body, _, last = Path(path).read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    return last == _SEAL.format(digest(body.encode()))


def _sizes(config: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    token, sequence = config.get("token_moe"), config.get("sequence_moe")
    rows = [
        ("parameters", f"{results['parameters']:,}" if results and "parameters" in results else None),
        ("layers x hidden size", f"{config.get('num_hidden_layers')} x {config.get('hidden_size')}"),
        ("image tokens, codes", f"{config.get('image_tokens')}, {(config.get('vocabulary') or {}).get('codes')}"),
        (
            "token-level experts",
            f"{' + '.join(map(str, token['experts']))} (painting + answering), top-{token['top_k']}"
            if token
            else "none",
        ),
        ("sequence-level experts", f"top-{sequence['top_k']}" if sequence else "none"),
        ("picture side", _side(config)),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value is not None)])


def _side(config: Mapping[str, Any]) -> str | None:
    side = (config.get("image_tokenizer") or {}).get("side")
    return None if side is None else f"{side} pixels"


def _asked(processor: Mapping[str, Any]) -> str:
    prompts, encoders = processor.get("prompts") or {}, processor.get("encoders") or {}
    told = (
        [f"Trained to be asked: {', '.join(f'{kind}: `{each}`' for kind, each in prompts.items())}."] if prompts else []
    )
    told += (
        [f"Frozen encoders: {', '.join(f'{use} by `{kind}`' for use, kind in encoders.items())}."] if encoders else []
    )
    return "\n".join(told) or "The checkpoint does not say how it was trained to be asked."


def _results(results: Mapping[str, Any] | None) -> str:
    if not results or not {"generation", "understanding"} <= results.keys():
        return "None were measured, or none lay beside the checkpoint when this card was written."
    painted, answered = results["generation"], results["understanding"]
    lines = [
        f"{painted['prompts']} random prompts painted, {answered['faces']} held-out faces asked about.",
        "",
        "| attribute | painted as prompted | chance | answered rightly | best constant answer |",
        "|---|---|---|---|---|",
    ]
    for name, row in painted["attributes"].items():
        other = answered["attributes"][name]
        lines.append(
            f"| {name} | {row['match']:.2f} | {row['chance']:.2f} | {other['accuracy']:.2f} | {other['majority']:.2f} |"
        )
    return "\n".join(lines)
