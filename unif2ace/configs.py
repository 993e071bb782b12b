"""Every size and every switch of the model, in one place: `tiny` runs on two CPU cores, `base` is the 1.8B shape.

Sources: the paper (arXiv 2503.08120) for the parts, Show-o's public checkpoint for the backbone's sizes. What the
paper does not publish (experts per group, their width, the balance coefficients) is configuration here.

The paper's ablations are switches, by its tables' names:

    loss     D3Diff, alpha 0.1 / 0.01 / 0.001   loss.alpha
             mask only; score only              loss.alpha = 0; loss.mask = 0
    experts  without token-level MoE            token_moe = None
             without sequence-level MoE         sequence_moe = None
             top-K                              sequence_moe.top_k, token_moe.top_k
             without CLIP; without face         sequence_moe.clip = False; sequence_moe.face = False
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

T2I, MMU = 0, 1  # the two task groups: text to image; multimodal understanding (plain text routes there too)
TASKS = ("t2i", "mmu")


@dataclass(frozen=True)
class VocabularyConfig:
    """One vocabulary for both modalities: text, then ten special tokens, then image codes, then the mask token.

    The order is Show-o's (50295 text tokens, 10 specials, 8192 codes, 1 mask: 58498 in all).
    """

    text: int = 50295
    codes: int = 8192

    @property
    def pad(self) -> int:
        return self.text

    @property
    def start_of_image(self) -> int:
        return self.text + 1

    @property
    def end_of_image(self) -> int:
        return self.text + 2

    @property
    def t2i(self) -> int:
        return self.text + 5

    @property
    def mmu(self) -> int:
        return self.text + 6

    @property
    def code_range(self) -> tuple[int, int]:
        """First image code and one past the last."""
        return self.text + 10, self.text + 10 + self.codes

    @property
    def mask(self) -> int:
        return self.text + 10 + self.codes

    @property
    def size(self) -> int:
        return self.mask + 1


@dataclass(frozen=True)
class TokenMoEConfig:
    """The grouped token-level mixture that stands in place of the FFN, or beside it.

    Attributes:
        dense: the dense FFN stays, common to both tasks, and the experts are added to it. A model that was trained
            without experts goes on from there: experts that answer zero leave its function as it is.
        experts: routed experts of each task group, (t2i, mmu).
        top_k: routed experts that a token uses.
        width: FFN width of one routed expert.
        shared_width: width of each group's always-on shared expert; 0 for none.
        balance: coefficient of each group's balance loss, the paper's lambda_t2i and lambda_mmu.
    """

    experts: tuple[int, int] = (4, 4)
    top_k: int = 2
    width: int = 128
    shared_width: int = 128
    dense: bool = False
    balance: tuple[float, float] = (0.01, 0.01)


@dataclass(frozen=True)
class SequenceMoEConfig:
    """The grouped sequence-level mixture over one sample's image tokens: t2i {copy, zero, noise, copy}, mmu {CLIP,
    face, copy, copy}.

    Attributes:
        top_k: experts that a sample uses (2 is best in the paper's ablation).
        balance: coefficient of each group's balance loss.
        clip, face: whether those two experts exist (an ablation of the paper); without one a copy takes its place.
        latents: key/value tokens that an encoder's features become inside the resampler.
    """

    top_k: int = 2
    balance: tuple[float, float] = (0.01, 0.01)
    clip: bool = True
    face: bool = True
    latents: int = 8


@dataclass(frozen=True)
class LossConfig:
    """The training loss: t2i * D3Diff + mmu * next token on faces + lm * next token on plain text + balance losses.

    Attributes:
        alpha: weight of D3Diff's score term, 0.01 in the paper; 0 leaves masked prediction only.
        mask: weight of D3Diff's masked-prediction term; 0 leaves the score term only (an ablation of the paper).
        score: the reading of the score term, see `unif2ace_kernels.d3diff`.
        schedule: mask schedule of the forward process.
        max_weight: clamp of the score term's per-token weight m'/m.
    """

    alpha: float = 0.01
    mask: float = 1.0
    score: str = "radd"
    schedule: str = "cosine"
    max_weight: float | None = None
    t2i: float = 1.0
    mmu: float = 1.0
    lm: float = 0.1


LARGEST_DEPTH = 1000
FLOATS = ("bfloat16", "float16", "float32", "float64")
NESTED: dict[str, type] = {
    "vocabulary": VocabularyConfig,
    "token_moe": TokenMoEConfig,
    "sequence_moe": SequenceMoEConfig,
    "loss": LossConfig,
}
# What transformers itself hands to a config beside the fields.
_PASSED = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "pad_token_id", "quantization_config", "torch_dtype", "vocab_size",
}  # fmt: skip


class UniF2aceConfig(PreTrainedConfig):
    """The unified transformer.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads: width, depth, attention heads.
        partial_rotary_factor: share of each head's channels that rotary position embedding turns.
        rope_theta: its base.
        parallel_block: attention and FFN read one LayerNorm (Phi, Show-o) instead of two in turn.
        intermediate_size: width of the dense FFN, where there is one: `token_moe` is None or has `dense`.
        image_tokens: image codes of one face.
        text_slots: positions before <soi> in a t2i sequence, the <t2i>, begin and end tokens included.
        image_positions: a learned embedding of each image position, added to its code's (Show-o has none).
        identity, semantic: channels of the identity embedding and of the semantic (CLIP-slot) features.
        semantic_source: what gives the semantic features: "clip", an encoder outside the model, or "image_tokenizer",
            whose latents stand in for one.
        token_moe, sequence_moe: the two levels of experts; None leaves one out.
        vocabulary, loss: see `VocabularyConfig` and `LossConfig`.
        initializer_range: standard deviation of fresh weights.
        image_tokenizer: ``{"kind": "lfq" or "magvit", ...its sizes}`` where the model carries its image tokenizer.
        eos_token_id: the text tokenizer's end-of-text token, which also begins a text.

    Parts may be given as dicts. `vocab_size` and `pad_token_id` follow from `vocabulary`.

    Raises:
        ValueError: an unknown key, a size that cannot be or a dtype that weights cannot have; it is named.
    """

    model_type = "unif2ace"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    hidden_size: int = 192
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    intermediate_size: int = 768
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    parallel_block: bool = False
    image_tokens: int = 64
    text_slots: int = 32
    image_positions: bool = True
    identity: int = 128
    semantic: int = 10
    semantic_source: str = "clip"
    token_moe: TokenMoEConfig | None = field(default_factory=TokenMoEConfig)
    sequence_moe: SequenceMoEConfig | None = field(default_factory=SequenceMoEConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    image_tokenizer: dict[str, Any] | None = None
    eos_token_id: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(key for key in kwargs if key not in _PASSED and not key.startswith("_"))
        if unknown:
            known = sorted(each.name for each in dataclasses.fields(self) if each.name in type(self).__annotations__)
            raise ValueError(f"config: expected the keys {known}, got also {unknown}")
        for name, kind in NESTED.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, _part(name, kind, value))
            elif not isinstance(value, kind) and not (value is None and name.endswith("_moe")):
                raise ValueError(f"config.{name}: expected a {kind.__name__} or a dict of its fields, got {value!r}")
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_tokens")
        for name in (*sizes, "text_slots", "identity", "semantic"):
            value, least = getattr(self, name), 3 if name == "text_slots" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"config.{name}: expected an integer of at least {least}, got {value!r}")
        if self.num_hidden_layers > LARGEST_DEPTH:  # each is built before a weight is read
            expected = f"at most {LARGEST_DEPTH}"
            raise ValueError(f"config.num_hidden_layers: expected {expected}, got {self.num_hidden_layers}")
        if self.semantic_source not in ("clip", "image_tokenizer"):
            raise ValueError(f"config.semantic_source: expected clip or image_tokenizer, got {self.semantic_source!r}")
        if self.hidden_size % self.num_attention_heads:
            expected = f"a divisor of hidden_size {self.hidden_size}"
            raise ValueError(f"config.num_attention_heads: expected {expected}, got {self.num_attention_heads}")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"config.partial_rotary_factor: expected one in (0, 1], got {self.partial_rotary_factor}")
        dtype = kwargs.get("torch_dtype") if self.dtype is None else self.dtype
        if dtype is not None and (dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")) not in FLOATS:
            raise ValueError(f"config.dtype: expected one of {', '.join(FLOATS)}, got {dtype!r}")
        for name, value in (("vocab_size", self.vocabulary.size), ("pad_token_id", self.vocabulary.pad)):
            if kwargs.get(name, value) != value:
                raise ValueError(f"config.{name}: expected {value}, as the vocabulary has it, got {kwargs[name]}")
            kwargs[name] = value
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(cls, vocabulary: VocabularyConfig, **changes: Any) -> UniF2aceConfig:
        """The demo's model, minutes on two CPU cores; `vocabulary` is what its tokenizers need."""
        return cls(vocabulary=vocabulary, **changes)

    @classmethod
    def base(cls, **changes: Any) -> UniF2aceConfig:
        """The paper's 1.8B shape, 256 px: Show-o's backbone of 1.45 B, dense FFNs included, and experts beside them.

        `unif2ace info base` counts its parameters part by part, and those that a token uses.
        """
        sizes: dict[str, Any] = {
            "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "parallel_block": True,
            "intermediate_size": 8192, "image_tokens": 256, "text_slots": 129, "image_positions": False,
            "identity": 512, "semantic": 1024, "eos_token_id": 50256,
            "token_moe": TokenMoEConfig(experts=(4, 4), top_k=2, width=384, shared_width=0, dense=True),
        }  # fmt: skip
        return cls(**(sizes | changes))

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def replace(self, **changes: Any) -> UniF2aceConfig:
        """A copy with other values."""
        own = {name: getattr(self, name) for name in type(self).__annotations__ if hasattr(self, name)}
        return type(self)(**(own | changes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UniF2aceConfig) and self._values() == other._values()

    def _values(self) -> dict[str, Any]:
        values = self.to_dict()
        return {key: values[key] for key in values if key not in ("transformers_version", "_name_or_path")}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as stored in config.json."""
        plain = super().to_dict()
        for name in NESTED:
            if dataclasses.is_dataclass(plain[name]):
                values = dataclasses.asdict(plain[name])
                plain[name] = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        return plain


def _part(name: str, kind: type, given: dict[str, Any]) -> Any:
    known = [each.name for each in dataclasses.fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"config.{name}: expected the keys {sorted(known)}, got also {unknown}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
