"""Bases of the same whitened activations as the LIB: identities, transcription, and what each rotation is for."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import ROTATED
from lib_lightning.algorithm.build import BuildResult, build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.rotations import near_degenerate_groups, random_rotation, rotated, varimax
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import SettingError
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution
from tests.algorithm.two_threads import in_two
from tests.cases import Case
from tests.computing import assert_equal, built, built_of
from tests.conftest import CASES
from tests.reference import Reference, edges, interactions, jacobian_metric, transcribe

RTOL = 1e-11


def transcribed(case: Case) -> Reference:
    with torch.no_grad():
        a0 = case.first(case.data)
    return transcribe(a0, case.sections, rtol=RTOL, masks=case.masks)


def close(a: Tensor, b: Tensor, scale: Tensor | None = None) -> bool:
    # Whitening divides by the square roots of importances down to 1e-11 of the largest.
    return bool((a - b).abs().max() <= 1e-7 * (b if scale is None else scale).abs().max().clamp(min=1e-12))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "random") for name in ("mlp_gelu", "few_samples", "last_token")]
    + [("padded", "ica")]
    + [("norm_and_residual", kind) for kind in ROTATED],
)
def test_identities_and_transcription(name: str, kind: str) -> None:
    case = CASES[name]
    graph = compute_interaction_graph(
        case.model, case.batches(10_000), case.node_layers, kind, "neuron", RTOL, input_fn=case.input_fn,
        mask=case.mask, effort="exact",
    )  # fmt: skip
    lib = transcribed(case)
    valid = list(case.masks) or [torch.ones(x.shape[:2], dtype=torch.bool) for x in lib.activations]
    bases = list(graph.bases.values())
    assert [basis.kind for basis in bases] == [*[kind] * len(case.sections), "neuron"]
    for l, (F, (before, after)) in enumerate(zip(case.sections, itertools.pairwise(bases), strict=True)):
        a, mu = lib.activations[l], lib.mean[l]
        C, C_pinv = before.to_features, before.from_features
        # The same number of features, the same subspace, and the same sum of importances as the LIB.
        assert before.n_features == len(lib.Lambda[l])
        assert close(C @ C_pinv, lib.C[l] @ lib.C_pinv[l])
        assert close(C_pinv @ C, torch.eye(before.n_features).double())
        assert close(before.importance.sum(), lib.Lambda[l].sum())
        assert (before.importance.diff() <= 0).all()
        # Uncorrelated features with their importances as variances.
        fhat = (a[valid[l]] - mu) @ C
        assert close(fhat.T @ fhat / len(fhat), before.importance.diag())
        # Directions of length 1 in the metric of the LIB.
        M = jacobian_metric(F, a, mu, lib.C[l + 1], valid[l], valid[l + 1])
        assert close((C_pinv @ M @ C_pinv.T).diagonal(), torch.ones(before.n_features).double())
        # Edges and attributions between rotated features, by dense Jacobians.
        arguments = (F, a, mu, C, C_pinv, after.to_features, valid[l], valid[l + 1])
        assert close(graph.edges[before.name, after.name], edges(*arguments))
        fhat_next = [
            (a_x[v] - lib.mean[l + 1]) @ after.to_features
            for a_x, v in zip(lib.activations[l + 1], valid[l + 1], strict=True)
        ]
        signed = [torch.einsum("tij,ti->ij", y, f) for y, f in zip(interactions(*arguments), fhat_next, strict=True)]
        expected = sum(signed) / valid[l + 1].sum()
        assert close(graph.attributions[before.name, after.name], expected, graph.edges[before.name, after.name])


@pytest.mark.parametrize("options", [{}, {"integration_steps": 2}, {"metric": "output"}, {"final_metric": "fisher"}])
def test_plain_twins_give_the_same_result(options: dict[str, Any]) -> None:
    case = CASES["norm_and_residual"]
    options = {**options, "output": OutputDistribution("categorical"), "basis": "random"}
    one, plain = built_of(case, **options), built_of(case, plain=True, **options)
    # In a least-determined direction, the few samples of these cases differ by rounding.
    assert_equal(one, plain, 1e-6)


def test_last_node_layer_is_rotated_if_it_has_a_metric() -> None:
    case = CASES["mlp_tanh"]
    random, lib = (built_of(case, basis=kind, final_metric="fisher") for kind in ("random", "lib"))
    assert random.bases[-1].kind == "random"
    assert close(random.bases[-1].importance.sum(), lib.bases[-1].importance.sum())


def lib_of(importance: Tensor, d: int = 9, seed: int = 0) -> Basis:
    """A LIB with given importances."""
    generator = torch.Generator().manual_seed(seed)
    r = len(importance)
    U = torch.linalg.qr(torch.randn(d, d, generator=generator).double()).Q[:, :r]
    D = torch.rand(r, generator=generator).double() + 0.1
    root = importance.sqrt()
    return Basis("fc", "lib", torch.zeros(d).double(), U / D.sqrt() * root, ((U * D.sqrt()) / root).T, importance)


def test_random_rotations_are_uniform_and_depend_on_the_seed_alone() -> None:
    lib, state = lib_of(torch.tensor([5.0, 2.0, 1.0]).double()), torch.random.get_rng_state()
    R = torch.stack([random_rotation(lib, seed) for seed in range(2000)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(random_rotation(lib, 3), R[3])
    assert close(R.mT @ R, torch.eye(3).double().expand(2000, 3, 3))
    # Of a uniform rotation, entries have mean 0 and mean square 1/r, and of two columns products vanish.
    assert R.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 2000)
    assert (R.square().mean(0) - 1 / 3).abs().max() < 0.04
    assert (torch.linalg.det(R) > 0).double().mean().sub(0.5).abs() < 0.06
    # The fourth moment of uniform directions: 3 / (r (r + 2)).
    assert (R**4).mean().sub(3 / 15).abs() < 0.01


def test_random_features_do_not_depend_on_signs_and_rotations_of_the_lib() -> None:
    lib = lib_of(torch.tensor([5.0, 2.0, 2.0, 1.0]).double())
    turn = torch.eye(4).double()
    turn[1:3, 1:3] = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    turn[0] *= -1
    other = replace(lib, to_features=lib.to_features @ turn, from_features=turn.T @ lib.from_features)
    one, two = (rotated(x, "random", random_rotation(x, 7))[0] for x in (lib, other))
    assert close(one.to_features, two.to_features)
    assert close(one.from_features, two.from_features)


def test_random_features_change_little_with_another_direction() -> None:
    importance = torch.linspace(3, 1, 40).double()
    lib = lib_of(importance, 60)
    fewer = replace(
        lib, to_features=lib.to_features[:, :-1], from_features=lib.from_features[:-1], importance=importance[:-1]
    )
    R, R_fewer = random_rotation(lib, 0)[:-1, :-1], random_rotation(fewer, 0)
    assert (R * R_fewer).sum(0).mean() > 0.9


def mixed(sources: Tensor, seed: int = 1) -> tuple[nn.Module, Tensor]:
    """A network that is read in all directions, and inputs that are mixtures of sources."""
    torch.manual_seed(seed)
    d = sources.shape[1]
    model = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d)).double()
    return model, sources @ torch.randn(d, d).double()


def first_features(kind: str, model: nn.Module, x: Tensor, **options: Any) -> tuple[InteractionGraph, Tensor]:
    graph = compute_interaction_graph(model, list(x.split(700)), ["input", "1", "output"], kind, rtol=1e-9, **options)
    fhat = graph.bases["input"].encode(x)
    return graph, fhat / fhat.std(0)


def best_matches(one: Tensor, other: Tensor) -> Tensor:
    """For each column, its largest absolute correlation with one of the other's."""
    n = len(one)
    one, other = ((x - x.mean(0)) / x.std(0, correction=0) for x in (one, other))
    return (one.T @ other / n).abs().amax(1)


def test_ica_finds_independent_sources_as_scikit_learn_does() -> None:
    from sklearn.decomposition import FastICA

    uniform = torch.rand(3000, 5, generator=torch.Generator().manual_seed(0)).double()
    sources = torch.cat([uniform[:, :2], -(1 - uniform[:, 2:]).log()], dim=1)
    model, x = mixed(sources)
    graph, found = first_features("ica", model, x)
    assert (best_matches(sources, found) > 0.99).all()
    assert (best_matches(sources, first_features("lib", model, x)[1]) < 0.99).any()
    expected = torch.as_tensor(FastICA(random_state=0, whiten="unit-variance").fit_transform(x.numpy()))
    assert (best_matches(expected, found) > 1 - 1e-4).all()
    assert not any("ICA of 'input'" in note for note in graph.info["notes"])
    # The seed only decides where the iteration starts.
    again = first_features("ica", model, x, basis_seed=5)[1]
    assert (best_matches(again, found) > 1 - 1e-4).all()


def test_dictionary_finds_sparse_coefficients() -> None:
    from sklearn.decomposition import DictionaryLearning

    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(800, 5, generator=generator) * (torch.rand(800, 5, generator=generator) < 0.1)
    model, x = mixed(sources.double())
    found = first_features("dictionary", model, x)[1]
    assert (best_matches(sources.double(), found) > 0.97).all()
    z = first_features("lib", model, x)[1]

    def objective(codes: Tensor, residual: Tensor) -> float:
        return float(residual.square().sum() / 2 + codes.abs().sum())

    codes = nn.functional.softshrink(found, 1.0)
    ours = objective(codes, found - codes)  # an orthogonal dictionary keeps lengths
    theirs = DictionaryLearning(5, alpha=1, max_iter=10, random_state=0, fit_algorithm="cd").fit(z.numpy())
    atoms = torch.as_tensor(theirs.components_)
    lasso = DictionaryLearning(5, transform_algorithm="lasso_cd", transform_alpha=1)
    lasso.components_, lasso.n_features_in_ = theirs.components_, 5
    their_codes = torch.as_tensor(lasso.transform(z.numpy()))
    assert ours < 1.02 * objective(their_codes, z - their_codes @ atoms)


def test_varimax_rotates_only_between_equal_importances() -> None:
    torch.manual_seed(0)
    # Two neurons read apart, two read alike: of these the LIB is an arbitrary rotation.
    model = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.2])))
    x = torch.randn(4000, 4).double()
    graph, _ = first_features_of(model, x, "varimax")
    lib, _ = first_features_of(model, x, "lib")
    assert lib.bases["input"].degenerate.tolist() == [False, True, True, False]
    assert graph.bases["input"].degenerate is None
    # In its own terms: each of the two degenerate features now acts on one neuron.
    change = lib.bases["input"].from_features @ graph.bases["input"].to_features
    assert change[0, 1:].abs().max() < 1e-9
    assert change[3, :3].abs().max() < 1e-9
    loadings = graph.bases["input"].from_features[1:3]
    assert (loadings.square().amax(1) / loadings.square().sum(1) > 0.99).all()


def first_features_of(model: nn.Module, x: Tensor, kind: str) -> tuple[InteractionGraph, Tensor]:
    graph = compute_interaction_graph(model, [x], ["input", "output"], kind)
    return graph, graph.bases["input"].encode(x)


def test_varimax_is_the_lib_where_errors_are_unknown() -> None:
    model, x = mixed(torch.randn(1, 4).double())
    x = torch.stack([x[0], -x[0]])[:, None].expand(-1, 3, -1) * torch.randn(1, 3, 4).double()
    lib, found = (compute_interaction_graph(model, [x[:1]], ["input", "output"], kind) for kind in ("lib", "varimax"))
    assert close(found.bases["input"].to_features.abs(), lib.bases["input"].to_features.abs())
    assert any("varimax leaves the LIB as it is" in note for note in found.info["notes"])


def test_varimax_of_two_factors_is_the_best_angle() -> None:
    L = torch.randn(30, 2).double()

    def criterion(angle: float) -> float:
        R = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        return float((L @ R).square().var(0, correction=0).sum())

    best = max(criterion(k * math.pi / 20000) for k in range(10000))
    R, has_converged = varimax(L)
    assert has_converged
    assert close(R.T @ R, torch.eye(2).double())
    assert float((L @ R).square().var(0, correction=0).sum()) == pytest.approx(best, rel=1e-6)


def test_groups_of_equal_importances_do_not_run_together() -> None:
    # Each neighbour is within two errors, but the last is not within two errors of the first.
    importance = torch.tensor([10.0, 9.0, 8.0, 1.0]).double()
    noise = torch.tensor([[1.0, -1.0, 1.0, 0.0], [-1.0, 1.0, -1.0, 0.0]]).double() / 2
    assert near_degenerate_groups(importance, importance + 0.6 * noise) == [slice(0, 2)]
    assert near_degenerate_groups(importance, importance + 0.01 * noise) == []
    assert near_degenerate_groups(importance[:0], importance[:0].expand(2, 0)) == []


@pytest.mark.parametrize("n", [40, 700])  # fewer samples than neurons, and more
@pytest.mark.parametrize("kind", ROTATED)
def test_wide_layers_without_a_covariance(n: int, kind: str) -> None:
    model = nn.Sequential(nn.Linear(530, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = list(torch.randn(n, 530).double().split(250))
    wide, plain = (built(model, batches, ["input", "1", "output"], plain=p, basis=kind) for p in (False, True))
    assert_equal(wide, plain, 1e-6)
    if kind == "random":  # not even the signs are free
        assert close(wide.bases[0].from_features, plain.bases[0].from_features)


@pytest.mark.parametrize("kind", ROTATED)
def test_two_processes_and_one_without_samples(kind: str) -> None:
    model, x = mixed(-torch.rand(600, 5).double().log())
    layers = as_node_layers(["input", "1", "output"])

    def build(batches: list[Tensor], group: ProcessGroup = SINGLE_PROCESS) -> BuildResult:
        own = InstrumentedModel(copy.deepcopy(model), layers, ModelSpec())
        return build_graph(own, batches, LIBConfig(kind, rtol=1e-9), process_group=group)

    whole = build([x])
    for parts in ([[x[:200]], [x[200:]]], [[], [x]]):
        for found in in_two(lambda group, parts=parts: build(parts[group.rank], group)):
            # Two processes group samples for standard errors, and with them degenerate features, in their own way.
            if kind != "varimax":
                assert close(found.bases[0].importance, whole.bases[0].importance)
                assert close(found.bases[0].encode(x), whole.bases[0].encode(x))
            assert found.bases[0].kind == kind
            assert close(found.bases[0].importance.sum(), whole.bases[0].importance.sum())


def test_many_activations_are_thinned_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.rotations._FEWEST_ROWS", 100)
    monkeypatch.setattr("lib_lightning.algorithm.rotations._ROWS_PER_FEATURE", 1)
    model, x = mixed(torch.rand(997, 4).double())
    found = built(model, list(x.split(37)), ["input", "1", "output"], basis="ica")
    assert any("The ICA of 'input', '1' is computed from 100 activations" in note for note in found.notes)


def test_an_iteration_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.rotations._ITERATIONS", 1)
    model, x = mixed(torch.rand(300, 4).double())
    for kind, name in (("ica", "ICA"), ("dictionary", "sparse dictionary")):
        notes = built(model, [x], ["input", "1", "output"], basis=kind).notes
        assert f"The {name} of 'input', '1' has not converged in 1 iterations." in notes


def test_a_layer_without_features() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    nn.init.constant_(model[0].bias, -1e3)
    for kind in ROTATED:
        found = built(model, [torch.randn(50, 4).double()], ["input", "1", "output"], basis=kind)
        assert [basis.n_features for basis in found.bases] == [0, 0, 2]


def test_misspelt_kinds_and_seeds() -> None:
    with pytest.raises(SettingError, match="Did you mean 'random'"):
        LIBConfig(basis="randm")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="basis_seed"):
        LIBConfig(basis_seed=-1)
