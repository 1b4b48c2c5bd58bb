"""Labels of features of language models: the tokens at which they are largest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recipes.checkpoint import load_tokenizer

# White space as it can be seen.
_VISIBLE = {"\n": "⏎", "\t": "⇥", " ": "␣"}


@dataclass
class TokenLabels:
    """Labels features of a language model with the tokens at which they are furthest from their mean.

    The sign of a feature is free: of both ends, the one with the larger values is taken.

    Args:
        tokenizer: A checkpoint whose tokenizer to use, as for `recipes.checkpoint.load_tokenizer`; None if tokens are
            bytes.
        count: Number of different tokens in a label.
        places: Number of places that are looked at, those with the largest values. Tokens that are there more often
            come first.

    Example:
        >>> import torch
        >>> feature = torch.tensor([[[0.0], [3.0], [-1.0]], [[2.0], [0.0], [4.0]]])
        >>> TokenLabels(places=3)(feature, torch.tensor([list(b"abc"), list(b"def")]))
        ['f b d']
    """

    tokenizer: str | None = None
    count: int = 3
    places: int = 10

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Label the features of one node layer, as a `lib_lightning.labels.Labeller`."""
        if inputs.shape[:2] != features.shape[:2]:  # positions are not those of tokens
            return [""] * features.shape[2]
        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        return [self._label(f, inputs.flatten(), tokenizer) for f in features.flatten(0, 1).unbind(1)]

    def _label(self, feature: Tensor, tokens: Tensor, tokenizer: Any) -> str:
        if feature.max() < -feature.min():
            feature = -feature
        largest = feature.argsort(descending=True)[: self.places]
        # Those of equal counts stay in the order of their values.
        found = Counter(readable(int(token), tokenizer) for token in tokens[largest[feature[largest] > 0]])
        return " ".join(token for token, _ in found.most_common(self.count))


def readable(token: int, tokenizer: Any) -> str:
    """A token as text, without the space before a word, and with white space that can be seen.

    Args:
        token: The token.
        tokenizer: Its tokenizer; None if it is a byte.

    Example:
        >>> readable(10, None), readable(32, None), readable(ord("k"), None)
        ('⏎', '␣', 'k')
    """
    text = chr(token) if tokenizer is None else tokenizer.decode([token])
    text = text.strip(" ") or "␣"
    return "".join(map(_seen, text.replace("\n", ""))) or "⏎"


def _seen(character: str) -> str:
    # Other control characters as they are written in Python.
    return _VISIBLE.get(character) or (character if character.isprintable() else ascii(character)[1:-1])
