"""The parts of the algorithm, each against what it must be equal to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.covariance import RunningCovariance, all_reduce_covariances
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.hutchinson import OrthogonalSigns
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.algorithm.linalg import add_gram
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.distributed.process_group import ProcessGroup, all_reduce
from lib_lightning.errors import ActivationError
from lib_lightning.jacobian.integrated_gradients import gauss_legendre, sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests.algorithm.two_threads import in_two
from tests.cases import Case


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_quadrature_is_exact_for_polynomials(k: int) -> None:
    for degree in range(2 * k):
        assert sum(w * x**degree for x, w in gauss_legendre(k)) == pytest.approx(1 / (degree + 1), rel=1e-12)


@pytest.mark.parametrize("steps", [0, 3])
def test_forward_and_reverse_products_belong_to_one_jacobian(case: Case, steps: int) -> None:
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    means = [a.mean((0, 1)) for a in instrumented.activations(case.data)]
    for section in sections(instrumented, case.data, means, steps, 10**6):
        for k in (1, 3):
            v = torch.randn(k, section.n, section.S_in, section.d_in).double()
            u = torch.randn(k, section.n, section.S_out, section.d_out).double()
            along, back = (u * section.jvp(v)).sum((1, 2, 3)), (section.vjp(u) * v).sum((1, 2, 3))
            torch.testing.assert_close(along, back, rtol=1e-10, atol=1e-10)


def test_edges_are_the_same_either_way(case: Case) -> None:
    graph = compute_interaction_graph(case.model, [case.data], case.node_layers, input_fn=case.input_fn)
    bases = list(graph.bases.values())
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    for before, after, section in zip(
        bases, bases[1:], sections(instrumented, case.data, [b.mean for b in bases], 0, 500), strict=False
    ):
        forward, reverse = Edges(before, after), Edges(before, after)
        for edges, update in ((forward, forward.update_forward), (reverse, reverse.update_reverse)):
            edges.rows += section.n * section.S_in
            update(section, before.encode(section.a))
        torch.testing.assert_close(forward.E, reverse.E, rtol=1e-9, atol=1e-12 * float(reverse.E.amax()))


@pytest.mark.parametrize("stack_elements", [1, 10**6])
def test_probes_are_unbiased_and_their_error_is_estimated(stack_elements: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    instrumented = InstrumentedModel(model, as_node_layers(["input", "1", "output"]))
    x = torch.randn(40, 3, 4).double()
    means = [a.mean((0, 1)) for a in instrumented.activations(x)]
    (section, _) = sections(instrumented, x, means, 0, stack_elements)
    C, generator = torch.randn(6, 6).double(), torch.Generator().manual_seed(1)
    exact = JacobianMetric(4, C, None, generator)
    exact.update(section)
    assert exact.relative_error == 0
    errors, estimates = [], []
    for _ in range(40):
        sampled = JacobianMetric(4, C, 5, generator)
        sampled.update(section)
        errors.append(sampled.M - exact.M)
        estimates.append(sampled.relative_error)
    spread = torch.stack(errors).square().mean().sqrt()
    # The mean of 40 runs lies within 4 standard errors of the exact metric, and the estimate is right within half.
    assert torch.stack(errors).mean(0).abs().max() < 4 * torch.stack(errors).std(0).max() / math.sqrt(40)
    true_error = spread * len(exact.M) / exact.M.norm()
    assert torch.tensor(estimates).square().mean().sqrt() == pytest.approx(float(true_error), rel=0.5)


def test_probes_say_how_many_and_how_good() -> None:
    # The last section has a closed form, and needs no probes.
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(30, 4)
    infos = [compute_interaction_graph(model, [x], ["0", "1", "output"], n_probes=k).info for k in (None, 1, 4)]
    assert [info["settings"]["n_probes"] for info in infos] == [None, 1, 4]
    assert infos[0]["metric_errors"] == {"0": 0.0, "1": 0.0}
    assert infos[1]["metric_errors"] == {"0": None, "1": 0.0}
    assert 0 < infos[2]["metric_errors"]["0"] < 1
    assert infos[2]["metric_errors"]["1"] == 0.0


def test_orthogonal_probes_have_less_variance_than_independent_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)).double()
    instrumented = InstrumentedModel(model, as_node_layers(["0", "3"]))
    x = torch.randn(64, 4).double()
    (section,) = sections(instrumented, x, [a.mean((0, 1)) for a in instrumented.activations(x)], 0, 10**6)
    C, generator = torch.eye(16).double(), torch.Generator().manual_seed(0)
    exact = JacobianMetric(16, C, None, generator)
    exact.update(section)

    def spread(k: int, size: int | None) -> float:
        squares = []
        for _ in range(30):
            sampled = JacobianMetric(16, C, k, generator)
            if size is not None:  # sets of one vector each: independent
                for signs in sampled._signs:
                    signs.draw = lambda count, size: 1 - 2 * torch.randint(0, 2, (count, size), generator=generator)
            sampled.update(section)
            squares.append((sampled.M - exact.M).square().mean())
        return float(torch.stack(squares).mean())

    # 64 samples use each of 16 orthogonal vectors 4 times for every probe: only what differs from sample to sample is
    # left to chance. Measured: 0.35 to 0.6 of the variance.
    for k in (2, 8):
        assert spread(k, None) < 0.8 * spread(k, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
def test_signs_are_orthogonal_for_as_long_as_there_are_dimensions(size: int) -> None:
    signs = OrthogonalSigns(torch.Generator().manual_seed(0))
    whole = 2 ** max(1, size - 1).bit_length()
    first, rest = signs.draw(1, size), signs.draw(2 * whole - 1, size)
    drawn = torch.cat([first, rest]).double()
    assert set(drawn.unique().tolist()) <= {-1.0, 1.0}
    for z in drawn.split(whole):  # whole sets
        assert torch.equal(z.T @ z, whole * torch.eye(size).double())


def test_many_probes_approach_the_exact_basis() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.LayerNorm(3)), torch.randn(50, 4)
    exact = compute_interaction_graph(model.double(), [x.double()], ["0", "1", "output"])
    sampled = compute_interaction_graph(model, [x.double()], ["0", "1", "output"], n_probes=400)
    for name in ("0", "1"):
        torch.testing.assert_close(sampled.bases[name].importance, exact.bases[name].importance, rtol=0.1, atol=1e-3)


def test_moments_far_from_zero_lose_no_digits() -> None:
    rows = torch.randn(600, 3).double()
    near, far = RunningCovariance(), RunningCovariance()
    near.update(rows, n=300)
    for batch in (rows + 1e6).split([2, 14, 584]):
        far.update(batch, n=len(batch) // 2)
    # The input itself is rounded at 1e6 * 2e-16; a sum of squares would lose twelve digits.
    torch.testing.assert_close(far.covariance, near.covariance, rtol=0, atol=1e-8)
    torch.testing.assert_close(far.mean, near.mean + 1e6, rtol=1e-15, atol=1e-9)


def test_truncation_is_relative() -> None:
    scale = torch.tensor([1.0, 1e-2, 1e-4, 1e-6]).double()
    model, x = nn.Linear(4, 4, bias=False).double(), torch.randn(200, 4).double() * scale
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    counts = [
        compute_interaction_graph(model, [x], ["input", "output"], rtol=rtol).bases["input"].n_features
        for rtol in (0.0, 1e-9, 1e-6, 1e-3)
    ]
    assert counts == [4, 3, 2, 1]


def test_features_of_a_constant_layer_are_none() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0.0 + 1.0

    model = nn.Sequential(nn.Linear(3, 3), Constant(), nn.Linear(3, 2))
    graph = compute_interaction_graph(model, [torch.randn(9, 3)], ["0", "1", "output"])
    assert [basis.n_features for basis in graph.bases.values()] == [0, 0, 2]
    assert [tuple(E.shape) for E in graph.edges.values()] == [(0, 0), (2, 0)]


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite")])
@pytest.mark.parametrize(("sample", "seen"), [(1, 9), (4, 15)])  # among the first few, which are checked first; later
def test_activations_must_be_finite(bad: float, word: str, sample: int, seen: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3)
    x[sample, 2] = bad
    with pytest.raises(ActivationError, match=rf"Node layer '0:input' has {word} activations \(1 of {seen} numbers\)"):
        compute_interaction_graph(model, [x], ["0:input", "output"])


def test_there_must_be_samples() -> None:
    with pytest.raises(ActivationError, match="no samples"):
        compute_interaction_graph(nn.Linear(2, 2), [], ["input", "output"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "ica"}, "basis must be one of 'lib', 'pca', 'neuron'; got 'ica'"),
        ({"final_basis": "lib"}, "final_basis must be one of"),
        ({"final_metric": "euclid"}, "final_metric must be one of 'fisher'; got 'euclid'"),
        (
            {"final_metric": "fisher", "final_basis": "pca"},
            "final_metric='fisher' determines the basis of the last node layer. Remove final_basis='pca'",
        ),
        ({"rtol": 1.0}, "rtol must be at least 0 and less than 1"),
        ({"n_probes": 0}, "n_probes must be at least 1"),
        ({"integration_steps": -1}, "integration_steps must not be negative"),
    ],
)
def test_settings_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LIBConfig(**options)


def test_batches_may_be_an_iterator() -> None:
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    once = compute_interaction_graph(model, iter(x.split(3)), ["input", "output"], progress=True)
    assert once.info["n_samples"] == 8
    assert torch.equal(
        once.edges["input", "output"],
        compute_interaction_graph(model, x.split(3), ["input", "output"]).edges["input", "output"],
    )


def test_basis_encodes_and_decodes() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(100, 3)
    basis = compute_interaction_graph(model, [x], ["0", "output"], rtol=1e-6).bases["0"]
    a = model[0](x)
    torch.testing.assert_close(basis.decode(basis.encode(a)), a, rtol=1e-4, atol=1e-4)
    assert basis.encode(a[0]).shape == (basis.n_features,)


def test_derivatives_must_be_finite() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Root(), nn.Linear(3, 2)), torch.randn(20, 3)
    for basis in ("lib", "pca", "neuron"):
        with pytest.raises(ActivationError, match="Derivatives of '2' with respect to '1' are NaN or infinite"):
            compute_interaction_graph(model, [x], ["1", "2", "output"], basis=basis)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_features(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3))
    x = torch.randn(100, 4)
    exact = compute_interaction_graph(model, [x], ["1", "3", "output"])
    half = compute_interaction_graph(model.to(dtype), [x.to(dtype)], ["1", "3", "output"])
    for name in ("1", "3"):
        # The leading features stand out of the rounding of activations, 0.4% in bfloat16.
        torch.testing.assert_close(half.bases[name].importance[:2], exact.bases[name].importance[:2], rtol=0.05, atol=0)


def test_a_single_tensor_is_not_a_list_of_batches() -> None:
    with pytest.raises(TypeError, match=r"for a single one write \[batch\]"):
        compute_interaction_graph(nn.Linear(2, 2), torch.randn(5, 2), ["input", "output"])
    with pytest.raises(TypeError, match=r"dtype is a floating-point type such as torch\.float64"):
        compute_interaction_graph(nn.Linear(2, 2), [torch.randn(5, 2)], ["input", "output"], dtype="float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "dense"), [(1, False), (7, False), (100, False), (250, True)])
def test_sum_over_a_span_is_the_whole_sum(rank: int, dense: bool, dtype: torch.dtype) -> None:
    # Directions of very different size, and batches that bring new ones.
    directions = torch.randn(rank, 400, dtype=torch.float64) * torch.logspace(0, -3, rank).double()[:, None]
    gram, expected = LowRankGram(400, parts=2, dense_width=0), torch.zeros(2, 400, 400).double()
    for k, width in enumerate((1, rank // 2 + 1, rank)):
        g = (torch.randn(300, width, dtype=torch.float64) @ directions[:width]).to(dtype)
        gram.add(g, k % 2)
        expected[k % 2] += g.double().T @ g.double()
    assert gram.dense == dense
    assert gram.rank == (400 if dense else rank)
    tolerance = 1000 * torch.finfo(dtype).eps  # 10 sqrt(d) eps of the vectors, squared with them
    for part in (0, 1):
        assert (gram.matrix(part) - expected[part]).norm() < tolerance * expected[part].norm()
    B = gram.factor(1e-14 if dtype == torch.float64 else 1e-7)
    assert (B.T @ B - expected.sum(0)).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("other", ["same", "turned", "fewer", "nothing", "dense"])
def test_sums_of_two_processes_meet_in_one_span(other: str) -> None:
    directions = torch.randn(40, 400).double()
    mine = torch.randn(60, 40).double() @ directions
    theirs = {
        "same": mine,
        "turned": torch.randn(60, 40).double() @ torch.randn(40, 400).double(),
        "fewer": torch.randn(60, 5).double() @ directions[:5],
        "nothing": torch.zeros(0, 400).double(),
        "dense": torch.randn(600, 400).double(),
    }[other]

    def work(process_group: ProcessGroup) -> LowRankGram:
        gram = LowRankGram(400, dense_width=0)
        gram.add((mine, theirs)[process_group.rank])
        gram.align(process_group)
        all_reduce([gram], process_group)
        return gram

    expected = mine.T @ mine + theirs.T @ theirs
    for gram in in_two(work):
        assert gram.rank == {"same": 40, "turned": 80, "dense": 400}.get(other, 40)
        assert (gram.matrix() - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("wide", [True, False])
def test_moments_of_two_processes_are_joined(wide: bool) -> None:
    x = [torch.randn(30, 4).double() + 1e6, torch.randn(30, 600).float()]

    def work(process_group: ProcessGroup) -> list[RunningCovariance]:
        moments = [RunningCovariance(wide), RunningCovariance(wide)]
        for layer_moments, a in zip(moments, x, strict=True):
            if process_group.rank == 0:
                layer_moments.update(a[:10], 10)
                layer_moments.update(a[10:], 20)
        all_reduce_covariances(moments, process_group)
        return moments

    for moments in in_two(work):
        assert [m.dtype for m in moments] == [torch.float64, torch.float32]
        assert moments[1].has_covariance == wide
        for layer_moments, a in zip(moments, x, strict=True):
            assert (layer_moments.n, layer_moments.count) == (30, 30)
            torch.testing.assert_close(layer_moments.mean, a.double().mean(0))
            if layer_moments.has_covariance:
                torch.testing.assert_close(layer_moments.covariance, a.T.double().cov(correction=0))


def test_a_span_is_found_again_after_nothing_and_lost_in_nan() -> None:
    gram = LowRankGram(300, dense_width=0)
    gram.add(torch.zeros(5, 300))
    assert gram.factor(1e-7).shape == (0, 300)
    gram.add(torch.ones(5, 300))
    assert gram.rank == 1
    gram.add(torch.full((5, 300), math.nan))
    assert not torch.isfinite(gram.matrix()).all()


def test_wide_layers_give_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(400, 12), nn.Tanh(), nn.Linear(12, 5)).double(), torch.randn(500, 400).double()
    dense = compute_interaction_graph(model, [x], ["input", "1", "output"])
    monkeypatch.setattr(LowRankGram.__init__, "__defaults__", (1, 0))
    narrow = compute_interaction_graph(model, [x], ["input", "1", "output"])
    for pair, E in dense.edges.items():
        torch.testing.assert_close(narrow.edges[pair], E, rtol=1e-9, atol=1e-12)


def test_the_sum_is_more_exact_than_its_vectors() -> None:
    # What is no direction of any vector gets nothing but the vectors' own rounding, squared.
    g = (torch.randn(20000, 4) @ torch.randn(4, 12)).float()
    gram = LowRankGram(12)
    gram.add(g)
    values = torch.linalg.eigvalsh(gram.matrix())
    assert values[:8].abs().max() < 1e-12 * values[-1]


@pytest.mark.parametrize("d", [1, 5, 300])
@pytest.mark.parametrize("m", [0, 1, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_of_products_by_any_number_of_threads(
    threads: int, m: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, total = torch.randn(m, d).double(), torch.eye(d).double()
    add_gram(total, rows)
    torch.testing.assert_close(total, torch.eye(d).double() + rows.T @ rows, rtol=1e-13, atol=1e-12)
