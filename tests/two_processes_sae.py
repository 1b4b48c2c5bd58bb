"""Two processes, for `tests/training/test_sae_trainer.py`: ``torchrun --nproc_per_node 2 THIS FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed as dist

from lib_lightning import SAETrainer
from tests.tiny_training import trainer_of
from tests.two_processes import Model, Sharded, plain, whole

# The lowest version of PyTorch shards weights on accelerators only.
RUNS: dict[str, Any] = {"ddp": lambda: "ddp"}
if hasattr(torch.cpu.Stream, "record_event"):
    RUNS["sharded"] = lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo")


class Timed(SAETrainer):
    """The clocks of the processes disagree: by that of process 1 there is never time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounds: list[int] = []
        self.seconds = 0.0

    def _train(self, *args: Any) -> None:
        self.rounds.append(self._n_batches)
        self.seconds += 2.0 + 1000 * dist.get_rank()
        super()._train(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds += 1.0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, strategy in RUNS.items():
        found: list[Any] = []
        for with_callback in (True, False):
            pl.seed_everything(0, verbose=False)
            model = Model(plain(8)) if name == "ddp" else Sharded(plain(8))
            callback = Timed(["net.0:input", "net.2:input"], n_latents=12, k=2, max_overhead=1.0)
            callback.clock = lambda callback=callback: callback.seconds  # type: ignore[misc]
            callbacks = [callback] if with_callback else []
            trainer = trainer_of(
                folder / name / str(with_callback), *callbacks, devices=2, strategy=strategy(), max_epochs=30
            )
            trainer.fit(model)
            found.append((callback, whole(model)))
        (callback, weights), (_, without) = found
        training = callback._trainings["net.2:input"]
        here = {
            "weights": training.weights(),
            "seen": training.n_seen,
            "steps": training.n_steps,
            "rounds": callback.rounds,
            "same_training": all(torch.equal(w, without[k]) for k, w in weights.items()),
            "overhead": callback._scalars["sae/overhead"],
        }
        torch.save(here, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
