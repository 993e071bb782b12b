"""Every size and every switch of the model, in one place: `tiny` runs on two CPU cores, `base` is the 1.8B shape.

Sources: the paper (arXiv 2503.08120) for the parts, Show-o's public checkpoint for the backbone's sizes. What the
paper does not publish (experts per group, their width, the balance coefficients) is configuration here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

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
    """The grouped token-level mixture that stands in place of the FFN.

    Attributes:
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
    """The training loss: t2i * D3Diff + mmu * next-token + balance losses.

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


@dataclass(frozen=True)
class ModelConfig:
    """The unified transformer.

    Attributes:
        hidden, layers, heads: width, depth, attention heads.
        rotary: share of each head's channels that rotary position embedding turns.
        parallel_block: attention and FFN read one LayerNorm (Phi, Show-o) instead of two in turn.
        ffn: width of the dense FFN where `token_moe` is None.
        image_tokens: image codes of one face.
        text_slots: positions before <soi> in a t2i sequence, the <t2i>, begin and end tokens included.
        image_positions: a learned embedding of each image position, added to its code's (Show-o has none).
        identity, semantic: channels of the identity embedding and of the semantic (CLIP-slot) features.
    """

    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    hidden: int = 192
    layers: int = 3
    heads: int = 3
    rotary: float = 0.5
    parallel_block: bool = False
    ffn: int = 768
    image_tokens: int = 64
    text_slots: int = 32
    image_positions: bool = True
    identity: int = 128
    semantic: int = 10
    token_moe: TokenMoEConfig | None = field(default_factory=TokenMoEConfig)
    sequence_moe: SequenceMoEConfig | None = field(default_factory=SequenceMoEConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    @classmethod
    def tiny(cls, vocabulary: VocabularyConfig) -> ModelConfig:
        """The demo's model, minutes on two CPU cores; `vocabulary` is what its tokenizers need."""
        return cls(vocabulary=vocabulary)

    @classmethod
    def base(cls) -> ModelConfig:
        """The paper's 1.8B shape on Show-o's backbone, 256 px: 1.80 B parameters, 1.05 B of them used by a token."""
        return cls(
            hidden=2048, layers=24, heads=32, parallel_block=True, ffn=8192, image_tokens=256, text_slots=129,
            image_positions=False, identity=512, semantic=1024,
            token_moe=TokenMoEConfig(experts=(8, 8), top_k=4, width=512, shared_width=1536),
        )  # fmt: skip

    def to_dict(self) -> dict:
        """Nested plain values, as stored in a checkpoint's config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The inverse of `to_dict`; lists become tuples again."""
        nested: dict[str, type] = {
            "vocabulary": VocabularyConfig,
            "token_moe": TokenMoEConfig,
            "sequence_moe": SequenceMoEConfig,
            "loss": LossConfig,
        }

        def arguments(kind: type, given: dict) -> dict:
            known = {each.name for each in dataclasses.fields(kind)}
            unknown = sorted(set(given) - known)
            if unknown:
                raise ValueError(f"config: expected the keys {sorted(known)}, got also {unknown}")
            return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

        present = {key: kind for key, kind in nested.items() if values.get(key) is not None}
        parts = {key: kind(**arguments(kind, values[key])) for key, kind in present.items()}
        return cls(**arguments(cls, {**values, **parts}))
