"""Events as sentences, and as lines of JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lib_lightning.lineage.events import Event

SENTENCES = [
    (Event("born", 120, "resid_post", 17), "feature resid_post/17 was born at step 120"),
    (Event("died", 1000, "resid_post", 17, label="k=5 a 99%"), "feature resid_post/17 (k=5 a 99%) died at step 1,000"),
    (Event("split", 90, "b.0:input", 17, others=(3,)), "feature b.0:input/17 split from b.0:input/3 at step 90"),
    (Event("merged", 90, "mlp", 4, others=(3, 5)), "feature mlp/4 merged into mlp/3 and mlp/5 at step 90"),
    (
        Event("emerged", 1240, "resid_post", 17, before=0.0002, after=0.015, evidence=4.5, onset=1000),
        "feature resid_post/17 emerged at step 1,240: its share of the layer's importance rose from 0.02% to 1.5% "
        "since step 1,000",
    ),
    (
        Event("faded", 50, "mlp", 0, before=0.031, after=0.0),
        "feature mlp/0 faded at step 50: its share of the layer's importance fell from 3.1% to nothing",
    ),
    (
        Event("rose", 50, "mlp", 0, before=0.0312, after=0.998),
        "feature mlp/0 rose at step 50: its share of the layer's importance rose from 3.1% to 100%",
    ),
    (
        Event("fell", 800, metric="lib/effective_edges/total", before=1989.4, after=703.0),
        "lib/effective_edges/total fell at step 800 from 1,989 to 703",
    ),
    (
        Event("rose", 8, metric="gini", before=-0.0001234567, after=0.91, onset=2),
        "gini rose at step 8 from -0.0001235 to 0.91 since step 2",
    ),
    (Event("rose", 8, metric="gini"), "gini rose at step 8"),
    (Event("rose", 8, metric="gini", abrupt=True), "gini rose abruptly at step 8"),
    (Event("rose", 8, metric="gini", abrupt=False), "gini rose at step 8"),
    (
        Event("emerged", 1240, "mlp", 17, before=0.0, after=0.015, abrupt=True, label="k=5"),
        "feature mlp/17 (k=5) emerged abruptly at step 1,240: its share of the layer's importance rose from nothing to "
        "1.5%",
    ),
]


@pytest.mark.parametrize(("event", "text"), SENTENCES)
def test_sentences_and_lines(event: Event, text: str) -> None:
    assert event.text == text
    line = event.to_json()
    assert "\n" not in line
    assert Event.from_json(line) == event
    assert None not in json.loads(line).values()


@pytest.mark.parametrize("abrupt", [None, False, True])
def test_whether_an_event_is_abrupt_is_written_if_it_was_tested(abrupt: bool | None) -> None:
    event = Event("rose", 3, metric="x", abrupt=abrupt)
    line = event.to_json()
    assert json.loads(line).get("abrupt", "nothing") == ("nothing" if abrupt is None else abrupt)
    assert Event.from_json(line).abrupt is abrupt


def test_events_in_older_files_were_not_tested_for_abruptness() -> None:
    assert Event.from_json('{"kind": "rose", "step": 3, "metric": "x"}').abrupt is None


def test_floats_are_exact() -> None:
    event = Event("rose", 3, metric="x", before=0.1 + 0.2, after=1e300, evidence=math.pi, onset=0)
    assert Event.from_json(event.to_json()) == event


def test_unknown_keys_are_ignored() -> None:
    line = json.dumps({**json.loads(Event("born", 1, "mlp", 2).to_json()), "text": "feature mlp/2 was born", "more": 1})
    assert Event.from_json(line) == Event("born", 1, "mlp", 2)


def test_subjects() -> None:
    assert Event("born", 1, "mlp", 0).subject == "mlp/0"
    assert Event("rose", 1, metric="lib/edges/total").subject == "lib/edges/total"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "grew", "layer": "a", "lineage": 1}, "kind must be one of born, died, .*; got 'grew'"),
        ({"kind": "born"}, "either a feature .* or a metric"),
        ({"kind": "born", "layer": "a"}, "either a feature .* or a metric"),
        ({"kind": "rose", "layer": "a", "lineage": 1, "metric": "m"}, "either a feature .* or a metric"),
        ({"kind": "born", "metric": "m"}, "must be 'rose' or 'fell'; got 'born'"),
        ({"kind": "rose", "metric": "m", "after": math.nan}, "after must be finite or None; got nan"),
        ({"kind": "rose", "metric": "m", "evidence": math.inf}, "evidence must be finite"),
    ],
)
def test_events_are_checked(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Event(step=1, **wrong)


@pytest.mark.parametrize("line", ["", "[]", "3", '{"kind": "born"}', '{"kind": "born", "step": 1}'])
def test_other_lines_are_no_events(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (some messages are those of json)
        Event.from_json(line)
