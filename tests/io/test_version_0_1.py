"""Files written by version 0.1, in tests/data/v0_1, are read, and their hashes are checked."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_lightning import InteractionGraph
from lib_lightning.io.basis_file import BasisFileError, read_file, read_parts
from lib_lightning.io.basis_format import BASIS, REFERENCE_FEATURES
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.lineage.first_seen import first_seen, retrace_files
from lib_lightning.lineage.snapshot_tracker import SnapshotTracker
from lib_lightning.training.cli import main
from lib_lightning.viewer import Run
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView

DATA = Path(__file__).parent.parent / "data" / "v0_1"
FILES = sorted(path.relative_to(DATA) for path in DATA.rglob("*.safetensors"))
NODE_LAYERS = ["net.0:input", "net.2:input", "output"]
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_graphs_load_with_everything_in_them(file: Path) -> None:
    graph = InteractionGraph.load(DATA / file)
    assert graph.node_layers == [layer.name for layer in graph.node_layer_specs()] == NODE_LAYERS
    assert list(graph.edges) == list(graph.edge_errors) == list(itertools.pairwise(NODE_LAYERS))
    for section, E in graph.edges.items():
        assert E.shape == graph.edge_errors[section].shape
    tensors, _ = read_file(DATA / file)
    for i, basis in enumerate(graph.bases.values()):
        assert basis.importance_error is not None
        if basis.kind in ("lib", "pca"):
            assert tensors[BASIS["degenerate"].format(i)].dtype == torch.bool
    in_run = file.parts[0] == "run"
    assert ("step" in graph.info) == ("reference_samples" in graph.info) == in_run
    for part in (graph.reference_features, graph.modules, graph.lineages):
        assert list(part) == (NODE_LAYERS if in_run else [])
    for name, values in graph.reference_features.items():
        assert values.shape == (graph.info["n_samples"], graph.bases[name].n_features)
        assert values.dtype == torch.float16


@pytest.mark.parametrize("file", FILES, ids=str)
def test_altered_files_are_refused(file: Path, tmp_path: Path) -> None:
    content = bytearray((DATA / file).read_bytes())
    content[-5] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(content)
    with pytest.raises(BasisFileError, match="altered after it was written"):
        InteractionGraph.load(tmp_path / "altered.safetensors")


def test_saved_again_they_have_the_present_names(tmp_path: Path) -> None:
    old = InteractionGraph.load(DATA / "run/lib/final.safetensors")
    old.save(tmp_path / "again.safetensors")
    tensors, header = read_file(tmp_path / "again.safetensors")
    assert {REFERENCE_FEATURES.format(i) for i in range(3)} <= set(tensors)
    assert not [key for key in tensors if "probes" in key or "unsure" in key]
    assert header == read_file(DATA / "run/lib/final.safetensors")[1]
    for key, tensor in read_file(DATA / "run/lib/final.safetensors")[0].items():
        assert torch.equal(tensors[key].nan_to_num(-7), tensor.nan_to_num(-7))
    parts, header = read_parts(DATA / "run/lib/final.safetensors", lambda key: key == REFERENCE_FEATURES.format(1))
    assert (list(parts), header["info"]["step"]) == ([REFERENCE_FEATURES.format(1)], 40)


def test_the_state_of_the_tracker_is_restored() -> None:
    checkpoint = torch.load(DATA / "checkpoints" / "step-20.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    tracker = SnapshotTracker(["lib", "pca"])
    tracker.load_state_dict(state["watcher"]["follower"])
    graphs = {name: Run(DATA / "run" / name).graph(24) for name in ("lib", "pca")}
    expected = {name: {k: x.ids.tolist() for k, x in graph.lineages.items()} for name, graph in graphs.items()}
    for name, graph in graphs.items():
        tracker.track(name, graph)
    assert {name: {k: x.ids.tolist() for k, x in graph.lineages.items()} for name, graph in graphs.items()} == expected


@pytest.mark.parametrize("name", ["lib", "pca"])
def test_runs_are_read(name: str) -> None:
    run = Run(DATA / "run" / name)
    assert run.steps == EXPECTED["steps"]
    assert run.graph().info["step"] == 40
    assert run.graph(8).node_layers == NODE_LAYERS
    assert list(RunLayout(run.folder).basis_files()) == EXPECTED["steps"]
    if name == "lib":
        assert run.events() == EXPECTED["events"] != []
        assert {layer: x.ids.tolist() for layer, x in run.graph().lineages.items()} == EXPECTED["lineages"]
    else:
        assert run.events() == []


def test_the_view_shows_degenerate_features_lineages_and_events() -> None:
    view = RunView(DATA / "run" / "lib", "lib", Cache(1 << 20))
    run, snapshot = json.loads(view.run()), json.loads(view.snapshot(40))
    assert [event["text"] for event in run["events"]] == [event["text"] for event in EXPECTED["events"]]
    final, layers = InteractionGraph.load(DATA / "run/lib/final.safetensors"), snapshot["layers"]
    assert [layer["ids"] for layer in layers] == [x.ids.tolist() for x in final.lineages.values()]
    degenerate = [layer.get("degenerate", layer.get("unsure")) for layer in layers]
    assert [len(values) for values in degenerate[:2]] == [5, 2]
    assert all(value in (0, 1) for values in degenerate[:2] for value in values)


def test_the_history_of_features_is_the_one_written_then() -> None:
    layout = RunLayout(DATA / "run" / "lib")
    final = InteractionGraph.load(layout.final_file)
    found = first_seen(final, retrace_files(final, list(layout.basis_files().items())))
    expected = json.loads(layout.history_file.read_text())
    assert found == {
        name: {
            **of_layer,
            "features": [{**f, "importance": pytest.approx(f["importance"])} for f in of_layer["features"]],
        }
        for name, of_layer in expected.items()
    }


def test_the_command_line_inspects_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", *(str(DATA / file) for file in FILES)])
    printed = capsys.readouterr().out
    assert printed.count("lib_lightning 0.1.0") == len(FILES)
    assert "features/net.0.input" in printed


def test_samples_are_found_under_their_old_names(tmp_path: Path) -> None:
    shutil.copytree(DATA / "run" / "lib", tmp_path / "lib")
    layout = RunLayout(tmp_path / "lib")
    assert all(layout.existing_samples_file(0, 1, kind).exists() for kind in ("", "held-out", "reference"))
    assert layout.existing_samples_file(0, 1, "reference").name == "probes-1-of-1.pt"
    layout.samples_file(0, 1, "reference").touch()
    assert layout.existing_samples_file(0, 1, "reference").name == "reference-1-of-1.pt"


def test_old_names_of_attributes_of_graphs() -> None:
    graph = InteractionGraph.load(DATA / "run/lib/final.safetensors")
    with pytest.warns(DeprecationWarning, match="use InteractionGraph.reference_features"):
        assert graph.probes is graph.reference_features
    with pytest.warns(DeprecationWarning, match="use InteractionGraph.reference_features"):
        graph.probes = {}
    assert graph.reference_features == {}
    with pytest.warns(DeprecationWarning, match="now node_layer_specs"):
        assert graph.layers() == graph.node_layer_specs()
