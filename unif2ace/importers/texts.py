"""Another model's text tokenizer, a tokenizer.json of the `tokenizers` library, taken exactly as it is."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from unif2ace.errors import UserError
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.parsing import reading

TEXT = "tokenizer.json"


def find_text_tokenizer(path: Path) -> Path | None:
    """The tokenizer.json at `path`, or in that folder, or beside that file; None where there is none."""
    path = Path(path)
    for each in (path, path / TEXT, path.parent / TEXT):
        if each.name == TEXT and each.is_file():
            return each
    return None


def load_text_tokenizer(path: Path) -> TextTokenizer:
    """A tokenizer.json, or the one in a folder, exactly as it is.

    Raises:
        UserError: there is none, it is damaged, or it has no end-of-text token.
    """
    file = find_text_tokenizer(path)
    if file is None:
        raise UserError(f"there is no {TEXT} at {path}: name the file, or a folder with it")
    with reading(file, "tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
    try:
        return TextTokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
