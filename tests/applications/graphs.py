"""Graphs: PyTorch Geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.applications.running import application, trainer_options


@application("PyTorch Geometric GCN of nodes", "others", "torch-geometric")
def gcn(callback: Any, folder: Path) -> None:
    import lightning.pytorch as pl
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv

    class Nodes(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(5, 8), GCNConv(8, 3)

        def forward(self, data: Any) -> Tensor:
            return self.second(self.first(data.x, data.edge_index).relu(), data.edge_index)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch), batch.y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx), batch_size=batch.num_graphs)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    ring = torch.stack([torch.arange(6), torch.arange(6).roll(1)])
    graphs = [Data(x=torch.randn(6, 5), edge_index=ring, y=torch.randint(0, 3, (6,))) for _ in range(32)]
    data = DataLoader(graphs, batch_size=8)
    pl.Trainer(**trainer_options(folder, callback)).fit(Nodes(), data, data)
