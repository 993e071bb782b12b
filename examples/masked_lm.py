"""A masked-diffusion language model in a hundred lines: trained on characters as LLaDA or MDLM is, then sampled.

    python examples/masked_lm.py [--reading mdlm] [--steps 600]

It reads the kernels' own pages, 36 kB of text that come with the package. The loss is the negative ELBO in nats a
character, which a model without context cannot bring below the entropy of single characters: 2.27 against 3.36 after
600 steps, under two minutes on two cores, when samples have words' shapes and few words.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import unif2ace_kernels
from unif2ace_kernels import d3diff, sampling

LENGTH = 64
# Score and schedule. Both are the ELBO of absorbing diffusion: LLaDA masks at rate t and weighs by 1 / t; MDLM's weight
# is that of its own log-linear schedule. See the table in the room d3diff's README.
READINGS = {"llada": ("bayes", "linear"), "mdlm": ("radd", "log_linear")}


class MaskedLM(nn.Module):
    """A bidirectional transformer over characters; the mask token is the one after the last character."""

    def __init__(self, characters: int, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.mask_id = characters
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
        return self.body(x + self.near(x.mT).mT)


def train(text: str, reading: str, steps: int, batch: int = 32, **size: int) -> tuple[MaskedLM, str, list[float]]:
    """The model, its characters and the loss of every step; `size`: as of `MaskedLM`."""
    characters = "".join(sorted(set(text)))
    data = torch.tensor([characters.index(each) for each in text])
    model, losses = MaskedLM(len(characters), **size), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    score, schedule = READINGS[reading]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        clean = data[torch.randint(len(data) - LENGTH, (batch, 1)) + torch.arange(LENGTH)]
        # One noise level of each in every batch: the ELBO's largest noise is that of the levels.
        u = (torch.arange(batch) + torch.rand(())) / batch
        mask_prob = d3diff.schedule(schedule).mask_prob(u, length=LENGTH)
        noised, mask = d3diff.noise(clean, mask_prob, model.mask_id, exact_count=False, seed=0, offset=step)
        loss, _ = d3diff.loss(
            model(noised), model.head.weight, model.head.bias, clean.where(mask, -100), mask_prob, score=score,
            schedule=schedule, code_range=(0, model.mask_id), ce_coef=0, alpha=1 / LENGTH,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, characters, losses


def sample(model: MaskedLM, characters: str, number: int, prompt: str = "", steps: int = 64) -> list[str]:
    """Texts drawn from the model, which begin with `prompt`."""
    sampler = sampling.MaskedDiffusionSampler(
        lambda ids, step: model(ids), steps, model.mask_id, head=(model.head.weight, model.head.bias),
        schedule="linear", policy="random",
    )  # fmt: skip
    ids = torch.full((number, LENGTH), model.mask_id)
    ids[:, : len(prompt)] = torch.tensor([characters.index(each) for each in prompt])
    return ["".join(characters[i] for i in row) for row in sampler(ids, seed=1).tolist()]


def read_text() -> str:
    return "\n".join(page.read_text() for page in sorted(Path(unif2ace_kernels.__file__).parent.rglob("*.md")))


def unigram_entropy(text: str) -> float:
    """Nats a character."""
    share = torch.tensor([text.count(character) for character in set(text)]) / len(text)
    return float(-(share * share.log()).sum())


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
    print(*map(repr, sample(model, characters, 4, prompt="The ")), sep="\n")


if __name__ == "__main__":
    main()
