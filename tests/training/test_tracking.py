"""Features tracked through real trainings: lineages in files, events, denser snapshots, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.lineage import Event, FeatureTracker
from lib_lightning.lineage.events import CHANGES
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.image import render_png
from lib_lightning.plots.module_numbers import Members, ModuleNumbers
from lib_lightning.training.samples import SampleStore
from lib_lightning.training.snapshot import SnapshotComputer
from lib_lightning.training.writer import SnapshotDirectory
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView
from tests.tiny_training import NODE_LAYERS, Classifier, Noisy, trainer_of
from tests.training.test_callback import run


class Steady(Classifier):
    """As many validation samples as wanted, the same ones in every pass."""

    def __init__(self, n_val: int = 160, breaks_at: int | None = None) -> None:
        super().__init__()
        self.n_val, self.breaks_at = n_val, breaks_at

    def val_dataloader(self) -> DataLoader[Any]:
        x = Noisy(self.n_val).x
        return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=64)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """At one step all that the hidden units do is undone, and something else put in its place."""
        if self.breaks_at == self.global_step:
            with torch.no_grad():
                g = torch.Generator().manual_seed(99)
                self.net[0].weight.copy_(3 * torch.randn(8, 5, generator=g))
                self.net[4].weight.copy_(3 * torch.randn(2, 8, generator=g))


def callback_with(**options: Any) -> LIBCallback:
    return LIBCallback(**{"node_layers": NODE_LAYERS, "every_n_steps": 2, "dtype": "float64", **options})


def snapshots(folder: Path) -> dict[int, InteractionGraph]:
    paths = sorted((folder / "lib" / "snapshots").iterdir())
    return {int(path.stem.removeprefix("step-")): InteractionGraph.load(path) for path in paths}


def ids(graph: InteractionGraph) -> dict[str, list[int]]:
    return {name: lineages.ids.tolist() for name, lineages in graph.lineages.items()}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LIBCallback, list[Event]]:
    """A run of 12 steps in which everything changes after the sixth, with all options on."""
    torch.manual_seed(0)
    folder, received = tmp_path_factory.mktemp("broken"), []
    callback = callback_with(baselines=["pca", "neuron"], on_event=received.append)
    logger = TensorBoardLogger(folder, name="", version="run")
    trainer_of(folder, callback, logger=logger, num_sanity_val_steps=-1).fit(Steady(breaks_at=6))
    return folder / "run", callback, received


def test_lineages_in_files_match_a_tracker_run_on_the_files(broken: tuple[Path, LIBCallback, Any]) -> None:
    for kind in ("lib", "pca", "neuron"):
        tracker = FeatureTracker()
        for path in sorted((broken[0] / kind / "snapshots").iterdir()):
            graph = InteractionGraph.load(path)
            written = ids(graph)
            assert set(written) == set(NODE_LAYERS)
            tracker.update(graph)
            assert ids(graph) == written


def test_features_keep_their_ids_until_everything_changes(broken: tuple[Path, LIBCallback, Any]) -> None:
    found = {step: ids(graph) for step, graph in snapshots(broken[0]).items()}
    hidden, output = NODE_LAYERS[1:]
    assert list(found) == [0, 2, 4, 6, 8, 10, 12]
    assert set(found[0][hidden]) & set(found[6][hidden]), "some features persist while little changes"
    # Not all of them: of so few, one may be like an old one by chance.
    assert set(found[8][hidden]) - set(found[6][hidden]), "features are new when everything changes"
    assert all(of_step[output] == [0, 1] for of_step in found.values()), "classes keep their order"


def test_turnover_is_logged(broken: tuple[Path, LIBCallback, Any]) -> None:
    folder, callback, _ = broken
    events = EventAccumulator(str(folder)).Reload()
    graphs = snapshots(folder)
    for layer in NODE_LAYERS[:2]:
        born = {e.step + 1: e.value for e in events.Scalars(f"lib/born/{layer.replace(':', '.')}")}
        new = set(ids(graphs[8])[layer]) - set(ids(graphs[6])[layer])
        assert born[8] == len(new)
    assert born[8] > 0
    overlap = {e.step + 1: e.value for e in events.Scalars("pca/overlap/net.0.input")}
    assert overlap[8] == pytest.approx(1), "all five inputs vary, before and after"
    assert callback.state.scalars["neuron/ended/net.4.input"] == 0


def test_events_reach_hooks_files_and_loggers(broken: tuple[Path, LIBCallback, list[Event]]) -> None:
    folder, callback, received = broken
    assert received
    assert received == callback.state.events
    lines = [json.loads(line) for line in (folder / "lib" / "events.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [event.text for event in received]
    assert [Event.from_json(json.dumps(line)) for line in lines] == received
    assert {event.kind for event in received if event.step == 8} >= {"born", "died"}
    assert all(
        max(e.before or 0, e.after or 0) >= 0.01 for e in received if e.kind in ("born", "died", "split", "merged")
    )
    shown = EventAccumulator(str(folder), {"tensors": 0}).Reload().Tensors("lib/events/text_summary")
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in shown}
    assert set(texts) == {event.step for event in received}
    assert texts[8] == "\n".join(f"- {event.text}" for event in received if event.step == 8)


def test_steps_agree_everywhere(broken: tuple[Path, LIBCallback, Any]) -> None:
    """Files, titles, events, images, texts, scalars and the tab: the number of optimizer steps before a snapshot."""
    folder, _, received = broken
    graphs = snapshots(folder)
    assert all(graph.info["step"] == step for step, graph in graphs.items())
    titles = [graph.plot().texts[0].get_text() for graph in graphs.values()]
    assert titles == [f"Interaction graph after {step:,} steps" for step in graphs]
    shown = EventAccumulator(str(folder), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    assert [image.step for image in shown.Images("lib/graph")] == list(graphs)
    assert {text.step for text in shown.Tensors("lib/events/text_summary")} == {event.step for event in received}
    # Scalars are where Lightning logs those of the user, and lib/step says of which snapshot they are.
    at = {scalar.step: int(scalar.value) for scalar in shown.Scalars("lib/step")}
    assert at == {graph.info["logging_step"]: step for step, graph in graphs.items()}
    run = json.loads(RunView(folder / "lib", "lib", Cache(1 << 24)).run())
    assert [snapshot["step"] for snapshot in run["snapshots"]] == list(graphs)
    assert set(run["scalars"]["lib_over_pca/edges/total"]["steps"]) <= set(graphs)
    assert run["scalars"]["val_loss"]["steps"] == [6, 12]


def test_modules_keep_their_numbers_in_files_figures_and_history(broken: tuple[Path, LIBCallback, Any]) -> None:
    folder, callback, _ = broken
    for kind in ("lib", "pca", "neuron"):
        numbers = ModuleNumbers()
        for path in sorted((folder / kind / "snapshots").iterdir()):
            graph = InteractionGraph.load(path)
            assert graph.info["modules_tracked"]
            members = {
                name: Members(lineages.ids.numpy(), graph.modules[name].numpy(), graph.bases[name].importance.numpy())
                for name, lineages in graph.lineages.items()
            }
            assert all(found == number for found, number in numbers.update(members).items())
            found = InteractionGraph(graph.bases, graph.edges).find_modules()
            before, after = (torch.cat(list(modules.values())) for modules in (found, graph.modules))
            assert torch.equal(before[:, None] == before, after[:, None] == after), "the same modules"
    history = callback.state.history.layers
    for k, graph in enumerate(snapshots(folder).values()):
        assert all(torch.equal(history[name][k].modules, modules) for name, modules in graph.modules.items())


def test_figures_over_time_are_written_and_shown(broken: tuple[Path, LIBCallback, Any]) -> None:
    folder = broken[0]
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    for name in ("timeline", "spectrum_over_time", "sparsity_over_time"):
        images = events.Images(f"lib/{name}")
        assert images[-1].encoded_image_string == (folder / "lib" / f"{name}.png").read_bytes()
        assert [image.step for image in images] == [6, 12], "at intervals, and at the end"


def test_features_keep_their_places_in_figures(broken: tuple[Path, LIBCallback, Any]) -> None:
    for kind in ("lib", "pca"):
        layout = AnimatedLayout()
        for path in sorted((broken[0] / kind / "snapshots").iterdir()):
            drawn = render_png(InteractionGraph.load(path).plot(layout=layout)).data
            assert drawn == (broken[0] / kind / "figures" / f"{path.stem}.png").read_bytes()


def test_first_seen_file(broken: tuple[Path, LIBCallback, Any]) -> None:
    folder = broken[0]
    retraced = json.loads((folder / "lib" / "retraced.json").read_text())
    final = InteractionGraph.load(folder / "lib" / "final.safetensors")
    assert list(retraced) == NODE_LAYERS
    for name, found in retraced.items():
        assert [feature["lineage"] for feature in found["features"]] == ids(final)[name]
        importance = final.bases[name].importance.tolist()
        assert [feature["importance"] for feature in found["features"]] == importance
    hidden = retraced[NODE_LAYERS[1]]
    assert hidden["formed"] >= 8
    strongest = hidden["features"][0]
    graphs = snapshots(folder)
    values = final.reference_features[NODE_LAYERS[1]][:, 0].double()
    like = {
        step: max(
            float(torch.corrcoef(torch.stack([values, x]))[0, 1] ** 2)
            for x in graph.reference_features[NODE_LAYERS[1]].double().T
        )
        for step, graph in graphs.items()
    }
    assert strongest["first"] == min(step for step, shared in like.items() if shared >= 0.5)
    assert strongest["since"] == max([s for s, shared in like.items() if shared < 0.5], default=-2) + 2


def test_training_is_unchanged(tmp_path: Path) -> None:
    plain = run(Classifier(), tmp_path / "plain")
    assert run(Classifier(), tmp_path / "watched", callback_with(adaptive=True)) == plain


def test_a_failing_hook_affects_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    received: list[Event] = []

    def fails(event: Event) -> None:
        raise RuntimeError("the hook fails")

    callback = callback_with(on_event=[fails, received.append])
    trainer_of(tmp_path, callback, num_sanity_val_steps=-1).fit(Steady(breaks_at=6))
    assert callback.snapshots == 7
    assert received == callback.state.events != []
    assert caplog.text.count("the hook fails") == 1


def test_snapshots_are_denser_after_a_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = callback_with(adaptive=True, every_n_steps=4)
    trainer_of(tmp_path, callback, max_epochs=9, num_sanity_val_steps=-1).fit(Steady(breaks_at=37))
    steps = [int(p.stem.removeprefix("step-")) for p in sorted((tmp_path / "lib" / "snapshots").iterdir())]
    first = next(event.step for event in callback.state.events if event.kind in CHANGES)
    assert first in range(4, 50, 4)
    assert steps[: steps.index(first) + 1] == list(range(0, first + 1, 4))
    assert steps[steps.index(first) :][:9] == list(range(first, first + 9))


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that cannot be read before training: the samples of the sanity check do until the first validation."""
    monkeypatch.setattr(SampleStore, "_read_first", lambda *args: "the data can be read once")


class Still(Steady):
    """A model whose weights do not change."""

    def __init__(self, n_val: int) -> None:
        super().__init__(n_val)
        self.net[1] = torch.nn.Identity()  # the running statistics of batch norm would change

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_no_events_if_only_the_number_of_probes_changes(tmp_path: Path) -> None:
    class Cheaper(pl.Callback):
        """From the seventh step on, the metric is sampled with one probe instead of exact."""

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                sampled = replace(callback.config, config=replace(callback.config.config, n_probes=1))
                callback.computer = SnapshotComputer(sampled, "lib")
                plan = callback.state.plan
                assert plan is not None
                effort = replace(plan.effort, n_probes=1)
                callback.state.set_plan(replace(plan, effort=effort), callback._effort_options)

    callback, model = callback_with(every_n_steps=1, effort="exact"), Still(n_val=16)
    model.net[1] = torch.nn.LayerNorm(8)  # so that the section has no closed form, which would be summed exactly
    trainer_of(tmp_path, callback, Cheaper(), num_sanity_val_steps=-1).fit(model)
    graphs = snapshots(tmp_path)
    exact, sampled = (graphs[step].bases[NODE_LAYERS[0]].importance for step in (6, 7))
    assert (exact[0] - sampled[0]).abs() > 0.01 * exact[0], "importances change"
    assert callback.state.events == []


@pytest.mark.usefixtures("read_once")
def test_no_events_if_only_the_samples_change(tmp_path: Path) -> None:
    """The few samples of the sanity check are replaced at the first validation."""
    callback = callback_with(every_n_steps=1)
    trainer_of(tmp_path, callback).fit(Still(n_val=300))
    graphs = snapshots(tmp_path)
    assert {graph.info["n_samples"] for graph in graphs.values()} == {128, 300}
    assert len(graphs) == 13
    assert callback.state.events == []


def test_snapshots_of_another_run_in_the_same_folder_are_archived(tmp_path: Path) -> None:
    wide = Steady()
    wide.net = torch.nn.Sequential(torch.nn.Linear(5, 12), *list(wide.net)[2:4], torch.nn.Linear(12, 2))
    layers = ["net.0:input", "net.3:input", "output"]
    trainer_of(tmp_path, callback_with(node_layers=layers, every_n_steps=3, basis="neuron"), max_epochs=1).fit(wide)
    (tmp_path / "lib" / "events.jsonl").write_text('{"step": 3, "kind": "rose"}\n')
    callback = callback_with(every_n_steps=4, basis="neuron")
    trainer_of(tmp_path, callback, max_epochs=1).fit(Steady())
    assert list(snapshots(tmp_path)) == [0, 4, 6]
    archived = {p.name for p in (tmp_path / "lib" / "stale" / "snapshots").iterdir()}
    assert archived == {"step-00000003.safetensors", "step-00000006.safetensors"}
    assert (tmp_path / "lib" / "events.jsonl").read_text() == "".join(f"{e.to_json()}\n" for e in callback.state.events)
    assert len(json.loads((tmp_path / "lib" / "retraced.json").read_text())) == 3


def test_a_snapshot_that_cannot_be_written_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SnapshotDirectory.write

    def fails(
        folder: SnapshotDirectory, graph: InteractionGraph, step: int, layout: AnimatedLayout | None = None
    ) -> Any:
        png = write(folder, graph, step, layout)
        if step == 8:
            raise OSError("the disk fails")
        return png

    monkeypatch.setattr(SnapshotDirectory, "write", fails)
    callback = callback_with()
    trainer_of(tmp_path, callback, num_sanity_val_steps=-1).fit(Steady(breaks_at=8))
    graphs = snapshots(tmp_path)
    assert list(graphs) == callback.state.history.steps == [0, 2, 4, 6, 10, 12]
    layout, tracker = AnimatedLayout(), FeatureTracker()
    for step, graph in graphs.items():
        written = ids(graph)
        tracker.update(graph)
        assert ids(graph) == written
        figure = (tmp_path / "lib" / "figures" / f"step-{step:08d}.png").read_bytes()
        assert render_png(graph.plot(layout=layout)).data == figure


def test_adaptive_needs_events() -> None:
    with pytest.raises(ValueError, match="without follow=True there are none"):
        callback_with(adaptive=True, follow=False)


def test_without_tracking(tmp_path: Path) -> None:
    callback = callback_with(follow=False)
    trainer_of(tmp_path, callback, num_sanity_val_steps=-1).fit(Steady(breaks_at=6))
    graphs = snapshots(tmp_path)
    assert not any(graph.reference_features or graph.lineages for graph in graphs.values())
    assert not any("/born/" in key for key in callback.state.scalars)
    assert not callback.state.events
    assert not list((tmp_path / "lib").glob("*.png"))


def samples_of(graphs: dict[int, InteractionGraph]) -> list[str]:
    return [graph.info["reference_samples"] for graph in graphs.values()]


@pytest.mark.usefixtures("read_once")
def test_reference_samples_of_the_sanity_check_are_kept(tmp_path: Path) -> None:
    """Eight batches of 64 are enough reference samples; snapshots use the samples of the whole validation later."""
    trainer_of(tmp_path, callback_with(), num_sanity_val_steps=8).fit(Steady(n_val=700))
    graphs = snapshots(tmp_path)
    assert {graph.info["n_samples"] for graph in graphs.values()} == {512, 700}
    assert len(set(samples_of(graphs))) == 1
    assert {len(graph.reference_features[NODE_LAYERS[0]]) for graph in graphs.values()} == {512}


@pytest.mark.usefixtures("read_once")
def test_too_few_reference_samples_are_replaced_once(tmp_path: Path) -> None:
    callback = callback_with()
    trainer_of(tmp_path, callback).fit(Steady(n_val=200))
    graphs = snapshots(tmp_path)
    found = samples_of(graphs)
    changed = next(k for k in range(len(found)) if found[k] != found[0])
    assert len(set(found[:changed])) == len(set(found[changed:])) == 1
    steps = list(graphs)
    before, after = (ids(graphs[steps[k]])[NODE_LAYERS[0]] for k in (changed - 1, changed))
    assert not set(before) & set(after), "on other samples no feature can be recognised"
    assert not [event for event in callback.state.events if event.step == steps[changed] and event.kind == "born"]


def test_a_resumed_run_continues_the_lineages(tmp_path: Path) -> None:
    half = 2

    class Plain(Steady):
        """Without random numbers, which checkpoints do not hold."""

        def __init__(self) -> None:
            super().__init__(breaks_at=8)
            self.net[2] = torch.nn.Identity()

        def train_dataloader(self) -> DataLoader[Any]:
            x = Noisy(48).x
            return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=8)

    def fit(folder: Path, epochs: int, ckpt: Path | None = None) -> tuple[pl.Trainer, LIBCallback]:
        torch.manual_seed(0)
        callback = callback_with(adaptive=True, every_n_steps=3)
        trainer = trainer_of(folder, callback, max_epochs=epochs, num_sanity_val_steps=-1)
        trainer.fit(Plain(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        return trainer, callback

    _, whole = fit(tmp_path / "whole", 3)
    trainer, _ = fit(tmp_path / "first", half)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(tmp_path / "second", 3, tmp_path / "half.ckpt")
    assert whole.state.events
    assert second.state.events == whole.state.events
    resumed, expected = snapshots(tmp_path / "second"), snapshots(tmp_path / "whole")
    assert list(resumed) == [step for step in expected if step > 6 * half]
    assert [ids(graph) for graph in resumed.values()] == [ids(expected[step]) for step in resumed]
    for name in ("events.jsonl", "retraced.json", "timeline.png", "spectrum_over_time.png", "sparsity_over_time.png"):
        assert (tmp_path / "second" / "lib" / name).read_bytes() == (tmp_path / "whole" / "lib" / name).read_bytes()
