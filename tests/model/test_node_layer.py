"""Node layers: names, and tensors as arrays of samples, positions and features."""

from __future__ import annotations

import pytest
import torch

from lib_lightning import NodeLayer
from lib_lightning.errors import NodeLayerError
from lib_lightning.model.node_layer import as_node_layers, split_tap


@pytest.mark.parametrize(
    ("shape", "expected"), [((4,), (4, 1, 1)), ((4, 7), (4, 1, 7)), ((4, 5, 7), (4, 5, 7)), ((4, 7, 2, 3), (4, 6, 7))]
)
def test_read_and_write_are_inverse(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    layer, tensor = NodeLayer(["m"]), torch.randn(shape)
    a = layer.read([tensor])
    assert a.shape == expected
    assert torch.equal(layer.write(a, [torch.zeros(shape)])[0], tensor)


def test_features_on_any_axis() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert NodeLayer(["m"], feature_dim=-1).read([images]).shape == (2, 12, 5)
    assert torch.equal(NodeLayer(["m"]).read([images])[0, 0], images[0, :, 0, 0])


def test_positions_are_selected_and_the_others_unchanged() -> None:
    layer, tokens = NodeLayer(["m"], positions=[-1, 0]), torch.randn(2, 3, 4)
    a = layer.read([tokens])
    assert torch.equal(a, tokens[:, [2, 0]])
    written = layer.write(torch.zeros_like(a), [tokens])[0]
    assert torch.equal(written[:, 1], tokens[:, 1])
    assert not written[:, [0, 2]].any()


def test_taps_are_joined_along_features() -> None:
    layer, parts = NodeLayer(["x", "y"]), [torch.randn(2, 3), torch.randn(2, 4)]
    a = layer.read(parts)
    assert torch.equal(a[:, 0], torch.cat(parts, dim=1))
    assert all(torch.equal(*pair) for pair in zip(layer.write(a, parts), parts, strict=True))


@pytest.mark.parametrize(
    ("layer", "tensors", "message"),
    [
        (NodeLayer(["m"]), [torch.zeros(())], "is a scalar"),
        (NodeLayer(["m"], feature_dim=0), [torch.zeros(2, 3)], "feature_dim=0"),
        (NodeLayer(["m"], feature_dim=3), [torch.zeros(2, 3)], "feature_dim=3"),
        (NodeLayer(["m"], positions=5), [torch.zeros(2, 3, 4)], "has 3 positions"),
        (NodeLayer(["x", "y"]), [torch.zeros(2, 3), torch.zeros(2, 5, 3)], "differ in samples or positions"),
    ],
)
def test_tensors_that_cannot_be_read_raise_errors(layer: NodeLayer, tensors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(NodeLayerError, match=message):
        layer.read(tensors)


@pytest.mark.parametrize("tap", ["", ":input", "fc:inputs", "fc:"])
def test_malformed_taps_raise_errors(tap: str) -> None:
    with pytest.raises(NodeLayerError, match="is not a tap"):
        split_tap(tap)


def test_at_least_two_node_layers_with_different_names() -> None:
    with pytest.raises(NodeLayerError, match="At least two"):
        as_node_layers(["output"])
    with pytest.raises(NodeLayerError, match="At least two"):
        as_node_layers("output")
    with pytest.raises(NodeLayerError, match="fc occurs more than once"):
        as_node_layers(["fc", "output", "fc"])
    with pytest.raises(NodeLayerError, match="at least one tap"):
        NodeLayer([])
