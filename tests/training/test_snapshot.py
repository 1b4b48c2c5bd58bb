"""What a snapshot contains besides the graph: baselines, metrics, labels, modules, standard errors, ablations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection

from lib_lightning import InteractionGraph, LIBCallback, compute_interaction_graph
from lib_lightning.ablation import AblationPlan, accuracy, edges_required
from lib_lightning.errors import LIBError
from lib_lightning.graph import Lineages
from lib_lightning.lineage.events import Event
from lib_lightning.metrics import Gini, Modularity, NumberOfFeatures, find_modules
from lib_lightning.model.replica import copy_model
from lib_lightning.training.recorder import SnapshotRecorder
from lib_lightning.training.run_state import PlotHistory
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView
from tests.tiny_training import NODE_LAYERS, Classifier, Noisy, trainer_of
from tests.training.test_callback import run


def scores_of(output: Tensor, batch: Any) -> Tensor:
    """A score function of a user's own."""
    return -(output[:, 0] - output[:, 1]).abs()


class Sorted(Classifier):
    """Validation samples that are the same in every pass, and enough of them to hold some out."""

    def val_dataloader(self) -> DataLoader[Any]:
        x = Noisy(60).x
        return DataLoader(list(zip(x, x.sum(1).gt(0).long(), strict=True)), batch_size=7)


def callback_with(**options: Any) -> LIBCallback:
    return LIBCallback(**{"node_layers": NODE_LAYERS, "num_samples": 24, "dtype": "float64", **options})


def test_training_is_unchanged_with_all_options(tmp_path: Path) -> None:
    def labeller(features: Tensor, inputs: Tensor) -> list[str]:
        return [f"{torch.rand(()):.2f}" for _ in range(features.shape[-1])]

    everything = callback_with(
        baselines=["pca", "neuron"], labeller=labeller, ablation=AblationPlan(every_n_snapshots=1), every_n_steps=3
    )
    plain = run(Sorted(), tmp_path / "plain")
    assert run(Sorted(), tmp_path / "watched", everything) == plain
    assert everything.snapshots == 5


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_one_copy_of_the_model_serves_a_whole_snapshot(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    shared: list[int] = []

    def counted(model: Any, max_bytes: int) -> Any:
        made = copy_model(model, max_bytes)
        copied.append(max_bytes)
        shared.append(len(made[1]))
        return made

    def labeller(features: Tensor, inputs: Tensor) -> list[str]:
        assert not torch.is_grad_enabled()
        return ["a feature"] * features.shape[-1]

    callback = callback_with(
        baselines=["pca"], labeller=labeller, ablation=AblationPlan(every_n_snapshots=1), memory_limit=0.5,
        max_overhead=float("inf"), every_n_steps=3, effort="exact",
    )  # fmt: skip
    compute, counts = callback.computer.compute, []

    def compute_counted(*args: Any) -> Any:
        copied.clear()
        result = compute(*args)
        counts.append(list(copied))
        return result

    monkeypatch.setattr("lib_lightning.model.preserve.COPIED_SHARE", share)
    monkeypatch.setattr("lib_lightning.model.preserve.copy_model", counted)
    monkeypatch.setattr(callback.computer, "compute", compute_counted)
    trainer_of(tmp_path, callback).fit(Sorted())
    assert callback.snapshots == 5
    assert counts == [[int(share * 2**29)]] * 5
    assert callback.graph is not None
    assert set(callback.graph.labels or {}) == set(NODE_LAYERS[:-1])
    assert callback.graph.reference_features
    assert bool(shared[-1]) == (share == 0), "weights are shared with the copy if they are too large"


class Counting(Sorted):
    """Changes with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


def test_baselines_start_from_the_same_state_of_the_model(tmp_path: Path) -> None:
    graphs, calls = [], []
    for prefix, options in (("pca", {"baselines": ["pca"]}), ("lib", {"basis": "pca"})):
        pl.seed_everything(0, verbose=False)
        model = Counting()
        trainer_of(tmp_path / prefix, callback_with(every_n_validations=1, **options)).fit(model)
        graphs.append(InteractionGraph.load(tmp_path / prefix / prefix / "final.safetensors"))
        calls.append(model.calls)
    assert calls[0] == calls[1]
    for one, other in zip(graphs[0].bases.values(), graphs[1].bases.values(), strict=True):
        assert torch.equal(one.importance, other.importance)
    for E, expected in zip(graphs[0].edges.values(), graphs[1].edges.values(), strict=True):
        assert torch.equal(E, expected)


@pytest.mark.parametrize("snapshots", [2, 3])
def test_figures_over_time_need_three_snapshots(snapshots: int, tmp_path: Path) -> None:
    callback = callback_with(every_n_validations=1)
    logger = TensorBoardLogger(tmp_path, name="")
    trainer_of(tmp_path, callback, logger=logger, max_epochs=snapshots).fit(Sorted())
    assert callback.snapshots == snapshots
    over_time = {"lib/timeline", "lib/spectrum_over_time", "lib/sparsity_over_time"}
    drawn = over_time & set(EventAccumulator(str(tmp_path / "version_0")).Reload().Tags()["images"])
    assert drawn == (over_time if snapshots == 3 else set())


def test_baselines_on_the_same_samples_and_their_ratios(tmp_path: Path) -> None:
    callback = callback_with(baselines=["pca", "neuron"], every_n_validations=1)
    trainer, model = trainer_of(tmp_path, callback, logger=TensorBoardLogger(tmp_path, name="")), Sorted()
    trainer.fit(model)
    numbers = trainer.callback_metrics
    samples = callback.samples.buffer.batches
    for kind in ("lib", "pca", "neuron"):
        expected = compute_interaction_graph(model, samples, NODE_LAYERS, basis=kind, dtype=torch.float64)
        assert numbers[f"{kind}/effective_edges/total"] == pytest.approx(expected.measure()["effective_edges/total"])
        saved = InteractionGraph.load(tmp_path / "version_0" / kind / "final.safetensors")
        assert saved.bases[NODE_LAYERS[0]].kind == kind
        for pair, E in expected.edges.items():
            torch.testing.assert_close(saved.edges[pair], E)
    for kind in ("pca", "neuron"):
        for metric in ("features", "gini", "modularity"):
            ratio = numbers[f"lib/{metric}/total"] / numbers[f"{kind}/{metric}/total"]
            assert numbers[f"lib_over_{kind}/{metric}/total"] == pytest.approx(float(ratio))
    events = EventAccumulator(str(tmp_path / "version_0")).Reload()
    assert set(events.Tags()["images"]) == {"lib/graph", "pca/graph", "neuron/graph", "lib/spectrum"}
    assert {"lib/modularity/total", "lib_over_pca/edges/total"} <= set(events.Tags()["scalars"])
    # At the end, as it takes a seventh of a snapshot's time.
    assert [p.name for p in (tmp_path / "version_0" / "lib" / "spectra").iterdir()] == ["step-00000012.png"]
    assert callback.snapshots == 2


def test_prefixes_of_baselines(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback_with(baselines=["pca"]), callback_with(baselines=["pca"], name="other"))
    trainer.fit(Sorted())
    prefixes = {key.split("/")[0] for key in trainer.callback_metrics} - {"val_loss"}
    assert prefixes == {"lib", "pca", "lib_over_pca", "other", "other_pca", "other_over_pca"}
    assert {"lib", "pca", "other", "other_pca"} <= {path.name for path in tmp_path.iterdir()}


def test_user_metrics_under_their_own_names(tmp_path: Path) -> None:
    metrics = MetricCollection({"large": NumberOfFeatures(rtol=0.1), "parts": Modularity(resolution=2.0)}, prefix="my_")
    callback = callback_with(metrics=metrics)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(Sorted())
    keys = {key.split("/")[1] for key in trainer.callback_metrics if key.startswith("lib/")}
    assert keys == {
        "my_large",
        "my_parts",
        "nats",
        "causal_features",
        "samples",
        "seconds",
        "step",
        "age",
        "overhead",
        "born",
        "ended",
        "overlap",
    }
    graph = callback.graph
    assert graph is not None
    assert trainer.callback_metrics["lib/my_large/net.0.input"] == NumberOfFeatures(rtol=0.1)(
        graph.bases["net.0:input"].importance
    )
    # The figure's modules are those that are measured.
    found, expected = (
        torch.cat(list(m)) for m in (graph.modules.values(), find_modules(list(graph.edges.values()), resolution=2.0))
    )
    # But for their numbers, which are those of the run.
    assert torch.equal(found[:, None] == found, expected[:, None] == expected)


def test_unsuitable_metrics_are_refused_at_once() -> None:
    with pytest.raises(LIBError, match="'mean'"):
        callback_with(metrics=MetricCollection({"mean": MeanMetric()}))
    with pytest.raises(ValueError, match="baselines are bases other than 'lib'"):
        callback_with(baselines=["lib"])
    with pytest.raises(ValueError, match="each of baselines must be one of"):
        callback_with(baselines=["nmf"])


def test_files_hold_errors_labels_modules_and_metrics(tmp_path: Path) -> None:
    seen = []

    def labeller(features: Tensor, inputs: Tensor) -> list[str]:
        seen.append((features.shape, inputs.shape))
        return [f"feature {j}" for j in range(features.shape[-1])]

    trainer_of(tmp_path, callback_with(labeller=labeller, metrics=MetricCollection({"gini": Gini()}))).fit(Sorted())
    graph = InteractionGraph.load(tmp_path / "lib" / "final.safetensors")
    assert seen[0][0][:2] == (24, 1)
    assert seen[0][1] == (24, 5)
    assert graph.labels["net.0:input"][0] == "feature 0"
    assert set(graph.modules) == set(NODE_LAYERS)
    assert (graph.edge_errors["net.0:input", "net.4:input"] > 0).any()
    error = graph.bases["net.0:input"].importance_error
    assert error is not None
    assert (error > 0).all()
    assert graph.info["metrics"]["gini/total"]["error"] > 0


@pytest.mark.parametrize("score", ["accuracy", scores_of])
def test_ablations_every_n_snapshots_on_held_out_samples(tmp_path: Path, score: Any) -> None:
    plan = AblationPlan(score=score, every_n_snapshots=3, tolerance=0.02)
    callback = callback_with(every_n_steps=2, ablation=plan)
    logged: dict[int, dict[str, float]] = {}

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            logged[trainer.global_step] = dict(callback._scalars(trainer))

    trainer, model = trainer_of(tmp_path, callback, Note()), Sorted()
    trainer.fit(model)
    x = Noisy(60).x
    assert torch.equal(torch.cat([b[0] for b in callback.samples.buffer.batches]), x[:24])
    assert torch.equal(torch.cat([b[0] for b in callback.samples.held_out.batches]), x[24:48])
    # Snapshots after 0, 2, 4, 6, 8, 10, 12 steps; ablations at the first, fourth and last.
    assert [logged[step]["lib/ablation_age"] for step in (2, 5, 6, 8, 11)] == [2.0, 5.0, 0.0, 2.0, 5.0]
    assert callback.state.ablation_step == 12
    assert callback.graph is not None
    expected = edges_required(
        model, callback.samples.held_out.batches, callback.graph, plan.score_fn, 0.02, dtype=torch.float64
    )
    counts = [math.nan if a.count is None else a.count for a in expected.values()]
    key = "lib/edges_required/"
    found = [callback.state.scalars[key + s] for s in ("net.0.input-to-net.4.input", "net.4.input-to-output")]
    assert found == pytest.approx(counts, nan_ok=True)
    assert callback.state.scalars[key + "total"] == pytest.approx(sum(counts), nan_ok=True)
    # Drawn where it was measured, in figures as in the tab.
    drawn = callback.state.history.totals["edges_required"]["lib"]
    run = json.loads(RunView(tmp_path / "lib", "lib", Cache(1 << 20)).run())
    for k, snapshot in enumerate(run["snapshots"]):
        shown = snapshot["metrics"].get("edges_required/total")
        assert (shown is not None) == (k in (0, 3, 6))
        value = math.nan if shown is None or shown["value"] is None else shown["value"]
        assert drawn[k] == pytest.approx(value, rel=1e-4, nan_ok=True)


class StopsAt8(pl.Callback):
    """Ends the training where nobody expects it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 8


@pytest.mark.parametrize(
    ("schedule", "stops", "steps"),
    [
        ({"every_n_steps": 4}, False, [0, 4, 8, 12]),
        ({"at_steps": [3, 12]}, False, [3, 12]),
        ({"at_steps": [3]}, False, [3, 12]),
        ({"every_n_validations": 1}, False, [6, 12]),
        ({}, False, None),
        ({"every_n_steps": 4}, True, [0, 4, 8, 8]),
    ],
)
def test_the_first_and_the_last_snapshot_are_ablated(
    schedule: dict[str, Any], stops: bool, steps: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Event] = []
    callback = callback_with(ablation=AblationPlan(tolerance=0.02), on_event=reported.append, **schedule)
    ablated: list[tuple[int, bool]] = []
    compute = SnapshotRecorder.compute

    def noted(self: Any, instrumented: Any, data: Any, metadata: Any, kind: Any, interval: float = 1.0) -> Any:
        ablated.append((metadata["step"], kind.ablation))
        return compute(self, instrumented, data, metadata, kind, interval)

    monkeypatch.setattr(SnapshotRecorder, "compute", noted)
    trainer_of(tmp_path, callback, *[StopsAt8()] * stops).fit(Sorted())
    assert steps is None or [step for step, _ in ablated] == steps
    assert [is_ablated for _, is_ablated in ablated] == [True, *[False] * (len(ablated) - 2), True]
    assert callback.state.ablation_step == callback.state.step == (8 if stops else 12)
    assert reported == callback.state.events, "each once"


def test_more_steps_than_expected_are_not_all_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = callback_with(every_n_steps=2, ablation=AblationPlan(tolerance=0.02, every_n_snapshots=100))
    monkeypatch.setattr("lib_lightning.training.callback.training_steps", lambda trainer: 6.0)
    ages: list[float] = []

    class Ages(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            ages.append(callback._scalars(trainer)["lib/ablation_age"])

    trainer_of(tmp_path, callback, Ages()).fit(Sorted())
    assert ages[:11] == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert callback.state.ablation_step == 12


def test_history_has_values_where_they_were_measured() -> None:
    """Whatever is measured when, also after going back to an earlier step."""
    graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(30, 3)], ["input", "output"])
    lineages = {name: basis.importance.argsort() for name, basis in graph.bases.items()}
    graph.lineages = {name: Lineages(ids, ids.double(), ids) for name, ids in lineages.items()}

    @given(st.lists(st.tuples(st.integers(0, 9), st.sets(st.sampled_from(["lib/a", "lib/b", "pca/a"]))), max_size=12))
    def check(snapshots: list[tuple[int, set[str]]]) -> None:
        history, expected = PlotHistory(), {}
        for value, (step, measured) in enumerate(snapshots):
            scalars: dict[str, dict[str, float]] = {"lib": {}, "pca": {}}
            for name in measured:
                kind, metric = name.split("/")
                scalars[kind][f"{metric}/total"] = float(value)
            history.add(step, graph, scalars)  # type: ignore[arg-type]
            expected = {s: of_step for s, of_step in expected.items() if s < step}
            expected[step] = {name: float(value) for name in measured}
        assert history.steps == list(expected)
        for metric, series in history.totals.items():
            for kind, values in series.items():
                wanted = [of_step.get(f"{kind}/{metric}", math.nan) for of_step in expected.values()]
                assert values == pytest.approx(wanted, nan_ok=True)

    check()


def test_ablations_with_too_few_samples_or_another_loader(tmp_path: Path) -> None:
    class Two(Sorted):
        def val_dataloader(self) -> Any:
            other = DataLoader(list(zip(Noisy(30).x, torch.zeros(30).long(), strict=True)), batch_size=10)
            return [super().val_dataloader(), other]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    elsewhere = callback_with(ablation=AblationPlan(val_dataloader=1))
    too_few = callback_with(ablation=AblationPlan(), num_samples=100, name="few")
    trainer_of(tmp_path, elsewhere, too_few, limit_val_batches=1.0).fit(Two())
    assert torch.equal(torch.cat([b[0] for b in elsewhere.samples.held_out.batches]), Noisy(30).x[:24])
    assert too_few.samples.held_out.count == 0
    for callback in (elsewhere, too_few):
        assert not math.isnan(callback.state.scalars[f"{callback.name}/edges_required/total"])


def test_the_users_dataloader_provides_held_out_samples(tmp_path: Path) -> None:
    batches = [(x, x.sum(1).gt(0).long()) for x in Noisy(60).x.split(10)]
    callback = callback_with(dataloader=batches, ablation=AblationPlan())
    trainer_of(tmp_path, callback, limit_val_batches=0).fit(Classifier())
    assert torch.equal(torch.cat([b[0] for b in callback.samples.held_out.batches]), Noisy(60).x[24:48])
    assert callback.snapshots


def test_resumed_runs_keep_their_held_out_samples(tmp_path: Path) -> None:
    def new() -> LIBCallback:
        return callback_with(every_n_steps=2, ablation=AblationPlan(every_n_snapshots=3))

    first, second = new(), new()
    trainer = trainer_of(tmp_path, first, max_epochs=1)
    trainer.fit(Sorted())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(tmp_path, second).fit(Sorted(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for a, b in zip(first.samples.held_out.batches, second.samples.held_out.batches, strict=True):
        assert torch.equal(a[0], b[0])
    assert second.snapshots == 7


def test_a_failing_score_costs_only_the_ablation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Snapshots go on without what the user's own code was to add, as with a labeller that fails."""

    def fails(output: Tensor, batch: Any) -> Tensor:
        return output

    callback = callback_with(ablation=AblationPlan(score=fails), every_n_validations=1)
    plain = run(Sorted(), tmp_path / "plain")
    assert run(Sorted(), tmp_path / "watched", callback) == plain
    assert caplog.text.count("one number for each of the") == 1
    assert callback.snapshots == 2
    assert math.isnan(callback.state.scalars["lib/edges_required/total"])
    assert InteractionGraph.load(tmp_path / "watched" / "lib" / "final.safetensors").edges


@pytest.mark.parametrize("options", [{"final_basis": "centered"}, {"final_metric": "fisher"}])
def test_other_bases_of_the_last_layer(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = callback_with(**options, baselines=["pca"])
    trainer_of(tmp_path, callback).fit(Sorted())
    assert callback.graph is not None
    last = callback.graph.bases["output"]
    assert last.kind == {"centered": "centered", "fisher": "lib"}[next(iter(options.values()))]
    assert torch.allclose(last.to_features.sum(0), torch.zeros(last.n_features).double(), atol=1e-9)


def test_ablation_plans_are_checked() -> None:
    assert AblationPlan().score_fn is accuracy
    for wrong in ({"score": "f1"}, {"tolerance": -1.0}, {"every_n_snapshots": 0}):
        with pytest.raises(ValueError, match="got"):
            AblationPlan(**wrong)  # type: ignore[arg-type]
