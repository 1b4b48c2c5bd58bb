"""Wide node layers: the same basis as from the covariance, without matrices of the full width."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.build import BuildResult, build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests.algorithm.two_threads import in_two
from tests.computing import IO, assert_equal, built

WIDE = 530  # more than DENSE_WIDTH
LAYERS = ["input", "1", "output"]


def network(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDE, 12), nn.Tanh(), *between, nn.Linear(12, 3)).double()


@contextmanager
def covariances_everywhere() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib_lightning.algorithm.covariance.DENSE_WIDTH", 10**6)
        yield


def assert_same_with_covariance(model: nn.Module, batches: list[Any], layers: list[str], **options: Any) -> BuildResult:
    wide = built(model, batches, layers, **options)
    with covariances_everywhere():
        assert_equal(wide, built(model, batches, layers, **options))
    return wide


class Widths(TorchDispatchMode):
    """The largest square matrix that any operation returns, and the largest eigenproblem."""

    def __init__(self) -> None:
        super().__init__()
        self.square = self.eigen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.ndim >= 2:
                if t.shape[-2] == t.shape[-1]:
                    self.square = max(self.square, t.shape[-1])
                if any(name in str(func) for name in ("eigh", "svd")):
                    self.eigen = max(self.eigen, min(t.shape[-2:]))
        return result


@pytest.mark.parametrize("act", [nn.Tanh(), nn.LayerNorm(12)])
@pytest.mark.parametrize("final", [{}, {"final_metric": "fisher"}])
def test_no_matrix_of_the_full_width(act: nn.Module, final: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Linear(WIDE, 12), act, nn.Linear(12, 3)).double(), torch.randn(800, WIDE).double()
    with Widths() as widths:
        built(model, list(x.split(100)), LAYERS, **final)
    assert widths.square <= 128
    assert widths.eigen <= 64 + 12  # the size of a sketch
    with covariances_everywhere(), Widths() as widths:
        built(model, list(x.split(100)), LAYERS, **final)
    assert widths.square == widths.eigen == WIDE, "the dispatch mode sees them"


@pytest.mark.parametrize("n", [1, 2, 9, 300, WIDE - 1, WIDE, WIDE + 1, 700])
def test_same_basis_for_any_number_of_samples(n: int) -> None:
    assert_same_with_covariance(network(), list(torch.randn(n, WIDE).double().split(250)), LAYERS)


@pytest.mark.parametrize("change", [lambda x: x[:100].repeat(2, 1), lambda x: torch.cat([x, 1e-9 * x[:, :1] + x[:1]])])
def test_same_basis_for_repeated_rows(change: Callable[[Tensor], Tensor]) -> None:
    assert_same_with_covariance(network(), [change(torch.randn(200, WIDE).double())], LAYERS)


def test_no_eigenproblem_of_the_number_of_rows() -> None:
    with Widths() as widths:
        built(network(), list(torch.randn(400, WIDE).double().split(100)), LAYERS)
    assert widths.eigen <= 64 + 12
    assert widths.square == 400, "the normal equations"


@pytest.mark.parametrize("n", [40, 700])
def test_same_basis_without_closed_forms(n: int) -> None:
    model, x = network(nn.LayerNorm(12)), torch.randn(n, WIDE).double()
    assert_same_with_covariance(model, list(x.split(250)), ["input", "2", "output"])


@pytest.mark.parametrize("n", [20, 300])
def test_same_basis_of_an_inner_layer(n: int) -> None:
    # Directions outside the span of few samples would enter the metric of the layer before.
    model = nn.Sequential(nn.Linear(6, WIDE), nn.Tanh(), nn.Linear(WIDE, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    assert_same_with_covariance(model, [torch.randn(n, 3, 6).double()], ["input", "1", "3", "output"])


def test_constant_activations_belong_to_no_feature() -> None:
    x = torch.rand(700, WIDE).double()
    x[:, :30], x[:, 30:60] = 0, 0.1307
    wide = assert_same_with_covariance(network(), list(x.split(100)), LAYERS)
    assert not wide.bases[0].to_features[:60].any()
    assert wide.bases[0].to_features[60:].all()


@pytest.mark.parametrize("n", [40, 400])
def test_same_basis_with_a_mask(n: int) -> None:
    x, mask = torch.randn(n, 3, WIDE).double(), torch.rand(n, 3) > 0.4
    x = x.masked_fill(~mask[..., None], torch.nan)
    batches = [(x[: n // 2], mask[: n // 2]), (x[n // 2 :], mask[n // 2 :])]
    assert_same_with_covariance(network(), batches, LAYERS, spec=ModelSpec(mask=1))


@pytest.mark.parametrize("samples", [20, 700])
@pytest.mark.parametrize("make", ["dead", "constant"])
def test_no_features_without_gradients_or_variance(make: str, samples: int) -> None:
    model, x = network(nn.ReLU()), torch.randn(samples, WIDE).double()
    if make == "dead":
        nn.init.constant_(model[0].bias, -1e3)
        model[1] = nn.ReLU()
    else:
        x = x[:1].expand(samples, -1)
    wide = assert_same_with_covariance(model, list(x.split(37)), IO)  # a batch size for which the mean is rounded
    assert wide.bases[0].n_features == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1e3, lambda x: 1e-6 * x, lambda x: 1e6 * x, torch.relu],
    ids=["far", "tiny", "huge", "relu"],
)
def test_same_basis_at_any_scale(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(WIDE, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    x = change(torch.randn(700, WIDE, dtype=torch.float64)).to(dtype)
    assert_same_with_covariance(model, list(x.split(100)), ["input", "2", "output"], rtol=1e-6)


@pytest.mark.parametrize("n", [60, 600])
@pytest.mark.parametrize("share", [0.4, 0.0])
@pytest.mark.parametrize("rotated", [False, True])
def test_two_processes_and_one_without_samples(
    n: int, share: float, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rotated:  # eigenvectors of equal eigenvalues depend on the order of sums, and therefore on threads
        factor = JacobianMetric.factor

        def another(self: JacobianMetric, cutoff: float) -> Tensor:
            B = factor(self, cutoff)
            return torch.linalg.qr(torch.randn(len(B), len(B)).to(B)).Q @ B

        monkeypatch.setattr(JacobianMetric, "factor", another)
    model, x, mask = network(), torch.randn(n, 2, WIDE).double(), torch.rand(n, 2) > 0.3
    own = int(share * n)
    parts = [[(x[:own], mask[:own])] if own else [], [(x[own:], mask[own:])]]

    def work(process_group: ProcessGroup) -> BuildResult:
        instrumented = InstrumentedModel(copy.deepcopy(model), as_node_layers(LAYERS), ModelSpec(mask=1))
        settings = LIBConfig(rtol=1e-11)
        return build_graph(
            instrumented,
            parts[process_group.rank],
            settings,
            plan=MemoryPlan(keep_graphs=True),
            process_group=process_group,
        )

    found = in_two(work)
    alone = built(model, [(x, mask)], LAYERS, spec=ModelSpec(mask=1))
    for rank in (0, 1):
        for a, b in zip(found[rank].bases, alone.bases, strict=True):
            torch.testing.assert_close(a.importance, b.importance, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(a.to_features @ a.from_features, b.to_features @ b.from_features)
        for E, expected in zip(found[rank].edges, alone.edges, strict=True):
            torch.testing.assert_close(E, expected, rtol=1e-8, atol=1e-12)


def test_sampled_metrics_of_wide_node_layers() -> None:
    model, x = network(nn.LayerNorm(12)), torch.randn(700, WIDE).double()
    wide = assert_same_with_covariance(model, [x], ["input", "2", "output"], n_probes=3)
    assert wide.bases[0].kind == "lib"
    assert built(model, [x], IO, n_probes=3).metric_errors["input"] > 0


@pytest.mark.parametrize("n", [60, 700])  # fewer samples than features, and more
def test_features_of_wide_layers_are_not_computed_twice(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, mask = network(), torch.randn(n, 2, WIDE).double(), torch.rand(n, 2) > 0.3
    batches = list(zip(x.split(50), mask.split(50), strict=True))
    encoded: list[str] = []
    encode = Basis.encode
    monkeypatch.setattr(Basis, "encode", lambda self, *args: encoded.append(self.name) or encode(self, *args))  # type: ignore[func-returns-value]
    anew = built(model, batches, LAYERS, spec=ModelSpec(mask=1), plan=MemoryPlan(keep_graphs=False))
    assert "input" in encoded
    encoded.clear()
    kept = built(model, batches, LAYERS, spec=ModelSpec(mask=1), plan=MemoryPlan(keep_graphs=True))
    assert "input" not in encoded
    assert_equal(kept, anew)
