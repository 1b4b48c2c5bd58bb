"""What works on features works on latents: editing, ablations, effects, single samples, files, metrics and figures."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compare, compute_interaction_graph, estimate_cost, measure_controls
from lib_lightning.ablation import edge_ablation_curve, edges_required, node_ablation_curve
from lib_lightning.algorithm.build import BuildResult, build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.algorithm.dictionary_layers import try_dictionaries
from lib_lightning.algorithm.effort import choose_effort, measure_cost
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.dictionaries import Transcoder
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError, SettingError, SettingTypeError
from lib_lightning.interventions import edit_features, feature_effects, scale
from lib_lightning.lineage import FeatureTracker
from lib_lightning.lineage.reference import reference_features
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.viewer.run import Run
from tests.algorithm.two_threads import in_two
from tests.dictionaries.stand_ins import (
    Normalizing,
    OfHeads,
    PassingState,
    PlainObject,
    Saturating,
    SparseDictionary,
    WithoutGradient,
    gpt2,
    tokens,
)

KINDS = [SparseDictionary, Normalizing, PassingState, OfHeads, Saturating]


def small(kind: type[SparseDictionary] = SparseDictionary) -> tuple[nn.Module, Tensor, dict[str, SparseDictionary]]:
    """A network of two sections, samples, and dictionaries of two node layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()
    dictionaries = {layer: kind(16, 24, k=5, seed=i).double() for i, layer in enumerate(("1", "3"))}
    return model, torch.randn(60, 5, generator=torch.Generator().manual_seed(1)).double(), dictionaries


def graph_of(kind: type[SparseDictionary] = SparseDictionary, **options: Any) -> tuple[Any, ...]:
    model, x, dictionaries = small(kind)
    return compute_interaction_graph(model, [x], ["1", "3", "output"], dictionaries, **options), model, x, dictionaries


def score(output: Tensor, batch: Any) -> Tensor:
    return output.softmax(-1).amax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_error_reproduce_the_model(kind: type[SparseDictionary]) -> None:
    graph, model, x, _ = graph_of(kind)
    with torch.no_grad():
        y, a = model(x), model[:2](x)
    basis = graph.bases["1"]
    with torch.no_grad():
        assert (basis.from_coordinates(basis.coordinates(a), a) - a).abs().max() < 1e-12
        replaced = model[2:](basis.from_coordinates(basis.coordinates(a), a))
        assert (replaced - y).abs().max() < 1e-6 * y.abs().max()
    # All edges of a section, those of both errors among them, are the section.
    section = "1", "3"
    every = graph.edges[section].numel()
    plain = score(y, None).mean()
    assert abs(edge_ablation_curve(model, [x], graph, score, section, [every])[every] - plain) < 1e-6
    r = basis.n_features
    assert abs(node_ablation_curve(model, [x], graph, score, "1", [r])[r] - plain) < 1e-6
    # With edits that change nothing, neither.
    with edit_features(model, graph, {"1/24": scale(1.0), ("1", 0): scale(1.0)}), torch.no_grad():
        assert (model(x) - y).abs().max() < 1e-10
    assert graph.labels["1"][-1] == "error"


def test_heads_of_an_attention_are_joined_at_what_its_output_reads() -> None:
    network, _ = gpt2()
    x, read, after = tokens(23), "transformer.h.1.attn.c_proj:input", "transformer.h.1.attn.c_proj"
    heads = OfHeads(16, 40, k=5).double()
    graph = compute_interaction_graph(network, [x], [read, after], {read: heads}, effort="exact")
    plain = SparseDictionary(16, 40, k=5).double()
    other = compute_interaction_graph(network, [x], [read, after], {read: plain}, effort="exact")
    torch.testing.assert_close(graph.edges[read, after], other.edges[read, after], rtol=1e-10, atol=0)
    basis, seen = graph.bases[read], list[Tensor]()
    hook = network.get_submodule(after).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        y = network(x).logits
        hook.remove()
        torch.testing.assert_close(basis.encode(seen[0])[..., :-1], plain.latents(seen[0])[..., basis.latents])
        with edit_features(network, graph, {f"{read}/40": scale(1.0), (read, 0): scale(1.0)}):
            assert (network(x).logits - y).abs().max() < 1e-10
        with edit_features(network, graph, {(read, 0): 0.0}):
            assert (network(x).logits - y).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_edits_change_what_is_decoded(kind: type[SparseDictionary]) -> None:
    graph, model, x, _ = graph_of(kind)
    basis = graph.bases["1"]
    latent = int(basis.latents[basis.importance[:-1].argmax()])
    with torch.no_grad():
        a = model[:2](x)
        f, e = basis.latents_and_error(a)
        j = graph.index(f"1/{latent}")
        fewer = f.clone()
        fewer[:, j] = 0
        wanted = model[2:](basis.decoded(fewer, a) + e)
        without_error = model[2:](basis.decoded(f, a))
        twice = model[2:](basis.decoded(f, a) + 2 * e)
        with edit_features(model, graph, {f"1/{latent}": 0}):
            assert torch.allclose(model(x), wanted, rtol=1e-10)
        with edit_features(model, graph, {"1/24": 0}):
            assert torch.allclose(model(x), without_error, rtol=1e-10)
        with edit_features(model, graph, {"1/24": scale(2.0)}):
            assert torch.allclose(model(x), twice, rtol=1e-10)
        effects = feature_effects(model, [x], graph, score, [f"1/{latent}", "1/24"])
        changes = [float((score(y, None) - score(model(x), None)).mean()) for y in (wanted, without_error)]
    assert effects[f"1/{latent}"].change == pytest.approx(changes[0])
    assert effects["1/24"].change == pytest.approx(changes[1])
    # Only the two most important features are kept: perhaps the error is one of them.
    kept = basis.importance.argsort(descending=True)[:2]
    is_kept = torch.zeros(basis.n_features, dtype=torch.float64).index_fill(0, kept, 1.0)
    with torch.no_grad():
        restored = basis.decoded(f * is_kept[:-1], a) + e * is_kept[-1]
        found = node_ablation_curve(model, [x], graph, score, "1", [2])[2]
        assert found == pytest.approx(float(score(model[2:](restored), None).mean()), rel=1e-9)


def test_edges_that_are_kept_compute_each_latent() -> None:
    graph, model, x, _ = graph_of()
    before, after = graph.bases["1"], graph.bases["3"]
    E, k = graph.edges["1", "3"], 40
    mask = torch.zeros(E.numel(), dtype=torch.bool)
    mask[E.flatten().argsort(descending=True, stable=True)[:k]] = True
    mask = mask.reshape(E.shape)
    with torch.no_grad():
        a = model[:2](x)
        f, e = before.latents_and_error(a)
        f_next, e_next = torch.zeros(len(x), after.error).double(), torch.zeros(len(x), 16).double()
        for i, row in enumerate(mask):
            one = before.decoded(f * row[:-1], a) + e * row[-1]
            f_one, e_one = after.latents_and_error(model[2:4](one))
            if i == after.error:
                e_next = e_one
            else:
                f_next[:, i] = f_one[:, i]
        wanted = score(model[4:](after.decoded(f_next, model[2:4](a)) + e_next), None).mean()
        assert edge_ablation_curve(model, [x], graph, score, ("1", "3"), [k])[k] == pytest.approx(
            float(wanted), rel=1e-9
        )
    required = edges_required(model, [x], graph, score, tolerance=0.01, search="bisection")
    assert {len(result.mask) for result in required.values()} == {after.n_features, 3}


@pytest.mark.parametrize("kind", [SparseDictionary, Normalizing, Saturating])
def test_one_sample(kind: type[SparseDictionary]) -> None:
    graph, model, x, _ = graph_of(kind, output_distribution="gaussian")
    sample = graph.sample_graph(x, model, index=3, outputs=[0])
    basis = graph.bases["3"]
    with torch.no_grad():
        a = model[:4](x[3:4])
        f, e = basis.latents_and_error(a)
        of_latents = -basis.without(a, torch.arange(basis.error))[:, 0]
        W = model[4].weight[0].detach()
    # The last section is linear: contributions to the output are exact, those of latents and that of the error.
    is_last = sample.targets == len(sample.nodes) - 1
    found = dict(zip(sample.sources[is_last].tolist(), sample.weights[is_last].tolist(), strict=True))
    of_kind: dict[str, list[float]] = {"feature": [], "error": []}
    for j, weight in found.items():
        of_kind[sample.nodes[j].kind].append(weight)
    if kind is not Saturating:
        assert of_kind["feature"] == pytest.approx((of_latents @ W)[f[0] != 0].tolist())
        # What is not the difference to the mean output is in the edge of the error as well.
        assert of_kind["error"] == pytest.approx([float((e @ W)[0] + sample.linearisation[-1])])
    assert (sample.left_out().abs() < 1e-9).all()


def test_files_have_a_reference_and_no_weights(tmp_path: Path) -> None:
    graph, model, x, dictionaries = graph_of()
    path, whole = tmp_path / "graph.safetensors", tmp_path / "whole.safetensors"
    graph.save(path)
    graph.save(whole, dictionary_weights=True)
    names = {}
    for file in (path, whole):
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            names[file] = set(json.loads(stream.read(size)))
    assert not any("to_features" in name or "W_dec" in name for name in names[path] if ".2." not in name)
    assert "dictionary.0.W_dec" in names[whole]
    loaded = InteractionGraph.load(path)
    reference = loaded.info["dictionaries"]["1"]
    assert reference["n_latents"] == 24
    assert reference["class"].endswith("stand_ins.SparseDictionary")
    for section, E in graph.edges.items():
        assert torch.equal(loaded.edges[section], E)
    assert loaded.feature_ids("1") == graph.feature_ids("1")
    assert loaded.measure() == graph.measure()
    assert loaded.feature("1/24").label == "error"
    with pytest.raises(LIBError, match="Pass it"):
        loaded.bases["1"].encode(torch.zeros(2, 16).double())
    with pytest.raises(LIBError, match="is not in the file"):
        node_ablation_curve(model, [x], loaded, score, "1", [2])
    given = InteractionGraph.load(path, dictionaries)
    with torch.no_grad():
        a = model[:2](x)
        assert torch.equal(given.bases["1"].encode(a), graph.bases["1"].encode(a))
    for name in ("to_features", "from_features"):
        assert torch.allclose(getattr(given.bases["1"], name), getattr(graph.bases["1"], name))
    assert node_ablation_curve(model, [x], given, score, "1", [2]) == node_ablation_curve(
        model, [x], graph, score, "1", [2]
    )
    # A file with weights gives them to an object of the same class, also when it is saved again.
    InteractionGraph.load(whole).save(tmp_path / "again.safetensors", dictionary_weights=True)
    stored = InteractionGraph.load(tmp_path / "again.safetensors")
    assert loaded.bases["1"].weights is None
    fresh = {layer: SparseDictionary(16, 24, k=5, seed=9).double() for layer in dictionaries}
    with pytest.raises(SettingError, match="other weights"):
        stored.attach_dictionaries(fresh)
    for layer, dictionary in fresh.items():
        dictionary.load_state_dict(stored.bases[layer].weights)
    stored.attach_dictionaries(fresh)
    with torch.no_grad():
        assert torch.equal(stored.bases["1"].encode(a), graph.bases["1"].encode(a))
        dictionaries["1"].W_dec[0, 0] += 1
    with pytest.raises(SettingError, match="other weights"):
        InteractionGraph.load(path, dictionaries)
    with pytest.raises(SettingError, match="not latents"):
        given.attach_dictionaries({"output": dictionaries["1"]})


def test_metrics_figures_and_views(tmp_path: Path) -> None:
    graph, model, x, _ = graph_of(n_pushed=3)
    assert graph.measure()["features/total"] > 10
    graph.find_modules()
    assert graph.plot().axes
    assert graph.plot(signs=True).axes
    assert graph.plot_spectrum([compute_interaction_graph(model, [x], ["1", "3", "output"])]).axes
    nodes = graph.to_networkx().nodes
    assert nodes["1", graph.bases["1"].error]["label"] == "error"
    feature = graph.feature(("1", 0))
    assert feature.id == f"1/{int(graph.bases['1'].latents[0])}"
    assert graph.examples["1"].values.shape[0] == graph.bases["1"].n_features
    assert graph.output_effects["1"].outputs.shape[0] == graph.bases["1"].n_features
    graph.info["step"] = 3
    graph.save(tmp_path / "version_0" / "lib" / "snapshots" / "step-00000003.safetensors")
    run = Run(tmp_path)
    page = run.feature(feature.id, 3)
    assert feature.id in str(page._repr_html_())
    assert run.graph(3).node_layers == ["1", "3", "output"]
    assert "latents" in run.view(tmp_path / "film.html").read_text()


def test_latents_keep_their_numbers_over_time() -> None:
    graph, model, x, dictionaries = graph_of()
    tracker = FeatureTracker()
    for step in range(2):
        now = compute_interaction_graph(model, [x[: 60 - 50 * step]], ["1", "3", "output"], dictionaries)
        now.info["reference_samples"] = "the same"
        now.reference_features = reference_features(now, model, [x])
        events = tracker.update(now, step)
        basis = now.bases["1"]
        assert now.lineages["1"].ids.tolist() == [*basis.latents.tolist(), 24]
    assert basis.n_features < graph.bases["1"].n_features
    ended = {event.lineage for event in events if event.kind == "died" and event.layer == "1"}
    assert ended == set(graph.bases["1"].latents.tolist()) - set(basis.latents.tolist())
    similarity = now.lineages["1"].similarity[:-1]  # the error has what is no feature any more
    assert torch.allclose(similarity, torch.ones_like(similarity), atol=1e-3)
    assert 0 < tracker.turnover["1"].overlap < 1


def test_a_language_model_in_half_and_single_precision() -> None:
    network, layers = gpt2()
    dictionaries = {layer: SparseDictionary(16, 30, k=4, seed=i) for i, layer in enumerate(layers[:2])}
    exact = compute_interaction_graph(
        network, [tokens()], layers, {name: x.double() for name, x in dictionaries.items()}, effort="exact"
    )
    single = compute_interaction_graph(network.float(), [tokens()], layers, dictionaries, effort="exact")
    for section, E in exact.edges.items():
        if E.shape == single.edges[section].shape:
            assert (single.edges[section] - E).norm() < 1e-3 * E.norm()
    half = {name: x.bfloat16() for name, x in dictionaries.items()}
    found = compute_interaction_graph(network, [tokens()], layers, half, effort="exact")
    assert all(torch.isfinite(E).all() for E in found.edges.values())


def test_cost_is_estimated() -> None:
    model, x, dictionaries = small()
    estimate = estimate_cost(model, x, ["1", "3", "output"], num_samples=1000, dictionaries=dictionaries)
    assert estimate.seconds < 60


def test_errors() -> None:
    model, x, dictionaries = small()
    layers = ["1", "3", "output"]
    with pytest.raises(NodeLayerError, match="'2'"):
        compute_interaction_graph(model, [x], layers, {"2": dictionaries["1"]})
    with pytest.raises(SettingTypeError, match="encode"):
        compute_interaction_graph(model, [x], layers, {"1": nn.Linear(3, 4)})
    with pytest.raises(SettingTypeError, match="by node layer"):
        compute_interaction_graph(model, [x], layers, dictionaries=dictionaries["1"])
    with pytest.raises(SettingError, match="not both"):
        compute_interaction_graph(model, [x], layers, dictionaries, dictionaries=dictionaries)
    with pytest.raises(SettingError, match="integration_steps"):
        compute_interaction_graph(model, [x], layers, dictionaries, integration_steps=2)
    with pytest.raises(SettingError, match="does not take activations"):
        compute_interaction_graph(model, [x], layers, {"1": SparseDictionary(7, 9).double()})
    with pytest.raises(SettingTypeError, match="object"):
        compute_interaction_graph(model, [x], layers, {"1": SparseDictionary})
    broken = SparseDictionary(16, 24, k=5).double()
    with torch.no_grad():
        broken.W_enc[:, 3] = torch.nan
    with pytest.raises(NotFiniteError, match="encoder of the dictionary of '1'"):
        compute_interaction_graph(model, [x], layers, {"1": broken})
    broken = SparseDictionary(16, 24, k=5).double()
    with torch.no_grad():
        broken.W_dec[3, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="decoder of the dictionary of '1'"):
        compute_interaction_graph(model, [x], layers, {"1": broken})
    with pytest.raises(SettingTypeError, match="A transcoder must be an object with methods"):
        Transcoder(SparseDictionary, slice(0, 8), slice(8, 16))
    with pytest.raises(SettingTypeError, match="by node layer"):
        compute_interaction_graph(model, [x], layers, dictionaries).attach_dictionaries(dictionaries["1"])


class Changed(SparseDictionary):
    """A dictionary with another ``encode`` or ``decode``, given as functions of what it would return."""

    after_encode: Any = staticmethod(lambda f: f)
    after_decode: Any = staticmethod(lambda a: a)

    def encode(self, a: Tensor) -> Any:
        return self.after_encode(super().encode(a))

    def decode(self, f: Tensor) -> Any:
        return self.after_decode(super().decode(f))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("encode", lambda f: f.sum(-1), "returns 1 row of 8 latents for 8 rows of activations"),
        ("encode", lambda f: None, "encode of the dictionary of '1' must return a tensor.*; got None"),
        ("encode", lambda f: f + 0.3 * torch.rand_like(f), "depend on more than the activations"),
        ("encode", lambda f: f - f.mean(0), "depend on the other activations in a batch"),
        (
            "encode",
            lambda f: f * (f >= f.flatten().topk(3 * len(f)).values[-1]),
            "depend on the other activations in a batch",
        ),
        ("decode", lambda a: None, "decode of the dictionary of '1' must return a tensor.*; got None"),
        ("decode", lambda a: a.T, "returns 16 rows of 8 for 8 rows of latents"),
        ("decode", lambda a: a.mean(0), "returns 16 rows of 1 for 8 rows of latents"),
        ("decode", lambda a: a[:, :9], "reads 16 activations, and writes 9"),
        ("decode", lambda a: a.detach(), "decoder of '1' has no derivative with respect to its latents"),
    ],
)
def test_dictionaries_that_are_none_are_refused(method: str, change: Any, message: str) -> None:
    model, x, _ = small()
    dictionary = Changed(16, 24).double()
    setattr(dictionary, f"after_{method}", change)
    with pytest.raises(SettingError, match=message) as caught:
        compute_interaction_graph(model, [x], ["1", "3", "output"], {"1": dictionary})
    assert len(str(caught.value).splitlines()) == 1


def test_errors_of_graphs_with_latents(tmp_path: Path) -> None:
    graph, model, *_ = graph_of(effort="exact")
    with pytest.raises(LIBError, match="takes 16 activations in the last axis; got a tensor of shape \\(2, 7\\)"):
        graph.bases["1"].encode(torch.zeros(2, 7))
    never = next(j for j in range(24) if f"1/{j}" not in graph.feature_ids("1"))
    with pytest.raises(LIBError, match=f"Latent {never} of '1' is no feature of this graph: it is active in none"):
        edit_features(model, graph, {f"1/{never}": 0}).__enter__()
    graph.save(tmp_path / "graph.safetensors")
    with pytest.raises(SettingError, match="a dictionary of 24 latents at '1', and this one has 20"):
        InteractionGraph.load(tmp_path / "graph.safetensors", {"1": SparseDictionary(16, 20).double()})


class OfOneLayer:
    """The dictionary of one layer of a crosscoder: each layer is reconstructed from latents that have read it."""

    def __init__(self, crosscoder: Crosscoder, layer: int) -> None:
        self.crosscoder, self.layer = crosscoder, layer
        self.W_enc, self.W_dec = crosscoder.W_enc[layer], crosscoder.W_dec[layer]
        self.b_enc, self.b_dec = crosscoder.b_enc, crosscoder.b_dec[layer]

    def encode(self, a: Tensor) -> Tensor:
        return torch.relu(a @ self.W_enc + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


class Crosscoder:
    """Latents that several layers share, with an encoder and a decoder for each of them."""

    def __init__(self, layers: int, d: int, r: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.W_enc, self.W_dec = (torch.randn(layers, *s, generator=g).double() / 4 for s in ((d, r), (r, d)))
        self.b_enc, self.b_dec = torch.zeros(r).double() - 0.1, torch.zeros(layers, d).double()


class IndependentComponents:
    """scikit-learn's FastICA as a dictionary."""

    def __init__(self, a: Tensor, r: int) -> None:
        decomposition = pytest.importorskip("sklearn.decomposition")
        ica = decomposition.FastICA(r, random_state=0, tol=0.1, max_iter=1000).fit(a.numpy())
        self.mean, self.W_enc, self.W_dec = (torch.as_tensor(x) for x in (ica.mean_, ica.components_.T, ica.mixing_.T))

    def encode(self, a: Tensor) -> Tensor:
        return (a - self.mean) @ self.W_enc

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.mean


class Clusters:
    """scikit-learn's k-means as a dictionary: one latent of each position is 1, and the residual is the error."""

    def __init__(self, a: Tensor, r: int) -> None:
        cluster = pytest.importorskip("sklearn.cluster")
        self.centers = torch.as_tensor(cluster.KMeans(r, random_state=0, n_init=1).fit(a.numpy()).cluster_centers_)

    def encode(self, a: Tensor) -> Tensor:
        nearest = torch.cdist(a, self.centers.to(a)).argmin(-1)
        return torch.nn.functional.one_hot(nearest, len(self.centers)).to(a)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.centers


@pytest.mark.parametrize("kind", ["crosscoder", "ica", "k-means"])
def test_crosscoders_ica_and_clusters(kind: str) -> None:
    model, x, _ = small()
    with torch.no_grad():
        a = {"1": model[:2](x), "3": model[:4](x)}
    crosscoder = Crosscoder(2, 16, 24)
    dictionaries: dict[str, Any] = {
        "crosscoder": lambda: {layer: OfOneLayer(crosscoder, i) for i, layer in enumerate(a)},
        "ica": lambda: {layer: IndependentComponents(of, 5) for layer, of in a.items()},
        "k-means": lambda: {layer: Clusters(of, 6) for layer, of in a.items()},
    }[kind]()
    graph = compute_interaction_graph(model, [x], ["1", "3", "output"], dictionaries, effort="exact")
    basis, dictionary = graph.bases["1"], dictionaries["1"]
    f, e = basis.latents_and_error(a["1"])
    # Latents and error are the activations, and importances mean squares of both.
    every = torch.zeros(len(x), dictionary.encode(a["1"]).shape[1]).double()
    every[:, basis.latents] = f
    assert torch.allclose(every, dictionary.encode(a["1"]))
    assert torch.allclose(dictionary.decode(every) + e, a["1"])
    squares = torch.cat([f.square(), e.square().sum(1, keepdim=True)], 1).mean(0)
    assert torch.allclose(basis.importance, squares)
    E = graph.edges["1", "3"]
    assert E.shape == (graph.bases["3"].n_features, basis.n_features)
    if kind == "k-means":  # the number of a cluster has no derivative: only the error acts, and is acted on
        assert (E[:-1] == 0).all()
        assert E[-1, -1] > 0
        assert any("no derivative" in note for note in graph.info["notes"])
    else:
        wanted = dense_edges(model[2:4], a["1"], basis, graph.bases["3"])
        assert torch.allclose(E[:-1, :-1], wanted, rtol=1e-8, atol=1e-12 * float(wanted.max()))


def dense_edges(section: nn.Module, a: Tensor, before: DictionaryBasis, after: DictionaryBasis) -> Tensor:
    """Edges between latents by Jacobians of the whole section, one sample after another."""
    total = torch.zeros(after.error, before.error).double()
    for row in a:
        f, e = (part.detach() for part in before.latents_and_error(row))

        def of(f: Tensor, row: Tensor = row, e: Tensor = e) -> Tensor:
            return after.latents_of(section(before.decoded(f, row) + e))

        total += (torch.autograd.functional.jacobian(of, f) * f).square()
    return total / len(a)


def test_controls_and_comparisons() -> None:
    graph, model, x, dictionaries = graph_of()
    layers = ["1", "3", "output"]
    for given in ({"basis": dictionaries}, {"dictionaries": dictionaries}):
        found = measure_controls(model, [x], layers, ["lib", "reinit"], draws=1, **given)
        assert list(found) == ["latents", "lib", "reinit"]
        assert found["latents"].mean["features/1"] == graph.bases["1"].n_features
        assert found["lib"].mean["features/1"] <= 16
    same = compare(graph, graph, model, model, [x])
    ids = graph.feature_ids("1")
    assert {(match.a, match.b) for match in same.matches if match.a in ids} == {(name, name) for name in ids}


def test_two_processes_have_the_latents_of_both() -> None:
    model, x, dictionaries = small()
    batches, layers = x.split(20), as_node_layers(["1", "3", "output"])

    def work(process_group: ProcessGroup, own: Sequence[Tensor]) -> BuildResult:
        instrumented = InstrumentedModel(copy.deepcopy(model), layers)
        adapted, _ = try_dictionaries(instrumented, own, copy.deepcopy(dictionaries))
        return build_graph(instrumented, own, LIBConfig(), MemoryPlan(), process_group, dictionaries=adapted)

    one = work(SINGLE_PROCESS, batches)
    for built in in_two(lambda group: work(group, batches[:1] if group.rank == 0 else batches[1:])):
        for basis, wanted in zip(built.bases[:2], one.bases[:2], strict=True):
            assert isinstance(basis, DictionaryBasis)
            assert isinstance(wanted, DictionaryBasis)
            assert torch.equal(basis.latents, wanted.latents)
            for name in ("importance", "to_features", "from_features"):
                assert torch.allclose(getattr(basis, name), getattr(wanted, name), rtol=1e-10)
        for E, wanted_E in zip(built.edges, one.edges, strict=True):
            assert torch.allclose(E, wanted_E, rtol=1e-9)


def test_as_many_active_latents_are_pushed_as_can_be_afforded() -> None:
    network, layers = gpt2()
    dictionaries = {layer: SparseDictionary(16, 300, k=4, seed=i).double() for i, layer in enumerate(layers)}
    instrumented = InstrumentedModel(network, as_node_layers(layers))
    with model_session(instrumented):
        cost, without = (measure_cost(instrumented, tokens(), of) for of in (dictionaries, {}))
        with torch.no_grad():
            a = instrumented.capture(tokens())[0].a
    active = dictionaries[layers[0]].encode(a) != 0
    of = cost.latents[0]
    assert (of.n_latents, of.positions, of.per_position) == (300, a.shape[1], 5)
    assert of.per_sample == int(active.any(1).sum(1).max()) + 1
    assert of.anywhere == int(active.any(1).any(0).sum()) + 1 > of.per_sample
    assert cost.ranks()[0] == of.anywhere
    # Edges cost as many products as latents are active, and there is no metric.
    config = LIBConfig(output_distribution="none")
    found, dense = cost.steps(config, 1000), without.steps(config, 1000)
    assert found.metrics == [0.0] * (len(layers) - 1)
    assert dense.metrics[0] > 0
    wide = replace(cost, latents={i: replace(x, per_sample=10 * x.per_sample) for i, x in cost.latents.items()})
    assert wide.steps(config, 1000).edges[0] > 5 * found.edges[0]
    plan = choose_effort(wide, config, 1000, 0.5 * wide.of_graph(config, 1000), all_samples=True)
    assert plan.n_probes is None
    assert 8 <= (plan.n_pushed or 0) < wide.latents[0].per_sample
    graph = compute_interaction_graph(network, [tokens()], layers, dictionaries)
    assert not any("metric" in note for note in graph.info["notes"])


def test_objects_that_are_no_modules_and_encoders_without_a_derivative() -> None:
    model, x, dictionaries = small()
    plain = PlainObject(16, 24)
    found = compute_interaction_graph(model, [x], ["1", "3"], {"1": plain, "3": plain}, effort="exact")
    same = compute_interaction_graph(model, [x], ["1", "3"], {"1": plain.of, "3": plain.of}, effort="exact")
    assert torch.allclose(found.edges["1", "3"], same.edges["1", "3"], rtol=1e-10)
    assert len(found.info["dictionaries"]["1"]["hash"]) == 16
    frozen = WithoutGradient(16, 24, k=5, seed=1).double()
    graph = compute_interaction_graph(model, [x], ["1", "3"], {"1": dictionaries["1"], "3": frozen})
    assert any("has no derivative" in note for note in graph.info["notes"])
    assert not graph.edges["1", "3"][:-1].any()  # all that is pushed goes into the error
    assert graph.edges["1", "3"][-1].any()


def test_a_note_where_directions_of_latents_vary() -> None:
    model, x, dictionaries = small()
    curved = Saturating(16, 24, k=5, seed=1).double()
    graph = compute_interaction_graph(model, [x], ["1", "3", "output"], {"1": dictionaries["1"], "3": curved})
    notes = [note for note in graph.info["notes"] if "no importance for the output" in note]
    assert [note.split("'")[1] for note in notes] == ["3"]
    assert (graph.bases["1"].output_importance is None, graph.bases["3"].output_importance is None) == (False, True)


def test_latents_and_results_of_other_types() -> None:
    model, x, _ = small()
    model, x = model.float(), x.float()
    plain, exact = Changed(16, 24), Changed(16, 24)
    exact.after_decode = Tensor.double
    graphs = [compute_interaction_graph(model, [x], ["1", "3", "output"], {"1": one}) for one in (plain, exact)]
    for section, E in graphs[0].edges.items():
        assert torch.allclose(E, graphs[1].edges[section], rtol=1e-4, atol=1e-6 * float(E.max()))
    for to_numbers in (Tensor.bool, lambda f: (f > 0).long()):
        steps = Changed(16, 24)
        steps.after_encode = to_numbers
        steps.decode = lambda f: f @ plain.W_dec  # type: ignore[method-assign]
        graph = compute_interaction_graph(model, [x], ["1", "3", "output"], {"1": steps})
        assert any("has no derivative" in note for note in graph.info["notes"])
        f = graph.bases["1"].encode(torch.tanh(x[:3, :1]).expand(3, 16))
        assert set(f[:, :-1].unique().tolist()) <= {0.0, 1.0}


def test_a_compiled_dictionary_is_the_same(tmp_path: Path) -> None:
    graph, *_, dictionaries = graph_of()
    compiled = {layer: torch.compile(one, backend="eager") for layer, one in dictionaries.items()}
    graph.save(tmp_path / "plain.safetensors")
    loaded = InteractionGraph.load(tmp_path / "plain.safetensors", dictionaries=compiled)
    assert loaded.info["dictionaries"] == graph.info["dictionaries"]
    model, x, _ = small()
    again = compute_interaction_graph(model, [x], ["1", "3", "output"], compiled)
    assert again.info["dictionaries"] == graph.info["dictionaries"]


@pytest.mark.parametrize("effort", ["auto", "exact"])
def test_all_latents_have_effects_on_the_output_where_these_cost_little(effort: Any) -> None:
    model, x, _ = small()
    dictionary = SparseDictionary(16, 200, k=5, seed=0).double()
    graph = compute_interaction_graph(model, [x], ["1", "3", "output"], {"1": dictionary}, effort=effort)
    assert not any("too long" in note for note in graph.info["notes"])
    assert graph.bases["1"].n_features > 17
    is_measured = torch.isfinite(graph.output_effects["1"].changes).any(1)
    assert is_measured[:-1].all()


def test_a_metric_of_the_output_beside_a_dictionary() -> None:
    model, x, dictionaries = small()
    layers = ["input", "1", "3", "output"]
    graph = compute_interaction_graph(model, [x], layers, {"1": dictionaries["1"]}, metric="output")
    alone = compute_interaction_graph(model, [x], layers, metric="output")
    assert torch.allclose(graph.bases["3"].importance, alone.bases["3"].importance)


@pytest.mark.parametrize("basis", [["ica"], 3, nn.Linear(2, 2)])
def test_a_basis_is_a_kind_or_dictionaries_by_node_layer(basis: Any) -> None:
    model, x, _ = small()
    with pytest.raises(SettingTypeError, match="basis is a kind, such as 'lib' or 'pca', or objects with encode"):
        compute_interaction_graph(model, [x], ["1", "3"], basis=basis)
