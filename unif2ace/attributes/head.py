"""A multi-label head on frozen features: one softmax a category, calibrated, that is silent where it is not sure.

    features [B, D] -> (x - mean) / scale -> [hidden] -> logits of every value of every category [B, V]
    probabilities of category c = softmax(exp(sharpness_c) logits_c + bias_c)

Sharpness and bias are fitted on faces that the weights have not seen (temperature scaling with a bias a class; of two
classes that is Platt's scaling), so that weights that were trained with classes balanced give shares again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unif2ace.attributes.base import Attribute
from unif2ace.attributes.features import Features
from unif2ace.errors import UserError, first_line
from unif2ace.files import digest, read_json, replacing, write_json
from unif2ace.parsing import reading

CONFIG, WEIGHTS = "attributes.json", "attributes.safetensors"
FORMAT = 1


class AttributeHead(nn.Module):
    """See the module's text.

    Args:
        width: D of the features.
        categories: each with its values.
        hidden: width of a hidden layer; 0: none, the head is linear.
        dropout: of features, and of the hidden layer.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    sharpness: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, width: int, categories: Mapping[str, tuple[str, ...]], hidden: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.categories, self.width, self.hidden = dict(categories), width, hidden
        self.sizes = [len(values) for values in categories.values()]
        first = [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout)] if hidden else []
        self.layers = nn.Sequential(nn.Dropout(dropout), *first, nn.Linear(hidden or width, sum(self.sizes)))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("sharpness", torch.zeros(len(self.sizes)))
        self.register_buffer("bias", torch.zeros(sum(self.sizes)))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits [B, K] of each category, not calibrated, from features [B, D]."""
        return self.layers((features - self.mean) / self.scale).split(self.sizes, 1)

    @torch.no_grad()
    def probabilities(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calibrated probabilities [B, K] of each category."""
        each = zip(self(features), self.sharpness, self.bias.split(self.sizes))
        return tuple((logits * sharpness.exp() + bias).softmax(1) for logits, sharpness, bias in each)


@dataclass(frozen=True)
class Description:
    """What a head's JSON file says beside its sizes.

    Attributes:
        features: kind of the features, as `Features` takes it; fingerprint: of them.
        framed: whether pictures are to stand in the synthetic faces' frame.
        confidence: least probability with which an answer is given.
        told: categories that are answered at all: those that the test showed to be better than chance.
    """

    features: str
    fingerprint: str
    framed: bool
    confidence: float
    told: tuple[str, ...]


def save(head: AttributeHead, description: Description, folder: Path) -> None:
    """Write the two files; the JSON last, so that a folder with it is whole."""
    weights = {name: value.contiguous() for name, value in head.state_dict().items()}
    with replacing(Path(folder) / WEIGHTS) as partial:
        save_file(weights, partial)
    sizes = {"width": head.width, "hidden": head.hidden, "categories": head.categories}
    write_json(Path(folder) / CONFIG, {"format": FORMAT, **sizes, **vars(description)})


def load(folder: Path) -> tuple[AttributeHead, Description]:
    """A head that `save` wrote.

    Raises:
        UserError: a file is missing, damaged, or not of the other.
    """
    folder = Path(folder)
    held = read_json(folder / CONFIG)
    try:
        if held.pop("format") != FORMAT:
            raise UserError(f"{folder / CONFIG} is of another version of this project: train the head again")
        categories = {str(name): tuple(map(str, values)) for name, values in held.pop("categories").items()}
        head = AttributeHead(int(held.pop("width")), categories, int(held.pop("hidden")))
        description = Description(**{**held, "told": tuple(held["told"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} does not describe an attribute head: {error!r}") from error
    with reading(folder / WEIGHTS, "safetensors"):
        weights = load_file(folder / WEIGHTS)
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS} is of another head ({first_line(error)}): copy both again") from error
    return head.eval(), description


class AttributeClassifier:
    """An AttributeSource: a trained head on its features; `fingerprint` is of all that its answers hang on.

    Args:
        folder: what `unif2ace train-attributes` wrote.
        device: where features are computed.
        features: where they come from, if their folder lies elsewhere than it did when the head was trained.
        confidence: least probability of an answer, if not the one that the head was saved with.

    Raises:
        UserError: the head or its features are not there, are damaged, or are of other weights than each other.
    """

    def __init__(
        self,
        folder: Path | str,
        device: str | torch.device = "cpu",
        features: str | None = None,
        confidence: float | None = None,
    ) -> None:
        self.name = f"classifier:{Path(folder).name}"
        self.head, described = load(Path(folder))
        self._features = Features(features or described.features, device, framed=described.framed)
        if self._features.fingerprint != described.fingerprint:
            raise UserError(f"{folder} was trained on other features than {self._features.kind} gives: train it again")
        self.confidence = described.confidence if confidence is None else confidence
        weights = (Path(folder) / WEIGHTS).read_bytes()
        self.fingerprint = digest(weights, described.fingerprint.encode(), str(self.confidence).encode())
        self.categories = {name: values for name, values in self.head.categories.items() if name in described.told}

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Attribute]]:
        """Of each picture the answers at least as likely as `confidence`; none where no face is found."""
        found: list[list[Attribute]] = [[] for _ in images]
        vectors, kept = self._features(images)
        if not kept:
            return found
        for (name, values), probabilities in zip(self.head.categories.items(), self.head.probabilities(vectors)):
            if name not in self.categories:
                continue
            likely, answers = probabilities.max(1)
            for index, probability, answer in zip(kept, likely.tolist(), answers.tolist()):
                if probability >= self.confidence:
                    found[index].append(Attribute(name, values[answer], probability))
        return found
