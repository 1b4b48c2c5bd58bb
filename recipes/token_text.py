"""How pieces of text look: their tokens, by the tokenizer of a checkpoint, or as bytes."""

from __future__ import annotations

from lib_lightning.features import TokenRenderer
from recipes.checkpoint import load_tokenizer


class TokensOf(TokenRenderer):
    """Shows the tokens of a sample, and names the model's outputs by them.

    Args:
        tokenizer: A checkpoint whose tokenizer to use, as for `recipes.checkpoint.load_tokenizer`; None if tokens are
            bytes, which they also are where the checkpoint has none.

    Example:
        >>> TokensOf().text(ord("k"))
        'k'
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        found = None if tokenizer is None else load_tokenizer(tokenizer)
        super().__init__("bytes" if found is None else found)
