"""What TensorBoard's own plugins make of the layout of a run's scalars, and of its hyperparameters and metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams.backend_context import Context
from torch.utils.tensorboard.summary import custom_scalars

from lib_lightning import LIBCallback
from lib_lightning.training.loggers import add_summaries
from lib_lightning.training.tensorboard_layout import FIRST, OTHERS, layout_of
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of


class Configured(Classifier):
    """A module with hyperparameters, as Lightning logs them."""

    def __init__(self, lr: float = 0.01, shape: dict[str, int] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def provider(folder: Path) -> MultiplexerDataProvider:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(folder))


def charts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Patterns by title of group and chart, as the tab CUSTOM SCALARS reads them."""
    layout: Any = CustomScalarsPlugin(TBContext(data_provider=provider(folder))).layout_impl(RequestContext(), "")
    return {
        group["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in group["chart"]}
        for group in json.loads(layout)["category"]
    }


def experiment(folder: Path) -> Any:
    """Columns as the tab HPARAMS reads them."""
    context = Context(TBContext(data_provider=provider(folder)))
    found = context.hparams_metadata(RequestContext(), "")
    return context.experiment_from_metadata(RequestContext(), "", True, found, [])


def scalars(folder: Path) -> set[str]:
    found = provider(folder).list_scalars(RequestContext(), experiment_id="", plugin_name="scalars")
    return {tag for tags in found.values() for tag in tags}


def fit(folder: Path, *callbacks: pl.Callback, **options: Any) -> None:
    logger = TensorBoardLogger(folder, name="", version="", **options)
    trainer_of(folder, *callbacks, logger=logger).fit(Configured(shape={"hidden": 8}))


def test_scalars_are_drawn_together_and_the_most_important_first(tmp_path: Path) -> None:
    fit(tmp_path, LIBCallback(NODE_LAYERS, baselines=["pca"], every_n_steps=3))
    found = charts(tmp_path)
    assert list(found) == ["lib: look at these first", "lib: more"]
    assert list(found["lib: look at these first"]) == list(FIRST)
    assert list(found["lib: more"]) == list(OTHERS)
    logged = scalars(tmp_path)
    drawn = {
        chart: {tag for tag in logged for pattern in patterns if re.search(pattern, tag)}
        for group in found.values()
        for chart, patterns in group.items()
    }
    for title, patterns in FIRST.items():
        assert drawn[title], (title, patterns)
    assert drawn[next(iter(FIRST))] == {"lib/effective_edges/total", "pca/effective_edges/total"}
    (features,) = (drawn[title] for title in FIRST if title.startswith("How much of each layer"))
    assert {"lib/effective_features/output", "pca/effective_features/net.0.input"} <= features
    assert "lib/effective_features/total" not in features
    empty = {title for title, tags in drawn.items() if not tags}
    assert empty == {"Edges required for the score"}  # which only `ablation=` counts


def test_metrics_stand_beside_the_hyperparameters_of_a_training_without_the_callback(tmp_path: Path) -> None:
    fit(tmp_path / "without")
    fit(tmp_path / "with", LIBCallback(NODE_LAYERS, every_n_steps=6))
    without, with_callback = experiment(tmp_path / "without"), experiment(tmp_path / "with")
    assert [column.name for column in without.hparam_infos] == ["lr", "shape/hidden"]
    assert list(without.hparam_infos) == list(with_callback.hparam_infos)
    assert [metric.name.tag for metric in without.metric_infos] == ["hp_metric"]
    assert [metric.name.tag for metric in with_callback.metric_infos] == [
        "hp_metric", "lib/effective_edges/total", "lib/modularity/total",
    ]  # fmt: skip


def test_metrics_that_the_user_chooses_are_left_alone(tmp_path: Path) -> None:
    class Own(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert trainer.logger is not None
            trainer.logger.log_hyperparams(pl_module.hparams, {"val_loss": 0.0})  # type: ignore[arg-type, call-arg]

    fit(tmp_path, LIBCallback(NODE_LAYERS, every_n_steps=3), Own(), default_hp_metric=False)
    assert [metric.name.tag for metric in experiment(tmp_path).metric_infos] == ["val_loss"]


def test_two_callbacks_have_groups_of_their_own(tmp_path: Path) -> None:
    fit(tmp_path, LIBCallback(NODE_LAYERS, every_n_steps=3), LIBCallback(NODE_LAYERS, name="again", at_steps=[3]))
    assert [title.split(":")[0] for title in charts(tmp_path)] == ["lib", "lib", "again", "again"]


def test_a_layout_of_the_user_replaces_it(tmp_path: Path) -> None:
    class Own(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            experiment: Any = trainer.loggers[0].experiment  # type: ignore[attr-defined]
            experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})

    fit(tmp_path, Own(), LIBCallback(NODE_LAYERS, every_n_steps=3))
    assert list(charts(tmp_path)) == ["mine"]


def test_other_loggers_have_no_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_summaries(TensorBoardLogger(tmp_path), [custom_scalars(layout_of({"lib": ["lib"]}))])
    trainer_of(tmp_path, LIBCallback(NODE_LAYERS, every_n_steps=3), logger=CSVLogger(tmp_path)).fit(Configured())
    assert "failed to log" not in caplog.text
