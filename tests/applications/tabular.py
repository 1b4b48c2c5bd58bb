"""Tables: PyTorch Tabular, and batches that are a TensorDict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.applications.running import application, trainer_options


def tabular(config: str, callback: Any, folder: Path, **options: Any) -> None:
    import pandas as pd
    from pytorch_tabular import TabularModel, models
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

    random = np.random.default_rng(0)
    x = random.standard_normal((96, 3))
    table = pd.DataFrame(x, columns=["a", "b", "c"])
    table["kind"] = random.choice(["p", "q", "r"], 96)
    table["target"] = (x.sum(1) > 0).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=["a", "b", "c"], categorical_cols=["kind"]),
        model_config=getattr(models, config)(task="classification", **options),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=16, max_epochs=2, accelerator="cpu", progress_bar="none", checkpoints=None, early_stopping=None,
            load_best=False, trainer_kwargs={"default_root_dir": str(folder), "enable_model_summary": False},
        ),
        verbose=False,
    )  # fmt: skip
    model.fit(train=table[:64], validation=table[64:], callbacks=[callback])


@application("pytorch-tabular CategoryEmbeddingModel", "pytorch-tabular")
def category_embedding(callback: Any, folder: Path) -> None:
    tabular("CategoryEmbeddingModelConfig", callback, folder, layers="16-8")


@application("pytorch-tabular FTTransformer", "pytorch-tabular")
def ft_transformer(callback: Any, folder: Path) -> None:
    small = {"input_embed_dim": 8, "num_heads": 2, "num_attn_blocks": 1}
    tabular("FTTransformerConfig", callback, folder, **small)


@application("tensordict TensorDictModule", "others", "tensordict")
def tensor_dict(callback: Any, folder: Path) -> None:
    import lightning.pytorch as pl
    import torch
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
            self.net = TensorDictModule(network, in_keys=["x"], out_keys=["y"])

        def forward(self, batch: Any) -> Tensor:
            return self.net(batch)["y"]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    parts = [{"x": torch.randn(16, 4), "row": torch.arange(16)} for _ in range(4)]
    batches: Any = [TensorDict(part, batch_size=[16]) for part in parts]
    loader: Any = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    pl.Trainer(**trainer_options(folder, callback)).fit(Model(), loader, loader)
