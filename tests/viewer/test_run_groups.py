"""Groups of runs by their paths, and mean and spread of their curves, in the tab's JavaScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.viewer.node import evaluate, write_modules


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(tmp_path_factory.mktemp("modules"))


WIDTHS = [f"{width}/seed{k}/version_0/lib" for width in ("narrow", "wide") for k in range(3)]
NAMES: dict[str, tuple[list[str], str, list[list[int]]]] = {
    "first folder": (WIDTHS, "folder0", [[0, 1, 2], [3, 4, 5]]),
    "seeds above widths": ([f"seed{k}/{width}/lib" for k in range(2) for width in "ab"], "folder1", [[0, 2], [1, 3]]),
    "versions": ([f"lightning_logs/version_{k}/lib" for k in range(3)], "all", [[0, 1, 2]]),
    "seeds only": ([f"{k}/lib" for k in range(3)], "all", [[0, 1, 2]]),
    "numbers at the end": ([f"{name}_{k}/lib" for name in ("mlp", "cnn") for k in range(2)], "stem0", [[0, 1], [2, 3]]),
    "baselines": ([f"seed{k}/{basis}" for k in range(2) for basis in ("lib", "pca")], "all", [[0, 2], [1, 3]]),
    "runs alone": (["lib", "pca"], "all", [[0], [1]]),
}


@pytest.mark.parametrize("case", NAMES)
def test_default_groups_do_not_mix_settings_or_bases(modules: Path, case: str) -> None:
    names, expected, groups = NAMES[case]
    imports = {"run_groups.js": "groupings, defaultGrouping, groupRuns"}
    chosen = "groupings(data).find(({id}) => id === defaultGrouping(groupings(data)))"
    found = evaluate(modules, imports, f"[{chosen}.id, groupRuns(data, {chosen}.keyOf)]", names)
    assert found[0] == expected
    assert [group["runs"] for group in found[1]] == [[names[k] for k in group] for group in groups]
    assert len({group["name"] for group in found[1]}) == len(groups)


def test_ways_to_group_are_different_and_put_some_runs_together(modules: Path) -> None:
    names = [f"{a}/{b}/seed{k}/lib" for a in ("adam", "sgd") for b in ("wide", "narrow") for k in range(2)]
    imports = {"run_groups.js": "groupings, groupRuns"}
    expression = (
        "groupings(data).map((way) => [way.id, way.text, groupRuns(data, way.keyOf).map(({runs}) => runs.length)])"
    )
    found = evaluate(modules, imports, expression, names)
    assert [(name, sizes) for name, _, sizes in found] == [
        ("all", [8]),
        ("folder0", [4, 4]),
        ("folder1", [4, 4]),
        ("folder2", [4, 4]),
        ("rest0", [2] * 4),
        ("rest1", [2] * 4),
        ("rest2", [2] * 4),
    ]
    assert found[1][1] == "1st folder: adam, sgd"


def test_mean_and_spread_are_over_the_runs_that_have_values(modules: Path) -> None:
    rng = np.random.default_rng(0)
    curves: list[dict[str, Any]] = []
    for first, last in ((0, 50), (10, 60), (20, 90)):
        steps = sorted({first, last, *rng.integers(first, last, 6).tolist()})
        curves.append({"steps": steps, "values": rng.normal(size=len(steps)).tolist()})
    found = evaluate(modules, {"run_groups.js": "summary"}, "summary(data)", curves)
    every = sorted({step for curve in curves for step in curve["steps"]})
    expected = []
    for step in every:
        inside = [curve for curve in curves if curve["steps"][0] <= step <= curve["steps"][-1]]
        values = np.array([np.interp(step, curve["steps"], curve["values"]) for curve in inside])
        if len(values) > 1:
            expected.append([step, len(values), values.mean(), values.std(ddof=1), values.min(), values.max()])
    columns = list(zip(*(found[key] for key in ("steps", "n", "mean", "sd", "min", "max")), strict=True))
    np.testing.assert_allclose(columns, expected, rtol=1e-12)
    assert {2, 3} == set(found["n"])
    assert evaluate(modules, {"run_groups.js": "lastCommonStep"}, "lastCommonStep(data)", curves) == 50
    assert evaluate(modules, {"run_groups.js": "lastCommonStep"}, "lastCommonStep(data)", curves[:1] * 2) == 50


def test_values_that_were_not_measured_are_interpolated(modules: Path) -> None:
    curve = {"name": "run", "steps": [0, 10, 20, 30], "values": [None, 1.0, None, 3.0]}
    imports = {"run_groups.js": "finite, valueAt"}
    expression = "[finite(data), ...[0, 10, 20, 30, 31].map((step) => valueAt(finite(data), step))]"
    found = evaluate(modules, imports, expression, curve)
    assert found == [{"name": "run", "steps": [10, 30], "values": [1, 3]}, None, 1, 2, 3, None]
