"""The committed results of ``tox -e applications``: complete, with versions and dates, and the same on the page."""

from __future__ import annotations

import json
from datetime import date

from tests.applications.__main__ import PAGE, RESULTS
from tests.applications.environments import GROUPS
from tests.applications.hugging_face import CONFIGURATIONS
from tests.applications.running import load
from tests.applications.table import page

STATED = json.loads(RESULTS.read_text())
FOUND = STATED["results"]


def test_the_page_is_written_from_the_results() -> None:
    assert PAGE.read_text() == page(STATED)


def test_every_application_has_a_result_with_versions_and_date() -> None:
    assert len(CONFIGURATIONS) == len({name for name, *_ in CONFIGURATIONS}) == 60
    assert set(FOUND) == set(load()) | {f"transformers {name}" for name, *_ in CONFIGURATIONS}
    for name, result in FOUND.items():
        assert date.fromisoformat(result["date"]), name
        if result["status"] == "works":
            assert result.get("features") or result["tolerance"] <= 1e-4, name
        else:
            assert result["status"] in ("refused", "not run", "not installed", "failed"), name
            assert result["reason"], name
    assert all(result["versions"]["torch"] for name, result in FOUND.items() if not name.startswith("transformers"))


def test_every_environment_is_used() -> None:
    assert {group for _, group, _, _ in load().values()} | {"transformers"} == set(GROUPS)
