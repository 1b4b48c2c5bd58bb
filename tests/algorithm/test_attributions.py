"""Attributions: signed interactions, from the same products as the edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.jackknife import GROUPS, group_slices, standard_error
from lib_lightning.errors import LIBError
from tests.algorithm.test_edges import _attention_section, _edges, _section_of


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_attributions_are_the_literal_sum(mode: str) -> None:
    section, before, after = _attention_section(n=6)
    fhat = before.encode(section.a)
    found = _edges(before, after, section, fhat, None, 0, mode).A
    F = section_function()
    expected = torch.zeros_like(found)
    for a, values, a_out in zip(section.a.detach(), fhat, section.a_out.detach(), strict=True):
        J = torch.autograd.functional.jacobian(F, a[None])[0, :, :, 0]  # (t, p, s, d)
        J_hat = torch.einsum("pi,tpsd,jd->tisj", after.to_features, J, before.from_features)
        y = torch.einsum("tisj,sj->tij", J_hat, values)
        expected += torch.einsum("tij,ti->ij", y, after.encode(a_out))
    torch.testing.assert_close(found, expected / (section.n * section.S_in), rtol=1e-10, atol=1e-12)


def section_function() -> nn.Module:
    from tests.algorithm.test_edges import _Attention

    torch.manual_seed(0)
    return _Attention().double()


@pytest.mark.parametrize("basis", ["lib", "pca", "neuron"])
@pytest.mark.parametrize("final_basis", ["neuron", "pca"])
@pytest.mark.parametrize("effort", ["auto", "exact"])
def test_the_sum_over_features_is_the_variance_in_affine_sections(basis: str, final_basis: str, effort: str) -> None:
    """``sum_j A_ij = E[fhat_i^2]``, which is the importance in every basis: of a neuron it is the variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)).double()
    x = torch.randn(50, 5).double() + 1
    graph = compute_interaction_graph(
        model, [x[:20], x[20:]], ["0", "1", "output"], basis=basis, final_basis=final_basis, effort=effort
    )
    for (_, after), A in graph.attributions.items():
        torch.testing.assert_close(A.sum(1), graph.bases[after].importance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_sampled_attributions_are_unbiased(mode: str) -> None:
    section, before, after = _attention_section()
    fhat = before.encode(section.a)
    exact = _edges(before, after, section, fhat, None, 0, mode).A
    several = torch.stack([_edges(before, after, section, fhat, 3, seed, mode).A for seed in range(300)])
    error = several.std(0) / len(several) ** 0.5
    assert ((several.mean(0) - exact).abs() <= 4.5 * error + 1e-12 * exact.abs().max()).all()
    assert (several.std(0) > 0).any(), "nothing was chosen at random"


def test_standard_errors_cover_the_truth() -> None:
    section, before, after = _attention_section(n=2000)
    truth = _edges(before, after, section, before.encode(section.a), None, 0, "forward").A
    inside, weights = torch.zeros_like(truth), truth.abs() / truth.abs().sum()
    for repetition in range(60):
        samples = torch.randperm(section.n, generator=torch.Generator().manual_seed(repetition))[:128]
        part = _section_of(section.a[samples])
        part.group_slices = list(group_slices(0, 128, 128, GROUPS))
        edges = _edges(before, after, part, before.encode(part.a), 4, repetition, "forward", GROUPS)
        inside += (edges.A - truth).abs() <= standard_error(edges.attribution_replicates)
    assert 0.55 <= float((inside / 60 * weights).sum()) <= 0.8


def test_shortcuts_masks_and_plain_code_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double(), torch.randn(40, 3, 5).double()
    graph = compute_interaction_graph(model, [x], ["input", "output"], basis="pca")
    torch.manual_seed(0)
    basis, after = graph.bases["input"], graph.bases["output"]
    J = torch.stack([torch.autograd.functional.jacobian(model, a) for a in x.flatten(0, 1)])
    y = (
        torch.einsum("pi,xpd,jd->xij", after.to_features, J, basis.from_features)
        * basis.encode(x).flatten(0, 1)[:, None]
    )
    expected = torch.einsum("xij,xi->ij", y, after.encode(model(x)).flatten(0, 1).detach()) / len(y)
    torch.testing.assert_close(graph.attributions["input", "output"], expected, rtol=1e-9, atol=1e-12)
    graph.save(tmp_path / "file")
    loaded = InteractionGraph.load(tmp_path / "file")
    torch.testing.assert_close(loaded.attributions, graph.attributions)
    torch.testing.assert_close(loaded.attribution_errors, graph.attribution_errors)
    for (_, j), (_, i), known in graph.to_networkx().edges(data=True):
        assert known["attribution"] == float(expected[i, j]) or abs(known["attribution"] - expected[i, j]) < 1e-9
    words = [text.get_text() for legend in graph.plot(signs=True).legends for text in legend.get_texts()]
    assert {"drives", "holds against"} <= set(words)
    graph.attributions = {}
    with pytest.raises(LIBError, match="no attributions"):
        graph.plot(signs=True)
    graph.save(tmp_path / "file")
    assert InteractionGraph.load(tmp_path / "file").attributions == {}
