"""Edges in forward and reverse mode, exact and from a sample of features."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.basis import Basis, neuron_basis
from lib_lightning.algorithm.edges import POWER, Edges
from lib_lightning.algorithm.jackknife import GROUPS, group_slices, standard_error
from lib_lightning.errors import ActivationError
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.jacobian.section import Section
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests.cases import Case


def test_the_page_on_the_method_has_the_power_by_which_features_are_chosen() -> None:
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "method.md").read_text(encoding="utf-8")
    found = re.search(r"\\pi_j \\propto \\Lambda_j\^\{(\d)/(\d)\}", page)
    assert found is not None
    assert int(found[1]) / int(found[2]) == POWER


def test_forward_and_reverse_mode_give_the_same_edges(case: Case) -> None:
    graph = compute_interaction_graph(case.model, [case.data], case.node_layers, input_fn=case.input_fn)
    bases = list(graph.bases.values())
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    for before, after, section in zip(
        bases, bases[1:], sections(instrumented, case.data, [b.mean for b in bases], 0, 500), strict=False
    ):
        forward, reverse = Edges(before, after), Edges(before, after)
        for edges, update in ((forward, forward.update_forward), (reverse, reverse.update_reverse)):
            edges.count(section)
            update(section, before.encode(section.a), after.encode(section.a_out))
        torch.testing.assert_close(forward.E, reverse.E, rtol=1e-9, atol=1e-12 * float(reverse.E.amax()))
        torch.testing.assert_close(forward.A, reverse.A, rtol=1e-9, atol=1e-12 * float(reverse.A.abs().amax()))


def test_derivatives_must_be_finite() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Root(), nn.Linear(3, 2)), torch.randn(20, 3)
    for basis in ("lib", "pca", "neuron"):
        with pytest.raises(ActivationError, match="Derivatives of '2' with respect to '1' are NaN or infinite"):
            compute_interaction_graph(model, [x], ["1", "2", "output"], basis=basis)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_edges_and_attributions_from_a_sample_of_features_are_unbiased(mode: str) -> None:
    section, before, after = _attention_section()
    fhat = before.encode(section.a)
    exact = _edges(before, after, section, fhat, None, 0, mode)
    sampled = [_edges(before, after, section, fhat, 3, seed, mode) for seed in range(300)]
    for name in ("E", "A"):
        expected, several = getattr(exact, name), torch.stack([getattr(edges, name) for edges in sampled])
        error = several.std(0) / len(several) ** 0.5
        assert ((several.mean(0) - expected).abs() <= 4.5 * error + 1e-12 * expected.abs().max()).all()
        assert (several.std(0) > 0).any(), "nothing was chosen at random"


def test_sampled_edges_are_exact_if_all_features_are_pushed(case: Case) -> None:
    options = {"input_fn": case.input_fn, "mask": case.mask}
    exact = compute_interaction_graph(case.model, [case.data], case.node_layers, **options)
    sampled = compute_interaction_graph(case.model, [case.data], case.node_layers, n_pushed=10**6, **options)
    for section, E in exact.edges.items():
        torch.testing.assert_close(sampled.edges[section], E, rtol=1e-9, atol=1e-12 * float(E.amax()))
        A = exact.attributions[section]
        torch.testing.assert_close(sampled.attributions[section], A, rtol=1e-9, atol=1e-12 * float(A.abs().amax()))


def test_standard_errors_include_the_choice_of_features() -> None:
    """In 100 repetitions with other samples and other choices, about as many intervals hold the truth as should."""
    section, before, after = _attention_section(n=4000)
    fhat = before.encode(section.a)
    truth = _edges(before, after, section, fhat, None, 0, "forward")
    inside = torch.zeros(2, *truth.E.shape)
    for repetition in range(100):
        samples = torch.randperm(section.n, generator=torch.Generator().manual_seed(repetition))[:128]
        part = _section_of(section.a[samples])
        part.group_slices = list(group_slices(0, 128, 128, GROUPS))
        edges = _edges(before, after, part, before.encode(part.a), 4, repetition, "forward", GROUPS)
        inside[0] += (edges.E - truth.E).abs() <= standard_error(edges.replicates)
        inside[1] += (edges.A - truth.A).abs() <= standard_error(edges.attribution_replicates)
    for counts, weights in zip(inside, (truth.E, truth.A.abs()), strict=True):
        assert 0.6 <= float((counts / 100 * weights / weights.sum()).sum()) <= 0.75


def test_an_eighth_of_the_products_is_enough_in_a_trained_transformer(trained_gpt2: tuple[nn.Module, Tensor]) -> None:
    model, tokens = trained_gpt2
    layers = ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    exact = compute_interaction_graph(model, [tokens], layers, n_probes=4)
    width = max(basis.n_features for basis in exact.bases.values())
    sampled = compute_interaction_graph(model, [tokens], layers, n_probes=4, n_pushed=width // 8)
    for section, E in exact.edges.items():
        assert (sampled.edges[section] - E).norm() <= 0.03 * E.norm()


class _Attention(nn.Module):
    """A section that mixes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x + self.attention(x, x, x)[0]))


def _section_of(a: Tensor) -> Section:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), _Attention().double())
    instrumented = InstrumentedModel(model, as_node_layers(["0", "output"]))
    with model_session(instrumented):
        (section,) = sections(instrumented, a, [a.mean((0, 1))] * 2, 0, 4000)
    return section


def _attention_section(n: int = 40) -> tuple[Section, Basis, Basis]:
    spread = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    section = _section_of(torch.randn(n, 5, 6, generator=torch.Generator().manual_seed(1)).double() * spread)
    return section, *(neuron_basis("x", rows.mean(0), rows.T.cov()) for rows in (section.a[:, 0], section.a_out[:, 0]))


def _edges(
    before: Basis, after: Basis, section: Section, fhat: Tensor, n_pushed: int | None, seed: int, mode: str,
    groups: int = 1,
) -> Edges:  # fmt: skip
    edges = Edges(before, after, groups, n_pushed=n_pushed, generator=torch.Generator().manual_seed(seed))
    edges.count(section)
    sampled, exact = {
        "forward": (edges.update_sampled, edges.update_forward),
        "reverse": (edges.update_sampled_reverse, edges.update_reverse),
    }[mode]
    (exact if n_pushed is None else sampled)(section, fhat, after.encode(section.a_out))
    return edges


@pytest.fixture(scope="module")
def trained_gpt2() -> tuple[nn.Module, Tensor]:
    """A GPT-2 shape of three blocks, trained for a moment on the letters of this library's own documentation."""
    text = torch.tensor(list((compute_interaction_graph.__doc__ or "").encode()))
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - 32, (16,), generator=generator)
        tokens = torch.stack([text[s : s + 32] for s in starts])
        logits = model(tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, torch.stack([text[s : s + 32] for s in range(0, len(text) - 32, len(text) // 64)])


@pytest.mark.parametrize(("n_pushed", "is_noted"), [(1, True), (16, False), (None, False)])
def test_features_that_no_sample_has_pushed_are_noted(n_pushed: int | None, is_noted: bool) -> None:
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, dropout=0.0).double().eval()
    graph = compute_interaction_graph(
        attention, [torch.randn(20, 8, 64).double()], ["input", "output"], n_probes=4, n_pushed=n_pushed, effort="exact"
    )
    notes = [note for note in graph.info["notes"] if "are taken as zero" in note]
    assert len(notes) == is_noted
    if is_noted:
        (E,) = graph.edges.values()
        missing = int((E == 0).all(0).sum())
        assert missing > 32
        assert f"The edges of {missing} of 64 features of 'input'" in notes[0]
