"""Looking back over basis files: those that do not fit are passed over, and what is found is written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lib_lightning import InteractionGraph
from lib_lightning.lineage.formed import formed, retrace_files
from tests.lineage.trajectories import snapshot


def directions() -> Tensor:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] = 1
    return torch.linalg.qr(x).Q[:, 1:] * 300**0.5


def written(folder: Path, graphs: dict[int, InteractionGraph]) -> list[tuple[int, Path]]:
    for step, graph in graphs.items():
        graph.save(folder / f"{step}.safetensors")
    return [(step, folder / f"{step}.safetensors") for step in graphs]


def test_files_are_gone_through_and_those_that_do_not_fit_passed_over(tmp_path: Path) -> None:
    x = directions()
    final = snapshot({"a": x[:, :3], "b": x[:, 3:5]}, 40)
    graphs = {
        0: snapshot({"a": x[:, 5:], "b": x[:, 3:4]}, 0),
        10: snapshot({"a": x[:, [0, 5]], "b": x[:, :2]}, 10),
        20: snapshot({"a": x[:, :3], "b": x[:, 3:5]}, 20, samples="others"),
        30: snapshot({"a": x[:, [1, 0]], "b": x[:, 3:5]}, 30),
        40: final,
    }
    files = written(tmp_path, graphs)
    half = tmp_path / "35.safetensors"
    half.write_bytes(files[3][1].read_bytes()[:100])
    found = retrace_files(final, sorted([*files, (35, half), (36, tmp_path / "gone.safetensors")]))
    assert found["a"].steps.tolist() == found["b"].steps.tolist() == [0, 10, 30, 40]
    assert found["a"].first().tolist() == [10, 30, 40]
    assert found["b"].first().tolist() == [0, 30]
    assert found["b"].since().tolist() == [30, 30]


def test_what_is_said_of_every_feature(tmp_path: Path) -> None:
    x = directions()
    final = snapshot({"a": x[:, :3]}, 20)  # importances 1, 0.55, 0.1
    final.labels = {"a": ["first", "", "third"]}
    earlier = {0: snapshot({"a": x[:, 2:]}, 0), 10: snapshot({"a": x[:, [1, 2]]}, 10), 20: final}
    found = formed(final, retrace_files(final, written(tmp_path, earlier)))
    assert found["a"]["formed"] == 20
    assert found["a"]["features"] == [
        {"feature": 0, "lineage": None, "label": "first", "importance": 1.0, "first": 20, "since": 20},
        {"feature": 1, "lineage": None, "label": "", "importance": 0.55, "first": 10, "since": 10},
        {"feature": 2, "lineage": None, "label": "third", "importance": 0.1, "first": 0, "since": 0},
    ]
    # Two of three features are not most of the importance; the first one alone is.
    earlier[10] = snapshot({"a": x[:, :1]}, 10)
    assert formed(final, retrace_files(final, written(tmp_path, earlier)))["a"]["formed"] == 10


def test_nothing_is_said_without_values_on_probe_samples() -> None:
    final = snapshot({"a": directions()}, 1)
    final.probes = {}
    assert retrace_files(final, []) == {}
    never = snapshot({"a": directions()[:, :1]}, 1)
    assert formed(never, retrace_files(never, []))["a"] == {
        "formed": None,
        "features": [{"feature": 0, "lineage": None, "label": "", "importance": 1.0, "first": None, "since": None}],
    }
