"""The page of a feature as JSON: the numbers in the files, whatever of them there is."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lib_lightning import InteractionGraph
from lib_lightning.io.notes import write_note
from lib_lightning.io.places import Places
from lib_lightning.io.rendering_file import append_lines, rendering_line
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.viewer import run_view
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.embedded_features import embed_features
from lib_lightning.viewer.feature import latest_effect
from lib_lightning.viewer.run_view import NotFoundError, RunView
from tests.viewer.example_run import OUTPUT_NAMES, ExampleRun
from tests.viewer.saved_run import SavedRun

LAYERS = ("input", "hidden", "output")


class EarlierRun(SavedRun):
    """A run of an earlier version."""

    def graph(self, k: int) -> InteractionGraph:
        """The graph without what came later."""
        graph = super().graph(k)
        for later in (graph.attributions, graph.attribution_errors, graph.examples, graph.effects, graph.label_scores):
            later.clear()
        return graph


def view_of(folder: Path) -> RunView:
    return RunView(folder, "version_0/lib", Cache(1 << 30))


def page_of(folder: Path, step: int, layer: int, which: int) -> Any:
    return json.loads(view_of(folder).feature(step, layer, which))


def close(value: Any) -> Any:
    return None if value is None or not math.isfinite(value) else pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize("rendering", ["tokens", "image"])
def test_the_page_of_every_feature_matches_the_graph(tmp_path: Path, rendering: str) -> None:
    run = ExampleRun(LAYERS, rendering=rendering, snapshots=4)
    run.write(tmp_path)
    view = view_of(tmp_path)
    for k in (0, 3):
        graph = run.graph(k)
        for l, layer in enumerate(LAYERS):
            examples, outputs, effects = graph.examples[layer], graph.output_effects[layer], graph.effects[layer]
            for i, name in enumerate(graph.feature_ids(layer)):
                page = json.loads(view.feature(10 * k, l, int(name.rpartition("/")[2])))
                feature = graph.feature(name)
                assert (page["id"], page["index"], page["layer"], page["label"]) == (name, i, layer, feature.label)
                assert page["importance"] == close(feature.importance)
                assert page["shape"] == list(examples.shape)
                histogram = page["histogram"]
                assert histogram["counts"] == examples.histogram[i].tolist()
                assert histogram["width"] == close(examples.bin_width[i])
                assert histogram["start"] == pytest.approx(-32 * histogram["width"], rel=1e-4)
                assert [one["kind"] for one in page["examples"]] == examples.kinds
                for n, one in enumerate(page["examples"]):
                    assert (one["sample"], one["position"]) == (examples.samples[i, n], examples.positions[i, n])
                    assert one["value"] == close(examples.values[i, n])
                    if one["context"] is not None:
                        at = one["context"][one["position"] - one["context_start"]]
                        assert at == pytest.approx(one["value"], rel=1e-2)
                assert set(page["renderings"]) == {str(one["sample"]) for one in page["examples"]}
                for sample, look in page["renderings"].items():
                    assert look == run.sample(int(sample))
                sides = [
                    [outputs.outputs[i, :2], outputs.changes[i, :2]],
                    [outputs.outputs[i, 2:], outputs.changes[i, 2:]],
                ]
                for side, (numbers, changes) in zip((page["raised"], page["lowered"]), sides, strict=True):
                    assert [one["name"] for one in side] == [OUTPUT_NAMES[n] for n in numbers.tolist()]
                    assert [one["change"] for one in side] == [close(x) for x in changes.tolist()]
                if math.isnan(effects.changes[i]):
                    assert page["effect"] is None or page["effect"]["step"] != 10 * k
                else:
                    assert page["effect"]["change"] == close(effects.changes[i])
                    assert (page["effect"]["step"], page["effect"]["score"]) == (10 * k, "accuracy")
                    assert page["effect"]["significant"] == bool(effects.significant[i])


def test_interactions_are_the_strongest_of_both_sides_with_their_signs(tmp_path: Path) -> None:
    run = ExampleRun(LAYERS, snapshots=2)
    run.write(tmp_path)
    graph = run.graph(1)
    for i, which in enumerate(graph.lineages["hidden"].ids.tolist()):
        page = page_of(tmp_path, 10, 1, which)
        for key, section, row in (("inputs", ("input", "hidden"), True), ("outputs", ("hidden", "output"), False)):
            E, A = graph.edges[section], graph.attributions[section]
            strengths, signed = (E[i], A[i]) if row else (E[:, i], A[:, i])
            order = [j for j in strengths.argsort(descending=True, stable=True).tolist() if strengths[j] > 0][:8]
            names = graph.feature_ids(section[0] if row else section[1])
            assert [one["id"] for one in page[key]] == [names[j] for j in order]
            assert [one["edge"] for one in page[key]] == [close(strengths[j]) for j in order]
            assert [one["attribution"] for one in page[key]] == [close(signed[j]) for j in order]
            assert [one["share"] for one in page[key]] == [close(strengths[j] / strengths.sum()) for j in order]
    assert page_of(tmp_path, 10, 0, 0)["inputs"] is None
    assert page_of(tmp_path, 10, 2, 0)["outputs"] is None


def test_the_history_follows_the_lineage_and_the_effect_is_the_latest(tmp_path: Path) -> None:
    run = ExampleRun(LAYERS, snapshots=6)
    run.write(tmp_path)
    graphs = [run.graph(k) for k in range(6)]
    which = next(i for i, one in enumerate(run.lineages[1]) if 0 < one.birth < 5 and one.death == 6)
    page = page_of(tmp_path, 50, 1, which)
    for k, graph in enumerate(graphs):
        ids = graph.lineages["hidden"].ids.tolist()
        i = ids.index(which) if which in ids else None
        basis = graph.bases["hidden"]
        for name in ("importance", "importance_error"):
            assert page["history"][name][k] == (None if i is None else close(getattr(basis, name)[i]))
        known = None if i is None or "hidden" not in graph.effects else graph.effects["hidden"].changes[i]
        assert page["history"]["effect"][k] == close(known)
    measured = [k for k, value in enumerate(page["history"]["effect"]) if value is not None]
    assert (page["effect"] is None) == (not measured)
    if measured:
        assert page["effect"]["step"] == 10 * measured[-1]


def test_the_effect_is_the_newest_one_or_else_the_first_later_one() -> None:
    none: list[Any] = [None]
    history = {name: [*none, 0.5, *none, 0.25, *none] for name in ("effect", "effect_error", "effect_significant")}
    history |= {"steps": [0, 10, 20, 30, 40], "score": ["accuracy"] * 5}
    found = [latest_effect(history, step) for step in (0, 10, 20, 30, 40)]
    assert [one["step"] for one in found if one] == [10, 10, 10, 30, 30]
    assert latest_effect({**history, "effect": none * 5}, 20) is None


@pytest.mark.parametrize("text", ['{"hidden": {"features": [{"lineage": 0, "since": 10}]}}', '{"hidden": [', "[]", "3"])
def test_since_when_a_feature_has_its_final_form(text: str, tmp_path: Path) -> None:
    ExampleRun(LAYERS, snapshots=2).write(tmp_path)
    assert page_of(tmp_path, 10, 1, 0)["final_since"] is None
    RunLayout(tmp_path).history_file.write_text(text)
    assert page_of(tmp_path, 10, 1, 0)["final_since"] == (10 if text.endswith("}") else None)
    assert page_of(tmp_path, 10, 0, 0)["final_since"] is None


def test_files_of_the_run_are_parsed_once_for_all_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(of: Callable[[Path], Any], path: Path) -> Any:
        read.append(path.name)
        return of(path)

    for name in ("read_final_forms", "read_renderings", "read_notes"):
        monkeypatch.setattr(run_view, name, partial(counted, getattr(run_view, name)))
    ExampleRun(LAYERS, snapshots=2).write(tmp_path)
    layout, view = RunLayout(tmp_path), RunView(tmp_path, "lib", Cache(1 << 24))
    layout.history_file.write_text('{"hidden": {"features": [{"lineage": 0, "since": 0}]}}')
    layout.notes_file.write_text('{"hidden/0": "one"}')
    layout.renderings_file.write_text('{"sample": 0, "samples": "", "kind": "text", "text": "a"}\n')
    for _ in range(3):
        assert json.loads(view.feature(10, 1, 0))["final_since"] == 0
    assert sorted(read) == ["notes.json", "retraced.json", "samples.jsonl"]
    layout.history_file.write_text('{"hidden": {"features": [{"lineage": 0, "since": 10}]}}')
    assert json.loads(view.feature(10, 1, 0))["final_since"] == 10
    assert json.loads(view.feature(10, 1, 0))["note"] == "one"
    assert read[3:] == ["retraced.json"]


def test_what_a_file_does_not_have_is_null(tmp_path: Path) -> None:
    """Files of earlier versions, layers without examples, runs without renderings."""
    EarlierRun(LAYERS, snapshots=2).write(tmp_path)
    for layer in range(3):
        page = page_of(tmp_path, 10, layer, 0)
        assert {key for key in ("examples", "histogram", "shape", "raised", "lowered", "effect") if page[key]} == set()
        assert (page["renderings"], page["note"], page["label_score"]) == ({}, "", None)
        assert all(one["attribution"] is None for one in [*(page["inputs"] or []), *(page["outputs"] or [])])
    graph = ExampleRun(LAYERS, snapshots=2).graph(1)
    del graph.examples["hidden"], graph.lineages["hidden"]
    graph.save(tmp_path / "snapshots" / "step-00000020.safetensors")
    assert page_of(tmp_path, 20, 1, 0)["examples"] is None
    assert page_of(tmp_path, 20, 0, 0)["examples"]
    old = Path(__file__).parents[1] / "data" / "run" / "lib"
    steps = view_of(old).steps() if old.exists() else []
    for step in steps:
        assert page_of(old, step, 0, 0)["importance"] > 0


def test_notes_and_renderings_are_read_as_they_are_now(tmp_path: Path) -> None:
    run = ExampleRun(LAYERS, snapshots=2)
    run.write(tmp_path)
    view = view_of(tmp_path)
    sample = json.loads(view.feature(0, 1, 0))["examples"][0]["sample"]
    write_note(tmp_path / "notes.json", "hidden/0", "mine <b>")
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(
            json.dumps({"sample": sample, "kind": "text", "text": "\u2028 new"}) + "\nnot JSON\n[1]\n" + '{"sample": 3,'
        )
    page = json.loads(view.feature(0, 1, 0))
    assert page["note"] == "mine <b>"
    assert page["renderings"][str(sample)] == {"kind": "text", "text": "\u2028 new"}
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / "samples.jsonl").unlink()
    page = json.loads(view.feature(0, 1, 0))
    assert (page["note"], page["renderings"]) == ("", {})
    # Files elsewhere are not read.
    (tmp_path / "other.jsonl").write_text(json.dumps({"sample": sample, "kind": "text", "text": "elsewhere"}))
    (tmp_path / "samples.jsonl").symlink_to(tmp_path / "other.jsonl")
    assert json.loads(view.feature(0, 1, 0))["renderings"] == {}


def test_samples_and_places_are_those_of_the_snapshot(tmp_path: Path) -> None:
    """The same number may be another sample in another snapshot."""
    run = ExampleRun(LAYERS, rendering="image", snapshots=2)
    run.write(tmp_path)
    graph, places = run.graph(1), Places((4, 4), (-1, -1), (2, 2), (3, 3), (8, 8), is_region=True)
    graph.info |= {"samples": "1f", "places": {"hidden": places.plain}}
    graph.save(tmp_path / "snapshots" / "step-00000010.safetensors")
    new = [rendering_line(i, "1f", {"kind": "text", "text": f"new {i}"}) for i in range(1000)]
    append_lines(tmp_path / "samples.jsonl", new)
    view = view_of(tmp_path)
    which = graph.lineages["hidden"].ids.tolist()[0]
    page = json.loads(view.feature(10, 1, which))
    for one in page["examples"]:
        assert page["renderings"][str(one["sample"])]["text"] == f"new {one['sample']}"
        assert one["position_box"] == list(places.part(one["position"]) or ())
    assert {one["position_box"] for one in json.loads(view.feature(10, 0, 0))["examples"]} == {None}
    before = json.loads(view.feature(0, 1, run.graph(0).lineages["hidden"].ids.tolist()[0]))
    assert {look["kind"] for look in before["renderings"].values()} == {"image"}
    assert "position_box" not in before["examples"][0], "a file that does not know"
    # In a film, renderings of both are told apart by the same hash.
    film = embed_features(view, [0, 10], 1 << 22)
    kept = json.loads(gzip.decompress(base64.b64decode(film.run)))["renderings"]
    assert {of: {look["kind"] for look in looks.values()} for of, looks in kept.items()} == {
        "": {"image"}, "1f": {"text"},
    }  # fmt: skip


def test_missing_features_and_damaged_files_are_not_found(tmp_path: Path) -> None:
    run = ExampleRun(LAYERS, snapshots=2)
    run.write(tmp_path)
    view = view_of(tmp_path)
    for place in ((0, 1, 99), (0, 7, 0), (5, 1, 0)):
        with pytest.raises(NotFoundError):
            view.feature(*place)
    graph = run.graph(1)
    graph.examples["hidden"] = graph.examples["hidden"].__class__(
        **{**vars(graph.examples["hidden"]), "values": graph.examples["hidden"].values[:1]}
    )
    graph.save(tmp_path / "snapshots" / "step-00000010.safetensors")
    with pytest.raises(NotFoundError, match="Cannot read the snapshot"):
        view.feature(10, 1, graph.lineages["hidden"].ids.tolist()[-1])
    assert InteractionGraph.load(tmp_path / "snapshots" / "step-00000000.safetensors").examples
