"""Images: Lightly, MONAI, diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.applications.running import application, trainer_options


@application("lightly SimCLR", "lightly")
def simclr(callback: Any, folder: Path) -> None:
    import lightning.pytorch as pl
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
            self.projection_head = SimCLRProjectionHead(8, 16, 4)
            self.criterion = NTXentLoss()

        def forward(self, x: Tensor) -> Any:
            return self.projection_head(self.backbone(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x0, x1), _, _ = batch
            return self.criterion(self(x0), self(x1))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    def collate(samples: list[Any]) -> Any:
        x = torch.stack([s[0] for s in samples])
        views = [x + 0.1 * torch.randn_like(x) for _ in range(2)]
        return views, torch.zeros(len(x), dtype=torch.long), [f"image-{i}.png" for i in range(len(x))]

    data = DataLoader(TensorDataset(torch.randn(64, 3, 12, 12)), 8, collate_fn=collate)
    pl.Trainer(**trainer_options(folder, callback)).fit(SimCLR(), data, data)


@application("MONAI UNet", "others", "monai")
def unet(callback: Any, folder: Path) -> None:
    import lightning.pytorch as pl
    from monai.data import DataLoader as MonaiLoader
    from monai.data import Dataset, MetaTensor
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet

    class Segmenter(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,))
            self.loss = DiceLoss(to_onehot_y=True, softmax=True)

        def forward(self, x: Tensor) -> Any:
            return self.unet(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(self(batch["image"]), batch["label"])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    images = torch.randn(32, 1, 8, 8)
    items = [{"image": MetaTensor(x), "label": MetaTensor((x > 0).float())} for x in images]
    data = MonaiLoader(Dataset(items), batch_size=8)
    pl.Trainer(**trainer_options(folder, callback)).fit(Segmenter(), data, data)


@application("diffusers UNet2DModel", "others", "diffusers")
def diffusion(callback: Any, folder: Path) -> None:
    import lightning.pytorch as pl
    from diffusers import DDPMScheduler, UNet2DModel

    class Denoiser(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
                down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
            )  # fmt: skip
            self.schedule = DDPMScheduler(num_train_timesteps=20)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x,) = batch
            noise, t = torch.randn_like(x), torch.randint(0, 20, (len(x),))
            return F.mse_loss(self.unet(self.schedule.add_noise(x, noise, t), t).sample, noise)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    data = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8)), 8)
    pl.Trainer(**trainer_options(folder, callback)).fit(Denoiser(), data, data)
