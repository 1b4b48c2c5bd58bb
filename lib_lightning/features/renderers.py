"""How a sample looks: renderers turn one sample into JSON that the feature's page shows."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from lib_lightning.errors import LIBError, SettingError, SettingTypeError, brief, counted, quoted, shortened
from lib_lightning.features.sample import Sample

Rendering = dict[str, Any]

# Larger images are stored smaller, in pixels of the longer side: a page shows examples side by side.
_STORED_SIZE = 96
# Points of a line; longer series are stored as means of equally many values.
_POINTS = 1000
_CHANNELS = 16
# White space and others that would not be seen.
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}
# A word in front of a token shows whether the tokenizer puts a space between them.
_WORD = "a"


class Renderer(Protocol):
    """A function, or an object such as `TokenRenderer`, that says how a sample looks.

    Example:
        >>> def first_number(sample: Sample) -> str:
        ...     return f"starts with {sample.input[0]:.1f}"
        >>> renderer: Renderer = first_number
        >>> render(renderer, Sample(None, {"x": torch.tensor([0.5, 2.0])}))
        {'kind': 'text', 'text': 'starts with 0.5'}
    """

    def __call__(self, sample: Sample, /) -> Any:
        """Render one sample.

        Args:
            sample: The sample.

        Returns:
            A text, or one of these, of what JSON can represent:
            ``{"kind": "text", "text": "..."}``;
            ``{"kind": "tokens", "tokens": ["The", " cat"]}``, one for each position;
            ``{"kind": "image", "png": base64, "size": [height, width]}``, of the input, in pixels;
            ``{"kind": "row", "columns": [...], "values": [...]}``;
            ``{"kind": "series", "values": [[...], ...], "length": T}``, a line for each channel.
        """
        ...


def _pair(name: str, value: object) -> tuple[float, ...] | None:
    """A setting that is a number, or one for each channel."""
    if value is None:
        return None
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise SettingTypeError(f"{name} is a number, or one for each channel; got {shortened(repr(value), 80)}.")
    return tuple(numbers)


@dataclass(frozen=True)
class TokenRenderer:
    """Shows samples that are sequences of tokens.

    Padding is not shown: what the mask leaves out, or, without one, the tokenizer's padding at the end. Tokens in front
    of the first valid one are empty, so that each token has the index of its position.

    Args:
        tokenizer: What turns ids into text: a tokenizer of Hugging Face, or its name or folder; anything else with a
            method ``decode``, which takes a list of ids; a function of one id; a list or dict with the text of each;
            ``"bytes"`` if ids are bytes of a text. None shows the ids.

    Raises:
        SettingTypeError: If it is none of these.
        LIBError: If there is no tokenizer of that name.

    Example:
        >>> sample = Sample(None, {"ids": torch.tensor([84, 10, 0])}, torch.tensor([True, True, False]))
        >>> TokenRenderer("bytes")(sample), TokenRenderer(["no", "yes"]).text(1)
        ({'kind': 'tokens', 'tokens': ['T', '↵']}, 'yes')
    """

    tokenizer: Any = None
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _loaded: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        t = self.tokenizer
        if isinstance(t, (list, tuple)):
            object.__setattr__(self, "tokenizer", tuple(t))
        is_known = t is None or isinstance(t, (str, list, tuple, Mapping)) or callable(getattr(t, "decode", None))
        if not is_known and not callable(t):
            raise SettingTypeError(
                f"tokenizer={shortened(repr(t), 80)} cannot turn ids into text: it has no method decode(ids). Give a "
                "tokenizer of Hugging Face or its name, a function of one id, a list of texts, 'bytes', or None for "
                "ids."
            )
        if isinstance(t, str) and t != "bytes":
            self._loaded.append(_load_tokenizer(t))

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be loaded again."""
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in (("tokenizer", state["tokenizer"]), ("_texts", {}), ("_loaded", [])):
            object.__setattr__(self, name, value)

    def __call__(self, sample: Sample, /) -> Rendering:
        """Render the first input of integers."""
        ids = next((t for t in sample.data.values() if not t.is_floating_point() and t.ndim == 1), sample.input)
        if ids.is_floating_point() or ids.ndim > 1:
            raise SettingError(
                f"TokenRenderer shows sequences of integers, and the model's input is {_described(sample)}. Use "
                "another renderer, such as ImageRenderer, TableRenderer or SeriesRenderer."
            )
        ids = ids.reshape(-1)
        start, end = self._valid(ids, sample)
        tokens = [""] * start + [self.text(token) for token in ids[start:end].tolist()]
        if self.tokenizer is None:
            tokens = tokens[:1] + [f" {number}" for number in tokens[1:]]
        return {"kind": "tokens", "tokens": tokens}

    def _valid(self, ids: Tensor, sample: Sample) -> tuple[int, int]:
        """The first valid position, and the one after the last."""
        found = {"": sample.mask, **{name: t for name, t in sample.inputs.items() if "mask" in name.lower()}}
        for name, mask in found.items():
            if mask is not None and mask.shape == ids.shape:
                # PyTorch's own modules have masks of padding, others those of valid positions.
                valid = ((mask != 0) ^ ("padding" in name.lower())).nonzero().flatten()
                return (int(valid[0]), int(valid[-1]) + 1) if len(valid) else (0, 0)
        pad = getattr(self._tokenizer, "pad_token_id", None)
        if pad is None:
            return 0, len(ids)
        content = (ids != pad).nonzero().flatten()
        end = int(content[-1]) + 1 if len(content) else 0
        if pad == getattr(self._tokenizer, "eos_token_id", None):
            end += 1  # the first one ends the text
        return 0, min(end, len(ids))

    @property
    def _tokenizer(self) -> Any:
        if not isinstance(self.tokenizer, str) or self.tokenizer == "bytes":
            return self.tokenizer
        if not self._loaded:
            self._loaded.append(_load_tokenizer(self.tokenizer))
        return self._loaded[0]

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens; None if unknown."""
        if self.tokenizer == "bytes":
            return 256
        return (
            len(self._tokenizer) if hasattr(self._tokenizer, "__len__") else getattr(self._tokenizer, "n_vocab", None)
        )

    def text(self, token: int) -> str:
        r"""A token as text, with white space that can be seen, except for spaces.

        Args:
            token: Its id.

        Returns:
            The text. Bytes that are only a part of a character are shown as ``\xe2``.
        """
        if token not in self._texts:
            found = self._text(token)
            self._texts[token] = "".join(map(_seen, found)) if found else f"⟨{token}⟩"
        return self._texts[token]

    def _text(self, token: int) -> str:
        t = self._tokenizer
        if t is None:
            return str(token)
        if t == "bytes":
            return _from_bytes(bytes([token])) if 0 <= token < 256 else ""
        if isinstance(t, Mapping):
            return str(t.get(token, t.get(str(token), "")))
        if isinstance(t, tuple):
            return str(t[token]) if 0 <= token < len(t) else ""
        return _piece(t, token) if hasattr(t, "decode") else str(t(token))


def _load_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise LIBError(
            f"tokenizer={name!r} is the name of a tokenizer of Hugging Face, and transformers is not installed: "
            "pip install transformers."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise LIBError(f"The tokenizer {name!r} cannot be loaded: {brief(error)}.") from error


def _piece(tokenizer: Any, token: int) -> str:
    """Text of one token, with the space in front of it if it has one."""
    text = _after_a_word(tokenizer, token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    if text is None:
        text = _decoded(tokenizer, token)
    if "\ufffd" in text or not text:
        names = (getattr(tokenizer, name, None) for name in ("convert_ids_to_tokens", "id_to_token", "id_to_piece"))
        name_of = next(filter(callable, names), None)
        if name_of is not None:
            return _from_piece(str(name_of(token)))
        if callable(bytes_of := getattr(tokenizer, "decode_single_token_bytes", None)):
            return _from_bytes(bytes_of(token))
    return text


def _decoded(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    if isinstance(text, (list, tuple)):
        text = "".join(map(str, text))
    if not isinstance(text, (str, bytes)):
        raise SettingTypeError(
            f"decode([{token}]) of {type(tokenizer).__name__} returns {type(text).__name__}, where a string is needed."
        )
    return _from_bytes(text) if isinstance(text, bytes) else text


def _after_a_word(tokenizer: Any, token: int) -> str | None:
    """What a tokenizer of Hugging Face adds to a text for a token, which may begin with a space; None if unclear."""
    try:
        before = tokenizer.encode(_WORD, add_special_tokens=False)[-1:]
        options = {"clean_up_tokenization_spaces": False}
        alone, both = (tokenizer.decode(ids, **options) for ids in (before, [*before, token]))
    except Exception:  # a tokenizer of a class of its own
        return None
    return both[len(alone) :] if both.startswith(alone) else None


def _from_piece(piece: str) -> str:
    """Text of a piece that is no text on its own: bytes as GPT-2 writes them, or as ``<0xE2>``."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return _from_bytes(bytes([int(piece[3:5], 16)]))
    if piece and all(c in _BYTE_OF for c in piece):
        return _from_bytes(bytes(_BYTE_OF[c] for c in piece))
    return piece.replace("▁", " ")


def _from_bytes(data: bytes) -> str:
    return data.decode("utf-8", errors="backslashreplace")


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in vocabularies such as that of GPT-2.

    Printable ones stand for themselves, the others, in their order, for those from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()


def _seen(character: str) -> str:
    # Other control characters as they are written in Python.
    if character == " " or character.isprintable():
        return character
    return _VISIBLE.get(character) or ascii(character)[1:-1]


@dataclass(frozen=True)
class ImageRenderer:
    """Shows samples that are images: of one channel grey, of three in colour, of four with transparency.

    Of any other number of channels, the mean is shown.

    Args:
        mean: What the data set's normalisation has subtracted: a number, or one for each channel. None if unknown:
            values from 0 to 1 (or integers from 0 to 255) are then shown as they are, values from -1 to 1 as if they
            had been doubled and shifted, and of any others the image's own smallest value is black and its largest
            white.
        std: What it has divided by.
        shape: Shape of an image, ``(C, H, W)`` or ``(H, W)``, where samples are vectors of its pixels.
        channels_last: Whether images are ``(H, W, C)``. None finds out by their shape.

    Raises:
        SettingError: If only one of mean and std is given, or they differ in length.
        SettingTypeError: If they are not numbers.

    Example:
        >>> ImageRenderer()(Sample(None, {"x": torch.rand(3, 4, 5)}))["size"]
        [4, 5]
    """

    mean: Any = None
    std: Any = None
    shape: Sequence[int] | None = None
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        mean, std = _pair("mean", self.mean), _pair("std", self.std)
        if (mean is None) != (std is None) or (mean and std and len({1, len(mean), len(std)}) > 2):
            raise SettingError(
                f"mean and std belong together, with as many numbers; got {self.mean!r} and {self.std!r}."
            )
        if std is not None and not all(s > 0 for s in std):
            raise SettingError(f"std must be positive; got {self.std!r}.")
        shape = None if self.shape is None else tuple(self.shape)
        if shape is not None and (len(shape) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in shape)):
            raise SettingError(f"shape is that of an image, (C, H, W) or (H, W); got {self.shape!r}.")
        for name, value in (("mean", mean), ("std", std), ("shape", shape)):
            object.__setattr__(self, name, value)

    def __call__(self, sample: Sample, /) -> Rendering:
        """Render the first input that is an image."""
        wanted = 1 if self.shape else 3
        x = next((t for t in sample.data.values() if t.ndim == wanted), sample.input)
        pixels = self._with_channels(x, sample)
        height, width = pixels.shape[1:]
        return {"kind": "image", "png": _png(self._scaled(pixels)), "size": [height, width]}

    def _with_channels(self, x: Tensor, sample: Sample) -> Tensor:
        """The image as ``(C, H, W)``, float32."""
        if self.shape is not None:
            if x.numel() != math.prod(self.shape):
                raise SettingError(
                    f"ImageRenderer(shape={tuple(self.shape)}) shows {math.prod(self.shape):,} numbers, and a sample "
                    f"has {x.numel():,}."
                )
            x = x.reshape(tuple(self.shape))
        if x.ndim == 4:  # a film: its middle frame
            axis = 0 if x.shape[1] in (1, 3, 4) or x.shape[0] not in (1, 3, 4) else 1
            x = x.select(axis, x.shape[axis] // 2)
        if x.ndim not in (2, 3) or not x.numel():
            raise SettingError(
                f"ImageRenderer shows inputs of shape (C, H, W), and the model's is {_described(sample)}. For images "
                "as vectors, give their shape: ImageRenderer(shape=(C, H, W))."
            )
        x = x.abs() if x.is_complex() else x
        is_integer = not x.is_floating_point() and x.dtype != torch.bool
        x = x.float() / 255 if is_integer and x.max() > 1 else x.float()
        if x.ndim == 2:
            return x[None]
        return x.movedim(-1, 0) if self._is_channels_last(x.shape) else x

    def _is_channels_last(self, shape: Sequence[int]) -> bool:
        if self.channels_last is not None:
            return self.channels_last
        return shape[0] not in (1, 3, 4) and shape[-1] in (1, 3, 4) and min(shape[:2]) >= shape[-1]

    def _scaled(self, x: Tensor) -> Tensor:
        """Values from 0 to 1."""
        if self.mean is not None:
            mean, std = (torch.tensor(v, device="cpu")[:, None, None] for v in (self.mean, self.std))
            if max(len(mean), len(std)) not in (1, len(x)):
                raise SettingError(
                    f"ImageRenderer has mean and std of {counted(max(len(mean), len(std)), 'channel')}, and an image "
                    f"has {len(x)}."
                )
            return (x * std + mean).nan_to_num(0.0).clamp(0, 1)
        finite = x[x.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        elif low >= -1 and high <= 1:
            low, high = -1.0, 1.0
        elif low >= 0 and high <= 255 and bool((finite == finite.round()).all()):
            low, high = 0.0, 255.0
        return ((x - low) / max(high - low, 1e-12)).nan_to_num(0.0).clamp(0, 1)


def _png(pixels: Tensor) -> str:
    """An image ``(C, H, W)`` with values from 0 to 1, encoded."""
    if len(pixels) not in (1, 3, 4):
        pixels = pixels.mean(0, keepdim=True)
    values = (pixels * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    if max(image.size) > _STORED_SIZE:
        image.thumbnail((_STORED_SIZE, _STORED_SIZE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=4)
    return base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class TableRenderer:
    """Shows samples that are rows of a table.

    Args:
        columns: Names of the columns. None numbers them, under the names of the model's arguments if there are several.

    Raises:
        SettingTypeError: If these are not texts.

    Example:
        >>> TableRenderer(["age", "height"])(Sample(None, {"x": torch.tensor([31, 1.75])}))
        {'kind': 'row', 'columns': ['age', 'height'], 'values': [31.0, 1.75]}
    """

    columns: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.columns is None:
            return
        if isinstance(self.columns, str) or not isinstance(self.columns, Iterable):
            raise SettingTypeError(f"columns is a list of names; got {shortened(repr(self.columns), 80)}.")
        object.__setattr__(self, "columns", tuple(map(str, self.columns)))

    def __call__(self, sample: Sample, /) -> Rendering:
        """Render all inputs that are vectors or single numbers; others, flattened, if there are none of these."""
        rows = {name: t for name, t in sample.data.items() if t.ndim < 2}
        rows = rows or {"input": sample.input.flatten()}
        values = [_rounded(x) for t in rows.values() for x in t.reshape(-1).tolist()]
        columns = list(self.columns) if self.columns is not None else _numbered(rows)
        if len(columns) != len(values):
            raise SettingError(
                f"TableRenderer has names for {counted(len(columns), 'column')} ({quoted(columns, 3)}), and a sample "
                f"has {counted(len(values), 'value')}."
            )
        return {"kind": "row", "columns": columns, "values": values}


def _numbered(rows: Mapping[str, Tensor]) -> list[str]:
    found: list[str] = []
    for name, t in rows.items():
        prefix = name if len(rows) > 1 else ""
        if t.ndim == 0 or (prefix and t.numel() == 1):
            found.append(name)
        else:
            found += [f"{prefix}[{i}]" if prefix else str(i) for i in range(t.numel())]
    return found


@dataclass(frozen=True)
class SeriesRenderer:
    """Shows samples that are time series, one line for each channel, of the first 16 channels.

    Of more than 1,000 points, means of neighbouring ones are shown.

    Args:
        channels_first: Whether samples are ``(C, T)``, rather than ``(T, C)``.

    Example:
        >>> SeriesRenderer()(Sample(None, {"x": torch.tensor([[0.5, 1], [1.5, 2], [2.5, 3]])}))
        {'kind': 'series', 'values': [[0.5, 1.5, 2.5], [1.0, 2.0, 3.0]], 'length': 3}
    """

    channels_first: bool = False

    def __call__(self, sample: Sample, /) -> Rendering:
        """Render the first input that is a matrix; without any, one that is a vector."""
        x = next((t for t in sample.data.values() if t.ndim == 2), sample.input)
        if x.ndim not in (1, 2):
            raise SettingError(
                f"SeriesRenderer shows inputs of shape (T,), (T, C) or (C, T), and the model's is {_described(sample)}."
            )
        x = (x.abs() if x.is_complex() else x).float()
        lines = x[None] if x.ndim == 1 else x if self.channels_first else x.T
        length = lines.shape[1]
        shown = lines[:_CHANNELS]
        if length > _POINTS:
            shown = torch.nn.functional.adaptive_avg_pool1d(shown, _POINTS)
        return {"kind": "series", "values": [[_rounded(v) for v in line] for line in shown.tolist()], "length": length}


@dataclass(frozen=True)
class TextRenderer:
    """Shows samples by a function of the user's.

    Args:
        function: From a `Sample` to a text. ``sample.batch`` is the batch with this sample alone.

    Raises:
        SettingTypeError: If it is not a function.

    Example:
        >>> TextRenderer(lambda sample: sample.batch["text"][0])(Sample({"text": ["a sentence"]}))
        {'kind': 'text', 'text': 'a sentence'}
    """

    function: Callable[[Sample], str]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SettingTypeError(
                f"TextRenderer takes a function from a sample to a text; got {shortened(repr(self.function), 80)}."
            )

    def __call__(self, sample: Sample, /) -> Rendering:
        """Render a sample."""
        return {"kind": "text", "text": str(self.function(sample))}


def _rounded(value: float | int | bool | complex) -> float | int | None:
    """A number with five digits; None for NaN and infinite ones, which JSON does not have."""
    if isinstance(value, complex):
        value = abs(value)
    if isinstance(value, (bool, int)):
        return int(value)
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _described(sample: Sample) -> str:
    """The data of a sample in words."""
    shapes = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in sample.data.values()]
    return " and ".join(shapes) or "no tensor"


def default_renderer(sample: Sample, model: nn.Module | None = None) -> Renderer:
    """The renderer for samples like this one, if the user has given none.

    Sequences of integers are tokens; three axes are those of an image, two those of a time series, one is that of a row
    of a table. Several inputs that are numbers or rows are shown as one row; else the first one is shown that is no
    mask. Any other sample is a text with its shapes.

    Args:
        sample: A sample.
        model: The model, whose first module with weights tells images from time series, and channels from steps.

    Returns:
        The renderer.

    Example:
        >>> default_renderer(Sample(None, {"x": torch.rand(3, 8, 8)}))
        ImageRenderer(mean=None, std=None, shape=None, channels_last=None)
        >>> default_renderer(Sample(None, {"a": torch.tensor(3), "b": torch.tensor(4)}))(
        ...     Sample(None, {"a": torch.tensor(3), "b": torch.tensor(4)}))
        {'kind': 'row', 'columns': ['a', 'b'], 'values': [3, 4]}
    """
    if not sample.data:
        return TextRenderer(describe)
    x, first = sample.input, _first_with_weights(model)
    is_discrete = not x.is_floating_point() and not x.is_complex()
    reads_series = first is not None and type(first).__name__.endswith(("Conv1d", "1d"))
    if x.ndim == 0 or (x.ndim == 1 and not is_discrete) or (x.ndim == 1 and x.dtype == torch.bool):
        is_long = x.numel() > 1 and (reads_series or "values" in next(iter(sample.data)))
        return SeriesRenderer() if is_long else TableRenderer()
    if x.ndim == 1:
        only_rows = len(sample.data) > 1 and all(t.numel() == 1 for t in sample.data.values())
        return TableRenderer() if only_rows else TokenRenderer()
    if x.ndim == 2 and x.numel():
        if first is not None and type(first).__name__.endswith("Conv2d"):
            return ImageRenderer()
        channels = getattr(first, "in_channels", getattr(first, "num_features", None)) if reads_series else None
        return SeriesRenderer(channels_first=channels == x.shape[0])
    if x.ndim in (3, 4) and min(x.shape[-2:]) > 1:
        channels = getattr(first, "in_channels", None)
        is_last = x.ndim == 3 and channels is not None and channels == x.shape[-1] != x.shape[0]
        return ImageRenderer(channels_last=True) if is_last else ImageRenderer()
    return TextRenderer(describe)


def _first_with_weights(model: nn.Module | None) -> nn.Module | None:
    modules = (
        [] if model is None else [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    )
    return modules[0] if modules else None


def describe(sample: Sample) -> str:
    """The shapes of a sample's inputs, as the text that is shown for want of anything better.

    Args:
        sample: The sample.

    Returns:
        The text.

    Example:
        >>> describe(Sample(None, {"x": torch.zeros(2, 3)}))
        'x: float32 (2, 3)'
    """
    parts = [f"{name}: {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in sample.data.items()]
    return ", ".join(parts) or type(sample.batch).__name__


_KINDS = {"text": ("text",), "tokens": ("tokens",), "image": ("png", "size"), "row": ("columns", "values"),
          "series": ("values",)}  # fmt: skip


def render(renderer: Renderer, sample: Sample) -> Rendering:
    """Render a sample, and check the result.

    Args:
        renderer: The renderer.
        sample: The sample.

    Returns:
        The rendering, with the sample's label if it has one.

    Raises:
        SettingTypeError: If the renderer returns anything but a rendering.

    Example:
        >>> render(lambda sample: "a text", Sample(None, label="cat"))
        {'kind': 'text', 'text': 'a text', 'label': 'cat'}
    """
    found: Any = renderer(sample)
    if isinstance(found, str):
        found = {"kind": "text", "text": found}
    needed = _KINDS.get(str(found.get("kind"))) if isinstance(found, Mapping) else None
    if needed is None or any(key not in found for key in needed):
        raise SettingTypeError(
            f"The renderer {_name_of(renderer)} returns {shortened(repr(found), 80)}: a rendering is a text, or a dict "
            f"with a 'kind' ({quoted(_KINDS)}) and what belongs to it."
        )
    try:
        json.dumps(dict(found), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingTypeError(
            f"The rendering of {_name_of(renderer)} is not what JSON can represent: {brief(error)}. Use numbers, "
            "strings, lists and dicts, and None for NaN."
        ) from error
    return {**found, **({"label": sample.label} if sample.label and "label" not in found else {})}


def _name_of(renderer: object) -> str:
    return getattr(renderer, "__name__", type(renderer).__name__)


def check_renderer(renderer: object) -> Renderer | None:
    """Check the setting of a renderer.

    Args:
        renderer: A renderer, or None.

    Returns:
        The same.

    Raises:
        SettingTypeError: If it is anything else.
    """
    if renderer is not None and (not callable(renderer) or isinstance(renderer, type)):
        shown = f"the class {renderer.__name__}" if isinstance(renderer, type) else shortened(repr(renderer), 80)
        raise SettingTypeError(
            "renderer is a function of a sample, or an object such as TokenRenderer(tokenizer), or None for a fitting "
            f"one; got {shown}."
        )
    return renderer
