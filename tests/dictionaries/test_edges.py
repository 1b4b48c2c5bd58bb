"""Edges between latents are those of dense Jacobians, on language models; and those of the library's own bases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.shortcuts import PLAIN
from lib_lightning.graph import InteractionGraph
from tests.dictionaries.dense import dense_edges
from tests.dictionaries.stand_ins import (
    Normalizing,
    OfHeads,
    PassingState,
    Rescaling,
    Saturating,
    SparseDictionary,
    Sparsified,
    gpt2,
    llama,
    tokens,
)

MODELS = {"gpt2": gpt2, "llama": llama}
OPTIONS: dict[str, Any] = {"effort": "exact", "output_distribution": "none"}


def sections_of(name: str) -> tuple[nn.Module, list[str], Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A model, its node layers, samples, activations of the first node layer, and the section behind it."""
    model, layers = MODELS[name]()
    x, found = tokens(), {}
    blocks = [model.get_submodule(layer) for layer in layers]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = output[0] if isinstance(output, tuple) else output

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    a = found[blocks[0]]
    positions = torch.arange(a.shape[1])[None]

    def section(x: Tensor) -> Tensor:
        options = {}
        if name == "llama":
            options["position_embeddings"] = model.model.rotary_emb(x[None], positions)
        mask = torch.full((1, 1, len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
        y = blocks[1](x[None], attention_mask=mask, **options)
        return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)

    assert torch.allclose(torch.stack([section(sample) for sample in a]), found[blocks[1]], rtol=1e-10, atol=1e-12)
    return model, layers[:2], x, a, section


def graph_of(
    model: nn.Module, x: Tensor, layers: list[str], dictionaries: dict[str, Any], **options: Any
) -> InteractionGraph:
    batches = [x[:4], x[4:]]
    return compute_interaction_graph(model, batches, layers, dictionaries=dictionaries, **{**OPTIONS, **options})


def assert_dense(graph: InteractionGraph, layers: list[str], E: Tensor, A: Tensor) -> None:
    """Compare a graph with all latents; those that are not in it have no edges."""
    i, j = graph.lineages[layers[1]].ids, graph.lineages[layers[0]].ids
    section = layers[0], layers[1]
    for found, wanted in ((graph.edges[section], E), (graph.attributions[section], A)):
        assert (found - wanted[i][:, j]).abs().max() <= 1e-8 * wanted.abs().max()
    left = torch.ones_like(E, dtype=torch.bool)
    left[i[:, None], j] = False
    assert not E[left].any()


DICTIONARIES: dict[str, Callable[[int], SparseDictionary]] = {
    "relu": lambda seed: SparseDictionary(16, 40, seed=seed),
    "jump_relu": lambda seed: SparseDictionary(16, 40, threshold=0.8, seed=seed),
    "top_k": lambda seed: SparseDictionary(16, 90, k=3, seed=seed),
}
OTHERS: dict[str, Callable[[int], SparseDictionary]] = {
    "heads": lambda seed: OfHeads(16, 40, k=5, seed=seed),
    "sparsify": lambda seed: Sparsified(16, 40, k=5, seed=seed),
    "saturating": lambda seed: Saturating(16, 24, threshold=0.5, seed=seed),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_edges_are_those_of_dense_jacobians(model: str, kind: str) -> None:
    network, layers, x, a, section = sections_of(model)
    before, after = (DICTIONARIES[kind](seed).double() for seed in (0, 1))
    graph = graph_of(network, x, layers, dict(zip(layers, (before, after), strict=True)))
    E, A = dense_edges(section, a, (before.encode, before.decode), (after.encode, after.decode))
    assert_dense(graph, layers, E, A)
    if kind == "top_k":  # of the latents only those that are active
        assert graph.bases[layers[0]].n_features < 91
    # Importances are mean squares; that of the error is the mean squared length.
    f = before.encode(a)
    squares = torch.cat([f.square(), (a - before.decode(f)).square().sum(-1, keepdim=True)], -1).mean((0, 1))
    own = graph.bases[layers[0]]
    assert torch.allclose(own.importance, squares[graph.lineages[layers[0]].ids].detach(), rtol=1e-12)
    assert graph.edge_errors.keys() == graph.edges.keys()
    assert own.importance_error is not None


@pytest.mark.parametrize("kind", OTHERS)
def test_other_forms_of_dictionaries(kind: str) -> None:
    network, layers, x, a, section = sections_of("gpt2")
    before, after = (OTHERS[kind](seed).double() for seed in (0, 1))

    def plain(one: SparseDictionary) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The same functions in their usual form."""
        decode = Saturating.decode if kind == "saturating" else SparseDictionary.decode
        of = SparseDictionary(16, 40, k=5).double() if kind == "sparsify" else one
        of.load_state_dict(one.state_dict())
        return of.latents, functools.partial(decode, of)

    first, second = plain(before), plain(after)
    graph = graph_of(network, x, layers, dict(zip(layers, (before, after), strict=True)))
    assert_dense(graph, layers, *dense_edges(section, a, first, second))


@pytest.mark.parametrize("kind", [Normalizing, Rescaling, PassingState])
def test_normalisation_is_a_constant_of_the_decoder_and_part_of_the_encoder(kind: type[SparseDictionary]) -> None:
    network, layers, x, a, section = sections_of("llama")
    before, after = (kind(16, 24, k=6, seed=seed).double() for seed in (0, 1))

    def functions(one: SparseDictionary, at: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        def encode(x: Tensor) -> Tensor:
            found = one.encode(x)
            return found[0] if isinstance(found, tuple) else found

        def decode(f: Tensor) -> Tensor:
            with torch.no_grad():
                found = one.encode(at)
            return one.decode(f, found[1]) if isinstance(found, tuple) else one.decode(f)  # type: ignore[call-arg]

        return encode, decode

    E = A = torch.zeros(())
    for sample in a:
        of_one = dense_edges(
            section, sample[None], functions(before, sample), functions(after, section(sample).detach())
        )
        E, A = E + of_one[0] / len(a), A + of_one[1] / len(a)
    state = {name: value for name, value in vars(before).items() if isinstance(value, Tensor)}
    for name in state:
        delattr(before, name)
    graph = graph_of(network, x, layers, dict(zip(layers, (before, after), strict=True)))
    assert_dense(graph, layers, E, A)
    assert not any(isinstance(value, Tensor) for value in vars(before).values())  # nothing was left behind
    assert before.training


@pytest.mark.parametrize("batches", [1, 3])
def test_reverse_mode_gives_the_same(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    network, layers, x, a, section = sections_of("gpt2")
    before, after = (SparseDictionary(16, 40, k=4, seed=seed).double() for seed in (0, 1))
    monkeypatch.setattr("lib_lightning.algorithm.build.FAST", PLAIN)
    monkeypatch.setattr("lib_lightning.jacobian.section.Section.has_jvp", lambda self: False)
    dictionaries = dict(zip(layers, (before, after), strict=True))
    graph = compute_interaction_graph(network, x.chunk(batches), layers, dictionaries=dictionaries, **OPTIONS)
    assert_dense(graph, layers, *dense_edges(section, a, (before.encode, before.decode), (after.encode, after.decode)))
    assert any("no second derivative" in note for note in graph.info["notes"])


def test_many_entries_of_an_error_are_read_with_random_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    network, layers, x, a, section = sections_of("gpt2")
    before, after = (SparseDictionary(16, 40, k=4, seed=seed).double() for seed in (0, 1))
    monkeypatch.setattr("lib_lightning.jacobian.section.Section.has_jvp", lambda self: False)
    monkeypatch.setattr("lib_lightning.algorithm.dictionary_edges._MOST_ENTRIES", 1)
    graph = graph_of(network, x, layers, dict(zip(layers, (before, after), strict=True)))
    E, A = dense_edges(section, a, (before.encode, before.decode), (after.encode, after.decode))
    i, j = graph.lineages[layers[1]].ids, graph.lineages[layers[0]].ids
    E, A = E[i][:, j], A[i][:, j]
    found = graph.edges[layers[0], layers[1]]
    assert (found - E)[:-1].abs().max() <= 1e-8 * E.abs().max()
    assert 0 < (found - E)[-1].norm() < 0.2 * E[-1].norm()
    assert (graph.attributions[layers[0], layers[1]] - A).abs().max() <= 1e-8 * A.abs().max()
    assert any("random signs" in note for note in graph.info["notes"])


@pytest.mark.parametrize("has_jvp", [True, False])
def test_a_batch_in_which_no_latent_is_active(monkeypatch: pytest.MonkeyPatch, has_jvp: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    x, layers = torch.randn(12, 5).double(), ["0", "1", "output"]
    quiet, dictionary = (SparseDictionary(8, 20, threshold=threshold).double() for threshold in (1e3, -1e3))
    largest = dictionary.encode(network[:2](x)).amax(1)
    dictionary.threshold = float(largest.detach().median())
    silent, active = x[largest <= dictionary.threshold], x[largest > dictionary.threshold]
    if not has_jvp:
        monkeypatch.setattr("lib_lightning.jacobian.section.Section.has_jvp", lambda self: False)

    # Batch by batch, and all at once: the same.
    both = compute_interaction_graph(network, [silent, active], layers, {"1": dictionary}, **OPTIONS)
    joined = compute_interaction_graph(network, [torch.cat([silent, active])], layers, {"1": dictionary}, **OPTIONS)
    assert torch.allclose(both.bases["0"].importance, joined.bases["0"].importance, rtol=1e-8)
    assert torch.allclose(both.edges["0", "1"], joined.edges["0", "1"], rtol=1e-8, atol=1e-12)
    assert both.edges["0", "1"][:-1].sum() > 0

    # With no active latent at all, there is the error alone; what is in front of it can have a dictionary too.
    for dictionaries in ({"1": quiet}, {"0": dictionary, "1": quiet}, {"0": quiet, "1": dictionary}):
        graph = compute_interaction_graph(network, [x[:6], x[6:]], layers, dictionaries, **OPTIONS)
        silent_layer = next(layer for layer, one in dictionaries.items() if one is quiet)
        assert graph.labels[silent_layer] == ["error"]
        error = graph.bases[silent_layer].encode(network[:2](x) if silent_layer == "1" else network[:1](x))
        assert torch.allclose(error.square().mean(0), graph.bases[silent_layer].importance)
        assert any(f"dictionary of '{silent_layer}'" in note for note in graph.info["notes"])


def test_masked_positions_have_no_latents() -> None:
    network, layers, x, a, _ = sections_of("gpt2")
    mask = torch.ones_like(x)
    mask[:, -1] = 0
    dictionaries = {layer: SparseDictionary(16, 30, k=3, seed=i).double() for i, layer in enumerate(layers)}
    batch = {"input_ids": x, "attention_mask": mask}
    graph = compute_interaction_graph(
        network, [batch], layers, mask="attention_mask", dictionaries=dictionaries, **OPTIONS
    )
    first = dictionaries[layers[0]].encode(a[:, :-1]).square().mean((0, 1)).detach()
    basis = graph.bases[layers[0]]
    assert torch.allclose(basis.importance[:-1], first[graph.lineages[layers[0]].ids[:-1]], rtol=1e-10)
    # Without what is masked, the edges are the same: positions before do not depend on it.
    short = graph_of(network, x[:, :-1], layers, dictionaries)
    assert torch.allclose(graph.edges[layers[0], layers[1]], short.edges[layers[0], layers[1]], rtol=1e-8)


@pytest.mark.parametrize("kind", ["lib", "pca", "neuron"])
@pytest.mark.parametrize("model", ["gpt2", "mlp", "cnn"])
def test_the_librarys_own_basis_is_a_dictionary(model: str, kind: str) -> None:
    if model == "gpt2":
        network, layers = gpt2()
        batches: list[Tensor] = [tokens(8)]
        layers = [*layers[1:], "output"]
    elif model == "mlp":
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        layers, batches = ["1", "3", "output"], list(torch.randn(60, 5).double().split(25))
    else:
        torch.manual_seed(0)
        convolution = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU())
        network = nn.Sequential(convolution, nn.Flatten(), nn.Linear(27, 3)).double()
        layers, batches = ["0.1", "0.3", "output"], list(torch.randn(30, 2, 6, 6).double().split(16))
    options = {**OPTIONS, "rtol": 1e-9, "output_distribution": "auto"}
    own = compute_interaction_graph(network, batches, layers, kind, **options)
    given = dict(list(own.bases.items())[:-1])
    found = compute_interaction_graph(network, batches, layers, given, **options)
    for name, basis in given.items():
        r = basis.n_features
        same = found.bases[name]
        assert same.n_features == r + 1
        assert (same.importance[:r] - basis.importance).abs().max() <= 1e-10 * basis.importance.max()
        assert same.output_importance is not None
        assert torch.allclose(same.output_importance[:r], basis.output_importance, rtol=1e-8)
    for section, E in own.edges.items():
        r_out, r = E.shape
        for one, other in ((found.edges, own.edges), (found.attributions, own.attributions)):
            assert (one[section][:r_out, :r] - other[section]).abs().max() <= 1e-10 * other[section].abs().max()


@pytest.mark.parametrize("options", [{}, {"n_probes": 4000}])
def test_a_lib_layer_in_front_of_a_dictionary_is_measured_by_its_latents(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, layers = torch.randn(60, 5).double(), ["1", "3", "output"]
    own = compute_interaction_graph(network, [x], layers, rtol=1e-9, **OPTIONS)
    mixed = compute_interaction_graph(network, [x], layers, {"3": own.bases["3"]}, rtol=1e-9, **OPTIONS)
    assert mixed.bases["1"].kind == "lib"
    assert torch.allclose(mixed.bases["1"].importance, own.bases["1"].importance, rtol=1e-9)
    # With latents: eigenvalues of the covariance in the metric of dense Jacobians.
    sae = SparseDictionary(6, 20, k=4).double()
    found = compute_interaction_graph(network, [x], layers, {"3": sae}, rtol=1e-9, **OPTIONS, **options)
    a = network[:2](x).detach()
    M = torch.zeros(7, 7).double()
    for sample in a:
        J = torch.autograd.functional.jacobian(lambda t: sae.encode(network[2:4](t)), sample)
        M += J.T @ J / len(a)
    wanted = torch.linalg.eigvals(M @ torch.cov(a.T, correction=0)).real.sort(descending=True).values
    tolerance = 0.1 if options else 1e-8  # random signs
    assert (found.bases["1"].importance - wanted[: found.bases["1"].n_features]).abs().max() <= tolerance * wanted.max()


def test_some_active_latents_chosen_at_random_give_the_same_in_the_mean() -> None:
    network, layers = gpt2()
    layers = layers[:2]
    x = tokens(96)
    dictionaries = {layer: SparseDictionary(16, 40, k=6, seed=i).double() for i, layer in enumerate(layers)}
    E, found = (
        compute_interaction_graph(network, [x], layers, dictionaries=dictionaries, n_pushed=n, **OPTIONS).edges[
            layers[0], layers[1]
        ]
        for n in (None, 8)
    )
    assert 0 < (found - E)[:, :-1].norm() < 0.3 * E[:, :-1].norm()
    assert torch.allclose(found[:, -1], E[:, -1], rtol=1e-9)  # the error is always pushed


def test_too_many_latents_for_the_memory_belong_to_the_error() -> None:
    network, layers, x, a, _ = sections_of("gpt2")
    dictionaries = {layer: SparseDictionary(16, 60, seed=i).double() for i, layer in enumerate(layers)}
    # Two matrices of 20 x 20 numbers.
    from lib_lightning.algorithm import build

    planned = build._common_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_common_plan", lambda plan, *args: replace(planned(plan, *args), edge_bytes=16 * 20**2))
        graph = graph_of(network, x, layers, dictionaries)
    basis = graph.bases[layers[0]]
    assert basis.n_features == 20
    assert any("belong to the error" in note for note in graph.info["notes"])
    squares = dictionaries[layers[0]].encode(a).square().mean((0, 1))
    assert set(graph.lineages[layers[0]].ids[:-1].tolist()) == set(squares.topk(19).indices.tolist())
    restored = basis.from_coordinates(basis.coordinates(a), a)
    assert torch.allclose(restored, a, rtol=1e-12)
    assert not graph.edge_errors  # no room for sums of each group
