"""The implementations that benchmarks compare with are correct, and all benchmarks can be collected."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from tests import benchmarks, reference
from tests.benchmarks import plain, subjects
from tests.benchmarks.by_hand import perceptron_edges
from tests.benchmarks.clock import extrapolated
from tests.benchmarks.report import table
from tests.cases import Case


def test_plain_loop_is_the_transcription(case: Case) -> None:
    if case.masks:
        pytest.skip("the plain loop does not support padding")
    a0 = case.first(case.data).detach()
    expected = reference.transcribe(a0, case.sections)
    for l, F in enumerate(case.sections):
        a, mu, C, C_pinv, C_next = (
            expected.activations[l], expected.mean[l], expected.C[l], expected.C_pinv[l], expected.C[l + 1],
        )  # fmt: skip
        torch.testing.assert_close(plain.covariance(a)[0], mu)
        E = plain.edges(F, a, mu, C, C_pinv, C_next)
        assert (E - expected.E[l]).norm() < 1e-8 * expected.E[l].norm()
        counts, counts_next = (torch.ones(x.shape[:2], dtype=torch.bool) for x in expected.activations[l : l + 2])
        M = reference.jacobian_metric(F, a, mu, C_next, counts, counts_next)
        assert (plain.metric(F, a, C_next) - M).norm() < 1e-8 * M.norm()


@pytest.mark.parametrize(
    "subject",
    [lambda: subjects.modular_addition(None), lambda: subjects.language_model(2, 5, n_layers=2, width=16)],
    ids=["modular_addition", "language_model"],
)
def test_chains_are_the_models(subject: subjects.Subject) -> None:
    made = subject()
    activations = made.activations()
    tapped = {}
    for name in made.node_layers[1:]:
        path, _, side = name.partition(":")
        module = made.model if path == "output" else made.model.get_submodule(path)

        def keep(_: object, args: object, output: object, name: str = name, side: str = side) -> None:
            value = args if side else output
            tapped[name] = value[0] if isinstance(value, tuple) else value

        module.register_forward_hook(keep)
    with torch.no_grad():
        made.model(made.data)
    for a, name in zip(activations[1:], made.node_layers[1:], strict=True):
        torch.testing.assert_close(a.reshape(tapped[name].shape), tapped[name], atol=1e-5, rtol=1e-5)


def test_by_hand_is_what_the_library_computes() -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(200, 9).double()
    graph = compute_interaction_graph(model, [x], subjects.PERCEPTRON_LAYERS, rtol=0)
    with torch.no_grad():
        by_hand = perceptron_edges(model, x)
    for E, expected in zip(by_hand, graph.edges.values(), strict=True):
        assert (E - expected).norm() < 1e-9 * expected.norm()


def test_extrapolation_counts_the_setup_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work(rounds: int) -> None:
        nonlocal now
        now += 5 + 2 * rounds

    monkeypatch.setattr("tests.benchmarks.clock.time.process_time", lambda: now)
    assert extrapolated(work, part=3, whole=100) == 5 + 2 * 100


def test_results_are_formatted_as_a_table() -> None:
    one = {"fullname": "a/bench_memory.py::test_peak", "stats": {"min": 12.3456}, "extra_info": {"MiB": 7, "of": "8"}}
    assert table({"benchmarks": [one]}).splitlines()[-1] == "| memory: peak | 12.3 | MiB **7**; of **8** |"


@pytest.mark.parametrize("path", sorted(Path(benchmarks.__file__).parent.glob("bench_*.py")), ids=lambda p: p.stem)
def test_every_benchmark_can_be_collected(path: Path) -> None:
    module = importlib.import_module(f"tests.benchmarks.{path.stem}")
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        names = [mark.args[0] for mark in marks]
        parametrized = {one for name in names for one in (name.split(",") if isinstance(name, str) else name)}
        fixtures = {"benchmark", "monkeypatch", "published", "tmp_path", *parametrized}
        assert set(inspect.signature(test).parameters) <= fixtures
