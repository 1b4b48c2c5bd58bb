"""Features that demonstrably matter, counted during training: when, with which score, and what is left behind."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.ablation import accuracy
from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.errors import LIBError, SettingError, SettingTypeError
from lib_lightning.interventions import CausalPlan, feature_effects
from lib_lightning.training.budget import SkippedSnapshots, SnapshotKind, SnapshotTrigger, TimeMeter, TimeSpent
from tests.tiny_training import NODE_LAYERS, trainer_of
from tests.training.test_callback import run
from tests.training.test_snapshot import Sorted, callback_with


class Silent(Sorted):
    """Its loss is no function of torch, and its batches have no labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([(x,) for x, _ in super().val_dataloader().dataset], batch_size=7)


def counts_of(callback: LIBCallback) -> dict[str, float]:
    return {key.split("/", 2)[2]: v for key, v in callback.state.scalars.items() if "/causal_features/" in key}


def margin(output: Tensor, batch: Any) -> Tensor:
    return (output[:, 0] - output[:, 1]) * (1 - 2 * batch[1])


def files(folder: Path) -> dict[int, InteractionGraph]:
    paths = sorted((folder / "lib" / "snapshots").glob("*.safetensors"))
    graphs = [InteractionGraph.load(path) for path in paths]
    return {graph.info["step"]: graph for graph in graphs}


@pytest.mark.parametrize("stops_early", [False, True])
def test_once_in_the_last_snapshot_where_labels_are_known(tmp_path: Path, stops_early: bool) -> None:
    plain = run(Sorted(), tmp_path / "plain")
    callback, model = callback_with(), Sorted()
    if stops_early:
        stop = EarlyStopping("val_loss", patience=0, min_delta=100.0)
        trainer_of(tmp_path, callback, stop, max_epochs=5).fit(model)
    else:
        assert run(model, tmp_path, callback) == plain
    graphs = files(tmp_path)
    *earlier, last = graphs.values()
    assert len(graphs) == callback.snapshots > 2
    assert not any(graph.effects for graph in earlier)
    assert last.info["step"] == (12 if not stops_early else callback.state.step)
    final = InteractionGraph.load(tmp_path / "lib" / "final.safetensors")
    for graph in (last, final):
        info = graph.info["causal"]
        assert (info["score"], info["level"]) == ("log_likelihood", 0.05)
        assert info["features"] == sum(basis.n_features for basis in graph.bases.values())
        batches, n = [], info["samples"]
        for x, y in model.val_dataloader():
            batches.append((x[: n - sum(len(b[0]) for b in batches)], y[: n - sum(len(b[0]) for b in batches)]))
        expected = feature_effects(model, [b for b in batches if len(b[0])], graph, dtype=torch.float64)
        for layer, effects in graph.effects.items():
            for j, name in enumerate(graph.feature_ids(layer)):
                assert float(effects.changes[j]) == pytest.approx(expected[name].change, abs=1e-9)
                assert bool(effects.significant[j]) == expected[name].significant
    counts = counts_of(callback)
    assert counts["total"] == sum(int(effects.significant.sum()) for effects in last.effects.values())
    assert counts["total"] == sum(value for key, value in counts.items() if key != "total")


def test_with_every_nth_snapshot_and_the_last_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = callback_with(at_steps=[0, 1, 2, 3], causal_every=2, causal_score=margin)
    with caplog.at_level(logging.INFO):
        trainer_of(tmp_path, callback, max_steps=4).fit(Sorted())
    matter = [f"{int(n)} of" for layer, n in counts_of(callback).items() if layer != "total"]
    (line,) = (line for line in caplog.text.splitlines() if "features whose absence" in line)
    _, found = line.split("features whose absence changes the margin beyond chance: ")
    assert [part.split()[0] + " of" for part in found.split(", ")] == matter
    graphs = files(tmp_path)
    assert [step for step, graph in graphs.items() if graph.effects] == [0, 2, 4]
    for graph in graphs.values():
        if graph.effects:
            assert graph.info["causal"]["score"] == "margin"
            assert graph.info["causal"]["samples"] == 24, "held out"
            assert not any(effects.changes.isnan().any() for effects in graph.effects.values())
    assert set(counts_of(callback)) == {*(name.replace(":", ".") for name in NODE_LAYERS), "total"}
    assert callback.state.causal_step == 4


def test_never_and_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert callback_with(causal_every=False).config.causal == CausalPlan(0)
    callback = callback_with(causal_every=0, at_steps=[0])
    trainer_of(tmp_path / "zero", callback, max_steps=1).fit(Sorted())
    assert not counts_of(callback)
    assert callback.graph is not None
    assert not callback.graph.effects
    callback = callback_with(at_steps=[0])
    trainer_of(tmp_path / "silent", callback, max_steps=1).fit(Silent())
    counts = counts_of(callback)
    assert counts
    assert all(math.isnan(count) for count in counts.values())
    assert "matter" not in caplog.text


def test_mistakes_stop_a_run_before_its_first_step_and_later_failures_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(output: Tensor, batch: Any) -> Tensor:
        return output.sum()

    def failing(output: Tensor, batch: Any) -> Tensor:
        raise KeyError("labels")

    for score, said in ((wrong, "one number for each of the 7 samples"), (failing, "causal_score failed on the first")):
        model = Sorted()
        with pytest.raises(LIBError, match=said):
            trainer_of(tmp_path / "wrong", callback_with(causal_every=1, causal_score=score)).fit(model)
        assert not model.losses
    with pytest.raises(SettingError, match="causal_every"):
        callback_with(causal_every=-1)
    with pytest.raises(SettingError, match="causal_every"):
        callback_with(causal_every=True)
    with pytest.raises(SettingTypeError, match="causal_score must be a function"):
        callback_with(causal_score="accuracy")
    calls: list[int] = []

    def fails_later(output: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no more")
        return output[:, 0]

    callback = callback_with(at_steps=[0, 1], causal_every=1, causal_score=fails_later)
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path / "later", callback, max_steps=2).fit(Sorted())
    assert callback.snapshots == 3
    assert caplog.text.count("Counting the features that matter failed") == 1


def test_a_resumed_run_keeps_what_has_been_counted(tmp_path: Path) -> None:
    callback = callback_with(at_steps=[0], causal_every=3)
    trainer_of(tmp_path, callback, max_steps=1).fit(Sorted())
    state = callback.state_dict()
    counts = counts_of(callback)
    for is_old in (False, True):
        if is_old:  # of a version without this
            state = {**state, "scalars": {k: v for k, v in state["scalars"].items() if "causal_features" not in k}}
            del state["causal_step"]
        resumed = callback_with(at_steps=[0], causal_every=3)
        resumed.load_state_dict(state)
        found = counts_of(resumed)
        assert set(found) == set(counts)
        assert all(map(math.isnan, found.values())) if is_old else found == counts
        assert resumed.snapshots == callback.snapshots


def test_time_for_the_count_at_the_end_is_reserved() -> None:
    now = [0.0]
    group, kind = SINGLE_PROCESS, SnapshotKind()

    def takes(counts_at_end: bool) -> bool:
        meter = TimeMeter(0.1, lambda: now[0], TimeSpent(overhead=3.0, last_cost={"plain": 1.0}, training=55.0))
        return SnapshotTrigger(meter, SkippedSnapshots(), "lib", False, counts_at_end).can_take(1, kind, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib_lightning.training.budget.GRACE", 0.0)
        assert takes(False)
        assert not takes(True)


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("null", None), ("0", 0), ("false", 0)])
def test_settings_in_yaml(text: str, expected: int | None) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LIBCallback, "lib")
    options = {"causal_every": yaml.safe_load(text), "causal_score": "lib_lightning.ablation.accuracy"}
    found = parser.parse_object({"lib": {"class_path": "lib_lightning.LIBCallback", "init_args": options}})
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # newer and older versions
    assert instantiate(found).lib.config.causal == CausalPlan(expected, accuracy)
