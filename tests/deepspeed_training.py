"""Trainings with DeepSpeed on two processes without GPUs: ``torchrun --nproc_per_node 2 THIS FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import deepspeed
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from tests.sharded_training import STEPS, Net, Save, samples
from tests.tiny_training import trainer_of


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def save_whole(model: nn.Module, folder: Path, step: int) -> None:
    """Save all weights as DeepSpeed gathers them in memory."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        torch.save(whole, folder / f"step_{step}.pt")


def by_deepspeed(folder: Path, stage: int) -> None:
    pl.seed_everything(0, verbose=False)
    net = Net().net
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config(stage))
    x, y = samples()
    for step in range(1, STEPS[-1] + 1):
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
        if step in STEPS:
            engine.save_checkpoint(str(folder / f"stage-{stage}"), tag=f"global_step{step}")
            save_whole(net, folder / f"stage-{stage}-full", step)


class OnCPU(DeepSpeedStrategy):
    """Lightning refuses DeepSpeed on CPUs, which have no index."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class SaveBoth(Save):
    """Saves checkpoints as the strategy does, and the weights as they are."""

    def on_train_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        super().on_train_batch_end(trainer, *given)
        if trainer.global_step in STEPS:
            save_whole(trainer.lightning_module, Path(f"{self.folder}-full"), trainer.global_step)


def by_lightning(folder: Path, stage: int) -> None:
    pl.seed_everything(0, verbose=False)
    save = SaveBoth(folder / f"lightning-{stage}", weights_only=False)
    strategy = OnCPU(config=config(stage), process_group_backend="gloo")
    trainer_of(folder, save, strategy=strategy, devices=2, max_epochs=1, use_distributed_sampler=False).fit(Net())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        by_deepspeed(folder, stage)
    for stage in (2, 3):
        by_lightning(folder, stage)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
