"""How samples look: tokens, images, rows, series, texts, and which of them is taken by default."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lib_lightning.errors import LIBError, SettingError, SettingTypeError
from lib_lightning.features import (
    ImageRenderer,
    Renderer,
    Sample,
    SeriesRenderer,
    TableRenderer,
    TextRenderer,
    TokenRenderer,
)
from lib_lightning.features.renderers import check_renderer, default_renderer, render


def sample_of(*inputs: Tensor, **named: Tensor) -> Sample:
    return Sample(None, {**{f"x{i}": t for i, t in enumerate(inputs)}, **named})


def pixels_of(rendering: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(rendering["png"]))))


def byte_level() -> Any:
    """A tokenizer like that of GPT-2, with the bytes of a smiley and the pieces of a sentence."""
    import tokenizers
    import transformers

    pieces = ["<|end|>", "The", "Ġcat", "Ċ", "ðŁ", "ĺĢ", "a", "s"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def word_pieces() -> Any:
    import tokenizers
    import transformers

    pieces = {"[UNK]": 0, "[PAD]": 1, "play": 2, "##ing": 3, "a": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def sentence_pieces() -> Any:
    import tokenizers
    import transformers

    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -2.0), ("s", -3.0), ("<0xE2>", -9.0), ("a", -4.0), ("▁", -4.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class DecodesToBytes:
    """As tiktoken: without a name for each piece, but with its bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token])


@pytest.mark.parametrize(
    ("tokenizer", "ids", "texts"),
    [
        (byte_level, [1, 2, 7, 3, 4, 5], ["The", " cat", "s", "↵", r"\xf0\x9f", r"\x98\x80"]),
        (word_pieces, [2, 3, 4, 0], [" play", "ing", " a", " [UNK]"]),
        (sentence_pieces, [1, 2, 3, 4], [" the", " cat", "s", r"\xe2"]),
        (DecodesToBytes, [72, 105, 0xE2], ["H", "i", r"\xe2"]),
        (lambda: ["zero", "one"], [1, 0, 2], ["one", "zero", "⟨2⟩"]),
        (lambda: {0: "a", 5: "b"}, [5, 0], ["b", "a"]),
        (lambda: {"0": "a"}, [0], ["a"]),  # as JSON has it
        (lambda: lambda token: f"<{token}>", [3], ["<3>"]),
        (lambda: "bytes", list("né\t".encode()), ["n", r"\xc3", r"\xa9", "⇥"]),
        (lambda: None, [7, -1], ["7", " -1"]),
    ],
)  # fmt: skip
def test_tokens_are_readable(tokenizer: Any, ids: list[int], texts: list[str]) -> None:
    renderer = TokenRenderer(tokenizer())
    assert renderer(sample_of(torch.tensor(ids))) == {"kind": "tokens", "tokens": texts}


def test_padding_is_cut_and_positions_are_kept() -> None:
    ids, mask = torch.tensor([1, 1, 2, 4, 1]), torch.tensor([0, 0, 1, 1, 0])
    for sample in (
        Sample(None, {"input_ids": ids}, mask != 0),
        sample_of(input_ids=ids, attention_mask=mask),
        sample_of(src=ids, src_key_padding_mask=mask == 0),
    ):
        assert TokenRenderer(list("abcde"))(sample)["tokens"] == ["", "", "c", "e"]
    assert TokenRenderer(word_pieces())(sample_of(ids))["tokens"][2:] == [" play", " a"]  # the last one is padding
    # Where padding is the end of a text, one is left of it.
    assert TokenRenderer(byte_level())(sample_of(torch.tensor([1, 0, 0, 0])))["tokens"] == ["The", "<|end|>"]
    assert TokenRenderer()(sample_of(input_ids=ids, attention_mask=mask * 0))["tokens"] == []


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (torch.tensor([[[0.0, 0.5, 1.0]]]), {}, [0, 128, 255]),
        (torch.tensor([[[-1.0, 0.0, 1.0]]]), {}, [0, 128, 255]),
        (torch.tensor([[[-0.42, 2.8, 1.19]]]), {}, [0, 255, 128]),  # normalised in a way that is not known
        (torch.tensor([[[0, 128, 255]]], dtype=torch.uint8), {}, [0, 128, 255]),
        (torch.tensor([[[0.0, 128.0, 255.0]]]), {}, [0, 128, 255]),
        (torch.tensor([[[-2.0, 0.0, 2.0]]]), {"mean": 0.5, "std": 0.25}, [0, 128, 255]),
        (torch.tensor([0.0, 0.5, 1.0]), {"shape": (1, 3)}, [0, 128, 255]),
        (torch.tensor([[[0.0, math.nan, math.inf]]]), {}, [0, 0, 255]),
        (torch.zeros(2, 1, 3).bfloat16(), {}, [0, 0, 0]),  # two channels: their mean
        (torch.ones(1, 1, 3, dtype=torch.bool), {}, [255, 255, 255]),
    ],
)
def test_grey_images(image: Tensor, options: dict[str, Any], expected: list[int]) -> None:
    rendering = ImageRenderer(**options)(sample_of(image))
    assert rendering["size"] == [1, 3]
    np.testing.assert_array_equal(pixels_of(rendering), [expected])


def test_colours_and_sizes_of_images() -> None:
    image = torch.rand(3, 5, 4)
    expected = (image.movedim(0, -1) * 255).round().byte().numpy()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), [0.2, 0.3, 0.1]
    normalised = (image - mean[:, None, None]) / torch.tensor(std)[:, None, None]
    for renderer, x in (
        (ImageRenderer(), image),
        (ImageRenderer(), image.movedim(0, -1)),
        (ImageRenderer(mean, std), normalised),
        (ImageRenderer(shape=[3, 5, 4]), image.flatten()),
        (ImageRenderer(), image[:, None].expand(-1, 7, -1, -1)),  # a film
    ):
        rendering = renderer(sample_of(x))
        assert rendering["size"] == [5, 4]
        np.testing.assert_allclose(pixels_of(rendering), expected, atol=1)
    assert pixels_of(ImageRenderer()(sample_of(torch.rand(4, 5, 5)))).shape == (5, 5, 4)
    large = ImageRenderer()(sample_of(torch.rand(3, 600, 300)))
    assert large["size"] == [600, 300]
    assert pixels_of(large).shape == (96, 48, 3)


def test_rows() -> None:
    assert TableRenderer()(sample_of(torch.tensor([1 / 3, math.nan]))) == {
        "kind": "row", "columns": ["0", "1"], "values": [0.33333, None],
    }  # fmt: skip
    several = sample_of(numbers=torch.tensor([0.5, 1.0]), kinds=torch.tensor([3]), flag=torch.tensor(True))
    assert TableRenderer()(several)["columns"] == ["numbers[0]", "numbers[1]", "kinds", "flag"]
    assert TableRenderer(list("abcd"))(several)["values"] == [0.5, 1.0, 3, 1]


def test_series() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert SeriesRenderer()(sample_of(x))["values"] == x.T.tolist()
    assert SeriesRenderer(channels_first=True)(sample_of(x))["values"] == x.tolist()
    long = SeriesRenderer()(sample_of(torch.linspace(0, 1, 16_000)))
    assert len(long["values"][0]) == 1000
    assert long["length"] == 16_000
    assert len(SeriesRenderer()(sample_of(torch.rand(5, 99)))["values"]) == 16


RENDERERS: list[Renderer] = [
    TokenRenderer(), TokenRenderer("bytes"), ImageRenderer([0.5], 0.5), ImageRenderer(shape=(8, 8)),
    TableRenderer(["a", "b"]), SeriesRenderer(True), TextRenderer(str),
]  # fmt: skip


@pytest.mark.parametrize("renderer", RENDERERS, ids=repr)
def test_renderers_are_values(renderer: Renderer) -> None:
    again = pickle.loads(pickle.dumps(renderer))
    assert again == renderer
    assert hash(again) == hash(renderer)
    assert [other == renderer for other in RENDERERS].count(True) == 1
    with pytest.raises(AttributeError):
        renderer.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenRenderer(object()), r"no method decode"),
        (lambda: TokenRenderer(3), r"tokenizer=3 cannot turn ids into text"),
        (lambda: TokenRenderer("no such one!"), r"'no such one!' cannot be loaded"),
        (lambda: TokenRenderer()(sample_of(torch.rand(3, 4, 4))), r"float32 \(3, 4, 4\).*ImageRenderer"),
        (lambda: ImageRenderer(mean=0.5), "belong together"),
        (lambda: ImageRenderer([1, 2, 3], [1, 2]), "belong together"),
        (lambda: ImageRenderer("a", "b"), "mean is a number"),
        (lambda: ImageRenderer(0.5, 0), "positive"),
        (lambda: ImageRenderer(shape=(3,)), "shape is that of an image"),
        (lambda: ImageRenderer(shape=(8, 8))(sample_of(torch.rand(65))), "shows 64 numbers, and a sample has 65"),
        (lambda: ImageRenderer()(sample_of(torch.rand(64))), r"give their shape"),
        (lambda: ImageRenderer([1, 2, 3], [1, 2, 3])(sample_of(torch.rand(4, 5, 5))), "3 channels.*an image has 4"),
        (lambda: TableRenderer("abc"), "columns is a list"),
        (lambda: TableRenderer(["a"])(sample_of(torch.rand(3))), r"1 column \('a'\), and a sample has 3 values"),
        (lambda: SeriesRenderer()(sample_of(torch.rand(3, 4, 4))), "SeriesRenderer shows"),
        (lambda: TextRenderer("text"), "takes a function"),
        (lambda: check_renderer("tokens"), "renderer is a function of a sample.*'tokens'"),
        (lambda: check_renderer(TableRenderer), "got the class TableRenderer"),
        (lambda: render(lambda _: 3, Sample(None)), "returns 3: a rendering is"),
        (lambda: render(lambda _: {"kind": "film"}, Sample(None)), "'kind'"),
        (lambda: render(lambda _: {"kind": "text", "text": {1}}, Sample(None)), "JSON can represent"),
        (lambda: sample_of().input, "no tensor"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(make: Any, message: str) -> None:
    with pytest.raises(LIBError, match=message) as caught:
        make()
    assert isinstance(caught.value, (SettingError, SettingTypeError, LIBError))
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("sample", "model", "kind"),
    [
        (sample_of(torch.tensor([1, 2, 3])), nn.Embedding(4, 2), "tokens"),
        (sample_of(input_ids=torch.tensor([1, 2]), attention_mask=torch.tensor([1, 1])), None, "tokens"),
        (sample_of(attention_mask=torch.tensor([1, 1]), input_ids=torch.tensor([1, 2])), None, "tokens"),
        (sample_of(torch.rand(3, 8, 8)), nn.Conv2d(3, 1, 3), "image"),
        (sample_of(pixel_values=torch.rand(3, 8, 8)), None, "image"),
        (sample_of(torch.rand(8, 8, 5)), nn.Conv2d(5, 1, 3), "image"),
        (sample_of(torch.rand(8, 8)), nn.Conv2d(1, 1, 3), "image"),
        (sample_of(torch.rand(3, 4, 8, 8)), nn.Conv3d(3, 1, 3), "image"),
        (sample_of(torch.rand(13)), nn.Linear(13, 1), "row"),
        (sample_of(torch.tensor(3)), nn.Embedding(4, 2), "row"),
        (sample_of(user=torch.tensor(3), item=torch.tensor(5)), nn.Embedding(9, 2), "row"),
        (sample_of(torch.tensor([True, False])), None, "row"),
        (sample_of(torch.rand(12, 3)), nn.LSTM(3, 4), "series"),
        (sample_of(torch.rand(3, 12)), nn.Conv1d(3, 4, 3), "series"),
        (sample_of(input_values=torch.rand(160)), None, "series"),
        (sample_of(torch.rand(12, 3, dtype=torch.complex64)), None, "series"),
        (sample_of(torch.rand(2, 2, 2, 2, 2)), None, "text"),
        (Sample({"text": "a"}), None, "text"),
    ],
)  # fmt: skip
def test_default_renderers(sample: Sample, model: nn.Module | None, kind: str) -> None:
    rendering = render(default_renderer(sample, model), sample)
    assert rendering["kind"] == kind
    json.dumps(rendering, allow_nan=False)
    if isinstance(model, nn.Conv1d):
        assert len(rendering["values"]) == 3
