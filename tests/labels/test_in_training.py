"""`ExampleLabels` as the labeller of a training: names and scores in files and figures, a scalar, resumed runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.labels import ExampleLabels, Labels
from lib_lightning.plots.image import render_png
from tests.resumable_run import Steady
from tests.tiny_training import trainer_of

NAMES = ["red", "green", "blue", "grey", "pink"]


class Classes(Steady):
    """Five classes that are far from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 5))

    def _data(self, n: int) -> Any:
        y = torch.arange(4 * n) % 5
        x = nn.functional.one_hot(y, 5) + 0.2 * torch.randn(4 * n, 5, generator=torch.Generator().manual_seed(n))
        return torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=40)


def fit(folder: Path, labeller: Any, epochs: int, ckpt: Path | None = None) -> LIBCallback:
    torch.manual_seed(0)
    callback = LIBCallback(
        ["net.0:input", "net.2:input", "output"], at_steps=[0], labeller=labeller, output_names=NAMES
    )
    saver = ModelCheckpoint(folder, filename="last")
    trainer = trainer_of(folder, callback, saver, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(Classes(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    scalars, graph = callback.state.scalars, callback.graph
    assert graph is not None
    assert ("lib/named_features/total" in scalars) == (labeller is not None)
    if labeller is not None:
        assert "lib/named_features/total" in trainer.callback_metrics
        scores = torch.cat([graph.label_scores[layer] for layer in ("net.0:input", "net.2:input")])
        assert scalars["lib/named_features/total"] == int(scores.isfinite().sum()) >= 5
        assert math.isnan(scalars["lib/named_features/output"])
    return callback


def test_names_and_scores_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fit(tmp_path / "a", ExampleLabels(), 2).graph
    assert graph is not None
    saved = InteractionGraph.load(tmp_path / "a" / "lib" / "final.safetensors")
    feature = saved.feature(("net.2:input", 0))
    assert any(f"class {name}" in feature.label for name in NAMES), "as the callback has them"
    assert feature.label_score is not None
    assert feature.label_score > 0.9
    texts: list[str] = []
    monkeypatch.setattr("lib_lightning.plots.graph.shorten", lambda text, *_: texts.append(text) or text)
    render_png(saved.plot())
    assert f"{feature.label_score:.2f} {feature.label}" in texts
    # Labels do not change what a run is: with or without them, it goes on.
    first = tmp_path / "a" / "last.ckpt"
    for folder, labeller, epochs in (("b", None, 3), ("c", ExampleLabels(), 4)):
        ckpt = first if folder == "b" else tmp_path / "b" / "last.ckpt"
        callback = fit(tmp_path / folder, labeller, epochs, ckpt)
        assert callback.state.history.steps[0] == 0, "its history is still known"


def test_a_labeller_that_fails_costs_no_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(ExampleLabels):
        def label(self, samples: Any) -> Any:
            raise ValueError("no idea")

    callback = LIBCallback(["net.0:input", "output"], at_steps=[0], labeller=Fails())
    trainer_of(tmp_path, callback, max_epochs=1).fit(Classes())
    assert callback.snapshots == 2
    assert caplog.text.count("The labeller failed, and features have no labels") == 1
    assert math.isnan(callback.state.scalars["lib/named_features/total"])


def test_a_labeller_needs_only_a_method(tmp_path: Path) -> None:
    class Ranks:
        def label(self, samples: Any) -> Labels:
            r = samples.features.shape[2]
            return Labels([f"rank {k}" for k in range(r)], torch.linspace(0.6, 0.9, r))

    callback = LIBCallback(["net.0:input", "output"], at_steps=[0], labeller=Ranks())
    trainer_of(tmp_path, callback, max_epochs=1).fit(Classes())
    assert callback.graph is not None
    assert callback.graph.feature(("net.0:input", 0)).label == "rank 0"
    assert callback.state.scalars["lib/named_features/total"] == callback.graph.bases["net.0:input"].n_features
    with pytest.raises(TypeError, match="an object with a method label"):
        LIBCallback(labeller=object())  # type: ignore[arg-type]


def test_labels_leave_the_training_as_it_is(tmp_path: Path) -> None:
    weights: list[list[Tensor]] = []
    for labeller in (None, ExampleLabels()):
        torch.manual_seed(0)
        model = Classes()
        callback = LIBCallback(["net.0:input", "output"], at_steps=[0, 3], labeller=labeller)
        trainer_of(tmp_path, callback, max_epochs=1).fit(model)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_more_samples_are_labelled_than_graphs_are_computed_on(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(ExampleLabels):
        def label(self, samples: Any) -> Any:
            seen.append(len(samples.features))
            return super().label(samples)

    callback = LIBCallback(["net.0:input", "output"], num_samples=7, at_steps=[0], labeller=Look())
    trainer_of(tmp_path, callback, max_epochs=1).fit(Classes())
    assert callback.graph is not None
    assert callback.graph.info["n_samples"] == 7
    assert set(seen) == {28}
