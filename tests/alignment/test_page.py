"""The example of docs/align.md runs, and its tables are those of the committed results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib_lightning.alignment.alignment import EventAlignment
from lib_lightning.training.cli import main
from recipes.grokking_events import KINDS, RESULTS, SCALARS, SEEDS, draw, offsets, story, table
from tests.alignment.test_alignment import born, write

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "align.md").read_text()


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, centre in enumerate((500, 700, 900)):
        logs = write(tmp_path / "runs" / f"seed-{seed}", centre, [born(centre - 300 * seed - 50)])
        rows = (logs / "probe.csv").read_text().partition("\n")[2].splitlines()
        falling = (f"{step},{1 - float(value)}" for step, value in (row.split(",") for row in rows))
        (logs / "metrics.csv").write_text("\n".join(["step,val_loss", *falling]))
    names: dict[str, Any] = {"__name__": "page"}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/align.md", "exec"), names)
    found = names["found"]
    assert isinstance(found, EventAlignment)
    assert str(found) in capsys.readouterr().out
    assert names["born"].offset == pytest.approx(-350, abs=3)
    assert (names["born"].before, names["born"].after) == (3 - names["born"].within, 0)
    assert json.loads(Path("alignment.json").read_text()) == found.to_dict()
    (command,) = re.findall(r"^lib-lightning (align .*)$", PAGE, re.MULTILINE)
    words = shlex.split(command.replace("runs/seed-*", "runs/seed-0 runs/seed-1 runs/seed-2"))
    main(words)
    assert str(found) in capsys.readouterr().out


def test_tables_are_those_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert f"<!-- events -->\n{table(results)}\n<!-- end of events -->" in PAGE
    assert story(results) in PAGE
    assert list(results) == list(SCALARS)
    for aligned in results.values():
        assert [run["name"] for run in aligned["runs"]] == [f"seed-{seed}" for seed in SEEDS]
        assert aligned["log"]
        kinds = {one["kind"]: one for one in aligned["kinds"]}
        assert set(kinds) <= set(KINDS)
        # What the library said, from all events, is what follows from their medians in each run.
        for kind, said in kinds.items():
            if said["num_runs"] >= 2:
                again = vars(offsets(aligned, kind))
                expected = {key: value if value is not None else float("nan") for key, value in said.items()}
                quartiles = again.pop("quartiles")
                assert quartiles == pytest.approx(expected.pop("quartiles"))
                assert again.pop("kind") == expected.pop("kind")
                assert again == pytest.approx(expected, nan_ok=True)


def test_the_figure_is_drawn_from_the_results() -> None:
    figure = draw(json.loads(RESULTS.read_text()))
    assert len(figure.axes) == len(SCALARS)
    with Image.open(ROOT / "docs" / "images" / "align.png") as image:
        assert image.width == 1000
    assert (ROOT / "docs" / "images" / "align.png").stat().st_size < 150_000
