"""RunView: the JSON of runs and snapshots, and how incomplete or invalid files are handled."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lib_lightning import InteractionGraph
from lib_lightning.viewer import Run
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_discovery import find_runs, regular_files
from lib_lightning.viewer.run_view import NotFoundError, RunView
from tests.viewer.saved_run import SavedRun, write_run
from tests.viewer.synthetic_run import SyntheticRun


def view_of(folder: Path, below: Path | None = None, limit: int = 1 << 30) -> RunView:
    return RunView(folder, "version_0/lib", Cache(limit), below)


def run_json(view: RunView) -> Any:
    return json.loads(view.run())


def rounded(values: torch.Tensor) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "version_0"


def test_the_json_of_a_run_matches_its_graphs(logs: Path) -> None:
    saved = write_run(logs)
    run = run_json(view_of(logs / "lib"))
    assert run["name"] == "version_0/lib"
    assert run["layers"] == [
        {"name": "input", "kind": "lib"},
        {"name": "hidden", "kind": "lib"},
        {"name": "output", "kind": "neuron"},
    ]
    assert [snapshot["step"] for snapshot in run["snapshots"]] == saved.steps
    for k, snapshot in enumerate(run["snapshots"]):
        graph = saved.graph(k)
        assert (snapshot["epoch"], snapshot["samples"]) == (k // 3, 1740)
        for layer, (name, basis) in zip(snapshot["layers"], graph.bases.items(), strict=True):
            assert layer["importance"] == rounded(basis.importance)
            assert layer["ids"] == (graph.lineages[name].ids.tolist() if name in graph.lineages else None)
            assert layer["parents"] == (graph.lineages[name].parents.tolist() if name in graph.lineages else None)
            assert layer["modules"] == graph.modules[name].tolist()
        assert set(snapshot["metrics"]) == set(graph.info["metrics"])
        assert snapshot["metrics"]["features/total"] == {
            "value": sum(basis.n_features for basis in graph.bases.values()),
            "error": 0.125,
        }
        gini = graph.info["metrics"]["gini/total"]["value"]
        assert snapshot["metrics"]["gini/total"] == {"value": float(f"{gini:.5g}"), "error": None}
    assert as_written(run["events"]) == saved.events()
    assert len(run["events"]) > 4
    shares: dict[tuple[str, int], float] = {}
    for graph in map(saved.graph, range(saved.snapshots)):
        for name, lineages in graph.lineages.items():
            importance = graph.bases[name].importance
            for i, share in zip(lineages.ids.tolist(), (importance / importance.sum()).tolist(), strict=True):
                shares[name, i] = max(share, shares.get((name, i), 0.0))
    largest = [shares[event["layer"], event["lineage"]] for event in run["events"]]
    assert [event["share"] for event in run["events"]] == pytest.approx(largest, rel=1e-3)


def as_written(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without what is computed for the viewer."""
    return [{key: value for key, value in event.items() if key not in ("at", "share")} for event in events]


def keys_of(value: Any) -> Any:
    """The structure of a JSON value: keys of objects, and of the first item of arrays."""
    if isinstance(value, dict):
        return {key: keys_of(item) for key, item in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_synthetic_runs_have_the_same_json_keys_as_saved_runs(logs: Path) -> None:
    write_run(logs)
    real, made_up = view_of(logs / "lib"), SyntheticRun("made/up", [0, 10, 20], [("a", "lib"), ("b", "lib")])
    forms = [keys_of(json.loads(view.run())) for view in (real, made_up)]
    for form in forms:  # labels, metrics, scalars and snapshots have other names
        for key in ("labels", "label_colors", "scalars", "fingerprints", "lifetimes"):
            del form[key]
        form["snapshots"][0]["metrics"] = None
    assert forms[0] == forms[1]
    assert keys_of(json.loads(real.snapshot(30))) == keys_of(json.loads(made_up.snapshot(made_up.all_steps[0])))
    assert keys_of(json.loads(real.feature(30, 0, 1))) == keys_of(json.loads(made_up.feature(10, 0, 1)))


def test_the_json_of_a_snapshot_matches_its_graph(logs: Path) -> None:
    saved = write_run(logs)
    for k, step in enumerate(saved.steps):
        graph = saved.graph(k)
        snapshot = json.loads(view_of(logs / "lib").snapshot(step))
        assert snapshot["step"] == step
        for layer, (name, basis) in zip(snapshot["layers"], graph.bases.items(), strict=True):
            assert layer["importance"] == rounded(basis.importance)
            if name == "output":
                nothing = ("ids", "error", "similarity", "parents", "labels", "degenerate")
                assert [layer[key] for key in nothing] == [None] * 6
                assert layer["modules"] == [-1, 0, 1, -1]
                continue
            assert basis.importance_error is not None
            assert basis.degenerate is not None
            lineages = graph.lineages[name]
            assert layer["error"] == rounded(basis.importance_error)
            assert layer["ids"] == lineages.ids.tolist()
            assert layer["similarity"] == rounded(lineages.similarity)
            assert layer["parents"] == lineages.parents.tolist()
            assert layer["modules"] == graph.modules[name].tolist()
            assert layer["labels"] == graph.labels[name]
            assert layer["degenerate"] == basis.degenerate.tolist()
            assert layer["nats"] == rounded(basis.output_importance)
            assert layer["nats_error"] == rounded(basis.output_importance_error)
        for section, (pair, E) in zip(snapshot["sections"], graph.edges.items(), strict=True):
            assert section["count"] == int((E != 0).sum())
            assert [section["strength"], section["strongest"]] == rounded(torch.stack([E.sum(), E.max()]))
            edges = section["edges"]
            order = E.flatten().argsort(descending=True, stable=True)[: section["count"]]
            assert edges["weight"] == rounded(E.flatten()[order])
            assert edges["error"] == rounded(graph.edge_errors[pair].flatten()[order])
            assert edges["attribution"] == rounded(graph.attributions[pair].flatten()[order])
            assert edges["attribution_error"] == rounded(graph.attribution_errors[pair].flatten()[order])
            assert edges["target"] == (order // E.shape[1]).tolist()
            assert edges["source"] == (order % E.shape[1]).tolist()
    # Similarities of new features are not known, and one edge is not there.
    first, graph = json.loads(view_of(logs / "lib").snapshot(0)), saved.graph(0)
    assert set(first["layers"][0]["similarity"]) == {None}
    assert first["sections"][0]["count"] == graph.edges["input", "hidden"].numel() - 1


def test_edges_are_sorted_and_limited(logs: Path) -> None:
    saved = write_run(logs, features=20)
    whole = json.loads(view_of(logs / "lib").snapshot(30))["sections"][0]
    few = json.loads(view_of(logs / "lib").snapshot(30, edges=7))["sections"][0]
    assert {key: few[key] for key in ("count", "strength", "strongest")} == {
        key: whole[key] for key in ("count", "strength", "strongest")
    }
    assert few["edges"] == {key: values[:7] for key, values in whole["edges"].items()}
    E = saved.graph(3).edges["input", "hidden"]
    assert few["edges"]["weight"] == rounded(E.flatten().topk(7).values)


def test_edges_that_are_equal_zero_or_nan(tmp_path: Path) -> None:
    graph = SavedRun().graph(0)
    pair = ("hidden", "output")
    graph.edges["input", "hidden"].zero_()
    graph.edges[pair].fill_(0.5)
    graph.edges[pair][0, 1] = math.nan
    graph.edge_errors = graph.attributions = graph.attribution_errors = {}
    graph.save(tmp_path / "lib" / "snapshots" / "step-00000000.safetensors")
    nothing, equal = json.loads(view_of(tmp_path / "lib").snapshot(0, edges=3))["sections"]
    empty = {"source": [], "target": [], "weight": [], "error": None, "attribution": None, "attribution_error": None}
    assert nothing == {"count": 0, "strength": 0, "strongest": 0, "edges": empty}
    n = graph.edges[pair].numel()
    assert (equal["count"], equal["strength"], equal["strongest"]) == (n - 1, 0.5 * (n - 1), 0.5)
    assert equal["edges"]["weight"] == [0.5] * 3
    assert (0, 1) not in zip(equal["edges"]["target"], equal["edges"]["source"], strict=True)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", " b", "c", "d"], {"0": "a", "1": " b", "2": "c", "3": "d"}),
        (["of", "another", "layer"], {}),
        ({"3": "last", "4": "beyond", "x": "no number"}, {"3": "last"}),
        (None, {}),
    ],
)
def test_outputs_have_names_of_classes(logs: Path, names: Any, expected: dict[str, str]) -> None:
    graph = SavedRun().graph(0)
    graph.info["output_names"] = names
    graph.save(logs / "lib" / "snapshots" / "step-00000000.safetensors")
    assert run_json(view_of(logs / "lib"))["output_names"] == expected


def test_features_of_the_last_layer_that_are_no_outputs_have_no_names(logs: Path) -> None:
    graph = SavedRun(layers=("a", "b")).graph(0)
    graph.bases["b"] = replace(graph.bases["b"], kind="pca")
    graph.info["output_names"] = ["a", "b", "c", "d"]
    graph.save(logs / "lib" / "snapshots" / "step-00000000.safetensors")
    assert run_json(view_of(logs / "lib"))["output_names"] == {}


def test_labels_are_the_newest_of_each_lineage(logs: Path) -> None:
    saved = write_run(logs)
    run = run_json(view_of(logs / "lib"))
    for i, name in enumerate(saved.layers[:-1]):
        expected: dict[str, str] = {}
        for k in range(saved.snapshots):
            graph = saved.graph(k)
            for lineage, label in zip(graph.lineages[name].ids.tolist(), graph.labels[name], strict=True):
                if label:
                    expected[str(lineage)] = label
        assert run["labels"][i] == expected
        assert any(label.endswith(" 57%") for label in expected.values())
        assert any(not label.endswith(" 57%") for label in expected.values())  # died before the end
    assert run["labels"][-1] == {}


def test_files_without_optional_tensors(tmp_path: Path) -> None:
    for k in range(2):
        graph = SavedRun().graph(k)
        graph.lineages, graph.edge_errors, graph.modules, graph.info = {}, {}, {}, {"step": 10 * k}
        graph.labels = {"hidden": [f"at {10 * k}", *[""] * (graph.bases["hidden"].n_features - 1)]}
        graph.save(tmp_path / "lib" / "snapshots" / f"step-{10 * k:08d}.safetensors")
    run = run_json(view_of(tmp_path / "lib"))
    assert run["labels"] == [{}, {"0": "at 10"}, {}]
    snapshot = run["snapshots"][0]
    assert (snapshot["epoch"], snapshot["samples"], snapshot["metrics"]) == (None, None, {})
    assert [layer["ids"] for layer in snapshot["layers"]] == [None] * 3
    assert run["events"] == []
    layer = json.loads(view_of(tmp_path / "lib").snapshot(10))["layers"][0]
    assert (layer["ids"], layer["parents"], layer["modules"]) == (None, None, None)


def test_snapshots_with_other_node_layers_are_skipped(tmp_path: Path) -> None:
    SavedRun(layers=("a", "b", "output"), snapshots=2).write(tmp_path / "lib")
    SavedRun(layers=("a", "c", "output"), snapshots=5).write(tmp_path / "lib", [3, 4])
    run = run_json(view_of(tmp_path / "lib"))
    assert [snapshot["step"] for snapshot in run["snapshots"]] == [30, 40]
    assert [layer["name"] for layer in run["layers"]] == ["a", "c", "output"]


def test_incomplete_files_are_skipped_until_they_are_complete(logs: Path) -> None:
    saved = SavedRun(snapshots=4)
    saved.write(logs / "lib")
    view = view_of(logs / "lib")
    file = logs / "lib" / "snapshots" / "step-00000020.safetensors"
    whole, version = file.read_bytes(), view.entry()["version"]
    file.write_bytes(whole[: len(whole) // 2])
    (file.parent / "step-00000025.safetensors").write_bytes(b"")
    (file.parent / ".step-00000026.safetensors.7.tmp").write_bytes(b"")
    (file.parent / "step-00000027.safetensors").mkdir()
    assert [snapshot["step"] for snapshot in run_json(view)["snapshots"]] == [0, 10, 30]
    assert view.entry()["version"] != version
    with pytest.raises(NotFoundError, match=r"Cannot read the snapshot of run 'version_0/lib' at step 20: .*truncated"):
        view.snapshot(20)
    with pytest.raises(NotFoundError, match="no snapshot at step 26"):
        view.snapshot(26)
    saved.graph(2).save(file)
    assert [snapshot["step"] for snapshot in run_json(view)["snapshots"]] == [0, 10, 20, 30]
    assert json.loads(view.snapshot(20))["step"] == 20


def test_inconsistent_files_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "snapshots"
    good = SavedRun().graph(1)
    good.save(folder / "step-00000010.safetensors")
    bad = SavedRun().graph(2)
    bad.labels["input"] = ["too few"]
    bad.save(folder / "step-00000020.safetensors")
    bad = SavedRun().graph(3)
    bad.modules["input"] = torch.zeros(2, dtype=torch.int64)
    bad.save(folder / "step-00000030.safetensors")
    view = view_of(tmp_path / "lib")
    assert [snapshot["step"] for snapshot in run_json(view)["snapshots"]] == [10]
    with pytest.raises(NotFoundError, match="'input' have different numbers of features"):
        view.snapshot(30)
    (folder / "step-00000010.safetensors").unlink()
    (folder / "step-00000030.safetensors").unlink()
    with pytest.raises(NotFoundError, match="no readable snapshots"):
        view.run()


def test_events_are_read_up_to_the_last_complete_line(logs: Path) -> None:
    saved = write_run(logs)
    path = logs / "lib" / "events.jsonl"
    more = {"step": 71, "kind": "split", "text": 'a "b"', "layer": None, "lineage": None, "value": 1}
    with path.open("a") as file:
        file.write('[1]\n\n{"kind": "no step"}\n' + json.dumps(more) + '\n{"step": 80, "ki')
    events = run_json(view_of(logs / "lib"))["events"]
    written = [*saved.events(), {key: value for key, value in more.items() if key != "value"}]
    assert as_written(events) == written


def test_a_run_read_while_it_is_written(logs: Path) -> None:
    """Every response is consistent although files are replaced meanwhile, and the last one is complete."""
    saved = SavedRun(snapshots=12)
    graphs = [saved.graph(k) for k in range(12)]
    saved.write(logs / "lib", [0])

    def train() -> None:
        for graph, step in list(zip(graphs, saved.steps, strict=True)) * 2:
            graph.save(logs / "lib" / "snapshots" / f"step-{step:08d}.safetensors")

    training = threading.Thread(target=train)
    view, seen = view_of(logs / "lib"), set()
    training.start()
    while training.is_alive():
        run = run_json(view)
        seen.add(run["version"])
        last = run["snapshots"][-1]
        assert json.loads(view.snapshot(last["step"]))["layers"][0]["importance"] == last["layers"][0]["importance"]
        time.sleep(0.005)
    training.join()
    assert len(seen) > 3
    assert [snapshot["step"] for snapshot in run_json(view)["snapshots"]] == saved.steps


def test_files_are_read_again_only_when_they_change(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_lightning.viewer import snapshot as module

    reads: list[str] = []
    read_parts = module.read_parts

    def counted(path: Path, wanted: Any) -> Any:
        reads.append(path.name)
        return read_parts(path, wanted)

    monkeypatch.setattr(module, "read_parts", counted)
    saved = SavedRun(snapshots=4)
    saved.write(logs / "lib")
    view = view_of(logs / "lib")
    first = view.run()
    assert view.run() == first
    assert len(reads) == 4
    saved.graph(2).save(logs / "lib" / "snapshots" / "step-00000020.safetensors")
    view.run()
    assert reads[4:] == ["step-00000020.safetensors"]


def test_the_cache_does_not_exceed_its_limit(logs: Path) -> None:
    saved = SavedRun(snapshots=6)
    saved.write(logs / "lib")
    cache = Cache(10_000)
    view = RunView(logs / "lib", "lib", cache)
    sizes = [len(view.snapshot(step)) for step in saved.steps]
    assert sum(sizes) > 2 * 10_000
    assert 0 < cache.size <= 10_000
    view.run()
    assert cache.size <= 10_000


def test_every_nth_snapshot_and_the_last(logs: Path) -> None:
    SavedRun(snapshots=9).write(logs / "lib")
    view = view_of(logs / "lib")
    assert view.steps(every=3) == [0, 30, 60, 80]
    assert [snapshot["step"] for snapshot in json.loads(view.run(every=3))["snapshots"]] == [0, 30, 60, 80]
    assert view.steps(every=99) == [0, 80]


def test_find_runs(tmp_path: Path) -> None:
    graph = SavedRun().graph(0)
    for place in ("version_10/lib", "version_2/lib", "version_2/pca", "version_2/lib/validate", ".hidden/lib"):
        graph.save(tmp_path / place / "snapshots" / "step-00000000.safetensors")
    (tmp_path / "version_3" / "lib" / "snapshots").mkdir(parents=True)
    assert list(find_runs(tmp_path)) == ["version_2/lib", "version_2/lib/validate", "version_2/pca", "version_10/lib"]
    assert find_runs(tmp_path / "version_10" / "lib") == {"lib": tmp_path / "version_10" / "lib"}
    assert find_runs(tmp_path / "nothing") == {}


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    SavedRun(snapshots=2).write(outside / "lib")
    SavedRun(snapshots=2).write(inside / "lib")
    (inside / "linked").symlink_to(outside)
    (inside / "half").mkdir()
    (inside / "half" / "snapshots").symlink_to(outside / "lib" / "snapshots")
    file = inside / "lib" / "snapshots" / "step-00000090.safetensors"
    file.symlink_to(outside / "lib" / "snapshots" / "step-00000000.safetensors")
    assert find_runs(inside) == {"lib": inside / "lib"}
    assert [plain.path.name for plain in regular_files(file.parent)] == [f"step-{s:08d}.safetensors" for s in (0, 10)]
    # A folder that is later replaced by a symbolic link.
    view = view_of(inside / "lib")
    (inside / "lib").rename(inside / "was")
    (inside / "lib").symlink_to(outside / "lib")
    with pytest.raises(NotFoundError):
        view.run()


def test_only_the_tensors_shown_are_read(logs: Path) -> None:
    """Large matrices are not read, and no hash is computed: damage there has no effect."""
    saved = SavedRun(snapshots=2)
    saved.write(logs / "lib")
    file = logs / "lib" / "snapshots" / "step-00000000.safetensors"
    expected = view_of(logs / "lib").snapshot(0)
    matrix = saved.graph(0).bases["input"].to_features.contiguous().numpy().tobytes()
    content = file.read_bytes()
    assert matrix in content
    file.write_bytes(content.replace(matrix, bytes(len(matrix))))
    with pytest.raises(ValueError, match="altered"):
        InteractionGraph.load(file)
    assert view_of(logs / "lib").snapshot(0) == expected


def test_the_version_changes_with_scalars_and_events(logs: Path) -> None:
    write_run(logs)
    view, seen = view_of(logs / "lib"), []
    for file in (logs / "lib" / "events.jsonl", next(logs.glob("events.out.tfevents*"))):
        seen.append(view.entry()["version"])
        with file.open("ab") as stream:
            stream.write(b" ")
    seen.append(view.entry()["version"])
    assert len(set(seen)) == 3


def test_a_log_directory_may_have_any_name(tmp_path: Path) -> None:
    for name in ("checkpoints", "samples", "snapshots"):
        write_run(tmp_path / name)
    before = tmp_path / "samples" / "lib" / "before"
    shutil.copytree(tmp_path / "samples" / "lib" / "snapshots", before / "snapshots")
    found = {name for name in find_runs(tmp_path) if name.endswith(("lib", "before"))}
    assert found == {"checkpoints/lib", "samples/lib", "snapshots/lib"}


def test_modules_of_version_0_1_are_numbered_over_the_run(tmp_path: Path) -> None:
    """Its files number modules anew in each snapshot; features that stay together keep their colour nevertheless."""
    folder = tmp_path.resolve() / "lib"
    saved, found = SavedRun(), []
    for k in range(saved.snapshots):
        graph = saved.graph(k)
        del graph.info["modules_tracked"]
        swap = torch.tensor([k % 2, 1 - k % 2, -1])
        graph.modules = {name: swap[modules] for name, modules in graph.modules.items()}
        graph.save(folder / "snapshots" / f"step-{10 * k:08d}.safetensors")
    run = run_json(view_of(folder))
    for k, (snapshot, number_of) in enumerate(zip(run["snapshots"], run["module_numbers"], strict=True)):
        assert number_of == {"0": k % 2, "1": 1 - k % 2}
        for layer in snapshot["layers"][:-1]:
            numbers = [number_of.get(str(module), -1) for module in layer["modules"]]
            found.append(dict(zip(layer["ids"], numbers, strict=True)))
    assert all(number == lineage % 3 - 1 for of_layer in found for lineage, number in of_layer.items())


def test_a_run_of_version_0_1_is_shown() -> None:
    folder = Path(__file__).parents[1] / "data" / "v0_1" / "run" / "lib"
    run = run_json(view_of(folder))
    assert all(
        set(number_of) == modules_of(s) for s, number_of in zip(run["snapshots"], run["module_numbers"], strict=True)
    )
    assert run["label_colors"] is not None
    assert run["snapshots"][-1]["step"] == max(snapshot["step"] for snapshot in run["snapshots"])


def modules_of(snapshot: dict[str, Any]) -> set[str]:
    return {str(module) for layer in snapshot["layers"] for module in layer["modules"] if module >= 0}


def test_ratios_are_shown_where_both_sides_were_measured(logs: Path) -> None:
    """Between measurements, a callback logs the latest value of a ratio again."""
    saved = SavedRun(snapshots=4)
    for k in range(4):
        graph = saved.graph(k)
        graph.info["logging_step"] = max(10 * k - 1, 0)
        if k in (1, 3):
            graph.info["metrics"]["edges_required/total"] = {"value": 7.0, "error": None}
        graph.save(logs / "lib" / "snapshots" / f"step-{10 * k:08d}.safetensors")
    with SummaryWriter(str(logs)) as writer:
        for step in (9, 19, 29):
            for name in ("edges_required", "features"):
                writer.add_scalar(f"lib_over_pca/{name}/total", step / 100, step)
            writer.add_scalar("val_loss", step / 100, step)
    scalars = run_json(view_of(logs / "lib"))["scalars"]
    assert {name: curve["steps"] for name, curve in scalars.items()} == {
        "val_loss": [10, 20, 30],
        "lib_over_pca/features/total": [10, 20, 30],
        "lib_over_pca/edges_required/total": [10, 30],
    }


def test_a_graph_of_version_0_1_has_the_numbers_of_the_film(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "data" / "v0_1" / "run" / "lib", tmp_path / "lib")
    run, view = Run(tmp_path / "lib"), view_of(tmp_path.resolve() / "lib")
    thinned = json.loads(view.run(every=2))
    assert [s["step"] for s in thinned["snapshots"]] == view.steps(every=2)
    for described in (run_json(view), thinned):
        for snapshot, number_of in zip(described["snapshots"], described["module_numbers"], strict=True):
            graph = run.graph(snapshot["step"])
            for layer, modules in zip(snapshot["layers"], graph.modules.values(), strict=True):
                assert modules.tolist() == [number_of.get(str(module), -1) for module in layer["modules"]]
