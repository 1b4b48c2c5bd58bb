"""All samples are there before the first step, and whoever reads data later reads the same as without the callback."""

from __future__ import annotations

import importlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.errors import LIBError
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.training.first_batches import OneShotError, batches_without_trace
from lib_lightning.training.frameworks import PACKAGES

N = 40
LAYERS = ["net.0:input", "net.2:input", "output"]
CALLS = {"global": 0}


class Stateful(Dataset[tuple[Tensor, Tensor]]):
    """Changes, each time a sample is read, everything that a data set may change."""

    read_by_all = 0

    def __init__(self) -> None:
        self.x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
        self.calls, self.order, self.cache = 0, [], {}  # type: ignore[var-annotated]
        self.noise, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.running = torch.zeros(3)
        self.file = io.BytesIO(bytes(range(256)) * 40)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        Stateful.read_by_all += 1
        CALLS["global"] += 1
        self.order.append(index)
        self.running += 1
        noise = torch.randn(4, generator=self.noise) + self.python.random() + self.numpy.random() + torch.rand(())
        noise = noise + random.random() + np.random.rand() + self.file.read(1)[0] / 100  # noqa: NPY002 (the global state is the point)
        noise = self.cache.setdefault(index, noise) + 1e-3 * (self.calls + Stateful.read_by_all + CALLS["global"])
        return self.x[index] + 0.01 * noise, self.x[index].sum().gt(0).long()


class Shuffled(Sampler[int]):
    """A sampler with a state of its own."""

    def __init__(self) -> None:
        self.epoch, self.random = 0, np.random.RandomState(3)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter((self.random.permutation(N) + self.epoch) % N)

    def __len__(self) -> int:
        return N


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples one after the other, anew in each pass."""

    def __init__(self) -> None:
        self.data, self.passes = Stateful(), 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return (self.data[k] for k in range(N))


class Batches:
    """Batches in memory. Lightning would take a list of them for several data loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def shuffled(data: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(1), **options)


# Training and validation read the same data set, so that whatever validation has changed is seen in training.
LOADERS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "shuffled": lambda data: (DataLoader(data, 8, shuffle=True), DataLoader(data, 8, shuffle=True)),
    "generators": lambda data: (shuffled(data), shuffled(data)),
    "one loader": lambda data: (both := shuffled(data), both),
    "samplers": lambda data: (DataLoader(data, 8, sampler=(s := Shuffled())), DataLoader(data, 8, sampler=s)),
    "workers": lambda data: (shuffled(data, num_workers=2), shuffled(data, num_workers=1)),
    "kept workers": lambda data: (
        shuffled(data, num_workers=1, persistent_workers=True), shuffled(data, num_workers=1, persistent_workers=True),
    ),
    "stream": lambda data: (DataLoader(Stream(), 8), DataLoader(Stream(), 8)),
    "own iterable": lambda data: (batches := Batches([tuple(b) for b in DataLoader(data, 8)]), batches),
}  # fmt: skip


def start_anew() -> None:
    """The same random states and counts as at the start of any other run."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    Stateful.read_by_all = CALLS["global"] = 0


def fit(package: str, folder: Path, loaders: Any, *callbacks: Any, **options: Any) -> Any:
    """Train, and return the trainer."""
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
            self.losses: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(float(loss))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.losses.append(float(nn.functional.cross_entropy(self(batch[0]), batch[1])))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    start_anew()
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(Module(), *loaders)
    return trainer


def state_after(trainer: Any, data: Stateful) -> list[Any]:
    module = trainer.lightning_module
    return [
        module.losses, [p.tolist() for p in module.parameters()], torch.get_rng_state().tolist(), random.getstate(),
        np.random.get_state()[1].tolist(), data.calls, data.order, len(data.cache), data.noise.get_state().tolist(),  # noqa: NPY002
        data.running.tolist(), data.file.tell(), Stateful.read_by_all, dict(CALLS),
    ]  # fmt: skip


@pytest.mark.combinations
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("sanity_steps", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_reading_samples_before_training_leaves_no_trace(
    kind: str, sanity_steps: int, package: str, tmp_path: Path
) -> None:
    found = []
    for callback in (None, LIBCallback(LAYERS, at_steps=[0], effort="exact")):
        start_anew()
        data = Stateful()
        loaders = LOADERS[kind](data)
        given = [] if callback is None else [callback]
        trainer = fit(package, tmp_path, loaders, *given, num_sanity_val_steps=sanity_steps)
        found.append(state_after(trainer, data))
    assert found[1] == found[0]
    files = RunLayout(tmp_path / "lib").basis_files()
    assert min(files) == 0
    graphs = [InteractionGraph.load(path) for path in files.values()]
    assert {graph.info["n_samples"] for graph in graphs} == {N}, "as many at step 0 as at the end"


def generator_of(loader: Any) -> Iterator[Any]:
    yield from loader


class Holding:
    """Can be gone through once, although it is no iterator itself."""

    def __init__(self, loader: Any) -> None:
        self.batches = generator_of(loader)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


class Counting(Stateful):
    """Counts with an iterator, whose position cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        next(self.count)
        return super().__getitem__(index)


ONCE: dict[str, Callable[[], Any]] = {
    "generator": lambda: generator_of(DataLoader(Stateful(), 8)),
    "map": lambda: map(tuple, DataLoader(Stateful(), 8)),
    "holding": lambda: Holding(DataLoader(Stateful(), 8)),
    "counter": lambda: DataLoader(Counting(), 8),
}


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_read_once_is_not_read(kind: str) -> None:
    with pytest.raises(OneShotError, match="can be gone through only once"), batches_without_trace(ONCE[kind]()):
        pass


def assert_no_trace(package: str, folder: Path, loaders: Callable[[Stateful], tuple[Any, ...]]) -> Stateful:
    """Train without the callback and with it, with the same end; returns the data of the second training."""
    found = []
    for callbacks in ([], [LIBCallback(LAYERS, at_steps=[0], effort="exact")]):
        data = Stateful()
        found.append(state_after(fit(package, folder, loaders(data), *callbacks), data))
    assert found[1] == found[0]
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
def test_samples_of_the_sanity_check_where_data_can_be_read_once(
    package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert_no_trace(package, tmp_path, lambda data: (DataLoader(data, 8), Holding(DataLoader(data, 8))))
    assert min(RunLayout(tmp_path / "lib").basis_files()) == 0
    said = [r.getMessage() for r in caplog.records if "Before the first validation" in r.getMessage()]
    assert said == [
        "Before the first validation, snapshots have the 16 samples of the sanity check: a generator can be gone "
        "through only once."
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
def test_without_validation_training_data_are_read(
    package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = assert_no_trace(package, tmp_path, lambda data: (DataLoader(data, 8, shuffle=True),))
    graphs = [InteractionGraph.load(path) for path in RunLayout(tmp_path / "lib").basis_files().values()]
    assert {graph.info["n_samples"] for graph in graphs} == {N}
    assert "Snapshots are computed on 40 training samples" in caplog.text
    with pytest.raises(LIBError, match="there are none"):
        fit(package, tmp_path, (generator_of(DataLoader(data, 8)),), LIBCallback(LAYERS), max_steps=2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.booleans(), st.integers(1, 9), st.sampled_from(["shuffled", "generators", "samplers"]))
def test_any_part_of_a_pass_leaves_no_trace(taken: int, drop_last: bool, size: int, kind: str) -> None:
    def epochs(looks: bool) -> list[Any]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        Stateful.read_by_all = CALLS["global"] = 0
        data = Stateful()
        options: dict[str, Any] = {"sampler": Shuffled()} if kind == "samplers" else {"shuffle": True}
        generator = torch.Generator() if kind == "generators" else None
        loader = DataLoader(data, size, drop_last=drop_last, generator=generator, **options)
        first = [x.tolist() for x, _ in loader]
        if looks:
            with batches_without_trace(loader) as batches:
                list(itertools.islice(batches, taken))
        return [first, [x.tolist() for x, _ in loader], data.order, data.calls]

    assert epochs(True) == epochs(False)


def test_large_data_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2**20, 4)), 8)
    monkeypatch.setattr(Tensor, "clone", lambda *args, **kwargs: pytest.fail("the data have been copied"))
    with batches_without_trace(loader) as batches:
        assert len(next(iter(batches))[0]) == 8
