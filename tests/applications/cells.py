"""Single cells: scvi-tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.applications.running import application, trainer_options


@application("scvi-tools SCVI", "scvi-tools")
def scvi(callback: Any, folder: Path) -> None:
    import anndata
    import scvi

    counts = np.random.default_rng(0).poisson(3, (96, 12)).astype(np.float32)
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=3)
    options = trainer_options(folder, callback, check_val_every_n_epoch=1)
    model.train(train_size=0.7, batch_size=16, **{k: v for k, v in options.items() if k != "limit_train_batches"})
