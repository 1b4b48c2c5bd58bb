"""Networks whose modules and features are known by construction: the LIB finds them, and the baselines do not."""

from __future__ import annotations

import pytest
import torch

from lib_lightning import compute_interaction_graph
from recipes.ground_truth import (
    FEATURES,
    MODULES,
    SEEDS,
    Planted,
    features_found,
    network_of_features,
    network_of_modules,
    rand_index,
    table,
    true_modules,
)


def test_lib_finds_the_modules_of_every_network() -> None:
    assert len(SEEDS) == 10
    assert [rand_index(seed, "lib") for seed in SEEDS] == [1] * 10


@pytest.mark.parametrize("basis", ["pca", "neuron"])
def test_baselines_do_not_find_modules(basis: str) -> None:
    assert max(rand_index(seed, basis) for seed in list(SEEDS)[:3]) < 0.3


def test_lib_finds_exactly_the_planted_features() -> None:
    planted = [width[0] for width in FEATURES[:-1]]
    assert [features_found(seed, "lib") for seed in SEEDS] == [planted] * 10


@pytest.mark.parametrize("basis", ["pca", "neuron"])
def test_baselines_count_what_leads_nowhere(basis: str) -> None:
    assert [features_found(seed, basis) for seed in SEEDS] == [[sum(width) for width in FEATURES[:-1]]] * 10


def jacobian(planted: Planted, start: int, stop: int) -> torch.Tensor:
    """Derivatives of unmixed coordinates at one node layer with respect to those at another, over samples."""
    A, A_out = planted.mixing[start], planted.mixing[stop]
    model = planted.model.double()
    u = (model[: 3 * start](planted.x.double()) @ A.inverse().T).detach()[::19]
    section = model[3 * start : 3 * stop]
    return torch.func.vmap(torch.func.jacrev(lambda v: section(v @ A.T) @ A_out.inverse().T))(u)


def test_blocks_are_what_they_are_said_to_be() -> None:
    planted = network_of_modules(0)
    for l in range(3):
        J = jacobian(planted, l, l + 1).abs().amax(0)
        rows, columns = (torch.arange(4).repeat_interleave(torch.tensor(MODULES[k])) for k in (l + 1, l))
        inside = rows[:, None] == columns
        assert J[~inside].max() < 1e-5 * J.max()  # weights are float32
        assert all(J[(rows == block), :][:, columns == block].amin() > 1e-2 for block in range(4))
        # Neither activations nor weights show it: the matrices that mix are full.
        assert (planted.model[3 * l].weight.abs() > 1e-3).double().mean() > 0.95


def test_planted_directions_are_those_that_the_output_depends_on() -> None:
    planted = network_of_features(0)
    a = planted.x.double()
    for l, (first, second) in enumerate(FEATURES[:-1]):
        J = jacobian(planted, l, 3)
        sizes = torch.linalg.svdvals(J.flatten(0, 1))
        assert int((sizes > 1e-4 * sizes[0]).sum()) == first
        assert J[..., first:].abs().max() < 1e-4 * J.abs().max()
        # One layer ahead, the others do act, and they vary more.
        if l < 2:
            assert jacobian(planted, l, l + 1)[..., first:].abs().amax((0, 1)).min() > 1e-2
        u = planted.model.double()[: 3 * l](a) @ planted.mixing[l].inverse().T
        assert u[:, first:].var(0).mean() > 10 * u[:, :first].var(0).mean()
        assert u.shape[1] == first + second


def test_true_module_of_a_neuron_without_mixing_is_its_own_block() -> None:
    planted = network_of_modules(1, values=4)
    graph = compute_interaction_graph(planted.model, [planted.x], planted.node_layers, basis="neuron")
    output = true_modules(planted, graph)[-1]
    assert output.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_table() -> None:
    lines = table(seeds=range(2)).splitlines()
    assert lines[2] == "| lib | 1.00 ± 0.00 | 5, 7, 4 / 5, 7, 4 |"
    assert [line.split(" | ")[-1] for line in lines[3:]] == ["11, 15, 13 / 5, 7, 4 |"] * 2
