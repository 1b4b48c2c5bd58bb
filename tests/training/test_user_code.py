"""Functions of the user's that fail: the snapshot goes on without their result, and that is said once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from lib_lightning import LIBCallback
from lib_lightning.ablation import AblationPlan
from lib_lightning.errors import LIBError
from lib_lightning.lineage.events import Event
from lib_lightning.metrics import GraphAverage, NumberOfEdges, NumberOfFeatures
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of


class Fails:
    """Counts its calls, and raises from a given one on; before, it returns ``result(*args)``."""

    def __init__(self, result: Any, first: int, error: Exception) -> None:
        self.result, self.first, self.error, self.calls = result, first, error, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls > self.first:
            raise self.error
        return self.result(*args)


def names(features: Tensor, inputs: Tensor) -> list[str]:
    return [f"f{j}" for j in range(features.shape[-1])]


def score(output: Tensor, batch: Any) -> Tensor:
    return output.argmax(-1).eq(batch[1]).double()


class Fragile(GraphAverage):
    """A metric that fails on graphs of trained models, unlike on the small one that it is checked with."""

    fails: Fails

    def update(self, edges: Tensor) -> None:
        if len(edges) != 2 or edges.shape[1] != 2:
            self.fails()
        self._add(edges.sum())


ERRORS = st.sampled_from(
    [ValueError("mine"), KeyError("k"), LIBError("a sentence"), MemoryError(), torch.OutOfMemoryError("out of memory")]
)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["labeller", "score", "metric", "on_event"]), first=st.integers(0, 3), error=ERRORS)
def test_snapshots_go_on_without_them(
    kind: str, first: int, error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    labeller = Fails(names, first if kind == "labeller" else 10**6, error)
    scoring = Fails(score, 9 * first if kind == "score" else 10**6, error)
    Fragile.fails = Fails(lambda: None, first if kind == "metric" else 10**6, error)
    hook = Fails(lambda event: None, first if kind == "on_event" else 10**6, error)
    events: list[Event] = []
    metrics = {"features": NumberOfFeatures(), "edges": NumberOfEdges(), "fragile": Fragile()}
    callback = LIBCallback(
        NODE_LAYERS, every_n_steps=3, baselines=["pca"], labeller=labeller, on_event=[hook, events.append],
        ablation=AblationPlan(scoring, every_n_snapshots=1), metrics=MetricCollection(metrics),
    )  # fmt: skip
    model = Classifier()
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="lib_lightning"):
        trainer_of(tmp_path, callback).fit(model)
    assert callback.snapshots == 5
    assert callback.graph is not None
    scalars = callback.state.scalars
    assert scalars["lib/features/total"] > 0
    assert len(events) == len(callback.state.events)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("lib_lightning") and "overhead" not in r.msg]
    failed = hook.calls > first if kind == "on_event" else True
    assert len(said) == failed, said
    assert all(type(error).__name__ in sentence and len(sentence) < 400 for sentence in said)
    assert bool(callback.graph.labels) == (kind != "labeller")
    assert (scalars["lib/fragile/total"] != scalars["lib/fragile/total"]) == (kind == "metric")


def test_a_traceback_is_logged_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LIBCallback(NODE_LAYERS, labeller=Fails(names, 0, ValueError("mine")), every_n_validations=1)
    with caplog.at_level(logging.DEBUG, logger="lib_lightning"):
        trainer_of(tmp_path, callback, max_epochs=1).fit(Classifier())
    (record,) = (r for r in caplog.records if r.exc_info and r.name.startswith("lib_lightning"))
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "mine"


def test_a_labeller_of_the_wrong_number_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LIBCallback(NODE_LAYERS, labeller=lambda features, inputs: ["only one"], every_n_validations=1)
    with caplog.at_level(logging.WARNING, logger="lib_lightning"):
        trainer_of(tmp_path, callback).fit(Classifier())
    assert callback.snapshots == 2
    assert caplog.text.count("The labeller failed, and features have no labels") == 1


def test_names_of_metrics_that_are_taken() -> None:
    with pytest.raises(LIBError, match="Metrics are called 'born'"):
        LIBCallback(NODE_LAYERS, metrics=MetricCollection({"born": NumberOfEdges()}), every_n_validations=1)
