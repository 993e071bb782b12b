"""The unified transformer: one token sequence, full-and-causal attention, two levels of grouped experts, two losses.

x = tokens (+ image positions)
each block:   x += attention(norm(x))
              x += ffn and experts(norm(x))               grouped token-level MoE, by the row's task
              x[image] = sequence experts(x[image])       grouped sequence-level MoE, by the row's task
head(norm(x)) over one vocabulary: text, specials, image codes, mask
loss = t2i * D3Diff(masked codes) + mmu, lm * next token (answers, plain text) + balance losses of every router

A transformers model: from_pretrained, save_pretrained, generate (text), gradient checkpointing; and `generate_image`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from unif2ace.configs import MMU, UniF2aceConfig
from unif2ace.model.attention import positions, rotary_table
from unif2ace.model.balance import Routers, balance_loss
from unif2ace.model.blocks import Block, Context, at_rows
from unif2ace.model.image_tokenizer import ImageTokenizer
from unif2ace.model.image_tokenizers import build_image_tokenizer, describe_image_tokenizer
from unif2ace.model.losses import training_loss
from unif2ace.model.magvit import Magvit
from unif2ace.model.painting import PaintSettings, paint_prompts
from unif2ace.model.sequence_moe import EXPERTS, Injection, Resampler, SequenceMoE
from unif2ace.model.sequences import Batch, Layout, Shares
from unif2ace.model.visibility import Visibility
from unif2ace_kernels import moe, sampling


@dataclass
class UniF2aceOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: the training loss, where labels were given; `terms`: what it is made of, detached scalars: ``mask`` and
            ``score`` of D3Diff, ``mmu``, ``lm``, ``balance``, and ``mask_accuracy`` and ``mmu_accuracy``, the shares
            of targets that the model ranks first.
        logits: [B, L or logits_to_keep, V] where no labels were given (the loss never makes them).
        past_key_values: with use_cache.
        last_hidden_state: [B, L, D] after the last norm.
        token_routings, sequence_routings: each layer's `Routing`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] | None = None
    token_routings: tuple[moe.Routing, ...] | None = None
    sequence_routings: tuple[moe.Routing, ...] | None = None


class TextOnly(LogitsProcessor):
    """No special token and no image code is said."""

    def __init__(self, text: int) -> None:
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(self.text, scores.shape[1], device=scores.device), -math.inf)


class UniF2aceForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model of `config`, randomly initialised (normal; projections into the residual stream smaller).

    `image_tokenizer` is its (frozen) image tokenizer where the config has one. `balance_group`: the ranks whose batches
    are balanced as one, see `unif2ace.model.balance`.
    """

    config_class = UniF2aceConfig
    config: UniF2aceConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = True
    balance_group: ProcessGroup | None = None
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__(config)
        size = config.vocabulary.size
        self.embedding = nn.Embedding(size, config.hidden_size)
        self.image_position = (
            nn.Parameter(torch.zeros(config.image_tokens, config.hidden_size)) if config.image_positions else None
        )
        self.injection = Injection(config) if config.sequence_moe is not None else None
        blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, size)
        self.rotary_channels = int(config.partial_rotary_factor * config.head_dim) // 2 * 2
        self._into_residual = {block.attention.out for block in blocks}
        self.post_init()
        self.image_tokenizer: ImageTokenizer | Magvit | None = None
        if config.image_tokenizer is not None:
            self.set_image_tokenizer(build_image_tokenizer(config.image_tokenizer))

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            adds = module in self._into_residual  # as many of these as layers add up: each starts smaller
            init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers) if adds else std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Resampler):
            init.normal_(module.queries, std=std)
        elif isinstance(module, SequenceMoE):
            init.zeros_(module.gate)
            module.fill_buffers()
        elif isinstance(module, moe.GroupedMoE):
            init.normal_(module.router_weight, std=0.02)
            for weight in (module.experts_w_in, module.experts_w_out):
                init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            for bias in (module.experts_b_in, module.experts_b_out):
                if bias is not None:
                    init.zeros_(bias)
        elif module is self and self.image_position is not None:
            init.zeros_(self.image_position)

    def set_image_tokenizer(self, tokenizer: ImageTokenizer | Magvit) -> None:
        """Carry this image tokenizer, frozen, and say so in the config."""
        self.image_tokenizer = tokenizer.requires_grad_(False).eval()
        self.config.image_tokenizer = describe_image_tokenizer(tokenizer)

    def train(self, mode: bool = True) -> UniF2aceForConditionalGeneration:
        """As nn.Module's; the image tokenizer stays as it is, and frozen (`from_pretrained` makes its weights anew)."""
        super().train(mode)
        tokenizer = getattr(self, "image_tokenizer", None)
        if tokenizer is not None:
            tokenizer.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = cast(nn.Linear, new_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        task: torch.Tensor | None = None,
        image_start: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mask_prob: torch.Tensor | None = None,
        identity: torch.Tensor | None = None,
        semantic: torch.Tensor | None = None,
        layout: Layout | None = None,
        shares: Shares | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> UniF2aceOutput:
        """Hidden states, and the loss where there are labels, else logits.

        Args:
            input_ids, ..., shares: as in `Batch`. Rows are plain text unless `task` and `image_start` say otherwise;
                where no row has an image the others may be left out.
            pixel_values: [B, 3, side, side] in [-1, 1], faces of which the image tokenizer makes the codes (and the
                semantic features, where the config says so) before anything else.
            past_key_values: of the positions before; `input_ids` are then text that goes on, [B, L], and
                `attention_mask` [B, past + L] covers both.
            logits_to_keep: logits of the last so many positions only, 0 for all.

        Raises:
            ValueError: an argument is unknown or of the wrong shape, or an image comes without what it needs.
        """
        unknown = sorted(set(kwargs) - {"return_dict", "output_attentions", "output_hidden_states"})
        if unknown:
            raise ValueError(f"expected the fields of Batch, got also {unknown}")
        rows, length = input_ids.shape
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(rows, past + length, dtype=torch.bool)
        if tuple(attention_mask.shape) != (rows, past + length):
            raise ValueError(
                f"attention_mask: expected the shape {[rows, past + length]}, got {list(attention_mask.shape)}"
            )
        attention_mask = attention_mask.bool()
        task = input_ids.new_full((rows,), MMU) if task is None else task
        image_start = input_ids.new_full((rows,), -1) if image_start is None else image_start
        use_cache = use_cache or past_key_values is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past:
            if labels is not None:
                raise ValueError("past_key_values: expected None where there are labels")
            x = self.embedding(input_ids)
            context = self._text_context(attention_mask, task, image_start, length)
        else:
            layout = layout or Layout.of(attention_mask, task, image_start)
            if pixel_values is not None:
                input_ids, semantic = self._see(input_ids, image_start, pixel_values, semantic)
            mask_prob = self._mask_prob(input_ids, image_start) if mask_prob is None else mask_prob
            x, context = self._context(
                self.embedding(input_ids), attention_mask, task, image_start, layout, mask_prob, identity, semantic
            )
        output = UniF2aceOutput(past_key_values=past_key_values)
        by_layer = []
        for block in self.blocks:
            x, *routings = block(x, context, past_key_values=past_key_values)
            by_layer.append(routings)
        output.token_routings, output.sequence_routings = (
            tuple(each for each in level if each is not None) for level in zip(*by_layer)
        )
        x = output.last_hidden_state = self.norm(x)
        if labels is None:
            output.logits = self.head(x[:, -logits_to_keep:])
        elif layout is not None and mask_prob is not None:  # as they are wherever there may be labels
            balance = balance_loss(self.routers(output), self.balance_group)
            output.loss, output.terms = training_loss(
                self.config, self.head, x, labels, task, image_start, layout, mask_prob, balance, shares
            )
        return output

    def _image_index(self, image_start: torch.Tensor) -> torch.Tensor:
        """[B, N] positions of the image tokens; the first N in a row without an image."""
        return image_start.clamp(min=0)[:, None] + torch.arange(self.config.image_tokens, device=image_start.device)

    @torch.no_grad()
    def _see(
        self,
        input_ids: torch.Tensor,
        image_start: torch.Tensor,
        pixel_values: torch.Tensor,
        semantic: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows with the codes of their faces, and the faces' semantic features."""
        if self.image_tokenizer is None:
            raise ValueError("pixel_values: expected codes in input_ids, this model has no image tokenizer; got pixels")
        codes, features = self.image_tokenizer.encode(pixel_values)
        codes = codes + self.config.vocabulary.code_range[0]
        if semantic is None and self.config.semantic_source == "image_tokenizer":
            semantic = features
        return input_ids.scatter(1, self._image_index(image_start), codes), semantic

    def _mask_prob(self, input_ids: torch.Tensor, image_start: torch.Tensor) -> torch.Tensor:
        """[B] share of a row's image tokens that are masked, read off the row."""
        if input_ids.shape[1] < self.config.image_tokens:
            return torch.zeros(len(input_ids), device=input_ids.device)
        codes = input_ids.gather(1, self._image_index(image_start))
        return (codes == self.config.vocabulary.mask).float().mean(1)

    def _context(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor,
        task: torch.Tensor,
        image_start: torch.Tensor,
        layout: Layout,
        mask_prob: torch.Tensor,
        identity: torch.Tensor | None,
        semantic: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Context]:
        """Of a whole batch; and x with the image positions added."""
        config, length = self.config, x.shape[1]
        rows = layout.images
        has_images = rows is None or len(rows) > 0
        image = injected = None
        if has_images:
            image = self._image_index(image_start if rows is None else image_start[rows])
            if self.image_position is not None:
                added = self.image_position.to(x.dtype).expand(len(image), -1, -1)
                index = image[:, :, None].expand_as(added)
                if rows is None:
                    x = x.scatter_add(1, index, added)
                else:
                    x = x.index_add(0, rows, torch.zeros_like(x[rows]).scatter(1, index, added))
        if has_images and self.injection is not None:
            needed = {"identity": (identity, self.injection.face), "semantic": (semantic, self.injection.clip)}
            for name, (value, expert) in needed.items():
                if value is None and expert is not None and len(layout.mmu):
                    raise ValueError(f"{name}: expected the features of every face that is asked about, got None")
            given = mask_prob, identity, semantic
            injected = self.injection(layout, *(each if each is None or rows is None else each[rows] for each in given))
        table = rotary_table(positions(attention_mask, task), self.rotary_channels, config.rope_theta)
        context = Context(
            visibility=Visibility(attention_mask, task, image_start, config.image_tokens),
            attention=config._attn_implementation or "sdpa",
            table=table,
            real=layout.real,
            real_task=task[layout.real // length] if layout.real is not None else task.repeat_interleave(length),
            rows=rows,
            image_task=task if rows is None else task[rows],
            image=image,
            injected=injected,
        )
        return x, context

    def _text_context(
        self, attention_mask: torch.Tensor, task: torch.Tensor, image_start: torch.Tensor, length: int
    ) -> Context:
        """Of `length` more text tokens a row, after what a cache holds."""
        place = positions(attention_mask, task)[:, -length:]
        return Context(
            visibility=Visibility(attention_mask, task, image_start, self.config.image_tokens, length),
            attention=self.config._attn_implementation or "sdpa",
            table=rotary_table(place, self.rotary_channels, self.config.rope_theta),
            real=None,
            real_task=task.repeat_interleave(length),
            rows=None,
            image_task=task,
            image=None,
            injected=None,
        )

    def routers(self, output: UniF2aceOutput) -> tuple[Routers, Routers]:
        """The token level's and the sequence level's, a layer each, with what they chose in a forward pass."""
        token, sequence = self.config.token_moe, self.config.sequence_moe
        sizes = [len(names) for names in EXPERTS]
        return (
            Routers(output.token_routings or (), token.experts if token else (), token.balance if token else ()),
            Routers(output.sequence_routings or (), sizes, sequence.balance if sequence else ()),
        )

    def image_hidden(self, last_hidden_state: torch.Tensor, image_start: torch.Tensor) -> torch.Tensor:
        """Hidden states at the image positions, [B, N, D]."""
        return at_rows(last_hidden_state, self._image_index(image_start))

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Text that goes on from each row: transformers' `generate`, held to text tokens.

        Rows are those of `UniF2aceProcessor` with their tensors (left-padded, so that all end together); in a batch
        each gets what it gets alone.
        """
        processors = [TextOnly(self.config.vocabulary.text), *(kwargs.pop("logits_processor", None) or [])]
        kwargs["logits_processor"] = LogitsProcessorList(processors)
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def generate_image(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor | None = None,
        on_step: Callable[[sampling.Step], None] | None = None,
        output_codes: bool = False,
        **settings: Any,
    ) -> torch.Tensor:
        """Faces from prompts.

        Args:
            input_ids: [B, L] rows of `UniF2aceProcessor` for text-to-image, or their first `text_slots` alone.
            codes: [B, N] what is known of the faces, -1 where it is to be painted; nothing when None.
            on_step: called after every step.
            output_codes: give the codes, and decode nothing.
            settings: fields of `unif2ace.model.painting.PaintSettings`: steps, guidance, seed, ...; what else a
                processor gives beside `input_ids` is passed over.

        Returns:
            [B, 3, side, side] in [-1, 1]; or codes [B, N] from 0.

        Raises:
            ValueError: rows too short for a prompt, an unknown setting, or nothing to decode codes with.
        """
        settings = {name: value for name, value in settings.items() if name not in Batch.__dataclass_fields__}
        unknown = sorted(settings.keys() - PaintSettings.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(f"expected the settings {sorted(PaintSettings.__dataclass_fields__)}, got also {unknown}")
        slots = self.config.text_slots
        if input_ids.shape[1] < slots:
            raise ValueError(f"input_ids: expected at least {slots} tokens a row, got {input_ids.shape[1]}")
        tokenizer = self.image_tokenizer
        if tokenizer is None and not output_codes:
            raise ValueError("output_codes: expected True, as this model has no image tokenizer; got False")
        painted = paint_prompts(self, input_ids[:, :slots], PaintSettings(**settings), on_step, codes)
        return painted if tokenizer is None or output_codes else tokenizer.decode(painted)
