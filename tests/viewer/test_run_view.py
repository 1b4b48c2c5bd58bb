"""What the view is told: the graphs' own numbers, and nothing of what is broken."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_lightning import InteractionGraph
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_discovery import find_runs, plain_files
from lib_lightning.viewer.run_view import NotThereError, RunView
from tests.viewer.filmed import Filmed, write_run
from tests.viewer.made_up import MadeUpFilm


def film_of(folder: Path, below: Path | None = None, limit: int = 1 << 30) -> RunView:
    return RunView(folder, "version_0/lib", Cache(limit), below)


def told(film: RunView) -> Any:
    return json.loads(film.run())


def rounded(values: torch.Tensor) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "version_0"


def test_a_run_is_what_its_graphs_are(logs: Path) -> None:
    filmed = write_run(logs)
    run = told(film_of(logs / "lib"))
    assert run["name"] == "version_0/lib"
    assert run["layers"] == [
        {"name": "input", "kind": "lib"},
        {"name": "hidden", "kind": "lib"},
        {"name": "output", "kind": "neuron"},
    ]
    assert [snapshot["step"] for snapshot in run["snapshots"]] == filmed.steps
    for k, snapshot in enumerate(run["snapshots"]):
        graph = filmed.graph(k)
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
    assert run["events"] == filmed.events()
    assert len(run["events"]) > 4


def keys_of(value: Any) -> Any:
    """What a JSON value is made of: keys of tables, and of the first item of lists."""
    if isinstance(value, dict):
        return {key: keys_of(item) for key, item in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_what_the_view_is_tested_with_has_the_form_of_real_runs(logs: Path) -> None:
    write_run(logs)
    real, made_up = film_of(logs / "lib"), MadeUpFilm("made/up", [0, 10, 20], [("a", "lib"), ("b", "lib")])
    forms = [keys_of(json.loads(film.run())) for film in (real, made_up)]
    for form in forms:  # other names of labels, metrics and scalars
        for key in ("labels", "scalars"):
            del form[key]
        form["snapshots"][0]["metrics"] = None
    assert forms[0] == forms[1]
    assert keys_of(json.loads(real.snapshot(30))) == keys_of(json.loads(made_up.snapshot(made_up.all_steps[0])))


def test_a_snapshot_is_what_its_graph_is(logs: Path) -> None:
    filmed = write_run(logs)
    for k, step in enumerate(filmed.steps):
        graph = filmed.graph(k)
        snapshot = json.loads(film_of(logs / "lib").snapshot(step))
        assert snapshot["step"] == step
        for layer, (name, basis) in zip(snapshot["layers"], graph.bases.items(), strict=True):
            assert layer["importance"] == rounded(basis.importance)
            if name == "output":
                nothing = ("ids", "error", "similarity", "parents", "labels", "unsure")
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
            assert layer["unsure"] == basis.degenerate.tolist()
        for section, (pair, E) in zip(snapshot["sections"], graph.edges.items(), strict=True):
            assert section["count"] == int((E != 0).sum())
            assert [section["strength"], section["strongest"]] == rounded(torch.stack([E.sum(), E.max()]))
            edges = section["edges"]
            order = E.flatten().argsort(descending=True, stable=True)[: section["count"]]
            assert edges["weight"] == rounded(E.flatten()[order])
            assert edges["error"] == rounded(graph.edge_errors[pair].flatten()[order])
            assert edges["target"] == (order // E.shape[1]).tolist()
            assert edges["source"] == (order % E.shape[1]).tolist()
    # Similarities of new features are not known, and one edge is not there.
    first, graph = json.loads(film_of(logs / "lib").snapshot(0)), filmed.graph(0)
    assert set(first["layers"][0]["similarity"]) == {None}
    assert first["sections"][0]["count"] == graph.edges["input", "hidden"].numel() - 1


def test_the_strongest_edges_come_first_and_no_more_than_asked_for(logs: Path) -> None:
    filmed = write_run(logs, features=20)
    whole = json.loads(film_of(logs / "lib").snapshot(30))["sections"][0]
    few = json.loads(film_of(logs / "lib").snapshot(30, edges=7))["sections"][0]
    assert {key: few[key] for key in ("count", "strength", "strongest")} == {
        key: whole[key] for key in ("count", "strength", "strongest")
    }
    assert few["edges"] == {key: values[:7] for key, values in whole["edges"].items()}
    E = filmed.graph(3).edges["input", "hidden"]
    assert few["edges"]["weight"] == rounded(E.flatten().topk(7).values)


def test_edges_that_are_equal_none_or_no_number(tmp_path: Path) -> None:
    graph = Filmed().graph(0)
    pair = ("hidden", "output")
    graph.edges["input", "hidden"].zero_()
    graph.edges[pair].fill_(0.5)
    graph.edges[pair][0, 1] = math.nan
    graph.edge_errors = {}
    graph.save(tmp_path / "lib" / "snapshots" / "step-00000000.safetensors")
    nothing, equal = json.loads(film_of(tmp_path / "lib").snapshot(0, edges=3))["sections"]
    empty = {"source": [], "target": [], "weight": [], "error": None}
    assert nothing == {"count": 0, "strength": 0, "strongest": 0, "edges": empty}
    n = graph.edges[pair].numel()
    assert (equal["count"], equal["strength"], equal["strongest"]) == (n - 1, 0.5 * (n - 1), 0.5)
    assert equal["edges"]["weight"] == [0.5] * 3
    assert (0, 1) not in zip(equal["edges"]["target"], equal["edges"]["source"], strict=True)


def test_labels_are_the_newest_of_each_lineage(logs: Path) -> None:
    filmed = write_run(logs)
    run = told(film_of(logs / "lib"))
    for i, name in enumerate(filmed.layers[:-1]):
        expected: dict[str, str] = {}
        for k in range(filmed.snapshots):
            graph = filmed.graph(k)
            for lineage, label in zip(graph.lineages[name].ids.tolist(), graph.labels[name], strict=True):
                if label:
                    expected[str(lineage)] = label
        assert run["labels"][i] == expected
        assert any(label.endswith(" 57%") for label in expected.values())
        assert any(not label.endswith(" 57%") for label in expected.values())  # died before the end
    assert run["labels"][-1] == {}


def test_files_of_before_there_was_this_and_that(tmp_path: Path) -> None:
    for k in range(2):
        graph = Filmed().graph(k)
        graph.lineages, graph.edge_errors, graph.modules, graph.info = {}, {}, {}, {"step": 10 * k}
        graph.labels = {"hidden": [f"at {10 * k}", *[""] * (graph.bases["hidden"].n_features - 1)]}
        graph.save(tmp_path / "lib" / "snapshots" / f"step-{10 * k:08d}.safetensors")
    run = told(film_of(tmp_path / "lib"))
    assert run["labels"] == [{}, {"0": "at 10"}, {}]
    snapshot = run["snapshots"][0]
    assert (snapshot["epoch"], snapshot["samples"], snapshot["metrics"]) == (None, None, {})
    assert [layer["ids"] for layer in snapshot["layers"]] == [None] * 3
    assert run["events"] == []
    layer = json.loads(film_of(tmp_path / "lib").snapshot(10))["layers"][0]
    assert (layer["ids"], layer["parents"], layer["modules"]) == (None, None, None)


def test_snapshots_of_other_node_layers_are_left_out(tmp_path: Path) -> None:
    Filmed(layers=("a", "b", "output"), snapshots=2).write(tmp_path / "lib")
    Filmed(layers=("a", "c", "output"), snapshots=5).write(tmp_path / "lib", [3, 4])
    run = told(film_of(tmp_path / "lib"))
    assert [snapshot["step"] for snapshot in run["snapshots"]] == [30, 40]
    assert [layer["name"] for layer in run["layers"]] == ["a", "c", "output"]


def test_what_is_half_there_is_left_out_until_it_is_whole(logs: Path) -> None:
    filmed = Filmed(snapshots=4)
    filmed.write(logs / "lib")
    film = film_of(logs / "lib")
    file = logs / "lib" / "snapshots" / "step-00000020.safetensors"
    whole, version = file.read_bytes(), film.entry()["version"]
    file.write_bytes(whole[: len(whole) // 2])
    (file.parent / "step-00000025.safetensors").write_bytes(b"")
    (file.parent / ".step-00000026.safetensors.7.tmp").write_bytes(b"")
    (file.parent / "step-00000027.safetensors").mkdir()
    assert [snapshot["step"] for snapshot in told(film)["snapshots"]] == [0, 10, 30]
    assert film.entry()["version"] != version
    with pytest.raises(NotThereError, match=r"at step 20 cannot be read: .*truncated"):
        film.snapshot(20)
    with pytest.raises(NotThereError, match="no snapshot at step 26"):
        film.snapshot(26)
    filmed.graph(2).save(file)
    assert [snapshot["step"] for snapshot in told(film)["snapshots"]] == [0, 10, 20, 30]
    assert json.loads(film.snapshot(20))["step"] == 20


def test_files_of_another_content_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "snapshots"
    good = Filmed().graph(1)
    good.save(folder / "step-00000010.safetensors")
    bad = Filmed().graph(2)
    bad.labels["input"] = ["too few"]
    bad.save(folder / "step-00000020.safetensors")
    bad = Filmed().graph(3)
    bad.modules["input"] = torch.zeros(2, dtype=torch.int64)
    bad.save(folder / "step-00000030.safetensors")
    film = film_of(tmp_path / "lib")
    assert [snapshot["step"] for snapshot in told(film)["snapshots"]] == [10]
    with pytest.raises(NotThereError, match="'input' differ in their number of features"):
        film.snapshot(30)
    (folder / "step-00000010.safetensors").unlink()
    (folder / "step-00000030.safetensors").unlink()
    with pytest.raises(NotThereError, match="no snapshot that can be read"):
        film.run()


def test_events_are_read_to_the_last_whole_line(logs: Path) -> None:
    filmed = write_run(logs)
    path = logs / "lib" / "events.jsonl"
    more = {"step": 71, "kind": "split", "text": 'a "b"', "layer": None, "lineage": None, "value": 1}
    with path.open("a") as file:
        file.write('[1]\n\n{"kind": "no step"}\n' + json.dumps(more) + '\n{"step": 80, "ki')
    events = told(film_of(logs / "lib"))["events"]
    assert events == [*filmed.events(), {key: value for key, value in more.items() if key != "value"}]


def test_a_run_read_while_it_is_written(logs: Path) -> None:
    """Each answer is whole, whatever is replaced meanwhile, and the last one has everything."""
    filmed = Filmed(snapshots=12)
    graphs = [filmed.graph(k) for k in range(12)]
    filmed.write(logs / "lib", [0])

    def train() -> None:
        for graph, step in list(zip(graphs, filmed.steps, strict=True)) * 2:
            graph.save(logs / "lib" / "snapshots" / f"step-{step:08d}.safetensors")

    training = threading.Thread(target=train)
    film, seen = film_of(logs / "lib"), set()
    training.start()
    while training.is_alive():
        run = told(film)
        seen.add(run["version"])
        last = run["snapshots"][-1]
        assert json.loads(film.snapshot(last["step"]))["layers"][0]["importance"] == last["layers"][0]["importance"]
        time.sleep(0.005)
    training.join()
    assert len(seen) > 3
    assert [snapshot["step"] for snapshot in told(film)["snapshots"]] == filmed.steps


def test_what_was_read_is_not_read_again_until_it_changes(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_lightning.viewer import snapshot as module

    reads: list[str] = []
    read_parts = module.read_parts

    def counted(path: Path, wanted: Any) -> Any:
        reads.append(path.name)
        return read_parts(path, wanted)

    monkeypatch.setattr(module, "read_parts", counted)
    filmed = Filmed(snapshots=4)
    filmed.write(logs / "lib")
    film = film_of(logs / "lib")
    first = film.run()
    assert film.run() == first
    assert len(reads) == 4
    filmed.graph(2).save(logs / "lib" / "snapshots" / "step-00000020.safetensors")
    film.run()
    assert reads[4:] == ["step-00000020.safetensors"]


def test_the_cache_keeps_to_its_limit(logs: Path) -> None:
    filmed = Filmed(snapshots=6)
    filmed.write(logs / "lib")
    cache = Cache(10_000)
    film = RunView(logs / "lib", "lib", cache)
    sizes = [len(film.snapshot(step)) for step in filmed.steps]
    assert sum(sizes) > 2 * 10_000
    assert 0 < cache.size <= 10_000
    film.run()
    assert cache.size <= 10_000


def test_every_few_snapshots_and_always_the_last(logs: Path) -> None:
    Filmed(snapshots=9).write(logs / "lib")
    film = film_of(logs / "lib")
    assert film.steps(every=3) == [0, 30, 60, 80]
    assert [snapshot["step"] for snapshot in json.loads(film.run(every=3))["snapshots"]] == [0, 30, 60, 80]
    assert film.steps(every=99) == [0, 80]


def test_runs_are_found_by_their_place(tmp_path: Path) -> None:
    graph = Filmed().graph(0)
    for place in ("version_10/lib", "version_2/lib", "version_2/pca", "version_2/lib/validate", ".hidden/lib"):
        graph.save(tmp_path / place / "snapshots" / "step-00000000.safetensors")
    (tmp_path / "version_3" / "lib" / "snapshots").mkdir(parents=True)
    assert list(find_runs(tmp_path)) == ["version_2/lib", "version_2/lib/validate", "version_2/pca", "version_10/lib"]
    assert find_runs(tmp_path / "version_10" / "lib") == {"lib": tmp_path / "version_10" / "lib"}
    assert find_runs(tmp_path / "nothing") == {}


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    Filmed(snapshots=2).write(outside / "lib")
    Filmed(snapshots=2).write(inside / "lib")
    (inside / "linked").symlink_to(outside)
    (inside / "half").mkdir()
    (inside / "half" / "snapshots").symlink_to(outside / "lib" / "snapshots")
    file = inside / "lib" / "snapshots" / "step-00000090.safetensors"
    file.symlink_to(outside / "lib" / "snapshots" / "step-00000000.safetensors")
    assert find_runs(inside) == {"lib": inside / "lib"}
    assert [plain.path.name for plain in plain_files(file.parent)] == [f"step-{s:08d}.safetensors" for s in (0, 10)]
    # A folder that a link takes the place of later.
    film = film_of(inside / "lib")
    (inside / "lib").rename(inside / "was")
    (inside / "lib").symlink_to(outside / "lib")
    with pytest.raises(NotThereError):
        film.run()


def test_reading_needs_no_more_than_the_tensors_it_shows(logs: Path) -> None:
    """The large matrices of a file may be anything: they are not read, and there is no hash to compute."""
    filmed = Filmed(snapshots=2)
    filmed.write(logs / "lib")
    file = logs / "lib" / "snapshots" / "step-00000000.safetensors"
    expected = film_of(logs / "lib").snapshot(0)
    matrix = filmed.graph(0).bases["input"].to_features.contiguous().numpy().tobytes()
    content = file.read_bytes()
    assert matrix in content
    file.write_bytes(content.replace(matrix, bytes(len(matrix))))
    with pytest.raises(ValueError, match="altered"):
        InteractionGraph.load(file)
    assert film_of(logs / "lib").snapshot(0) == expected


def test_there_is_news_when_curves_or_events_grow(logs: Path) -> None:
    write_run(logs)
    film, seen = film_of(logs / "lib"), []
    for file in (logs / "lib" / "events.jsonl", next(logs.glob("events.out.tfevents*"))):
        seen.append(film.entry()["version"])
        with file.open("ab") as stream:
            stream.write(b" ")
    seen.append(film.entry()["version"])
    assert len(set(seen)) == 3


def test_a_log_directory_may_have_any_name(tmp_path: Path) -> None:
    for name in ("checkpoints", "samples", "snapshots"):
        write_run(tmp_path / name)
    before = tmp_path / "samples" / "lib" / "before"
    shutil.copytree(tmp_path / "samples" / "lib" / "snapshots", before / "snapshots")
    found = {name for name in find_runs(tmp_path) if name.endswith(("lib", "before"))}
    assert found == {"checkpoints/lib", "samples/lib", "snapshots/lib"}
