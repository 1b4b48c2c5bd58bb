"""Sections with channels last in memory: several vectors go through them at once, with the products of one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_lightning import compute_interaction_graph
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers

# By number of axes of space: operations that read tensors with channels on axis 1.
OPERATIONS: dict[int, dict[str, Callable[[], nn.Module | Callable[[Tensor], Tensor]]]] = {
    2: {
        "GroupNorm": lambda: nn.GroupNorm(2, 4),
        "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
        "BatchNorm": lambda: nn.BatchNorm2d(4),
        "LayerNorm": lambda: nn.LayerNorm([4, 4, 4]),
        "MaxPool": lambda: nn.MaxPool2d(2),
        "AvgPool": lambda: nn.AvgPool2d(2),
        "AdaptiveMaxPool": lambda: nn.AdaptiveMaxPool2d(2),
        "AdaptiveAvgPool": lambda: nn.AdaptiveAvgPool2d(2),
        "Conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
        "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "ConvTranspose": lambda: nn.ConvTranspose2d(4, 4, 2, 2),
        "nearest": lambda: nn.Upsample(scale_factor=2),
        "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        "reflect": lambda: nn.ReflectionPad2d(1),
        "PixelShuffle": lambda: nn.PixelShuffle(2),
        "GroupNorm after Upsample": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.GroupNorm(2, 4)),
        "normalize": lambda: lambda x: F.normalize(x, dim=1),
        "GELU": nn.GELU,
    },
    3: {
        "GroupNorm": lambda: nn.GroupNorm(2, 4),
        "BatchNorm": lambda: nn.BatchNorm3d(4),
        "MaxPool": lambda: nn.MaxPool3d(2),
        "AvgPool": lambda: nn.AvgPool3d(2),
        "Conv": lambda: nn.Conv3d(4, 4, 3, padding=1),
    },
}
CASES = [(n, name) for n, operations in OPERATIONS.items() for name in operations]


class ChannelsLast(nn.Module):
    """A linear map of channels, which are the last axis in memory and axis 1 of the tensor; and an operation."""

    def __init__(self, operation: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.operation = nn.Linear(2, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.up(x).movedim(-1, 1)).flatten(1)


@pytest.mark.parametrize(("n_axes", "name"), CASES)
def test_products_with_several_vectors(n_axes: int, name: str) -> None:
    torch.manual_seed(0)
    model = ChannelsLast(OPERATIONS[n_axes][name]()).double().eval()
    x = torch.randn(2, *(4,) * n_axes, 2, dtype=torch.float64)
    instrumented = InstrumentedModel(model, as_node_layers(["up", "output"]))
    (section,) = sections(instrumented, x, [], 0, 10**9)
    u = torch.randn(3, section.n, section.S_out, section.d_out, dtype=torch.float64)
    v = torch.randn(3, section.n, section.S_in, section.d_in, dtype=torch.float64)
    for product, vectors in ((section.vjp, u), (section.jvp, v)):
        one_by_one = torch.cat([product(vector[None]) for vector in vectors])
        torch.testing.assert_close(product(vectors), one_by_one, rtol=1e-10, atol=1e-12)
    assert not section.sequential_only


@pytest.mark.parametrize("name", OPERATIONS[2])
def test_models_in_this_memory_format(name: str) -> None:
    """Weights and inputs may have it, too; graphs are the same, without a note."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Tanh(), *modules_of(name)), nn.Flatten()).double()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    expected = compute_interaction_graph(model, [x], ["0", "output"], effort="exact")
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    found = compute_interaction_graph(model, [x], ["0", "output"], effort="exact")
    assert found.info["notes"] == expected.info["notes"] == []
    torch.testing.assert_close(found.edges["0", "output"], expected.edges["0", "output"], rtol=1e-8, atol=1e-12)


def modules_of(name: str) -> list[nn.Module]:
    operation = OPERATIONS[2][name]()
    return [operation] if isinstance(operation, nn.Module) else []
