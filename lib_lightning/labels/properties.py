"""What is known of samples and positions without knowledge of the task: tokens, classes, columns, places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lib_lightning.errors import LIBError
from lib_lightning.labels.candidates import Codes, Contained, Kind, Numbers
from lib_lightning.labels.labeller import FeatureSamples

# Wider vectors are not taken for the columns of a table, nor longer sequences for a few fields with one position.
_MAX_COLUMNS, _MAX_FIELDS = 1024, 16


@dataclass(frozen=True)
class Texts:
    """How properties are called.

    Attributes:
        token: From a token to a text; None if only its number is known.
        columns: Names of columns; None to number them.
        classes: From a class to a text.
        image: Height and width of images that are given as vectors of their pixels; None for none.
    """

    token: Callable[[int], str] | None = None
    columns: Sequence[str] | None = None
    classes: Callable[[int], str] = str
    image: tuple[int, int] | None = None


def properties(samples: FeatureSamples, texts: Texts) -> list[Kind]:
    """Everything that may name a feature of a node layer.

    Args:
        samples: The samples.
        texts: How properties are called.

    Returns:
        Candidates by kind.
    """
    x, found = samples.inputs, list[Kind]()
    P, S = samples.positions.shape[1], samples.num_positions
    if samples.classes is not None:
        distinct, codes = samples.classes.unique(return_inverse=True)
        numbers = distinct.tolist()
        found.append(
            Codes(codes[:, None], lambda k: "class " + ", ".join(texts.classes(numbers[i]) for i in sorted(k)), True)
        )
    if samples.targets is not None:
        found.append(_numbers(samples.targets[:, None, None], ["target"], True))
    if not x.is_floating_point() and x.ndim <= 2:
        found += _of_tokens(x.reshape(len(x), -1), samples, texts.token)
    elif x.ndim == 2 and x.shape[1] <= _MAX_COLUMNS:
        found.append(Numbers(x[:, None].float().nan_to_num(0.0), _columns(x.shape[1], texts), True))
    elif x.ndim == 3:
        found += _of_series(x, samples)
    elif x.ndim == 4:
        found += _of_images(x, samples)
    if S > 1 and P > 1 and x.ndim < 4:
        place = samples.positions.float()[..., None]
        found += [Codes(samples.positions, _place_name), Numbers(place, [("late position", "early position")])]
    return found


def _numbers(values: Tensor, names: Sequence[str], of_samples: bool = False) -> Numbers:
    return Numbers(values.float().nan_to_num(0.0), _both(names), of_samples)


def _both(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"large {name}", f"small {name}") for name in names]


def _columns(count: int, texts: Texts) -> list[tuple[str, str]]:
    """What large and small values of each column are called."""
    if texts.columns is not None:
        if len(texts.columns) != count:
            raise LIBError(f"The columns of the table are {count}, and {len(texts.columns)} names are given for them.")
        return _both(texts.columns)
    if texts.image is not None and math.prod(texts.image) == count:
        pixels = [f"pixel ({i // texts.image[1]}, {i % texts.image[1]})" for i in range(count)]
        return [(f"bright {pixel}", f"dark {pixel}") for pixel in pixels]
    return _both([f"column {i}" for i in range(count)])


def _place_name(places: Sequence[int]) -> str:
    return f"position{'s' * (len(places) > 1)} " + ", ".join(map(str, sorted(places)))


def _of_tokens(tokens: Tensor, samples: FeatureSamples, text: Callable[[int], str] | None) -> list[Kind]:
    """The token at a position, before and after it, and anywhere in the sample; what kind of text it is."""
    distinct, codes = tokens.unique(return_inverse=True)
    ids, (n, T) = distinct.tolist(), tokens.shape
    if ids[0] < 0:  # padding, which comes first among the distinct ones
        ids, codes = ids[1:], codes - 1

    def quoted(k: int) -> str:
        return f"“{ids[k] if text is None else text(ids[k])}”"

    def named(before: str = "") -> Callable[[Sequence[int]], str]:
        return lambda values: before + " ".join(map(quoted, values))

    found: list[Kind] = []
    if samples.num_positions == T and T > 1:
        none = torch.full((n, 1), -1, device=codes.device)
        at = samples.positions
        here = codes.gather(1, at)
        found += [
            Codes(here, named()),
            Codes(torch.cat([none, codes], 1).gather(1, at), named("after ")),
            Codes(torch.cat([codes, none], 1).gather(1, at + 1), named("before ")),
        ]
        if text is not None:
            of_kind = torch.tensor(
                [[bool(test(text(i))) for test in _TEXTS.values()] for i in ids], device=codes.device
            )
            found.append(Numbers(of_kind[here].float(), [(name, f"no {name}") for name in _TEXTS]))
    if T == 1:
        found.append(Codes(codes, named(), True))
    elif T <= _MAX_FIELDS:
        fields = codes + len(ids) * torch.arange(T, device=codes.device)
        found.append(Contained.of(fields, lambda k: f"{quoted(k % len(ids))} at position {k // len(ids)}"))
    if T > 1:
        found.append(Contained.of(codes, lambda k: f"samples with {quoted(k)}"))
    return found


# As renderers show them.
_LINE_ENDS = ("↵", "␍", "⇥", "⏎")
_TEXTS: dict[str, Callable[[str], bool]] = {
    "digit": lambda text: any(map(str.isdigit, text)),
    "capital letter": lambda text: any(map(str.isupper, text)),
    "letter": lambda text: any(map(str.isalpha, text)),
    "white space": lambda text: not text.strip() or text.strip(" ") in _LINE_ENDS,
    "punctuation": lambda text: bool(text.strip()) and not any(map(str.isalnum, text)),
    "start of a word": lambda text: len(text) > 1 and text[0] == " " and text[1].isalpha(),
}


def _of_series(x: Tensor, samples: FeatureSamples) -> list[Kind]:
    """The channels of a series, or of vectors at each position: at the position, and their means over the sample."""
    S = samples.num_positions
    if x.shape[1] != S and x.shape[2] == S:
        x = x.transpose(1, 2)
    if x.shape[2] > _MAX_COLUMNS:
        return []
    names = [f"channel {i}" for i in range(x.shape[2])]
    found: list[Kind] = [_numbers(x.float().mean(1, keepdim=True), [f"mean of {name}" for name in names], True)]
    if x.shape[1] == S and S > 1:
        at = samples.positions[..., None].expand(-1, -1, x.shape[2])
        found.append(_numbers(x.gather(1, at), names))
    return found


def _of_images(x: Tensor, samples: FeatureSamples) -> list[Kind]:
    """Brightness and colours of an image, and, for a feature of a convolution, at its place; and the place."""
    x = x.float()
    x = x.movedim(-1, 1) if x.shape[1] not in (1, 3, 4) and x.shape[-1] in (1, 3, 4) else x
    x = torch.cat([x.mean(1, keepdim=True), x], 1) if x.shape[1] in (3, 4) else x.mean(1, keepdim=True)
    names = ["bright", "red", "green", "blue", "opaque"][: x.shape[1]]
    opposites = ["dark", "no red", "no green", "no blue", "transparent"]
    pairs = [(name, opposite) for name, opposite in zip(names, opposites, strict=False)]
    whole = Numbers(x.mean((2, 3))[:, None], [(f"{a} image", f"{b} image") for a, b in pairs], True)
    height, width = x.shape[2:]
    rows = round(math.sqrt(samples.num_positions * height / width))
    if samples.num_positions == 1 or rows < 1 or samples.num_positions % rows:
        return [whole]
    columns = samples.num_positions // rows
    at = samples.positions
    here = F.adaptive_avg_pool2d(x, (rows, columns)).flatten(2).transpose(1, 2)
    here = here.gather(1, at[..., None].expand(-1, -1, here.shape[2]))
    places = torch.stack([at // columns, at % columns], 2).float()
    return [whole, Numbers(here, pairs), Numbers(places, [("bottom", "top"), ("right", "left")])]
