"""Random training batches of a config: full-length rows, or with the padding that captions and questions leave."""

from __future__ import annotations

import torch

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.sequences import IGNORE, Batch, mmu_batch, t2i_batch, t2i_prompts
from unif2ace_kernels import d3diff

END = 0
SEED = 0


def training_batch(
    config: UniF2aceConfig, t2i: int, mmu: int, *, words: int | None = None, text: int | None = None
) -> Batch:
    """Rows of both tasks.

    Args:
        t2i, mmu: how many of each.
        words: tokens of a caption; None fills the text slots.
        text: tokens of a question with its answer, the second half of which is the answer; None makes the rows of both
            tasks equally long.
    """
    generator = torch.Generator().manual_seed(SEED)
    vocabulary, count = config.vocabulary, config.image_tokens
    words = config.text_slots - 3 if words is None else words
    text = config.text_slots - 1 if text is None else text

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    parts = []
    if t2i:
        codes = draw(*vocabulary.code_range, t2i, count)
        time = (torch.arange(t2i, dtype=torch.float64) + 0.5) / t2i
        mask_prob = d3diff.schedule(config.loss.schedule).mask_prob(time, length=count)
        noised, masked = d3diff.noise(codes, mask_prob, vocabulary.mask, seed=SEED)
        prompts = t2i_prompts(draw(1, vocabulary.text, t2i, words).tolist(), END, config)
        parts.append(t2i_batch(prompts, noised, config, codes.masked_fill(~masked, IGNORE), mask_prob.float()))
    if mmu:
        identity = torch.randn(mmu, config.identity, generator=generator)
        semantic = torch.randn(mmu, count, config.semantic, generator=generator)
        texts = draw(1, vocabulary.text, mmu, text).tolist()
        answers = [[place >= text // 2 for place in range(text)]] * mmu
        codes = draw(*vocabulary.code_range, mmu, count)
        parts.append(mmu_batch(codes, texts, identity, semantic, config, answers))
    return Batch.join(parts, vocabulary.pad)
