"""Training is the same, bit for bit, with and without the callback, whatever a forward pass keeps, writes and logs."""

from __future__ import annotations

import importlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import LIBCallback, compute_interaction_graph
from lib_lightning.training.frameworks import PACKAGES
from tests.integration.hidden_state import PLACES, Place, stateful

each_package = pytest.mark.parametrize("package", PACKAGES)
pytestmark = pytest.mark.filterwarnings("ignore")


def module_of(package: str, network: nn.Module, data: Tensor, forward: Callable[..., Tensor] | None = None) -> Any:
    """A LightningModule around a network."""
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if forward is None else forward(self, x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(data), 8, shuffle=True)

        val_dataloader = train_dataloader

    return Module()


class Recorder:
    """What has been logged, by any way to log."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __deepcopy__(self, memo: object) -> Recorder:
        return self


def logger_of(package: str, calls: list[Any]) -> Any:
    """A logger that records every call."""
    base = importlib.import_module(f"{package}.loggers").Logger

    class Experiment:
        def add_scalar(self, *args: Any) -> None:
            calls.append(args)

    class Recording(base):  # type: ignore[misc, valid-type]
        name, version, save_dir, experiment = "recording", 3, None, Experiment()

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            calls.append(({k: v for k, v in metrics.items() if not k.startswith("lib/")}, step))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Recording()


def fit(package: str, module: Any, callback: LIBCallback | None, folder: Path, logger: Any = False) -> Any:
    pl = importlib.import_module(package)
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=3, accelerator="cpu", enable_progress_bar=False, logger=logger,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.fit(module)
    if callback is not None:
        assert callback.snapshots >= 3
    return trainer


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what a model may use)


def state_of(trainer: Any) -> list[Any]:
    """Weights, moments of the optimizer, and random states."""
    module = trainer.lightning_module
    moments = [t.tolist() for entry in trainer.optimizers[0].state.values() for t in entry.values()]
    randomness = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    return [[t.tolist() for t in module.state_dict().values()], moments, randomness]


def assert_same_training(
    make: Callable[[], Any], package: str, folder: Path, layers: list[str] | None, read: Callable[[Any], Any] = str
) -> None:
    """Train twice, with and without snapshots, and compare everything."""
    found = []
    for callback in (None, LIBCallback(layers, every_n_validations=1, max_overhead=float("inf"))):
        seed()
        module = make()
        trainer = fit(package, module, callback, folder)
        found.append([*state_of(trainer), read(module), [m.training for m in module.modules()]])
    assert found[1] == found[0]


@pytest.mark.combinations
@each_package
@pytest.mark.parametrize("part", range(4))
def test_hidden_state(package: str, part: int, tmp_path: Path) -> None:
    places: list[Place] = PLACES[part::4]
    reads: list[Callable[[Any], Any]] = []

    def make() -> Any:
        network, read = stateful(places)
        reads.append(lambda module: read(module.net))
        return module_of(package, network, torch.randn(32, 3))

    assert_same_training(make, package, tmp_path, ["net.second:input", "output"], lambda m: reads[-1](m))


@each_package
def test_transformers_that_install_hooks_in_their_first_call(package: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        output_hidden_states=True,
    )  # fmt: skip

    def forward(module: Any, x: Tensor) -> Tensor:
        return torch.stack(module.net(x).hidden_states).mean(0)

    def make() -> Any:
        return module_of(package, BertModel(config), torch.randint(0, 37, (32, 5)), forward)

    assert_same_training(make, package, tmp_path, ["net.embeddings", "net.encoder.layer.0"])


def cnn() -> tuple[nn.Module, Tensor, None]:
    """Running statistics and dropout are what such a network keeps and draws."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(6, 3),
    )  # fmt: skip
    return network, torch.randn(32, 3, 8, 8), None


def gpt2() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), torch.randint(0, 11, (32, 6)), lambda module, x: module.net(input_ids=x).logits


def llama() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.randint(0, 11, (32, 6)), lambda module, x: module.net(input_ids=x).logits


@pytest.mark.combinations
@each_package
@pytest.mark.parametrize("network_and_data", [cnn, gpt2, llama])
def test_usual_architectures_at_default_node_layers(
    package: str, network_and_data: Callable[[], tuple[nn.Module, Tensor, Any]], tmp_path: Path
) -> None:
    def make() -> Any:
        network, data, forward = network_and_data()
        return module_of(package, network, data, forward)

    assert_same_training(make, package, tmp_path, None)


class Batch:
    """An object with a cache, such as a graph."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.cache = x, {}


@each_package
def test_a_cache_inside_the_batch(package: str, tmp_path: Path) -> None:
    batches = [Batch(x) for x in torch.randn(4, 8, 3)]

    def forward(module: Any, batch: Batch) -> Tensor:
        batch.cache["calls"] = batch.cache.get("calls", 0) + 1
        return module.net(batch.x * (1 + 1e-4 * batch.cache["calls"]))

    def make() -> Any:
        for batch in batches:
            batch.cache.clear()
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        module = module_of(package, network, torch.zeros(1), forward)
        module.training_step = lambda batch, batch_idx: module(batch).square().mean()
        module.validation_step = lambda batch, batch_idx: module(batch).sum() and None
        module.train_dataloader = module.val_dataloader = lambda: DataLoader(batches, batch_size=None)
        return module

    assert_same_training(make, package, tmp_path, ["net.0", "output"], lambda m: [b.cache["calls"] for b in batches])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@each_package
def test_forward_reads_its_trainer_and_logs(package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger_class = importlib.import_module(f"{package}.loggers").Logger
    trainer_class = importlib.import_module(package).Trainer

    def forward(module: Any, x: Tensor) -> Tensor:
        trainer = module.trainer
        assert isinstance(trainer, trainer_class)
        assert isinstance(module.logger, logger_class)
        assert isinstance(trainer.logger, logger_class)
        assert (module.logger.name, module.logger.version, module.logger.save_dir) == ("recording", 3, None)
        assert trainer.lightning_module is module
        assert module.global_step == trainer.global_step
        y = module.net(x) * (1 + 0.1 * module.current_epoch + 0.01 * trainer.max_epochs)
        module.log("mean", y.mean())
        module.log_dict({"first": y[0, 0]})
        module.print("in forward")
        module.logger.log_metrics({"own": float(y.mean())}, step=trainer.global_step)
        module.logger.experiment.add_scalar("own", float(y.mean()), trainer.global_step)
        for logger in trainer.loggers:
            logger.log_metrics({"each": 1.0})
        trainer.calls = getattr(trainer, "calls", 0) + 1
        return y

    found = []
    for callback in (None, LIBCallback(["net.0", "output"], every_n_validations=1, max_overhead=float("inf"))):
        seed()
        module, calls = module_of(package, network(), torch.randn(32, 3), forward), []
        trainer = fit(package, module, callback, tmp_path, logger_of(package, calls))
        logged = [call for call in calls if call[0] not in ({}, {"epoch": 0}, {"epoch": 1}, {"epoch": 2})]
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("lib/")}
        printed = capsys.readouterr().out.count("in forward")
        found.append([*state_of(trainer), logged, metrics, trainer.calls, printed])
    assert found[1] == found[0]


@each_package
def test_a_logger_in_a_hook(package: str, tmp_path: Path) -> None:
    calls: list[Any] = []
    logger = logger_of(package, calls)
    module = module_of(package, network(), torch.randn(32, 3))
    module.net[0].register_forward_hook(lambda m, args, out: logger.log_metrics({"hook": 1.0}))
    fit(package, module, None, tmp_path, logger)
    n_calls = len(calls)
    compute_interaction_graph(module, [torch.randn(20, 3)], ["net.0", "output"])
    assert len(calls) == n_calls


@each_package
def test_a_model_that_has_been_trained_reads_its_trainer_outside_of_it(package: str, tmp_path: Path) -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        module.log("mean", x.mean())
        return module.net(x) * module.trainer.max_epochs

    module = module_of(package, network(), torch.randn(32, 3), forward)
    trainer = fit(package, module, None, tmp_path)
    graph = compute_interaction_graph(module, [torch.randn(20, 3)], ["net.0", "output"])
    assert graph.node_layers == ["net.0", "output"]
    assert module.trainer is trainer
    assert "log" not in vars(module)


@each_package
def test_two_trainers_in_threads(package: str, tmp_path: Path) -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(module.net[0], x, use_reentrant=False)[:, None]
        h = h + nn.functional.scaled_dot_product_attention(h, h, h)
        return module.net[2](torch.tanh(h[:, 0]))

    seed()
    modules = [module_of(package, network(), torch.randn(32, 3), forward) for _ in range(2)]
    settings = _settings()
    callbacks = [LIBCallback(["net.0", "output"], every_n_steps=1) for _ in modules]
    errors: list[Exception] = []

    def train(index: int) -> None:
        try:
            fit(package, modules[index], callbacks[index], tmp_path / str(index))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert _settings() == settings
    for module, callback in zip(modules, callbacks, strict=True):
        x = torch.cat([batch[0] for batch in module.val_dataloader()])
        graph = callback.graph
        assert graph is not None
        expected = compute_interaction_graph(module, [x], ["net.0", "output"])
        torch.testing.assert_close(
            graph.bases["net.0"].importance, expected.bases["net.0"].importance, rtol=1e-4, atol=1e-6
        )


def _settings() -> list[Any]:
    cuda = torch.backends.cuda
    return [
        torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        dict(vars(torch.utils.checkpoint)),
    ]  # fmt: skip
