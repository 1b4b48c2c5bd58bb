"""Standard errors: replicates compared with the remaining samples, and errors with the spread over new samples."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.build import BuildResult, build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.jackknife import GROUPS, group_slices, leave_one_out, near_degenerate, standard_error
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import ActivationError
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests import computing
from tests.algorithm.two_threads import in_two
from tests.cases import Case, N
from tests.computing import activations_of
from tests.conftest import CASES
from tests.reference import fisher_metric, interactions, jacobian_metric

RTOL = 1e-11
SIZES = (7, 2, 11)


@functools.cache
def built_of(case: Case, groups: int, sizes: tuple[int, ...] = SIZES, **options: object) -> BuildResult:
    return computing.built_of(case, sizes, rtol=RTOL, plan=MemoryPlan(groups=groups), **options)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> bool:
    return actual.shape == expected.shape and bool(
        (actual - expected).abs().max() <= rtol * expected.abs().max().clamp(min=1e-12)
    )


@pytest.mark.parametrize(("n", "groups"), [(30, 8), (8, 8), (5, 8), (1, 8), (17, 1), (0, 8)])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_sample_is_in_one_group_for_any_batches(n: int, groups: int, size: int) -> None:
    group_of: dict[int, int] = {}
    for start in range(0, n, size):
        stop = min(start + size, n)
        for group, span in group_slices(start, stop, n, groups):
            for index in range(start, stop)[span]:
                assert index not in group_of
                group_of[index] = group
    assert sorted(group_of) == list(range(n))
    found = [group_of[index] for index in range(n)]
    assert found == sorted(found), "consecutive"
    counts = [found.count(g) for g in range(groups)]
    assert max(counts) - min(counts) <= 1
    assert found == [index * groups // n for index in range(n)]


def test_groups_do_not_change_the_result(case: Case) -> None:
    one, many = built_of(case, 1), built_of(case, 8)
    for a, b in zip(one.bases, many.bases, strict=True):
        assert close(b.importance, a.importance, 1e-12)
        assert close(b.to_features.abs(), a.to_features.abs(), 1e-8)  # directions near the cutoff
        assert a.importance_error is None
        assert a.degenerate is None
    for E, expected in zip(many.edges, one.edges, strict=True):
        assert close(E, expected, 1e-12)
    for A, expected in zip(many.attributions, one.attributions, strict=True):
        assert close(A, expected, 1e-12)
    for built, n in ((one, 0), (many, 8)):
        replicates = *built.importance_replicates, *built.edge_replicates, *built.attribution_replicates
        assert all(len(x) == n for x in replicates)


OPTIONS: list[dict[str, object]] = [
    {"final_basis": "neuron"},
    {"final_metric": "fisher"},
    {"final_basis": "centered", "basis": "pca"},
    {"final_basis": "pca", "basis": "neuron"},
]


def test_replicates_are_the_result_of_the_remaining_samples(case: Case) -> None:
    assert_replicates_of_thirds(case, OPTIONS[0])


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("name", ["mlp_tanh", "positions", "padded"])
def test_replicates_in_other_bases(name: str, options: dict[str, object]) -> None:
    # Dense Jacobians are slow: all models are tested above, all bases here.
    assert_replicates_of_thirds(CASES[name], options)


def assert_replicates_of_thirds(case: Case, options: dict[str, object]) -> None:
    n = len(activations_of(case)[0])
    assert_replicates(case, built_of(case, 3, **options), [index * 3 // n for index in range(n)])


@pytest.mark.parametrize("name", ["mlp_gelu", "positions", "dict_input"])
def test_replicates_with_integrated_gradients(name: str) -> None:
    built = built_of(CASES[name], 3, final_basis="neuron", integration_steps=2)
    assert_replicates(CASES[name], built, [index * 3 // N for index in range(N)], steps=2)


def assert_replicates(case: Case, built: BuildResult, groups: list[int], steps: int = 0) -> None:
    """Compare the first and the last replicate with dense sums over the remaining samples, in these bases."""
    a, last = activations_of(case), len(case.sections)
    there = sorted(set(groups))
    for g in (0, len(there) - 1):
        rest = torch.tensor(groups) != there[g]
        counts = [case.valid(x, l)[rest] for l, x in enumerate(a)]
        for l, basis in enumerate(built.bases):
            rows = a[l][rest][counts[l]]
            centred = rows - rows.mean(0)
            Sigma, C, C_pinv = centred.T @ centred / len(rows), basis.to_features, basis.from_features
            expected = (C.T @ Sigma @ C).diagonal()
            if basis.kind == "lib":
                if l == last:
                    M = fisher_metric(rows)
                else:
                    M = jacobian_metric(
                        case.sections[l], a[l][rest], basis.mean, built.bases[l + 1].to_features, *counts[l : l + 2],
                        steps,
                    )  # fmt: skip
                expected = expected * (C_pinv @ M @ C_pinv.T).diagonal()
            assert close(built.importance_replicates[l][g], expected, 1e-8)
            if l < last:
                y = interactions(
                    case.sections[l], a[l][rest], basis.mean, C, C_pinv, built.bases[l + 1].to_features,
                    *counts[l : l + 2], steps,
                )  # fmt: skip
                E = sum(y_x.square().sum(0) for y_x in y) / counts[l].sum()
                assert close(built.edge_replicates[l][g], E, 1e-8)
                fhat_next = built.bases[l + 1].encode(a[l + 1][rest])
                values = [f[v] for f, v in zip(fhat_next, counts[l + 1], strict=True)]
                A = sum(torch.einsum("tij,ti->ij", *pair) for pair in zip(y, values, strict=True)) / counts[l + 1].sum()
                # Terms of both signs cancel, rounding errors do not.
                assert (built.attribution_replicates[l][g] - A).abs().max() <= 1e-8 * max(A.abs().max(), E.max())


@pytest.mark.parametrize("stack_elements", [1, 10**6])
def test_mean_of_replicates_is_the_importance_with_probes(stack_elements: int) -> None:
    # The mean of the replicates over groups of equal size is the metric of all samples, with or without probes.
    case = CASES["mlp_tanh"]
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    for k in (1, 2, 5):
        built = build_graph(
            instrumented,
            case.batches(*SIZES),
            LIBConfig(rtol=RTOL, n_probes=k),
            plan=MemoryPlan(stack_elements=stack_elements, groups=5),
        )
        for basis, replicates in zip(built.bases, built.importance_replicates, strict=True):
            assert replicates.shape == (5, basis.n_features)
            # The replicate of a product of two means differs by the product of their deviations.
            error = standard_error(replicates)
            assert ((replicates.mean(0) - basis.importance).abs() < error.clamp(min=1e-12 * basis.importance[0])).all()


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Variances far apart, so that features are in the same order for every set of samples.
SCALE = 0.6 ** torch.arange(6, dtype=torch.float64)


@functools.cache
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        with torch.no_grad():  # nonlinear enough that the metric depends on the samples as well
            for layer in (model[0], model[2]):
                layer.weight *= 2
        return model


LAYERS = ["input", "1", "3", "output"]


def graph_at(n: int, seed: int, **options: object) -> InteractionGraph:
    return compute_interaction_graph(network(), [gaussian(n, 6, seed) * SCALE], LAYERS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("final", [{"final_basis": "neuron"}, {"final_metric": "fisher"}])
def test_replicates_of_importances_are_right_to_first_order(final: dict[str, object]) -> None:
    # For one section before neurons, which are the same features for all samples, or for the last node layer itself.
    def at(x: Tensor) -> InteractionGraph:
        return compute_interaction_graph(network(), [x], ["3", "output"], **final)  # type: ignore[arg-type]

    name = "output" if "final_metric" in final else "3"
    differences = []
    for n in (500, 8000):
        squares = torch.zeros(2)
        for seed in range(3):
            x = gaussian(n, 6, seed) * SCALE
            graph = at(x)
            basis, replicates = graph.bases[name], graph.replicates.importance[name]
            others = [x[torch.arange(n) * GROUPS // n != g] for g in range(GROUPS)]
            true = torch.stack([at(other).bases[name].importance for other in others])
            assert (~basis.degenerate).sum() >= 3
            squares += (
                torch.stack([replicates - true, true - basis.importance])[..., ~basis.degenerate].square().sum((1, 2))
            )
        differences.append(float((squares[0] / squares[1]).sqrt()))
    # The error is of second order: relative to the deviations it falls as 1/sqrt(n), here to a quarter.
    assert differences[0] < 0.15
    assert differences[1] < 0.5 * differences[0]


DRAWS = 60


@functools.cache
def drawn(**options: object) -> list[InteractionGraph]:
    """Graphs of one model, each of different samples."""
    return [graph_at(1500, seed, rtol=1e-4, **options) for seed in range(DRAWS)]


def coverage(estimates: Tensor, numbers: Tensor, chosen: Tensor) -> float:
    """Mean ratio of standard errors ``(draws, ...)`` to the spread of the chosen numbers ``(draws, ...)``."""
    ratio = estimates.square().mean(0).sqrt()[chosen] / numbers.std(0)[chosen]
    return float(ratio.log().mean().exp())


@pytest.mark.parametrize(
    "options", [{"basis": "lib"}, {"basis": "lib", "final_metric": "fisher"}, {"basis": "pca"}, {"basis": "neuron"}]
)
def test_errors_of_importances_are_their_spread_over_new_samples(options: dict[str, object]) -> None:
    graphs = drawn(**options)
    for name in LAYERS:
        bases = [graph.bases[name] for graph in graphs]
        r = min(basis.n_features for basis in bases)
        degenerate = [torch.zeros(r) if basis.degenerate is None else basis.degenerate[:r].float() for basis in bases]
        sure = torch.stack(degenerate).mean(0) < 0.1
        assert sure.sum() >= 2
        # Measured: 0.95 to 1.08 with 120 draws, although the errors are for fixed features of the next layer.
        error, importance = (
            torch.stack([getattr(b, k)[:r] for b in bases]) for k in ("importance_error", "importance")
        )
        assert coverage(error, importance, sure) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("basis", ["lib", "pca", "neuron"])
def test_errors_of_edges_and_attributions_are_their_spread_over_new_samples_for_fixed_features(basis: str) -> None:
    graphs = drawn(basis=basis)
    first, instrumented = graphs[0], InstrumentedModel(network(), as_node_layers(LAYERS))
    bases = list(first.bases.values())
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in first.edges]
    for seed in range(DRAWS):
        x = gaussian(1500, 6, seed) * SCALE
        for l, section in enumerate(sections(instrumented, x, [b.mean for b in bases], 0, 2**18)):
            total = Edges(bases[l], bases[l + 1])
            total.update(section, bases[l].encode(section.a), bases[l + 1].encode(section.a_out))
            found[l].append((total.E, total.A))
    for pair, numbers in zip(first.edges, found, strict=True):
        strong = 1e-3 * first.edges[pair].max() < first.edges[pair]
        both = (("edges", "edge_errors"), ("attributions", "attribution_errors"))
        for (name, of_errors), values in zip(both, zip(*numbers, strict=True), strict=True):
            # Each error is known to a quarter, their mean better.
            error = getattr(first, of_errors)[pair]
            assert coverage(error[None], torch.stack(values), strong) == pytest.approx(1, abs=0.25)
            if basis == "neuron":  # neurons are the same features for all draws
                errors = torch.stack([getattr(graph, of_errors)[pair] for graph in graphs])
                in_draws = torch.stack([getattr(graph, name)[pair] for graph in graphs])
                assert coverage(errors, in_draws, strong) == pytest.approx(1, abs=0.25)


@pytest.mark.combinations
@pytest.mark.parametrize("name", ["mlp_tanh", "positions", "padded"])
@pytest.mark.parametrize(
    "own", [14, 3, 0, N]
)  # 3 samples leave some groups of a process empty; 0 and N leave all of them empty
def test_groups_of_two_processes_are_combined(name: str, own: int) -> None:
    case, groups = CASES[name], 5
    parts = [case.batches(own, N)[:1] if own else [], case.batches(own, N)[1:] if own else case.batches(N)]

    def work(process_group: ProcessGroup) -> BuildResult:
        model = copy.deepcopy(case.model)
        instrumented = InstrumentedModel(model, as_node_layers(case.node_layers), ModelSpec(case.input_fn, case.mask))
        config = LIBConfig(rtol=RTOL, final_metric="fisher")
        # The second process has memory for more groups: the smaller number is used.
        plan = MemoryPlan(groups=groups + process_group.rank)
        return build_graph(instrumented, parts[process_group.rank], config, plan, process_group)

    built = in_two(work)
    for a, b in zip(built[0].bases, built[1].bases, strict=True):
        assert torch.equal(a.importance_error, b.importance_error)
        assert torch.equal(a.degenerate, b.degenerate)
    for name in ("edges", "attributions", "edge_replicates", "attribution_replicates"):
        for a, b in zip(getattr(built[0], name), getattr(built[1], name), strict=True):
            assert torch.equal(a, b)
    numbers = [[index * groups // n for index in range(n)] for n in (own, N - own)]
    assert_replicates(case, built[0], [*numbers[0], *numbers[1]])


@pytest.mark.parametrize(
    ("importance", "replicates", "expected"),
    [
        (torch.tensor([]), torch.zeros(4, 0), []),
        (torch.tensor([1.0]), torch.tensor([[1.1], [0.9]]), [False]),
        (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([[3.1, 2.1, 1.1], [2.9, 1.9, 0.9]]), [False] * 3),  # correlated
        (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([[3.5, 1.5, 1.0], [2.5, 2.5, 1.0]]), [True, True, False]),
    ],
)
def test_neighbours_within_two_errors_are_degenerate(
    importance: Tensor, replicates: Tensor, expected: list[bool]
) -> None:
    assert near_degenerate(importance, replicates).tolist() == expected


def test_planted_equal_importances_are_degenerate() -> None:
    variances = torch.tensor([16.0, 4.0, 4.0, 1.0, 0.1], dtype=torch.float64)
    model = nn.Linear(5, 5, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(gaussian(5, 5, 0)).Q)
    flagged = {basis: torch.zeros(5) for basis in ("lib", "pca")}
    for seed in range(40):
        x = gaussian(400, 5, seed) * variances.sqrt()
        for basis, total in flagged.items():
            graph = compute_interaction_graph(model, [x], ["input", "output"], basis=basis)  # type: ignore[arg-type]
            total += graph.bases["input"].degenerate
    for total in flagged.values():
        # Two equal importances differ by more than two errors in one of seven draws (a Rayleigh distribution), and
        # somewhat more often as the error itself is only known to a quarter.
        assert (total[1:3] >= 26).all()
        assert (total[[0, 3, 4]] == 0).all()


@pytest.mark.parametrize("kind", ["neuron", "centered"])
def test_fixed_directions_are_never_degenerate(kind: str) -> None:
    graph = compute_interaction_graph(
        nn.Linear(3, 3), [torch.randn(20, 3)], ["input", "output"], basis="neuron", final_basis=kind
    )
    assert [b.degenerate for b in graph.bases.values()] == [None, None]
    assert all((b.importance_error > 0).all() for b in graph.bases.values())


def test_fewer_samples_than_groups() -> None:
    """A single sample is refused, and in a snapshot, where it is not, there is nothing that could have an error."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    for n in (5, 2):
        graph = compute_interaction_graph(model, x[:n].split(1), ["1", "output"])
        assert graph.replicates.edges["1", "output"].shape == (n, *graph.edges["1", "output"].shape)
        assert graph.edge_errors["1", "output"].isfinite().all()
    with pytest.raises(ActivationError, match="There is one sample"):
        compute_interaction_graph(model, [x[:1]], ["1", "output"])
    instrumented = InstrumentedModel(model, as_node_layers(["1", "output"]))
    one = build_graph(instrumented, [x[:1]], LIBConfig(), MemoryPlan())
    assert {len(x) for x in (*one.edge_replicates, *one.importance_replicates)} == {0}
    assert [b.importance_error for b in one.bases] == [None, None]
    assert [b.degenerate for b in one.bases] == [None, None]


def test_groups_without_valid_positions_are_skipped() -> None:
    case = CASES["padded"]
    mask = case.data["lengths"].clone()
    mask[:12] = False  # three of eight groups, and a part of the fourth
    graph, rest = (
        compute_interaction_graph(
            case.model, [{"tokens": case.data["tokens"][s], "lengths": mask[s]}], case.node_layers, mask="lengths"
        )
        for s in (slice(None), slice(12, None))
    )
    for name, basis in graph.bases.items():
        replicates = graph.replicates.importance[name]
        assert replicates.shape == (5, basis.n_features)
        assert basis.importance_error.isfinite().all()
        torch.testing.assert_close(basis.importance, rest.bases[name].importance, rtol=1e-9, atol=1e-12)
    assert {len(x) for x in graph.replicates.edges.values()} == {5}


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(40).double()
    replicates = leave_one_out(x, torch.ones(40))
    assert standard_error(replicates) == pytest.approx(float(x.std() / math.sqrt(40)), rel=1e-12)
    assert standard_error(replicates[:1]).isnan()
