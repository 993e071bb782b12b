"""Text to token ids and back: byte-level BPE by the `tokenizers` library, so that any text can be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unif2ace.errors import UserError

END = "<|endoftext|>"


class TextTokenizer:
    """A `tokenizers.Tokenizer` with the one special token that begins and ends a text.

    Raises:
        ValueError: `tokenizer` lacks that token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        end = tokenizer.token_to_id(END)
        if end is None:
            raise ValueError(f"tokenizer: expected one with the token {END}, got one without")
        self.tokenizer, self.end = tokenizer, end

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 1024) -> TextTokenizer:
        """Learn at most `size` tokens from `texts`; neither the case of letters nor the kind of space is told apart."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end.

        Raises:
            UserError: there is nothing in it.
        """
        ids = self.tokenizer.encode(text).ids if text.strip() else []
        if not ids:
            raise UserError("the text is empty: write a few words")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, up to the end token."""
        kept = []
        for each in ids:
            if each == self.end:
                break
            if each < self.size:
                kept.append(int(each))
        return self.tokenizer.decode(kept).strip()

    def save(self, path: Path) -> None:
        Path(path).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
