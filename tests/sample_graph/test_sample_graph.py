"""Contributions on one sample, compared with dense Jacobians and finite differences of the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError, SettingError
from lib_lightning.sample_graph import SampleGraph
from tests.integration.oracle import assert_close, dense, randomize

V, T = 11, 4


def mlp() -> tuple[nn.Module, Any, list[Any]]:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.randn(20, 5).double(), ["0", "1", "3", "output"]


def cnn() -> tuple[nn.Module, Any, list[Any]]:
    blocks = [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, torch.randn(12, 2, 6, 6).double(), ["0", "2", "4", "output"]


def gpt2() -> tuple[nn.Module, Any, list[Any]]:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=8, n_layer=2, n_head=2, **ends))
    return model, {"input_ids": torch.randint(V, (12, T))}, ["transformer.drop", "transformer.h.0", "transformer.h.1"]


def llama() -> tuple[nn.Module, Any, list[Any]]:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=2, max_position_embeddings=T, **sizes))
    for layer in model.model.layers:  # those of transformers compute in float32
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(8), nn.RMSNorm(8)
    model.model.norm = nn.RMSNorm(8)
    batch = {"input_ids": torch.randint(V, (12, T))}
    return model, batch, ["model.embed_tokens", "model.layers.0", NodeLayer("model.layers.1", positions=[-1])]


MODELS: list[Callable[[], tuple[nn.Module, Any, list[Any]]]] = [mlp, cnn, gpt2, llama]


@cache
def computed(make: Callable[[], tuple[nn.Module, Any, list[Any]]]) -> tuple[nn.Module, Any, InteractionGraph]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch, layers = make()
        model = randomize(model).eval()
    return model, batch, compute_interaction_graph(model, [batch], layers, effort="exact")


def one_of(batch: Any, index: int) -> Any:
    if isinstance(batch, dict):
        return {name: t[index : index + 1] for name, t in batch.items()}
    return batch[index : index + 1]


def call(model: nn.Module, batch: Any) -> Any:
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found if isinstance(found, Tensor) else found.logits


def rows(layer: NodeLayer, value: Any) -> Tensor:
    """Activations ``(S, d)`` of what a module returns, for one sample."""
    t = value if isinstance(value, Tensor) else value[0]
    return layer.read([t])[0]


def section(model: nn.Module, batch: Any, before: NodeLayer, after: NodeLayer) -> tuple[Tensor, Callable[..., Tensor]]:
    """Activations of a node layer at one sample, and the function from them to the next: by hooks of our own."""
    modules = dict(model.named_modules())
    seen: dict[str, Any] = {}

    def run(new: Tensor | None) -> Tensor:
        def first(module: nn.Module, args: Any, output: Any) -> Any:
            t = output if isinstance(output, Tensor) else output[0]
            seen["a"] = rows(before, t).detach()
            if new is None:
                return output
            written = before.write(new[None], [t])[0]
            return written if isinstance(output, Tensor) else (written, *output[1:])

        def second(module: nn.Module, args: Any, output: Any) -> None:
            seen["out"] = rows(after, output)

        handles = [modules[before.taps[0]].register_forward_hook(first)]
        if after.taps[0] != "output":
            handles.append(modules[after.taps[0]].register_forward_hook(second))
        y = call(model, batch)
        for handle in handles:
            handle.remove()
        return rows(after, y) if after.taps[0] == "output" else seen["out"]

    run(None)
    return seen["a"], run


def positions(found: SampleGraph, layer: NodeLayer, S: int) -> list[int]:
    """Indices of a node layer's positions that have features or outputs as nodes."""
    numbers = [p % T for p in layer.positions] if isinstance(layer.positions, tuple) else list(range(S))
    nodes = {node.position for node in found.nodes if node.layer == layer.name and node.kind in ("feature", "output")}
    return [numbers.index(position) for position in sorted(nodes)]


def weights(found: SampleGraph, kind: str, layers: tuple[str, str], sizes: tuple[int, int]) -> Tensor:
    """Weights of edges from nodes of a kind, shape ``(S', r', S, r)``; positions without target nodes are left out."""
    ends = [
        (found.nodes[s], found.nodes[t], w)
        for s, t, w in zip(found.sources.tolist(), found.targets.tolist(), found.weights.tolist(), strict=True)
    ]
    targets = sorted({n.position for n in found.nodes if n.layer == layers[1] and n.kind in ("feature", "output")})
    sources = sorted({n.position for n in found.nodes if n.layer == layers[0]})  # all of them have errors
    matrix = torch.zeros(len(targets), sizes[1], len(sources), sizes[0]).double()
    for s, t, w in ends:
        if s.kind == kind and (s.layer, t.layer) == layers:
            matrix[targets.index(t.position), t.index, sources.index(s.position), s.index if s.index >= 0 else 0] = w
    return matrix


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_contributions_are_those_of_dense_jacobians(make: Callable[[], Any]) -> None:
    model, batch, graph = computed(make)
    sample = one_of(batch, 5)
    V_out = call(model, sample).shape[-1]
    found = graph.sample_graph(sample, model, outputs=range(V_out), max_features=10**6)
    assert found.left_out().abs().max() < 1e-9  # every value is exactly what leads to it
    specs = [layer for layer in graph.node_layer_specs() if layer.taps != ("output",)]
    jacobians = dense(model, sample, [*specs, "output"])[1]
    for l, (before, after) in enumerate(itertools.pairwise([*specs, NodeLayer("output")])):
        a, function = section(model, sample, before, after)
        J = torch.autograd.functional.jacobian(function, a)  # (S', d', S, d)
        assert_close(jacobians[l][0], J)  # both ways of our own agree: autograd and finite differences
        basis, out = graph.bases[before.name], function(a).detach()
        fhat = (a - basis.mean) @ basis.to_features
        if after.name == "output":  # logits less their average, and less those at the mean
            at_mean = graph.bases["output"].mean if "output" in graph.bases else function(basis.mean.expand_as(a))
            C = torch.eye(V_out).double() - 1 / V_out
        else:
            C, at_mean = graph.bases[after.name].to_features, graph.bases[after.name].mean
        reached = positions(found, after, len(out))  # by paths that lead to the output at the last position
        values, J = ((out - at_mean) @ C)[reached].detach(), J[reached]
        G = torch.einsum("pi,tpsd->tisd", C, J)
        layers, sizes = (before.name, after.name), (basis.n_features, C.shape[1])
        expected = torch.einsum("tisd,jd,sj->tisj", G, basis.from_features, fhat)
        assert_close(weights(found, "feature", layers, sizes), expected, 1e-8)
        errors = torch.einsum("tisd,sd->tis", G, a - basis.mean - fhat @ basis.from_features)
        linearisation = values - torch.einsum("tisd,sd->ti", G, a - basis.mean)
        if len(out) == len(a):  # the error at the target's own position has what linearisation leaves out
            for t, s in enumerate(reached):
                errors[t, :, s] += linearisation[t]
            linearisation = 0 * linearisation
        scale = float(values.abs().max())
        actual = weights(found, "error", layers, (1, C.shape[1]))[..., 0]
        if linearisation.any():
            actual, errors = actual.sum(2), errors.sum(2) + linearisation
        assert (actual - errors).abs().max() < 1e-8 * scale
        assert actual.abs().max() > 1e-6 * scale or after.name == "output"


def test_averages_over_samples_are_edges_and_attributions() -> None:
    for make, S, S_next in ((mlp, 1, 1), (cnn, 9, 4)):
        model, batch, graph = computed(make)
        layers = graph.node_layers[1], graph.node_layers[2]
        sizes = tuple(graph.bases[layer].n_features for layer in layers)
        E, A = torch.zeros_like(graph.edges[layers]), torch.zeros_like(graph.edges[layers])
        for index in range(len(batch)):
            found = graph.sample_graph(batch, model, index=index, max_features=10**6)
            y = weights(found, "feature", layers, sizes).sum(2)  # (S', r', r), summed over positions of the source
            after = [n for n in found.nodes if (n.kind, n.layer) == ("feature", layers[1])]
            fhat = torch.tensor([n.value for n in after], dtype=torch.float64).reshape(-1, sizes[1])
            E += y.square().sum(0) / (len(batch) * S)
            A += (y * fhat[..., None]).sum(0) / (len(batch) * S_next)
        assert_close(E, graph.edges[layers], 1e-8)
        assert_close(A, graph.attributions[layers], 1e-8)


def test_fewer_features_and_less_memory_change_no_weight() -> None:
    model, batch, graph = computed(gpt2)
    full = graph.sample_graph(batch, model, index=0, max_features=10**6)
    known = dict(zip(pairs(full), full.weights.tolist(), strict=True))
    few = graph.sample_graph(batch, model, index=0, max_features=5)
    assert [sum(n.kind == "feature" and n.layer == layer for n in few.nodes) for layer in few.node_layers] == [5, 5, 5]
    kinds = [few.nodes[s].kind for s in few.sources.tolist()]
    for pair, kind, weight in zip(pairs(few), kinds, few.weights.tolist(), strict=True):
        assert abs(known[pair] - weight) < 1e-9, kind
    assert few.left_out().abs().max() > 1e-3  # of features that are no nodes
    # What is kept are the features with most influence on outputs.
    last = [n for n in full.nodes if n.kind == "feature" and n.layer == full.node_layers[-1]]
    best = sorted(last, key=lambda n: -n.influence)[:5]
    assert {n.key for n in best} == {n.key for n in few.nodes if n.kind == "feature" and n.layer == best[0].layer}
    again = graph.sample_graph(batch, model, index=0, max_features=5, memory_limit=1e-9)
    assert pairs(again) == pairs(few)
    torch.testing.assert_close(again.weights, few.weights)


def pairs(found: SampleGraph) -> list[tuple[Any, Any]]:
    ends = zip(found.sources.tolist(), found.targets.tolist(), strict=True)
    return [(found.nodes[s].key, found.nodes[t].key) for s, t in ends]


def test_linearisation_leaves_out_nothing_of_affine_sections_and_with_integrated_gradients() -> None:
    model, batch, graph = computed(mlp)
    found = graph.sample_graph(batch, model, index=0)
    last = torch.tensor([n.kind == "output" for n in found.nodes])
    assert found.linearisation[last].abs().max() < 1e-12  # the section to the output is affine
    assert found.linearisation[~last].abs().max() > 1e-3
    # On the path from the mean, the integral of the gradient is the change: what is left is how far the next node layer
    # at this mean is from its own mean.
    along = graph.sample_graph(batch, model, index=0, integration_steps=24)
    mean = [graph.bases[layer].mean for layer in ("0", "1")]
    offset = ((model[1](mean[0]) - mean[1]) @ graph.bases["1"].to_features).detach()
    first = [i for i, n in enumerate(along.nodes) if (n.layer, n.kind) == ("1", "feature")]
    assert_close(along.linearisation[first], offset[[along.nodes[i].index for i in first]], 1e-8)


def test_masked_positions_have_no_nodes() -> None:
    model, batch, graph = computed(gpt2)
    mask = torch.ones(12, T).long()
    mask[3, 2:] = 0
    batch = {**batch, "attention_mask": mask}
    found = graph.sample_graph(batch, model, index=3, mask="attention_mask", max_features=10**6)
    assert {n.position for n in found.nodes} == {0, 1}
    assert found.left_out().abs().max() < 1e-9
    short = graph.sample_graph({"input_ids": batch["input_ids"][3:4, :2]}, model, max_features=10**6)
    assert dict(zip(pairs(found), found.weights.tolist(), strict=True)) == pytest.approx(
        dict(zip(pairs(short), short.weights.tolist(), strict=True)), abs=1e-9
    )


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_outputs_that_are_no_classes(kind: str) -> None:
    model, batch, _ = computed(mlp)
    graph = compute_interaction_graph(model, [batch], ["0", "1", "output"], output_distribution=kind)
    found = graph.sample_graph(batch, model, index=1)
    outputs = [n for n in found.nodes if n.kind == "output"]
    y = model(batch)[1].detach()
    for node in outputs:  # of numbers, how far they are from their means
        assert node.value == pytest.approx(float(y[node.index] - graph.bases["output"].mean[node.index]))
        assert node.probability == (pytest.approx(float(y[node.index].sigmoid())) if kind == "bernoulli" else None)
    assert len(outputs) == 3


def test_pruning_and_networkx() -> None:
    model, batch, graph = computed(llama)
    found = graph.sample_graph(batch, model, index=0)
    total = sum(n.probability for n in found.nodes if n.kind == "output")
    for layer in found.node_layers:  # probability flows back through every node layer, and ends in errors and inputs
        total -= sum(n.influence for n in found.nodes if n.kind == "error" and n.layer == layer)
    assert total == pytest.approx(sum(n.influence for n in found.nodes if n.kind == "input"), rel=1e-9)
    pruned = found.pruned()
    assert 0 < len(pruned.weights) < len(found.weights)
    assert set(pairs(pruned)) <= set(pairs(found))
    assert len(found.pruned(1, 1).weights) > 0.9 * len(found.weights)
    nx = pruned.to_networkx()
    assert nx.number_of_nodes() == len(pruned.nodes)
    assert nx.number_of_edges() == len(pruned.weights)
    for node, data in nx.nodes(data=True):
        if data["kind"] == "feature":
            assert nx.in_degree(node)
            assert nx.out_degree(node)
            assert graph.feature((data["layer"], data["index"])).id == data["id"]


def test_errors() -> None:
    model, batch, graph = computed(mlp)
    with pytest.raises(SettingError, match="a batch with 20 samples: say which one with index=0"):
        graph.sample_graph(batch, model)
    with pytest.raises(SettingError, match="index=20 is none of them"):
        graph.sample_graph(batch, model, index=20)
    with pytest.raises(SettingError, match="0 samples"):
        graph.sample_graph(batch[:0], model)
    with pytest.raises(SettingError, match=r"outputs are different indices from 0 to 2; got \[3\]"):
        graph.sample_graph(batch, model, index=0, outputs=[3])
    with pytest.raises(SettingError, match="position=1 is none of the 1 output positions"):
        graph.sample_graph(batch, model, index=0, position=1)
    with pytest.raises(NotFiniteError, match="'0' on this sample are NaN"):
        graph.sample_graph(batch * float("nan"), model, index=0)
    other = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(NodeLayerError, match="computed on another model"):
        graph.sample_graph(batch, other, index=0)
    with pytest.raises(LIBError, match="The model is needed"):
        graph.to_circuit_tracer("one.json", batch)
