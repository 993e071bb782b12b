"""A masked-diffusion language model in a hundred lines: trained on characters as LLaDA or MDLM is, then sampled.

    python examples/masked_lm.py [--reading mdlm] [--steps 600]

It reads the kernels' own pages, 40 kB of text that come with the package. The loss is the negative ELBO in nats a
character, so that it is comparable with the entropy of single characters, which a model without context cannot beat:
2.27 against 3.36 after 600 steps, two minutes on one core, when samples have words' shapes and few words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import unif2ace_kernels
from unif2ace_kernels import d3diff, sampling

LENGTH = 64
# Both are the ELBO of absorbing diffusion: LLaDA masks at rate t and weighs by 1 / t; MDLM's weight is that of its own
# log-linear schedule. See the table in the room d3diff's README.
READINGS = {
    "llada": {"score": "bayes", "schedule": "linear"},
    "mdlm": {"score": "radd", "schedule": "log_linear"},
}


def read_text() -> str:
    return "\n".join(page.read_text() for page in sorted(Path(unif2ace_kernels.__file__).parent.rglob("*.md")))


class MaskedLM(nn.Module):
    """A bidirectional transformer over characters; the mask token is the one after the last character."""

    def __init__(self, characters: int, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters + 1, width)
        self.place = nn.Parameter(torch.randn(LENGTH, width))
        # Spelling, at once: attention needs longer to find neighbours.
        self.near = nn.Conv1d(width, width, 9, padding=4)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> the last hidden states [B, N, D]; the loss and the sampler have the head in them."""
        x = self.embed(ids) + self.place
        return self.body(x + self.near(x.transpose(1, 2)).transpose(1, 2))


def elbo(model: MaskedLM, clean: Tensor, u: Tensor, reading: str, step: int) -> Tensor:
    """The negative ELBO of `clean` [B, N] in nats a character, at noise levels u [B] in (0, 1)."""
    options = READINGS[reading]
    mask_id = model.head.out_features
    mask_prob = d3diff.schedule(options["schedule"]).mask_prob(u, length=LENGTH)
    noised, mask = d3diff.noise(clean, mask_prob, mask_id, exact_count=False, seed=0, offset=step)
    targets = torch.where(mask, clean, -100)
    loss, _ = d3diff.loss(
        model(noised), model.head.weight, model.head.bias, targets, mask_prob,
        code_range=(0, mask_id), ce_coef=0, alpha=1 / LENGTH, **options,
    )  # fmt: skip
    return loss


def train(text: str, reading: str, steps: int, batch: int = 32, **size: int) -> tuple[MaskedLM, list[str], list[float]]:
    """The model, its characters and the loss of every step; `size`: as of `MaskedLM`."""
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    data = torch.tensor([number[character] for character in text])
    model = MaskedLM(len(characters), **size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        starts = torch.randint(len(data) - LENGTH, (batch, 1))
        # One noise level of each in every batch: the ELBO's largest noise is that of the levels.
        u = (torch.arange(batch) + torch.rand(())) / batch
        loss = elbo(model, data[starts + torch.arange(LENGTH)], u, reading, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, characters, losses


def unigram_entropy(text: str) -> float:
    """Nats a character."""
    share = torch.tensor([text.count(character) for character in set(text)]) / len(text)
    return float(-(share * share.log()).sum())


def sample(model: MaskedLM, characters: list[str], number: int, prompt: str = "", steps: int = 64) -> list[str]:
    """Texts drawn from the model, which begin with `prompt`."""
    head = (model.head.weight, model.head.bias)
    sampler = sampling.MaskedDiffusionSampler(
        lambda ids, step: model(ids), steps, len(characters), head=head, schedule="linear", policy="random"
    )
    ids = torch.full((number, LENGTH), len(characters))
    ids[:, : len(prompt)] = torch.tensor([characters.index(each) for each in prompt], dtype=torch.int64)
    return ["".join(characters[i] for i in row) for row in sampler(ids, seed=1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reading", choices=READINGS, default="llada")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    torch.manual_seed(0)
    text = read_text()
    model, characters, losses = train(text, options.reading, options.steps)
    last = losses[-len(losses) // 5 :]
    print(f"{len(losses)} steps; {sum(last) / len(last):.2f} nats a character, single ones {unigram_entropy(text):.2f}")
    for line in sample(model, characters, 4, prompt="The "):
        print(repr(line))


if __name__ == "__main__":
    main()
