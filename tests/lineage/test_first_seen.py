"""Histories of final features from basis files; unsuitable files are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib_lightning import InteractionGraph
from lib_lightning.lineage import retrace
from lib_lightning.lineage.first_seen import first_seen, retrace_files
from tests.lineage.trajectories import snapshot


def directions() -> Tensor:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] = 1
    return torch.linalg.qr(x).Q[:, 1:] * 300**0.5


def written(folder: Path, graphs: dict[int, InteractionGraph]) -> list[tuple[int, Path]]:
    for step, graph in graphs.items():
        graph.save(folder / f"{step}.safetensors")
    return [(step, folder / f"{step}.safetensors") for step in graphs]


def test_unsuitable_files_are_skipped(tmp_path: Path) -> None:
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


def test_summary_of_every_feature(tmp_path: Path) -> None:
    x = directions()
    final = snapshot({"a": x[:, :3]}, 20)  # importances 1, 0.55, 0.1
    final.labels = {"a": ["first", "", "third"]}
    earlier = {0: snapshot({"a": x[:, 2:]}, 0), 10: snapshot({"a": x[:, [1, 2]]}, 10), 20: final}
    found = first_seen(final, retrace_files(final, written(tmp_path, earlier)))
    assert found["a"]["formed"] == 20
    assert found["a"]["features"] == [
        {"feature": 0, "lineage": None, "label": "first", "importance": 1.0, "first": 20, "since": 20},
        {"feature": 1, "lineage": None, "label": "", "importance": 0.55, "first": 10, "since": 10},
        {"feature": 2, "lineage": None, "label": "third", "importance": 0.1, "first": 0, "since": 0},
    ]
    # Two of three features are not most of the importance; the first one alone is.
    earlier[10] = snapshot({"a": x[:, :1]}, 10)
    assert first_seen(final, retrace_files(final, written(tmp_path, earlier)))["a"]["formed"] == 10


def test_without_reference_features_there_is_no_history() -> None:
    final = snapshot({"a": directions()}, 1)
    final.reference_features = {}
    assert retrace_files(final, []) == {}
    never = snapshot({"a": directions()[:, :1]}, 1)
    assert first_seen(never, retrace_files(never, []))["a"] == {
        "formed": None,
        "features": [{"feature": 0, "lineage": None, "label": "", "importance": 1.0, "first": None, "since": None}],
    }


def mixed(share: float, direction: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A feature with this squared correlation with a direction."""
    return share**0.5 * direction + (1 - share) ** 0.5 * other


def test_steps_at_which_features_become_recognisable() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=g, dtype=torch.float64)
    x[:, 0] = 1
    x = torch.linalg.qr(x).Q[:, 1:]  # mean 0
    shares = {0: (0.1, 1.0), 10: (0.6, 1.0), 20: (0.4, 1.0), 30: (0.55, 1.0), 40: (0.9, 1.0)}
    earlier = [torch.stack([-mixed(a, x[:, 0], x[:, 2]), mixed(b, x[:, 1], x[:, 3])], 1) for a, b in shares.values()]
    earlier[2] = earlier[2][:, [1, 0]]  # order does not matter
    seen = retrace(x[:, :2], list(shares), earlier)
    expected = torch.tensor(list(shares.values()), dtype=torch.float64).sqrt()
    torch.testing.assert_close(seen.similarity, expected, rtol=0, atol=1e-9)
    assert seen.first().tolist() == [10, 0]
    assert seen.since().tolist() == [30, 0]
    assert seen.first(0.95).tolist() == [-1, 0]
    assert seen.since(0.85).tolist() == [40, 0]


def test_neurons_are_compared_with_themselves() -> None:
    x = torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64)).Q
    x = x - x.mean(0)
    seen = retrace(x, [0, 1], [x[:, [1, 0, 2]], x], in_order=True)
    assert seen.since().tolist() == [1, 1, 0]


def test_no_earlier_snapshot_and_none_with_features() -> None:
    x = torch.randn(20, 2)
    assert retrace(x, [], []).first().tolist() == [-1, -1]
    assert retrace(x, [5], [x[:, :0]]).since().tolist() == [-1, -1]


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="on the same samples"):
        retrace(torch.randn(20, 2), [0], [torch.randn(19, 2)])
