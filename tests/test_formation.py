"""The recipe of a training that never saw this library: its numbers, and a small run of all of it."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_lightning.labels.properties import _TEXTS
from lib_lightning.viewer import Run
from recipes import scipy_lm
from recipes.formation import (
    EVALUATED,
    GROUPS,
    KIND,
    LAYERS,
    MATTERS,
    OTHER,
    POSITION,
    RESULTS,
    STEPS,
    TOKEN,
    attention_to_token_before,
    crossed,
    draw,
    first_step,
    group_of,
    load,
    main,
    n_gram_losses,
    report,
    story,
)

ROOT = Path(__file__).parents[1]


def test_the_pages_say_what_the_committed_results_say() -> None:
    found = json.loads(RESULTS.read_text())
    assert found["step"] == [0, *scipy_lm.saved_steps(STEPS)]
    page = (ROOT / "docs" / "trace.md").read_text()
    assert story(found) in " ".join(page.split())
    assert report(found) in page
    readme = (ROOT / "README.md").read_text()
    assert "(docs/images/formation.png)" in readme
    assert f"each of its {len(found['step'])} checkpoints" in readme
    # What the sentences say without a number.
    kinds = found["step"].index(first_step(found, "block2", KIND))
    costs = [one[group][1] for layers in found["layers"].values() for one in layers[:kinds] for group in GROUPS]
    assert max(costs) < MATTERS / 2
    assert found["loss"][kinds - 1] == pytest.approx(found["n-grams"][0], abs=0.1)
    first = [first_step(found, layer, group) or math.inf for layer, group in
             (("block2", KIND), ("block2", TOKEN), ("embedding", POSITION))]  # fmt: skip
    assert first == sorted(first)
    assert [first_step(found, layer, POSITION) for layer in ("block1", "block2")] == [None, None]
    at = found["step"].index(first[-1])
    uniform, before, then = (max(found["attention"][k]) for k in (0, at - 2, at))
    assert before - uniform < 0.02 < then - uniform


def test_the_figure_is_drawn_from_the_committed_results() -> None:
    figure = draw(json.loads(RESULTS.read_text()))
    assert len(figure.axes) == 2 + len(LAYERS)
    with Image.open(ROOT / "docs" / "images" / "formation.png") as image:
        assert image.width == 1000
        assert len(image.getcolors()) <= 96
    assert (ROOT / "docs" / "images" / "formation.png").stat().st_size < 150_000


def test_the_training_knows_nothing_of_this_library() -> None:
    tree = ast.parse(Path(scipy_lm.__file__).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }  # fmt: skip
    assert "transformers" in imported
    assert not [name for name in imported if name.partition(".")[0] in ("lib_lightning", "recipes", "lightning")]
    assert scipy_lm.EVALUATED == EVALUATED
    assert scipy_lm.STEPS == STEPS


def test_losses_of_n_grams_are_those_of_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(0, 5, (300,), generator=generator)
    training[1::3] = training[::3][: len(training[1::3])]  # so that longer n-grams know more
    text = torch.randint(0, 6, (7, 12), generator=generator)  # with a token that is not counted
    tokens, V = training.tolist(), 6

    def probability(history: tuple[int, ...], token: int) -> float:
        shorter = probability(history[1:], token) if history else 1 / V
        n = len(history)
        counts = Counter(tuple(tokens[k : k + n + 1]) for k in range(len(tokens) - n))
        followers = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        total = sum(followers.values())
        if not total:
            return shorter
        return (max(followers.get(token, 0) - 0.75, 0) + 0.75 * len(followers) * shorter) / total

    found = n_gram_losses(training, text, 3)
    for n in (1, 2, 3):
        expected = [
            -math.log(probability(tuple(row[max(0, s - n + 1) : s]), row[s]))
            for row in text.tolist() for s in range(1, len(row))
        ]  # fmt: skip
        assert found[n - 1] == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_names_are_grouped_by_what_they_speak_of() -> None:
    for kind in _TEXTS:
        for name in (f"high: {kind}", f"low: no {kind}; high: “x”"):
            assert group_of(name) == KIND
    assert group_of("low: “position” “a”; high: digit") == TOKEN
    assert group_of("high: positions 1, 5; low: “a”") == group_of("high: late position") == POSITION
    for name in ("", "high: before “a” “b”", "low: after “.”; high: digit", "high: samples with “a”"):
        assert group_of(name) == OTHER
    found = {"n-grams": [5.0, 3.0, 2.0], "step": [0, 10, 20], "loss": [6.0, 2.9, 1.0]}
    assert crossed(found) == 10
    assert crossed({**found, "loss": [6.0, 5.0, 4.0]}) == 20


@pytest.mark.recipe
def test_a_small_training_is_traced_and_continued(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a user runs it; then again, after the training and the trace were cut short."""
    small = ["--folder", str(tmp_path), "--steps", "15", "--documents", "40"]
    main(small)
    said = capfd.readouterr().out
    steps = [0, 10, 15]
    assert [int(k) for k in re.findall(r"training: step (\d+) of 15, loss", said)] == steps
    assert "| positions | " in said
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in said
    found = json.loads((tmp_path / "formation.json").read_text())
    assert found["step"] == Run(tmp_path / "logs").steps == steps
    graph = Run(tmp_path / "logs").graph(15)
    for layer in LAYERS:
        assert sum(found["layers"][layer][-1][group][0] for group in GROUPS) == graph.bases[layer].n_features
    with Image.open(tmp_path / "formation.png") as image:
        assert image.width == 1000
    # What heads of an untrained model attend to: all places alike.
    model, tokens = load(tmp_path / "training", 0), torch.zeros(1, 64, dtype=torch.int64)
    even = sum(1 / (s + 1) for s in range(2, 64)) / 62
    assert attention_to_token_before(model, tokens) == pytest.approx([even] * 4, rel=0.05)

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt")}
    main(small)
    assert "training: step" not in capfd.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in files}
    (tmp_path / "training" / "checkpoint-15" / "trainer_state.json").unlink()  # as if killed while it was written
    main(small)
    said = capfd.readouterr().out
    assert [int(k) for k in re.findall(r"training: step (\d+) of 15, loss", said)] == [15]
    again = json.loads((tmp_path / "formation.json").read_text())
    assert again["step"] == steps
    assert again["loss"] == pytest.approx(found["loss"], abs=0.002)
