"""What a release consists of agrees: versions, workflows, environments of tox and supported interpreters."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lib_lightning

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOX = (ROOT / "tox.ini").read_text(encoding="utf-8")


def read(path: Path) -> dict[Any, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_one_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert lib_lightning.__version__.split(".dev")[0] == citation["version"]
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_interpreters_are_the_same_everywhere() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    in_classifiers = {c.rsplit(" ", 1)[1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)}
    matrix = read(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    minors = re.search(r"py3\{([\d,]+)\}", TOX)
    assert minors is not None
    assert in_classifiers == set(matrix["python"]) == {f"3.{minor}" for minor in minors[1].split(",")}
    assert project["requires-python"] == f">={min(in_classifiers, key=lambda v: int(v.split('.')[1]))}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_environments_that_exist(path: Path) -> None:
    jobs = read(path)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    # A tag of a version, never a moving branch of somebody's.
    assert all(re.search(r"@(v\d+|release/v1)$", step["uses"]) for step in steps if "uses" in step)
    called = [name for step in steps for name in re.findall(r"tox -e ([\w,.-]+)", step.get("run", ""))]
    assert called
    for name in ",".join(called).split(","):
        assert name == "py" or f"[testenv:{name}]" in TOX, name


def test_only_the_job_that_publishes_may_ask_for_a_token() -> None:
    for path in WORKFLOWS:
        workflow = read(path)
        assert "id-token" not in workflow.get("permissions", {})
        for name, job in workflow["jobs"].items():
            rights = job.get("permissions", {})
            assert "id-token" not in rights or (path.stem, name) == ("publish", "publish") or "pages" in rights
