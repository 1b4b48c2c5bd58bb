"""Comparisons as the viewer reads them: what is in the file, or nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_lightning import compare, compute_interaction_graph
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.comparisons import comparison_files, read_comparison
from lib_lightning.viewer.run_discovery import regular_file
from lib_lightning.viewer.run_view import RunView
from tests.viewer.saved_run import write_run

LAYERS = ["0", "1"]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A comparison of two networks, as it is saved."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)) for _ in range(2)]
    batches = [torch.randn(300, 4)]
    graphs = [compute_interaction_graph(model, batches, LAYERS) for model in models]
    saved: dict[str, Any] = json.loads(json.dumps(compare(*graphs, *models, batches).to_dict()))
    return saved


def write(folder: Path, text: str, name: str = "comparison.json") -> Any:
    file = folder / "comparison" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return regular_file(file)


def test_all_that_is_drawn_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path.resolve(), json.dumps(content))
    found = read_comparison(file)
    assert found is not None
    assert found["fingerprints"] == content["fingerprints"]
    for read, layer in zip(found["layers"], content["layers"], strict=True):
        assert (read["a"], read["b"]) == (layer["a"]["layer"], layer["b"]["layer"])
        assert [f"{read['a']}/{row[0]}" for row in read["matches"]] == [match["a"] for match in layer["matches"]]
        for rows, side in zip(read["features"], "ab", strict=True):
            expected = layer[side]["features"]
            assert [f"{layer[side]['layer']}/{row[0]}" for row in rows] == [one["id"] for one in expected]
            assert [row[1] for row in rows] == [one["kind"] for one in expected]
            assert [row[2] for row in rows] == pytest.approx([one["similarity"] for one in expected], rel=1e-4)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"fingerprints": ["a", "b"]}', "[" * 100_000, "\x00", '"x"'])
def test_files_of_other_contents_are_left_out(text: str, tmp_path: Path) -> None:
    assert read_comparison(write(tmp_path.resolve(), text)) is None


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, x in inner for path in paths(x, (*at, key)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_altered_nothing_else_than_numbers_and_names_is_read(
    content: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    altered = json.loads(json.dumps(content))
    *way, last = data.draw(st.sampled_from([path for path in paths(altered) if path]))
    place = altered
    for key in way:
        place = place[key]
    odd = [None, True, -1, math.nan, math.inf, 1e400, "x", "0/-1", "0/9" * 9, [], {}, [None], {"a": {}}]
    place[last] = data.draw(st.sampled_from(odd))
    found = read_comparison(write(tmp_path.resolve(), json.dumps(altered)))
    if found is not None:
        json.dumps(found, allow_nan=False)
        for layer in found["layers"]:
            assert isinstance(layer["a"], str)
            rows = [row for side in layer["features"] for row in side] + [row[1:] for row in layer["matches"]]
            assert all(isinstance(row[0], int) and row[0] >= 0 and isinstance(row[1], str) for row in rows)
            assert all(x is None or isinstance(x, float) for row in rows for x in row[2:])


def test_a_run_has_its_comparisons_the_newest_first(content: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path)
    folder = (tmp_path / "lib").resolve()
    view = RunView(folder, "lib", Cache(1 << 20))
    before = view.entry()["version"]
    assert json.loads(view.run())["comparisons"] == []
    second = {**content, "fingerprints": ["c", "d"]}
    for text, name, time in (
        (content, "comparison-1.json", 2),
        (second, "comparison-2.json", 1),
        ("broken", "comparison.json", 3),
    ):
        os.utime(write(folder, json.dumps(text), name).path, (time, time))
    write(folder, json.dumps(content), "other.json")
    (folder / "comparison" / "comparison-3.json").symlink_to(folder / "comparison" / "comparison-1.json")
    assert [file.path.name for file in comparison_files(folder)] == [
        "comparison.json", "comparison-1.json", "comparison-2.json"
    ]  # fmt: skip
    shown = json.loads(view.run())
    assert [one["fingerprints"] for one in shown["comparisons"]] == [content["fingerprints"], ["c", "d"]]
    assert view.entry()["version"] != before
    assert sorted(shown["fingerprints"].values()) == view.steps()
    assert json.loads(view.run(every=2))["fingerprints"] == shown["fingerprints"]
