"""Phi-1.5 (microsoft/phi-1_5, PhiForCausalLM) to our transformer: the text model that Show-o began from.

What Show-o did with it is done here. The layers are taken whole. Of its 51200 vocabulary rows the 50295 of its text
tokens are; the others, which its tokenizer never gives out, are left, and special tokens, image codes and the mask
token begin anew (normal, 0.02; bias 0). Phi-1.5 does not normalise queries and keys, Show-o does from the first step,
with a LayerNorm that begins at scale 1 and shift 0: so does this, and the model is no longer Phi-1.5's function until
it is trained. A Phi with `qk_layernorm` is taken exactly.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from unif2ace.configs import SequenceMoEConfig, TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.errors import UserError
from unif2ace.importers.texts import find_text_tokenizer, load_text_tokenizer
from unif2ace.importers.weights import Weights
from unif2ace.model.blocks import Block, FeedForward
from unif2ace.model.modeling import UniF2aceForConditionalGeneration

LICENCE = "MIT (as published at microsoft/phi-1_5)"
NOT_PLACED = ("rotary_emb.inv_freq",)
TEXT_SLOTS = 129
# What a Phi's config may say that ours cannot vary, and the values under which both compute the same.
FIXED = {
    "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_eps": (1e-5,),
    "rope_theta": (10000.0,),
    "rope_type": ("default",),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False,),
}


@dataclass(frozen=True)
class Options:
    """What an import leaves to the user.

    Attributes:
        dense: without experts at either level.
        identity, semantic: channels of the features that the sequence-level experts will read.
    """

    dense: bool = False
    identity: int = 512
    semantic: int = 1024


@dataclass(frozen=True)
class Sizes:
    """What the shapes and the config.json of a PhiForCausalLM tell.

    Attributes:
        rows: of the vocabulary. rotary: see `UniF2aceConfig`.
        qk_norm: whether queries and keys have a LayerNorm.
    """

    rows: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    qk_norm: bool
    rotary: float

    @classmethod
    def read(cls, weights: Weights, prefix: str, what: str) -> Sizes:
        """Sizes from the names that begin with `prefix`.

        Raises:
            UserError: the tensors that tell them are not there, or its config is of a function that ours is not.
        """
        matrices = (f"{prefix}model.embed_tokens.weight", f"{prefix}model.layers.0.mlp.fc1.weight")
        embedding, fc1 = (weights.shapes.get(name, ()) for name in matrices)
        if len(embedding) != 2 or len(fc1) != 2:
            some = ", ".join(sorted(weights.shapes)[:3])
            raise UserError(f"{weights.path} is not {what}: expected matrices {' and '.join(matrices)}, got {some}")
        q_norm = weights.shapes.get(f"{prefix}model.layers.0.self_attn.q_layernorm.weight")
        settings = weights.settings()
        nested = settings.get("rope_parameters")
        settings |= nested if isinstance(nested, dict) else {}
        for name, allowed in FIXED.items():
            if settings.get(name, allowed[0]) not in allowed:
                found = f"its config has {name} {settings[name]}"
                raise UserError(f"{weights.path}: {found}, only {allowed[0]} can be taken")
        rows, hidden = embedding
        heads = weights.whole("num_attention_heads", max(1, hidden // (q_norm[0] if q_norm and q_norm[0] else 64)))
        if hidden % heads:
            raise UserError(f"{weights.path}: {heads} heads do not divide the width {hidden}: check its config.json")
        rotary = settings.get("partial_rotary_factor", 0.5)
        if not isinstance(rotary, int | float) or not 0 < rotary <= 1:
            raise UserError(f"{weights.path}: its config has partial_rotary_factor {rotary!r}, expected one in (0, 1]")
        numbered = re.compile(re.escape(prefix) + r"model\.layers\.(\d+)\.")
        layers = {match[1] for match in map(numbered.match, weights.shapes) if match}
        return cls(rows, hidden, len(layers), heads, fc1[0], q_norm is not None, rotary)

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Every name and shape of a PhiForCausalLM of these sizes."""
        D, F, V = self.hidden, self.ffn, self.rows
        matrices = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D)}
        matrices |= {"self_attn.dense": (D, D), "mlp.fc1": (F, D), "mlp.fc2": (D, F)}
        norms = {"input_layernorm": D}
        if self.qk_norm:
            norms |= {"self_attn.q_layernorm": D // self.heads, "self_attn.k_layernorm": D // self.heads}
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}model.embed_tokens.weight": (V, D)}
        for layer in range(self.layers):
            for name, shape in matrices.items():
                shapes[f"{prefix}model.layers.{layer}.{name}.weight"] = shape
                shapes[f"{prefix}model.layers.{layer}.{name}.bias"] = shape[:1]
            for name, channels in norms.items():
                for kind in ("weight", "bias"):
                    shapes[f"{prefix}model.layers.{layer}.{name}.{kind}"] = (channels,)
        for kind in ("weight", "bias"):
            shapes[f"{prefix}model.final_layernorm.{kind}"] = (D,)
        return shapes | {f"{prefix}lm_head.weight": (V, D), f"{prefix}lm_head.bias": (V,)}

    def config(self, vocabulary: VocabularyConfig, image_tokens: int, options: Options) -> UniF2aceConfig:
        """Our config of this backbone: with experts at their function-preserving start, or without any."""
        base = UniF2aceConfig.base()
        experts = cast(TokenMoEConfig, base.token_moe)
        width = max(1, experts.width * self.ffn // base.intermediate_size)
        token = None if options.dense else dataclasses.replace(experts, width=width)
        return UniF2aceConfig(
            vocabulary=vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            partial_rotary_factor=self.rotary,
            parallel_block=True,
            intermediate_size=self.ffn,
            image_tokens=image_tokens,
            text_slots=TEXT_SLOTS,
            image_positions=False,
            identity=options.identity,
            semantic=options.semantic,
            token_moe=token,
            sequence_moe=None if options.dense else SequenceMoEConfig(),
        )


@torch.no_grad()
def build(
    config: UniF2aceConfig, weights: Weights, prefix: str, sizes: Sizes, rows: int, seed: int = 0
) -> UniF2aceForConditionalGeneration:
    """Our transformer with the backbone's weights, `rows` of its vocabulary, and experts that change nothing yet.

    What the backbone has not (routers, resamplers, further vocabulary rows) is drawn from `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UniF2aceForConditionalGeneration(config).eval()
    model.embedding.weight[:rows] = weights[f"{prefix}model.embed_tokens.weight"][:rows]
    model.head.weight[:rows] = weights[f"{prefix}lm_head.weight"][:rows]
    model.head.bias[:rows] = weights[f"{prefix}lm_head.bias"][:rows]

    def take(module: torch.nn.Module, name: str) -> None:
        for kind in ("weight", "bias"):
            getattr(module, kind).copy_(weights[f"{prefix}model.{name}.{kind}"])

    take(model.norm, "final_layernorm")
    for number, block in enumerate(cast(list[Block], list(model.blocks))):
        layer = f"layers.{number}"
        take(block.norm, f"{layer}.input_layernorm")
        take(block.attention.out, f"{layer}.self_attn.dense")
        if sizes.qk_norm:
            take(block.attention.q_norm, f"{layer}.self_attn.q_layernorm")
            take(block.attention.k_norm, f"{layer}.self_attn.k_layernorm")
        for kind in ("weight", "bias"):
            each = [weights[f"{prefix}model.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            getattr(block.attention.qkv, kind).copy_(torch.cat(each))
        ffn = cast(FeedForward, block.ffn)
        take(ffn.w_in, f"{layer}.mlp.fc1")
        take(ffn.w_out, f"{layer}.mlp.fc2")
        if block.experts is not None:
            block.start_from_dense()
        if block.sequence is not None:
            block.sequence.start_as_identity()
    return model


def import_phi(
    path: Path | Weights,
    *,
    text: int | None = None,
    codes: int = 8192,
    image_tokens: int = 256,
    options: Options = Options(),  # noqa: B008  it is frozen
) -> tuple[UniF2aceForConditionalGeneration, list[str]]:
    """Read a PhiForCausalLM.

    Args:
        path: a file of weights, an index of shards, or the folder of either; or those weights, open.
        text: tokens that its tokenizer gives out, the first rows of its vocabulary; None: as many as the
            tokenizer.json beside the weights has, Phi-1.5's 50295 where there is none.
        codes: of the image tokenizer to come. image_tokens: of one face.

    Returns:
        The model, and lines that say what went where.

    Raises:
        UserError: it is not one, whole and of one shape throughout.
    """
    weights = Weights.of(path)
    sizes = Sizes.read(weights, "", "a Phi")
    if text is None:
        beside = find_text_tokenizer(weights.path)
        text = VocabularyConfig().text if beside is None else load_text_tokenizer(beside).size
    if sizes.rows < text:
        raise UserError(
            f"{weights.path}: its vocabulary has {sizes.rows} rows, fewer than the {text} text tokens asked for"
        )
    unplaced = weights.check(sizes.shapes(""), "a Phi", NOT_PLACED)
    config = sizes.config(VocabularyConfig(text, codes), image_tokens, options)
    model = build(config, weights, "", sizes, text)
    told = [
        f"licence: {weights.licence(LICENCE)}",
        *weights.checked,
        f"placed: {sizes.layers} layers, text tokens 0 to {text - 1}",
        f"begun anew: the vocabulary's other {config.vocabulary.size - text} rows",
        f"left: {sizes.rows - text} rows that no text token uses",
    ]
    if not sizes.qk_norm:
        told.append(
            "changed: queries and keys are normalised as in Show-o, which this Phi does not do: train before use"
        )
    return model, told + not_placed(unplaced) + experts_told(config)


def not_placed(names: list[str]) -> list[str]:
    return [f"not placed: {', '.join(names)}"] if names else []


def experts_told(config: UniF2aceConfig) -> list[str]:
    if config.token_moe is None:
        return ["experts: none"]
    return ["experts: beside each FFN, at a start that changes nothing: those of tokens answer zero, of images copy"]
