"""Forecasts of time series: darts, NeuralForecast, PyTorch Forecasting, GluonTS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.applications.running import application, trainer_options


def waves(n: int, length: int) -> Any:
    """Sine waves with noise, ``(n, length)``."""
    random = np.random.default_rng(0)
    t = np.arange(length) / 7 + random.uniform(0, 6, (n, 1))
    return (np.sin(t) + 0.1 * random.standard_normal((n, length))).astype(np.float32)


def darts(model: str, callback: Any, folder: Path, **options: Any) -> None:
    from darts import TimeSeries, models

    series = [TimeSeries.from_values(wave) for wave in waves(4, 80)]
    forecaster = getattr(models, model)(
        input_chunk_length=12, output_chunk_length=4, batch_size=16, work_dir=str(folder), n_epochs=2,
        pl_trainer_kwargs=trainer_options(folder, callback), **options,
    )  # fmt: skip
    forecaster.fit(series[:2], val_series=series[2:])


@application("darts NBEATSModel", "darts")
def nbeats(callback: Any, folder: Path) -> None:
    darts("NBEATSModel", callback, folder, num_stacks=2, num_blocks=1, num_layers=2, layer_widths=16)


@application("darts TransformerModel", "darts")
def darts_transformer(callback: Any, folder: Path) -> None:
    small = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 16}
    darts("TransformerModel", callback, folder, d_model=8, nhead=2, **small)


@application("darts TCNModel", "darts")
def darts_tcn(callback: Any, folder: Path) -> None:
    darts("TCNModel", callback, folder, kernel_size=3, num_filters=4)


@application("darts TiDEModel", "darts")
def tide(callback: Any, folder: Path) -> None:
    darts("TiDEModel", callback, folder, hidden_size=16, decoder_output_dim=4)


def neuralforecast(model: str, callback: Any, folder: Path, **options: Any) -> None:
    import pandas as pd
    from neuralforecast import NeuralForecast, models

    dates = pd.date_range("2020-01-01", periods=90, freq="D")
    frames = [pd.DataFrame({"unique_id": str(i), "ds": dates, "y": wave}) for i, wave in enumerate(waves(6, 90))]
    trainer = {k: v for k, v in trainer_options(folder, callback).items() if k != "max_epochs"}
    forecaster = getattr(models, model)(
        h=4, input_size=12, max_steps=8, val_check_steps=4, batch_size=4, windows_batch_size=16, **options, **trainer
    )
    NeuralForecast([forecaster], freq="D").fit(pd.concat(frames), val_size=8)


@application("neuralforecast NHITS", "neuralforecast")
def nhits(callback: Any, folder: Path) -> None:
    neuralforecast("NHITS", callback, folder, mlp_units=3 * [[16, 16]])


@application("neuralforecast PatchTST", "neuralforecast")
def patch_tst(callback: Any, folder: Path) -> None:
    small = {"hidden_size": 8, "n_heads": 2, "encoder_layers": 1, "linear_hidden_size": 16}
    neuralforecast("PatchTST", callback, folder, patch_len=4, stride=4, **small)


def pytorch_forecasting(model: str, callback: Any, folder: Path, dataset: dict[str, Any], **options: Any) -> None:
    import lightning.pytorch as pl
    import pandas as pd
    import pytorch_forecasting as pf

    frames = [pd.DataFrame({"series": str(i), "time": range(60), "value": wave}) for i, wave in enumerate(waves(6, 60))]
    data = pf.TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True), time_idx="time", target="value", group_ids=["series"],
        max_encoder_length=12, max_prediction_length=4, time_varying_unknown_reals=["value"], **dataset,
    )  # fmt: skip
    forecaster = getattr(pf, model).from_dataset(data, **options)
    train, validate = (data.to_dataloader(train=train, batch_size=16, num_workers=0) for train in (True, False))
    pl.Trainer(**trainer_options(folder, callback, limit_val_batches=4)).fit(forecaster, train, validate)


@application("pytorch-forecasting TemporalFusionTransformer", "pytorch-forecasting")
def fusion(callback: Any, folder: Path) -> None:
    small = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4}
    dataset = {"time_varying_known_reals": ["time"], "static_categoricals": ["series"]}
    pytorch_forecasting("TemporalFusionTransformer", callback, folder, dataset, **small)


@application("pytorch-forecasting NBeats", "pytorch-forecasting")
def pf_nbeats(callback: Any, folder: Path) -> None:
    pytorch_forecasting("NBeats", callback, folder, {}, widths=[16, 32], num_blocks=[1, 1], num_block_layers=[2, 2])


@application("pytorch-forecasting DeepAR", "pytorch-forecasting")
def pf_deepar(callback: Any, folder: Path) -> None:
    dataset = {"time_varying_known_reals": ["time"], "static_categoricals": ["series"]}
    pytorch_forecasting("DeepAR", callback, folder, dataset, hidden_size=8)


def gluonts(estimator: Any, folder: Path) -> None:
    import pandas as pd
    from gluonts.dataset.pandas import PandasDataset

    dates = pd.period_range("2020-01-01", periods=90, freq="D")
    series = {str(i): pd.Series(wave, index=dates) for i, wave in enumerate(waves(6, 90))}
    data = PandasDataset(series)
    estimator.train(training_data=data, validation_data=data)


@application("gluonts DeepAREstimator", "gluonts")
def deepar(callback: Any, folder: Path) -> None:
    from gluonts.torch import DeepAREstimator

    options = trainer_options(folder, callback, enable_checkpointing=True)  # as GluonTS needs
    gluonts(
        DeepAREstimator(
            freq="D", prediction_length=4, hidden_size=8, num_layers=1, num_batches_per_epoch=4, batch_size=8,
            trainer_kwargs=options,
        ),
        folder,
    )  # fmt: skip


@application("gluonts SimpleFeedForwardEstimator", "gluonts")
def feed_forward(callback: Any, folder: Path) -> None:
    from gluonts.torch import SimpleFeedForwardEstimator

    options = trainer_options(folder, callback, enable_checkpointing=True)  # as GluonTS needs
    gluonts(
        SimpleFeedForwardEstimator(
            prediction_length=4, hidden_dimensions=[16, 16], num_batches_per_epoch=4, batch_size=8,
            trainer_kwargs=options,
        ),
        folder,
    )  # fmt: skip
