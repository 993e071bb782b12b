"""The smallest models and batches that still have every part: what the model's tests share."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from unif2ace.configs import SequenceMoEConfig, TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.data import captions
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import IGNORE, Batch, mmu_batch, t2i_batch, t2i_prompts
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.training.recipe import EncodedFaces

with torch.device("meta"):  # torch lists its constructors on first use: now, before a fixture replaces some
    torch.empty(0)

END = 0  # the text tokenizer's only special token is its first

CONFIG = UniF2aceConfig(
    vocabulary=VocabularyConfig(text=40, codes=16),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_tokens=4,
    text_slots=7,
    identity=6,
    semantic=5,
    token_moe=TokenMoEConfig(experts=(3, 4), top_k=2, width=16, shared_width=16),
    sequence_moe=SequenceMoEConfig(latents=2),
)


def config(**changes) -> UniF2aceConfig:
    return CONFIG.replace(**changes)


def lively(config: UniF2aceConfig = CONFIG, seed: int = 1) -> UniF2aceForConditionalGeneration:
    """A float64 model whose every part matters: the usual initialisation leaves some at zero."""
    torch.manual_seed(seed)
    model = UniF2aceForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def loss(model: UniF2aceForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(**vars(batch))
    return output.loss, output.terms


def texts(lengths, seed: int = 0, config: UniF2aceConfig = CONFIG) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, config.vocabulary.text, size=length).tolist() for length in lengths]


def t2i(lengths=(3, 0, 4), seed: int = 0, config: UniF2aceConfig = CONFIG) -> Batch:
    """Rows with captions of these lengths and about half of the codes masked, at least one."""
    torch.manual_seed(seed)
    start = config.vocabulary.code_range[0]
    codes = start + torch.randint(config.vocabulary.codes, (len(lengths), config.image_tokens))
    masked = torch.rand(codes.shape) < 0.5
    masked[:, 0] = True
    prompts = t2i_prompts(texts(lengths, seed, config), END, config)
    noised = codes.masked_fill(masked, config.vocabulary.mask)
    return t2i_batch(prompts, noised, config, codes.masked_fill(~masked, IGNORE))


def mmu(lengths=(5, 2, 7), seed: int = 0, config: UniF2aceConfig = CONFIG) -> Batch:
    """Rows with texts of these lengths whose second half is the answer; float64 features."""
    torch.manual_seed(seed)
    start = config.vocabulary.code_range[0]
    codes = start + torch.randint(config.vocabulary.codes, (len(lengths), config.image_tokens))
    answers = [[position >= length // 2 for position in range(length)] for length in lengths]
    identity = torch.randn(len(lengths), config.identity, dtype=torch.float64)
    semantic = torch.randn(len(lengths), config.image_tokens, config.semantic, dtype=torch.float64)
    return mmu_batch(codes, texts(lengths, seed + 1, config), identity, semantic, config, answers)


def mixed(seed: int = 0, config: UniF2aceConfig = CONFIG, rows: int = 1) -> Batch:
    """Both tasks, `rows` times three rows of each."""
    parts = [t2i((3, 0, 4) * rows, seed, config), mmu((5, 2, 7) * rows, seed, config)]
    return Batch.join(double(*parts), config.vocabulary.pad)


def double(*batches: Batch) -> list[Batch]:
    """The same batches with every float tensor in float64."""
    return [
        Batch(**{k: v.double() if v is not None and v.is_floating_point() else v for k, v in vars(batch).items()})
        for batch in batches
    ]


def single(batch: Batch) -> Batch:
    """The same batch with every float tensor in float32."""
    return Batch(**{k: v.float() if v is not None and v.is_floating_point() else v for k, v in vars(batch).items()})


def replaced(batch: Batch, **changes) -> Batch:
    return dataclasses.replace(batch, **changes)


def text_tokenizer() -> TextTokenizer:
    return TextTokenizer.train(captions.all_texts())


def encoded_faces(count: int, config: UniF2aceConfig, seed: int = 0) -> EncodedFaces:
    """Faces drawn at random: nothing in one tells of another part of it."""
    torch.manual_seed(seed)
    return EncodedFaces(
        torch.randint(config.vocabulary.codes, (count, config.image_tokens)),
        torch.randn(count, config.image_tokens, config.semantic),
        torch.nn.functional.normalize(torch.randn(count, config.identity), dim=1),
        captions.random_classes(count, np.random.default_rng(seed)),
    )
