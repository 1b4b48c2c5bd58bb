"""Whole snapshots on a device without float64, as Apple's MPS: the sums are those of a device that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib_lightning import LIBCallback, compute_interaction_graph
from lib_lightning.ablation import edges_required, node_ablation_curve
from lib_lightning.ablation.scores import log_likelihood
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics import NumberOfEdges, NumberOfModules
from lib_lightning.metrics.functional import fourier_variance, gini, hoyer, share_of_edges
from lib_lightning.model.agreement import agree, length
from lib_lightning.model.precision import for_sums, supports_float64, to_float64
from tests.stand_in_device import DEVICE, StandInDevice, batches_on_device

Made = tuple[nn.Module, Tensor, list[str]]


def mlp() -> Made:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.randn(64, 8), ["input", "1", "3", "output"]


def wide() -> Made:
    model = nn.Sequential(nn.Linear(600, 16), nn.ReLU(), nn.Linear(16, 16), nn.Softmax(-1), nn.Linear(16, 3))
    return model, torch.randn(700, 600), ["input", "1", "output"]


def cnn() -> Made:
    convolutions = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 3)), torch.randn(16, 3, 6, 6), ["1", "3", "output"]


def gpt2() -> Made:
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    layers = ["transformer.h.0:input", "transformer.h.0", "transformer.h.1", "output"]
    return GPT2LMHeadModel(config), torch.randint(16, (8, 8)), layers


def llama() -> Made:
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    layers = ["model.layers.0:input", "model.layers.0", "model.layers.1", "output"]
    return LlamaForCausalLM(config), torch.randint(16, (8, 8)), layers


def on_device(model: nn.Module, x: Any, layers: list[str], **options: Any) -> InteractionGraph:
    with StandInDevice() as device:
        graph = compute_interaction_graph(model.to(DEVICE), [batches_on_device(x)], layers, **options)
        model.to("cpu")
        assert device.operations > 100
    return graph


@pytest.mark.combinations
@pytest.mark.parametrize("make", [mlp, wide, cnn, gpt2, llama])
@pytest.mark.parametrize(
    "options",
    [
        {"effort": "exact"},
        {"n_probes": 4, "n_pushed": 2},
        {"n_probes": 4, "n_pushed": 2, "final_metric": "fisher"},
        {"n_probes": 4, "n_pushed": 2, "metric": "output"},
        {"n_probes": 2, "n_pushed": 2, "integration_steps": 2},
    ],
    ids=["exact", "sampled", "fisher", "output", "path"],
)
def test_a_snapshot_is_that_of_a_device_with_float64(make: Callable[[], Made], options: dict[str, Any]) -> None:
    model, x, layers = make()
    found = on_device(model, x, layers, **options)
    same_type = compute_interaction_graph(model, [x], layers, **options)
    double = x.double() if x.is_floating_point() else x
    exact = compute_interaction_graph(model.double(), [double], layers, **options)
    for name in layers:
        found_importance, largest = found.bases[name].importance, exact.bases[name].importance.max()
        assert found_importance.dtype == torch.float64
        torch.testing.assert_close(found_importance, same_type.bases[name].importance, rtol=1e-7, atol=0)
        # Relative to the largest one: rounding of the model's own float32 decides whether the smallest are kept.
        r = min(len(found_importance), len(exact.bases[name].importance))
        torch.testing.assert_close(
            found_importance[:r] / largest, exact.bases[name].importance[:r] / largest, rtol=0, atol=1e-5
        )
    for pair, E in found.edges.items():
        torch.testing.assert_close(E, same_type.edges[pair], rtol=1e-5, atol=1e-7 * float(E.max()))


def test_without_forward_mode_edges_are_sampled_in_reverse() -> None:
    model, x, layers = cnn()
    model[3] = OnceDifferentiable()
    found = on_device(model, x, layers, n_probes=4, n_pushed=1)
    assert any("no second derivative" in note for note in found.info["notes"])
    E = compute_interaction_graph(model, [x], layers, n_probes=4, n_pushed=1).edges
    for pair in E:
        torch.testing.assert_close(found.edges[pair], E[pair], rtol=1e-5, atol=1e-7 * float(E[pair].max()))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class OnceDifferentiable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x)


def test_ablations() -> None:
    model, x, layers = mlp()
    batch = (x, torch.randint(3, (64,)))
    graph = compute_interaction_graph(model, [batch], layers)
    curve = node_ablation_curve(model, [batch], graph, log_likelihood, "1")
    required = edges_required(model, [batch], graph, log_likelihood, tolerance=1e-2)
    with StandInDevice():
        model.to(DEVICE)
        moved = batches_on_device(batch)
        assert node_ablation_curve(model, [moved], graph, log_likelihood, "1") == pytest.approx(curve, abs=1e-5)
        found = edges_required(model, [moved], graph, log_likelihood, tolerance=1e-2)
        assert {pair: x.count for pair, x in found.items()} == {pair: x.count for pair, x in required.items()}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_metrics_of_edges_on_the_device(r_out: int, r_in: int, seed: int) -> None:
    E = torch.rand(r_out, r_in, generator=torch.Generator().manual_seed(seed))
    residues = torch.arange(12)
    values = torch.rand(12, 2, 3, generator=torch.Generator().manual_seed(seed))

    def numbers(E: Tensor, residues: Tensor, values: Tensor) -> list[Tensor]:
        found = [gini(E), hoyer(E), share_of_edges(E), fourier_variance(values, residues, residues.flip(0), 5).sum()]
        metrics = [NumberOfEdges(), NumberOfModules()]
        nn.ModuleList(metrics).to(E.device)
        metrics[0].update(edges=E)
        metrics[1].update(edges=[E])
        return [x.cpu() for x in (*found, *(metric.compute() for metric in metrics))]

    expected = numbers(E, residues, values)
    with StandInDevice():
        found = numbers(*batches_on_device((E, residues, values)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_stand_in_refuses_what_such_a_device_refuses() -> None:
    with StandInDevice():
        x = torch.ones(2, 2, device=DEVICE)
        assert x.device == DEVICE
        for refused in (
            x.double,
            lambda: x.to("cpu", torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
            lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        ):
            with pytest.raises(TypeError, match="float64"):
                refused()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2)
        with pytest.raises(NotImplementedError, match="linalg_eigh"):
            torch.linalg.eigh(x)
        assert torch.zeros(2).double().device.type == x.cpu().double().device.type == "cpu"


def test_the_device_is_asked_once() -> None:
    supports_float64.cache_clear()
    with StandInDevice() as device:
        assert not supports_float64(DEVICE)
        asked = device.operations
        assert not supports_float64(DEVICE)
        assert device.operations == asked
        x = torch.full((3,), 1e30, device=DEVICE)
        assert for_sums(x).device.type == to_float64(x).device.type == "cpu"
        assert to_float64(x).dtype == torch.float64
        assert float(length(x)) == pytest.approx(3**0.5 * 1e30)
        assert agree(x, x, 1e-6)
    assert supports_float64(torch.device("cpu"))
    assert for_sums(x) is x


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class _Training(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_training_with_the_callback(tmp_path: Any) -> None:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(64, 8), torch.randint(3, (64,))), batch_size=32)
    module = _Training()
    with StandInDevice() as device:
        trainer = Trainer(
            max_epochs=2, strategy=SingleDeviceStrategy(DEVICE, _Accelerator()), default_root_dir=tmp_path,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, logger=False,
            callbacks=[callback := LIBCallback(node_layers=["net.0:input", "net.1", "net.3", "output"])],
        )  # fmt: skip
        trainer.fit(module, loader, loader)
        assert device.operations > 1000
    assert callback.graph is not None
    assert "lib/overhead" in trainer.logged_metrics
