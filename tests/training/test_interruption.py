"""Ctrl-C and SIGTERM in the middle of a snapshot: it is dropped whole, and all else is as without it."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import LIBCallback, compute_interaction_graph
from lib_lightning.algorithm import progress
from lib_lightning.errors import ComputationStopped
from lib_lightning.model import instrumented, safe_points, vjp
from lib_lightning.model.safe_points import safe_point, signals_at_safe_points
from lib_lightning.training.frameworks import PACKAGES
from tests.training.test_frameworks import NODE_LAYERS, model_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Countdown:
    """Sends a signal to this process in front of the k-th safe point."""

    def __init__(self, k: int, signum: int) -> None:
        self.left, self.signum, self.at = k, signum, 0.0

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.at = time.perf_counter()
            os.kill(os.getpid(), self.signum)
        safe_point()


@contextmanager
def signal_at(k: int, signum: int) -> Iterator[Countdown]:
    countdown = Countdown(k, signum)
    with pytest.MonkeyPatch.context() as patch:
        for module in (progress, instrumented, vjp):
            patch.setattr(module, "safe_point", countdown)
        yield countdown


def state_of(model: nn.Module) -> list[Any]:
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [modes, {k: v.clone() for k, v in model.state_dict().items()}, grads, torch.get_rng_state()]


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, list[str]]]] = {
    "MLP": lambda: (
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2)),
        torch.randn(20, 5),
        ["input", "3", "output"],
    ),
    "CNN": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2)),
        torch.randn(12, 3, 6, 6),
        ["input", "2", "output"],
    ),
}


@pytest.mark.parametrize("name", ["MLP", "CNN"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 9, 14, 22, 30])
def test_ctrl_c_anywhere_leaves_the_model_as_it_was(name: str, k: int) -> None:
    torch.manual_seed(0)
    model, x, layers = NETWORKS[name]()
    model.train()
    model[0].eval()
    before, handlers = state_of(model), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with signal_at(k, signal.SIGINT) as countdown:
        try:
            compute_interaction_graph(model, [x, x], layers)
        except KeyboardInterrupt:
            assert countdown.left == 0, "nothing else has run after the safe point"
        else:
            assert countdown.left > 0
    assert_same(state_of(model), before)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def fit(package: str, folder: Path, *callbacks: Any) -> tuple[Any, Any]:
    pl = importlib.import_module(package)
    torch.manual_seed(0)
    model = model_of(package)
    trainer = pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), max_epochs=2, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", lambda code: None)
        try:
            trainer.fit(model)
        except (SystemExit, KeyboardInterrupt) as error:
            return model, error
    return model, None


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.combinations
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("k", [1, 20, 60, 10_000])
def test_a_snapshot_of_a_training_is_dropped_whole(package: str, signum: int, k: int, tmp_path: Path) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        callback = LIBCallback(node_layers=NODE_LAYERS, max_overhead=float("inf"))
        with signal_at(k, signum) as countdown:
            _, ended = fit(package, tmp_path / "run", callback)
        was_sent = countdown.left <= 0
        assert (ended is not None) == was_sent
        if was_sent:
            assert time.perf_counter() - countdown.at < 2
            assert callback.state.n_snapshots == len(list((tmp_path / "run").rglob("step=*.safetensors")))
            assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    finally:
        for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(s, handler)


@pytest.mark.parametrize("k", [1, 10, 25])
def test_the_training_is_as_without_the_dropped_snapshot(
    k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import lightning.pytorch as pl

    class AtEnd(pl.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            states.append((trainer.global_step, state_of(pl_module), trainer.optimizers[0].state_dict()))

    class Send(AtEnd):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(self: LIBCallback, trainer: Any, *args: Any) -> bool:
        if trainer.global_step == 0:
            return False
        with signal_at(k, signal.SIGTERM) as countdown:
            succeeded = try_snapshot(self, trainer, *args)
        assert countdown.left == 0
        assert not succeeded
        return succeeded

    states: list[Any] = []
    handler, try_snapshot = signal.getsignal(signal.SIGTERM), LIBCallback._try_snapshot
    try:
        fit("lightning.pytorch", tmp_path / "without", Send())
        monkeypatch.setattr(LIBCallback, "_try_snapshot", interrupted)
        fit("lightning.pytorch", tmp_path, LIBCallback(node_layers=NODE_LAYERS, every_n_validations=1), AtEnd())
    finally:
        signal.signal(signal.SIGTERM, handler)
    without, dropped = states
    assert_same(dropped, without)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert "was dropped: SIGTERM" in caplog.text


def interrupted_by(*signals: int, is_stopped: Callable[[], bool] = lambda: False) -> str:
    """How far a computation comes after some signals."""
    done = "before"
    with signals_at_safe_points(is_stopped):
        for signum in signals:
            os.kill(os.getpid(), signum)
            done = "after the signal"
        reached.append(done)
        safe_point()
        reached.append("after the safe point")
    return done


reached: list[str] = []


def test_a_second_signal_does_not_wait() -> None:
    reached.clear()
    with pytest.raises(KeyboardInterrupt):
        interrupted_by(signal.SIGINT)
    assert reached == ["after the signal"]
    reached.clear()
    with pytest.raises(KeyboardInterrupt):
        interrupted_by(signal.SIGINT, signal.SIGINT)
    assert not reached


def test_a_handler_that_raises_nothing_ends_the_computation_if_it_says_so() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    try:
        reached.clear()
        with pytest.raises(ComputationStopped):
            interrupted_by(signal.SIGTERM, is_stopped=lambda: bool(came))
        assert reached == ["after the signal"]
        with pytest.raises(ComputationStopped):
            interrupted_by(is_stopped=lambda: bool(came))
        assert reached == ["after the signal"], "asked before"
        came.clear()
        with signals_at_safe_points():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not came
        assert came == [signal.SIGTERM], "a signal after the last safe point is not lost"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_neither_handles_nor_blocks_signals() -> None:
    def work() -> None:
        with signals_at_safe_points():
            safe_point()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert safe_points._deferred is None


class Slow(nn.Module):
    """A forward pass of many seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(4, 3), nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        self.calls += 1
        for _ in range(500):
            time.sleep(0.01)
            x = x * 1.0
        return self.last(x)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_ctrl_c_ends_a_long_forward_pass(dtype: Any) -> None:
    model, x = Slow(), torch.randn(12, 4)
    before = state_of(model)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    started = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        compute_interaction_graph(model, [x], ["first", "last"], dtype=dtype)
    assert time.perf_counter() - started < 2.5
    assert_same(state_of(model), before)
    assert model.calls == 0, "only a copy has run"
    assert not model.first._forward_hooks
    assert isinstance(model.first.weight, nn.Parameter)


def test_sigterm_ends_a_long_forward_pass_of_a_snapshot(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Training(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Slow()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net.last(self.net.first(batch)).mean()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.net(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(12, 4), batch_size=4)

        val_dataloader = train_dataloader

    class Send(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            sent.append(time.perf_counter() + 0.5)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    sent: list[float] = []
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    callback = LIBCallback(["net.first", "net.last"], at_steps=[0])
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[Send(), callback], max_epochs=1, accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "_exit", lambda code: None)
            with pytest.raises(SystemExit):
                trainer.fit(Training())
        assert time.perf_counter() - sent[0] < 2
    finally:
        for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(s, handler)
    assert callback.snapshots == 0
    assert not files(tmp_path)
