"""Where in the input positions are shown: compared with which pixels change the activations there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer
from lib_lightning.features.places import find_places, places_in_image, places_in_sequence
from lib_lightning.features.renderers import default_renderer, render
from lib_lightning.features.sample import SampleReader
from lib_lightning.io.places import Places, position_in_input
from lib_lightning.model.instrumented import InstrumentedModel


def places_of(model: nn.Module, batch: Any, layers: list[str | NodeLayer]) -> dict[str, Places]:
    specs = [layer if isinstance(layer, NodeLayer) else NodeLayer(layer) for layer in layers]
    instrumented = InstrumentedModel(model.eval(), specs)
    with instrumented.session():
        reader = SampleReader.of_model(instrumented, batch)
        sample = next(sample for _, sample in reader.read([batch], [0]))
        found = find_places(instrumented, batch, sample, render(default_renderer(sample, model), sample))
    return {name: places for name, plain in found.items() if (places := Places.from_plain(plain)) is not None}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 6, 5, 2, 2, bias=False), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)
        self.long, self.short, self.sum = nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 1, 2), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        return self.sum(self.short(x) + self.long(x)).mean((2, 3))


STACKS = {
    "same": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)),
    "valid": nn.Sequential(nn.Conv2d(3, 4, 5), nn.Tanh(), nn.Conv2d(4, 4, 3)),
    "dilated": nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.SiLU(), nn.AvgPool2d(2)),
    "pooled": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)),
    "oblong": nn.Sequential(nn.Conv2d(3, 4, (3, 5), (2, 1), (1, 2))),
}  # fmt: skip


def changed_by(model: nn.Module, x: Tensor, position: tuple[int, int]) -> Tensor:
    """Which pixels change the activations at a position, shape ``(H, W)``, by changing one at a time."""
    H, W = x.shape[2:]
    changed = torch.zeros(H, W, dtype=torch.bool)
    with torch.no_grad():
        before = model(x)[..., position[0], position[1]]
        for row in range(H):
            each = x.repeat(W, 1, 1, 1, 1)  # a row of pixels at once
            each[range(W), ..., row, range(W)] += 50 * torch.randn(W, len(x), x.shape[1])
            after = model(each.flatten(0, 1)).unflatten(0, (W, len(x)))[..., position[0], position[1]]
            changed[row] = (after != before).flatten(1).any(1)
    return changed


@pytest.mark.parametrize("name", STACKS)
def test_box_is_what_a_position_of_a_convolution_depends_on(name: str) -> None:
    torch.manual_seed(0)
    model, x = copy.deepcopy(STACKS[name]).double(), torch.randn(4, 3, 14, 16, dtype=torch.float64)
    last = f"{len(model) - 1}"
    places = places_of(nn.Sequential(*model, nn.Flatten()), x, [last, "output"])[last]
    H, W = model(x).shape[2:]
    assert places.is_region
    for position in ((0, 0), (H // 2, W // 2), (H - 1, 1), (H - 1, W - 1)):
        rows, columns = changed_by(model, x, position).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        box = (top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left)
        assert places.part(position[0] * W + position[1]) == box


def test_residual_blocks_and_other_layouts() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    found = places_of(Residual(), x, ["stem", "sum", "output"])
    assert found["stem"].stride == (2, 2)
    assert found["stem"].part(0) == (0, 0, 3, 3)
    assert found["sum"].stride == (8, 8)
    assert found["sum"].size == (5 + 2 * 2 + 2 * 4,) * 2
    assert "output" not in found
    # A region of the whole image says nothing: an even division of it is shown.
    wide = nn.Sequential(nn.Conv2d(3, 4, 15, 2, 7), nn.ReLU(), nn.Conv2d(4, 4, 15, 2, 7), nn.Flatten())
    found = places_of(wide, x[..., :16, :16], ["0", "2", "output"])
    assert not found["2"].is_region
    assert found["2"].part(5) == (4, 4, 4, 4)
    selected = NodeLayer(["0"], positions=[0, 5], name="some")
    assert places_of(nn.Sequential(*STACKS["same"], nn.Flatten()), x, [selected, "output"])["some"].part(64) == (
        0, 0, 3, 2,
    )  # fmt: skip


def test_steps_of_strided_convolutions_over_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 5, 2, 2), nn.Tanh(), nn.Conv1d(8, 8, 3, 2), nn.Flatten())
    places = places_of(model, torch.randn(4, 3, 50), ["0", "2", "output"])["2"]
    assert (places.start, places.stride, places.size) == ((-2,), (4,), (9,))
    assert [places.step(k) for k in (0, 5)] == [2, 22]


class Padded(nn.Module):
    """A class token in front of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.front, self.head = nn.Embedding(9, 4), nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([self.front.expand(len(ids), -1, -1), self.embed(ids)], 1))


def test_tokens() -> None:
    found = places_of(Padded(), torch.randint(0, 9, (3, 7)), ["embed", "head:input"])
    assert [found["embed"].step(k) for k in (0, 6)] == [0, 6]
    assert [found["head:input"].step(k) for k in (0, 1, 7)] == [None, 0, 6]


@pytest.mark.parametrize(
    ("grid", "image", "skipped", "box"),
    [
        ((197,), (224, 224), 1, (0, 16, 16, 16)),
        ((196,), (224, 224), 0, (0, 16, 16, 16)),
        ((201,), (224, 224), 5, (0, 16, 16, 16)),  # four registers
        ((1025,), (512, 512), 1, (0, 16, 16, 16)),
        ((13,), (32, 48), None, None),
        ((9,), (32, 64), 1, (0, 16, 16, 16)),
        ((7,), (224, 224), None, None),
        ((4, 4), (32, 32), 0, (0, 8, 8, 8)),
        ((), (32, 32), None, None),
    ],
)
def test_patches(grid: tuple[int, ...], image: tuple[int, int], skipped: int | None, box: Any) -> None:
    places = places_in_image(grid, image)
    if skipped is None:
        assert places is None
    else:
        assert places is not None
        assert places.skipped == skipped
        assert places.part(skipped + 1) == box
        assert all(places.part(k) is None for k in range(skipped))


def test_sequences_of_other_lengths() -> None:
    assert places_in_sequence((1,), (5,)) is None
    assert places_in_sequence((3, 3), (9,)) is None
    narrow = places_in_sequence((6,), (8,))
    assert narrow is not None
    assert [narrow.step(k) for k in (0, 5)] == [1, 6]
    strided = places_in_sequence((3,), (9,))
    assert strided is not None
    assert [(strided.part(k), strided.step(k)) for k in range(3)] == [((0, 3), 1), ((3, 3), 4), ((6, 3), 7)]


def test_what_the_page_of_a_feature_is_told() -> None:
    nothing = {"position_box": None, "token": None}
    assert position_in_input(None, 3) == nothing
    assert position_in_input({"grid": [2]}, 0) == nothing  # of a damaged file
    sequence = Places((4,), (0,), (1,), (1,), (4,)).plain
    assert position_in_input(sequence, 3) == {"position_box": None, "token": 3}
    assert position_in_input(sequence, 4) == nothing
