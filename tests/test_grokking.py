"""The grokking recipes: pages show their committed results, and small runs of them give such results."""

from __future__ import annotations

import itertools
import json
import math
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy import stats

from lib_lightning import InteractionGraph
from lib_lightning.plots.image import render_png
from lib_lightning.viewer import Run
from recipes import grokking, grokking_events
from recipes.grokking import (
    EXAMPLES,
    RESULTS,
    SHARE,
    SHARE_TRAINING,
    compare_task,
    counts,
    draw,
    measure,
    memorised,
    report,
    resolution,
    snapshot_steps,
    story,
    train,
)
from recipes.grokking_tasks import TASKS, Task, addition, parity, subtraction
from recipes.leads import Lead, compare, halfway, holm, median_interval, verdict
from recipes.learning_coefficient import LOCALIZATION, learning_coefficient

ROOT = Path(__file__).parents[1]


def test_the_page_shows_what_the_committed_results_say() -> None:
    results = json.loads(RESULTS.read_text())
    assert list(results) == list(TASKS)
    page = (ROOT / "docs" / "grokking.md").read_text()
    assert report(results) in page
    assert story(results) in page


def test_what_the_page_says_of_the_committed_results() -> None:
    results = json.loads(RESULTS.read_text())
    verdicts, late = dict[str, dict[str, str]](), dict[str, dict[str, Lead]]()
    early = dict[str, dict[str, str]]()
    for task, runs in results.items():
        found, corrected = compare_task(list(runs.values()))
        late[task] = found["memorising"]
        verdicts[task] = {name: verdict(lead, corrected["memorising"][name]) for name, lead in late[task].items()}
        early[task] = {name: verdict(lead, corrected["start"][name]) for name, lead in found["start"].items()}
    output, tail = "importance for the output", "features above 1e-06"
    assert verdicts["addition"][output] == verdicts["addition"][SHARE_TRAINING] == ""
    assert all({verdicts[task][name] for task in TASKS} != {"before"} for name in verdicts["addition"])
    for task in ("subtraction", "parity"):
        assert verdicts[task][output] == verdicts[task][SHARE_TRAINING] == "before"
    assert [early[task][SHARE] for task in TASKS] == ["before", "after", "after"]
    assert {early[task][SHARE_TRAINING] for task in TASKS} == {"before"}
    # Correlations over 20 runs that differ from 0 at the level of 5% are above 0.45.
    correlated = {
        (task, name): late[task][name].rank_correlation > 0.45 for task in TASKS for name in (output, SHARE_TRAINING)
    }
    assert [correlated[task, output] for task in TASKS] == [True, False, False]
    assert [correlated[task, SHARE_TRAINING] for task in TASKS] == [True, True, False]
    assert verdicts["subtraction"][SHARE] == verdicts["parity"][SHARE] == "after"
    assert [verdicts[task][EXAMPLES] == "before" for task in TASKS] == [False, False, True]
    assert late["parity"][EXAMPLES].rank_correlation > 0.6
    assert [verdicts[task]["causal features"] for task in TASKS] == ["", "after", ""]
    assert [verdicts[task]["features above 0.1"] for task in TASKS] == ["", "before", ""]
    for name, in_subtraction, in_parity in (("effective features", 20, 1), (output, 0, 0), (SHARE_TRAINING, 20, 20)):
        assert (late["subtraction"][name].rises, late["parity"][name].rises) == (in_subtraction, in_parity)
    assert [verdicts[task]["effective features"] for task in TASKS] == ["", "before", "before"]
    assert [verdicts[task][tail] for task in TASKS] == ["after", "", ""]
    assert not late["subtraction"][tail].ratios


def test_the_figure_is_drawn_from_the_committed_results() -> None:
    results = json.loads(RESULTS.read_text())
    figure = draw(results)
    assert len(figure.axes) == len(TASKS)
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert render_png(figure).width > 1000


def test_when_a_series_is_halfway() -> None:
    steps = [0, 10, 20, 30, 40, 50, 60]
    falls = [9, 8, 6, 2, 2, 2, 2]
    assert halfway(steps, falls, start=10) == pytest.approx(22.5)  # from 8 to 2: 5
    assert halfway(steps, falls, start=15) == pytest.approx(25)  # from 6 to 2: 4
    assert halfway(steps, [9, 8, 2, 9, 2, 2, 2], start=10) == pytest.approx((15 + 30 + 40 / 7) / 2)
    assert halfway(steps, [9, 8, 2, 9, 8, 2, 2], start=10) == pytest.approx(45), "a spike on the way is not the change"
    assert halfway(steps, [0, 0, 0, 1, 9, 1, 1], start=10) == pytest.approx(25), "one spike is not the end"
    assert math.isnan(halfway(steps, [5] * 7, start=10))
    assert math.isnan(halfway(steps, [9, 9, 9, 9, 9, 1, 1], start=50)), "fewer than five values after the start"


def test_when_training_samples_are_memorised() -> None:
    assert memorised({"step": [10, 20, 30], "train": [0.5, 0.99, 0.9]}) == 20
    assert math.isnan(memorised({"step": [10, 20], "train": [0.5, 0.9]}))


def test_runs_that_do_not_generalise_do_not_count() -> None:
    run = {"step": [0, 1, 2, 3, 4, 5], "train": [0.0, 1, 1, 1, 1, 1], "test": [0.0, 0.1, 0.9, 0.95, 1.0, 0.2]}
    assert counts(run)
    assert not counts({**run, "test": [0.0, 0.1, 0.2, 0.85, 1.0, 1.0]})
    assert not counts({**run, "train": [0.9] * 6})


@pytest.mark.parametrize("n", [6, 9, 20])
def test_the_interval_of_a_median_has_the_coverage_that_it_says(n: int) -> None:
    low, high = median_interval(range(n))
    assert n - 1 - high == low
    assert 2 * stats.binom.cdf(low, n, 0.5) <= 0.05, "the interval has its level"
    assert 2 * stats.binom.cdf(low + 1, n, 0.5) > 0.05, "and a shorter one has not"


def test_comparisons_agree_with_scipy_and_with_the_definition() -> None:
    generator = random.Random(0)
    others = [generator.uniform(100, 1000) for _ in range(20)]
    steps = [x * generator.lognormvariate(-0.3, 0.4) for x in others]
    lead = compare([*steps, math.nan, 5.0], [*others, 7.0, math.nan], [True] * 22)
    ratios = [a / b for a, b in zip(steps, others, strict=True)]
    assert lead.ratios == pytest.approx(ratios)
    assert lead.before == sum(ratio < 1 for ratio in ratios)
    assert lead.p_value == stats.wilcoxon([math.log(x) for x in ratios], method="exact").pvalue
    assert lead.rank_correlation == pytest.approx(stats.spearmanr(steps, others).statistic)
    assert verdict(lead, 0.01) == "before"
    assert verdict(compare(others, steps, [True] * 20), 0.01) == "after"
    assert verdict(lead, 0.06) == verdict(lead, math.nan) == ""
    assert compare([math.nan], [3.0], [False]).ratios == ()
    mixed = compare(steps, others, [i < 6 for i in range(20)])
    assert mixed.rises == 6
    assert mixed.p_value == stats.binomtest(6, 20).pvalue > lead.p_value


def test_holms_correction_holds_the_chance_of_any_false_lead() -> None:
    generator = random.Random(0)
    runs = [[generator.random() for _ in range(30)] for _ in range(2000)]
    assert sum(min(holm(p_values)) <= 0.05 for p_values in runs) / 2000 == pytest.approx(0.05, abs=0.015)
    assert holm([0.04, 0.001, math.nan, 0.02])[:2] == pytest.approx([0.04, 0.003])


def test_a_planted_lead_is_found_and_what_moves_with_test_accuracy_is_not() -> None:
    steps = snapshot_steps(10, 3000)
    generator = random.Random(0)

    def sigmoid(middle: float) -> list[float]:
        return [1 / (1 + (middle / max(step, 1)) ** 6) for step in steps]

    runs = []
    for _ in range(20):
        late = generator.uniform(400, 1200)
        together, before = (late * generator.lognormvariate(mean, 0.1) for mean in (0, -0.5))
        runs.append(
            {"step": steps, "train": sigmoid(20), "test": sigmoid(late)}
            | {"together": sigmoid(together), "before": sigmoid(before), "constant": [1.0] * len(steps)}
        )
    found, corrected = compare_task(runs)
    verdicts = {name: verdict(lead, corrected["memorising"][name]) for name, lead in found["memorising"].items()}
    assert (verdicts["together"], verdicts["before"], verdicts["constant"]) == ("", "before", "")
    assert found["memorising"]["before"].times == pytest.approx(math.exp(-0.5), rel=0.1)
    assert found["memorising"]["before"].rank_correlation > 0.9
    assert found["memorising"]["constant"].ratios == ()
    assert "nine in ten" in resolution({"planted": dict(enumerate(runs))})


def noisy_runs(generator: random.Random, noise: float) -> list[dict[str, list[float]]]:
    """Runs with three constant quantities with noise, one that moves with test accuracy, and one before it."""
    steps = [float(step) for step in snapshot_steps(10, 3000)]

    def sigmoid(middle: float, scale: float = 0.0) -> list[float]:
        return [1 / (1 + (middle / max(step, 1)) ** 6) + generator.gauss(0, scale) for step in steps]

    runs = []
    for _ in range(20):
        late = generator.uniform(400, 1200)
        walk = list(itertools.accumulate(generator.gauss(0, 1) for _ in steps))
        runs.append(
            {"step": steps, "train": sigmoid(20), "test": sigmoid(late)}
            | {"noise": [generator.gauss(0, 1) for _ in steps], "count": [generator.randint(8, 12) for _ in steps]}
            | {"walk": walk, "together": sigmoid(late, noise), "before": sigmoid(0.5 * late, noise)}
        )
    return runs


def test_noise_does_not_lead() -> None:
    generator, n = random.Random(0), 150
    false, found_before = dict.fromkeys(("noise", "count", "walk", "together"), 0), 0
    for _ in range(n):
        leads, corrected = compare_task(noisy_runs(generator, noise=0.3))
        verdicts = {name: verdict(lead, corrected["memorising"][name]) for name, lead in leads["memorising"].items()}
        for name in false:
            false[name] += verdicts[name] != ""
        found_before += verdicts["before"] == "before"
    # Together at most one task in twenty, beyond which there are three standard errors.
    assert sum(false.values()) <= n * 0.05 + 3 * (n * 0.05 * 0.95) ** 0.5, false
    assert found_before > 0.9 * n


SMALL = {
    "addition": partial(addition, modulus=7, steps=20),
    "subtraction": partial(subtraction, modulus=5, steps=20),
    "parity": partial(parity, num_bits=6, num_train=40, steps=20),
}


@pytest.mark.recipe
@pytest.mark.parametrize("task", TASKS)
def test_a_small_run_is_measured(task: str, tmp_path: Path) -> None:
    train(SMALL[task], tmp_path, seed=3, per_decade=3)
    found = measure(tmp_path, SMALL[task], seed=3)
    made: Task = SMALL[task](3)
    assert found["step"] == snapshot_steps(made.first, 20, 3) == [0, 5, 10, 20]
    graph = InteractionGraph.load(tmp_path / "step-000020.safetensors")
    basis = graph.bases[made.before_output]
    assert basis.output_importance is not None
    assert found["features above 0.01"][-1] == (basis.importance > 0.01 * basis.importance[0]).sum()
    assert found["importance for the output"][-1] == pytest.approx(basis.output_importance.sum().item(), rel=1e-4)
    assert found["causal features"][-1] == graph.effects[made.before_output].significant.sum()
    labelled = torch.tensor([label != "" for label in graph.labels[made.before_output]])
    share = basis.importance[labelled].sum() / basis.importance.sum()
    assert found[SHARE][-1] == pytest.approx(share.item(), rel=1e-4)
    assert 0 <= found[EXAMPLES][-1] <= 1
    committed = json.loads(RESULTS.read_text())[task]
    assert set(found) == set(committed["0"])


@pytest.mark.recipe
def test_the_training_is_that_of_the_task_alone(tmp_path: Path) -> None:
    """Snapshots change nothing: the same weights as without them."""
    make = SMALL["parity"]
    train(make, tmp_path, seed=3, per_decade=3)
    trained = InteractionGraph.load(tmp_path / "step-000020.safetensors").info["weights_hash"]
    train(make, tmp_path / "fewer", seed=3, per_decade=1)
    assert InteractionGraph.load(tmp_path / "fewer" / "step-000020.safetensors").info["weights_hash"] == trained


@pytest.mark.recipe
def test_runs_that_are_there_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grokking, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(grokking, "TASKS", {"parity": SMALL["parity"]})
    command = ["--folder", str(tmp_path), "--tasks", "parity", "--seeds"]
    grokking.main([*command, "1"])
    monkeypatch.setattr(grokking, "train", lambda *_: pytest.fail("again"))
    (tmp_path / "parity-1.json").unlink()  # as if it had been stopped before
    grokking.main([*command, "1"])
    assert "| parity | 1 |" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "results.json").read_text())["parity"]) == ["1"]


def test_labels_of_solutions() -> None:
    task = parity(0, num_train=200)
    bits = task.test[0]
    first, noise = bits[:, 0], bits[:, 5]
    features = torch.stack([bits[:, :3].prod(1), first, noise, first + noise / 2], 1)[:, None]
    labels = task.labeller(features, bits)
    assert [label.split(" ")[-1] for label in labels] == ["100%", "100%", "", "80%"] or labels[2] == ""
    task = subtraction(0)
    x = task.test[0]
    a, b = x.unflatten(1, (2, 31)).argmax(2).unbind(1)
    assert torch.equal((a - b) % 31, task.test[1])
    wave = torch.cos(2 * torch.pi * 3 * (a - b) / 31)
    assert task.labeller(torch.stack([wave, a.float()], 1)[:, None], x) == ["difference 100%", ""]


@pytest.mark.recipe
def test_a_small_run_has_the_estimates_of_another_tool_and_is_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grokking_events, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(grokking_events, "SEEDS", (3,))
    monkeypatch.setattr(grokking_events.run, "__defaults__", (11, 40, 3))
    grokking_events.main(["--folder", str(tmp_path), "--figure", str(tmp_path / "align.png")])
    assert "When test accuracy rises (`accuracy/test`), most steeply at step" in capsys.readouterr().out
    scalars = Run(tmp_path / "seed-3").scalars()
    assert scalars["llc/mean"][0] == scalars["llc/weight_norm"][0] == Run(tmp_path / "seed-3").steps
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(grokking_events.SCALARS)
    assert results["accuracy/test"]["runs"][0]["events"]["born"][0] > 0
    # The other tool changes nothing in the training.
    grokking_events.train(tmp_path / "alone", seed=3, modulus=11, steps=40, per_decade=3)
    alone, beside = (Run(tmp_path / name).graph().info["weights_hash"] for name in ("alone", "seed-3"))
    assert alone == beside
    # What is there already is not trained again.
    monkeypatch.setattr(grokking_events, "run", lambda *_: pytest.fail("again"))
    grokking_events.main(["--folder", str(tmp_path)])


def test_the_learning_coefficient_of_a_regular_model_is_half_the_number_of_its_weights() -> None:
    """The logits are the weights themselves, where their likelihood is largest: of four directions one is flat."""
    n = 20_000
    inputs, targets = torch.ones(n, 1), torch.arange(4).repeat(n // 4)
    model = torch.nn.Linear(1, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    found = learning_coefficient(model, inputs, targets, length=3000, step_size=1e-4)
    # The loss has the curvature 1/4 along the three others, beside which the pull back to the weights is not nothing.
    curvature = n / math.log(n) / 4
    assert found == pytest.approx(3 / 2 * curvature / (curvature + LOCALIZATION), rel=0.15)
    assert learning_coefficient(model, inputs, targets, 50) == learning_coefficient(model, inputs, targets, 50)
    assert not model.weight.any()
