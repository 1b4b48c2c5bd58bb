"""Trainings on two processes that shard the weights and save them: ``torchrun --nproc_per_node 2 THIS FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.tiny_training import trainer_of

STEPS = (2, 4)


def samples() -> tuple[Tensor, Tensor]:
    """The same samples on every process."""
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    return x, x[:, :2].prod(1).gt(0).long()


class Net(pl.LightningModule):
    """Batch norm, whose buffers are not sharded, and the same on both processes; with ``shards``, the weights are."""

    def __init__(self, shards: bool = False) -> None:
        super().__init__()
        self.shards = shards
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def configure_model(self) -> None:
        if self.shards:
            shard(self.net, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*samples()), batch_size=8)


def shard(net: nn.Sequential, **mesh: Any) -> None:
    for layer in (net[0], net[3], net):
        fully_shard(layer, **mesh)


class Save(pl.Callback):
    """Saves checkpoints as the strategy of the trainer does."""

    def __init__(self, folder: Path, weights_only: bool) -> None:
        self.folder, self.weights_only = folder, weights_only

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in STEPS:
            name = f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(self.folder / name, self.weights_only)


class OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy on CPUs, though not a subclass, and leaves the choice of the device to torch."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        # The same without a copy to the CPU, with which torch crashes on CPUs.
        assert self.model is not None
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))


STRATEGIES: dict[str, Any] = {
    "fsdp-sharded": lambda: OnCPU(state_dict_type="sharded", process_group_backend="gloo"),
    "fsdp-full": lambda: OnCPU(state_dict_type="full", process_group_backend="gloo"),
    "model-parallel-sharded": lambda: ModelParallelStrategy(2, 1, True, process_group_backend="gloo"),
    "model-parallel-full": lambda: ModelParallelStrategy(2, 1, False, process_group_backend="gloo"),
}


def by_lightning(folder: Path, name: str) -> None:
    pl.seed_everything(0, verbose=False)
    model = Net(shards=name.startswith("model-parallel"))
    # torch crashes when it gathers the optimizer of FullyShardedDataParallel on CPUs.
    save = Save(folder / name, weights_only=name == "fsdp-full")
    trainer = trainer_of(
        folder, save, strategy=STRATEGIES[name](), devices=2, max_epochs=1, use_distributed_sampler=False
    )
    trainer.fit(model)


def by_torch(folder: Path) -> None:
    """Plain torch: the state of the application, what accelerate writes, and both as one file by torch's converter."""
    pl.seed_everything(0, verbose=False)
    net = Net().net
    shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    x, y = samples()
    for step in range(1, STEPS[-1] + 1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step not in STEPS:
            continue
        model, optim = get_state_dict(net, optimizer)
        dcp.save({"app": {"model": model, "optim": optim}}, checkpoint_id=folder / "torch" / f"step_{step}")
        dcp.save(
            {"model": get_model_state_dict(net)},
            checkpoint_id=folder / "accelerate" / f"checkpoint-{step}" / "pytorch_model_fsdp_0",
        )
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in net.state_dict().items()}
        if dist.get_rank() == 0:
            (folder / "torch-full").mkdir(exist_ok=True)
            (folder / "converted").mkdir(exist_ok=True)
            torch.save(whole, folder / "torch-full" / f"step_{step}.pt")
            dcp_to_torch_save(folder / "torch" / f"step_{step}", folder / "converted" / f"step_{step}.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in STRATEGIES:
        print("==", name, flush=True)
        by_lightning(folder, name)
    by_torch(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
