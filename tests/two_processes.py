"""Two processes, for `tests/training/test_distributed.py`: ``torchrun --nproc_per_node 2 THIS FOLDER``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lib_lightning import LIBCallback
from tests.tiny_training import trainer_of

NODE_LAYERS = ["net.0:input", "net.2:input", "output"]


def samples(n: int, d: int = 5) -> Tensor:
    """The same samples on every process."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


class Stream(IterableDataset[Tensor]):
    """A different number of samples on each process."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def __iter__(self) -> Iterator[Tensor]:
        rank = dist.get_rank()
        start = sum(self.counts[:rank])
        yield from samples(sum(self.counts))[start : start + self.counts[rank]]


class Model(pl.LightningModule):
    """A small network with given validation data."""

    def __init__(self, val: DataLoader[Any] | None, d: int = 5) -> None:
        super().__init__()
        self.val, self.d = val, d
        self.net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0] if isinstance(batch, list) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(samples(24, self.d)), batch_size=4)

    def val_dataloader(self) -> Any:
        return self.val if self.val is not None else []


def labels_of(x: Tensor) -> Tensor:
    """One of three classes for each sample."""
    return x[:, :3].argmax(1)


class LabelledStream(IterableDataset[tuple[Tensor, Tensor]]):
    """A different number of samples with labels on each process."""

    def __init__(self, *counts: int) -> None:
        self.stream = Stream(*counts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x in self.stream:
            yield x, labels_of(x[None])[0]


class Labelled(Model):
    """Learns the classes of its samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), labels_of(batch[0]))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=2.0)


def label_logit(output: Tensor, batch: Any) -> Tensor:
    """A score that is not the default one."""
    return output.gather(1, batch[1][:, None])[:, 0]


class Timed(Model):
    """On process 0 a step takes one second and a snapshot two; the clock of process 1 does not advance."""

    seconds = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.spend(1)
        return super().training_step(batch, batch_idx)

    def spend(self, seconds: float) -> None:
        if dist.get_rank() == 0:
            self.seconds += seconds

    def watch(self, callback: LIBCallback) -> None:
        take = callback.computer.compute

        def take_two_seconds(*args: Any) -> Any:
            self.spend(2)
            return take(*args)

        callback.computer.compute = take_two_seconds  # type: ignore[method-assign]
        callback.clock = lambda: self.seconds


class FailsOnOne(Model):
    """Process 1 fails to compute its snapshot in the first epoch, or has little memory."""

    def __init__(self, val: DataLoader[Any], error: type[Exception]) -> None:
        super().__init__(val)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.training and dist.get_rank() == 1:
            if self.error is MemoryError and len(x) > 4:
                raise MemoryError
            if self.error is ValueError and self.trainer.current_epoch == 0 and len(x) > 3:
                raise ValueError("this process fails")
        return super().forward(x)


class Sharded(Model):
    """Weights sharded among both processes: every layer, or only the hidden dimension."""

    def __init__(self, val: DataLoader[Any]) -> None:
        super().__init__(val)
        self.sharded = False

    def configure_model(self) -> None:
        if self.sharded:
            return
        self.sharded = True
        first, second = self.net[0], self.net[2]
        if self.device_mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        else:
            for module in (first, second, self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


def plain(n: int, d: int = 5) -> DataLoader[Any]:
    return DataLoader(TensorDataset(samples(n, d)), batch_size=8)


RUNS: dict[str, tuple[Any, Any]] = {
    "repeated": (lambda: Model(plain(71)), {}),
    "float32": (lambda: Model(plain(71)), {"dtype": None}),
    "few": (lambda: Model(plain(71)), {"num_samples": 33}),
    "one_sample_repeated": (lambda: Model(plain(3)), {}),
    "wide": (lambda: Model(plain(71, 600), 600), {"every_n_steps": 2}),
    "uneven": (lambda: Model(DataLoader(Stream(40, 13), batch_size=8)), {}),
    "empty_first": (lambda: Model(DataLoader(Stream(0, 30), batch_size=8)), {"every_n_steps": 2, "node_layers": None}),
    "empty_last": (lambda: Model(DataLoader(Stream(30, 0), batch_size=8)), {"basis": "pca"}),
    "own": (lambda: Model(None), {"dataloader": plain(71), "num_samples": 50}),
    "fails": (lambda: FailsOnOne(plain(71), ValueError), {}),
    "memory": (lambda: FailsOnOne(plain(71), MemoryError), {}),
    "probes": (lambda: Model(plain(71)), {"n_probes": 4}),
    "budget": (lambda: Timed(plain(71)), {"every_n_steps": 1, "max_overhead": 1.5, "follow": False, "causal_every": 0}),
    # By default once, at the end, by as many samples and features as are affordable; or all at a pace of the user's.
    "causal": (lambda: Labelled(DataLoader(LabelledStream(40, 31), batch_size=8)), {"every_n_steps": 3}),
    "causal_empty": (
        lambda: Labelled(DataLoader(LabelledStream(0, 71), batch_size=8)),
        {"every_n_steps": 3, "causal_every": 2, "causal_score": label_logit},
    ),
    "fully_sharded": (lambda: Sharded(plain(71)), {"dtype": None}),
    "tensor_parallel": (lambda: Sharded(plain(71)), {"dtype": None, "node_layers": ["input", "output"]}),
}
if not hasattr(torch.cpu.Stream, "record_event"):  # the lowest version of PyTorch shards weights on accelerators only
    del RUNS["fully_sharded"]
RUNS |= {name: (lambda: Model(plain(71)), {}) for name in ("averaged", "moving_average", "halved")}


# Runs with snapshots at the steps that are the default. In all others there are fewer.
BY_DEFAULT = ("repeated", "fails")


class Halving(pl.Callback):
    """Changes the weights when training has ended."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)


# Callbacks that replace the weights, by run.
OTHERS: dict[str, Any] = {
    "averaged": lambda: StochasticWeightAveraging(0.5, swa_epoch_start=1),
    "moving_average": lambda: EMAWeightAveraging(decay=0.8),
    "halved": Halving,
}
STRATEGIES: dict[str, Any] = {
    "fully_sharded": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
    "tensor_parallel": lambda: ModelParallelStrategy(1, 2, process_group_backend="gloo"),
}


def whole(model: Model) -> dict[str, Tensor]:
    """All weights, gathered from both processes if they are sharded."""
    return {k: w.full_tensor() if isinstance(w, DTensor) else w for k, w in model.net.state_dict().items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, (model_of, options) in RUNS.items():
        print("==", name, flush=True)
        pl.seed_everything(0, verbose=False)
        given = {"node_layers": NODE_LAYERS, "dtype": "float64", "max_overhead": math.inf, **options}
        if name not in BY_DEFAULT:
            given.setdefault("every_n_steps", 3)
        model, callback = model_of(), LIBCallback(**given)
        if isinstance(model, Timed):
            model.watch(callback)
        strategy = STRATEGIES.get(name, lambda: "ddp")
        others = [OTHERS[name]()] if name in OTHERS else []
        trainer = trainer_of(folder / name, callback, *others, devices=2, strategy=strategy(), max_epochs=2)
        trainer.fit(model)
        trainer.save_checkpoint(folder / name / "checkpoint")
        weights = whole(model)
        if name in STRATEGIES:
            pl.seed_everything(0, verbose=False)
            again = model_of()
            trainer_of(folder / "without", devices=2, strategy=strategy(), max_epochs=2).fit(again)
            assert all(torch.equal(w, weights[k]) for k, w in whole(again).items()), "training is untouched"
        here = {
            "weights": weights,
            "snapshots": callback.snapshots,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "edges": [] if callback.graph is None else list(callback.graph.edges.values()),
            "count": callback.samples.buffer.count,
            "causal": callback.state.scalars.get("lib/causal_features/total"),
            "n_skipped": callback.trigger.skipped.total,
        }
        torch.save(here, folder / name / f"process-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
