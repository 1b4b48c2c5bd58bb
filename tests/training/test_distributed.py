"""Several processes: the result of one process, no deadlocks, and files written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.interventions import feature_effects
from lib_lightning.training.weights import FINAL, TRAINED
from tests.rendered import check_rows
from tests.two_processes import OTHERS, RUNS, Labelled, label_logit, labels_of, samples

ROOT = Path(__file__).parents[2]
# Number of samples, their width, and those that each process computes on.
SAMPLES: dict[str, tuple[int, int, list[int]]] = {
    "repeated": (71, 5, [36, 35]),
    "float32": (71, 5, [36, 35]),
    "few": (33, 5, [17, 16]),
    "one_sample_repeated": (3, 5, [2, 1]),
    "wide": (71, 600, [36, 35]),
    "uneven": (53, 5, [40, 13]),
    "empty_first": (30, 5, [0, 30]),
    "empty_last": (30, 5, [30, 0]),
    "own": (50, 5, [26, 24]),
    "fails": (71, 5, [36, 35]),
    "memory": (71, 5, [36, 35]),
    "probes": (71, 5, [36, 35]),
    "budget": (71, 5, [36, 35]),
    "causal": (71, 5, [40, 31]),
    "causal_empty": (71, 5, [0, 71]),
    "fully_sharded": (71, 5, [36, 35]),
    "tensor_parallel": (71, 5, [71, 71]),
    **dict.fromkeys(OTHERS, (71, 5, [36, 35])),
}

# Where only some of the samples are taken: of how many.
RUNS_ON = {"few": 71, "own": 71}


def torchrun(script: str, folder: Path) -> str:
    """Run a script on two processes; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of all runs; that there is one says that no process waited for ever."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, torchrun("tests/two_processes.py", folder)


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / name / f"process-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"probes"}))
def test_two_processes_give_the_result_of_one(name: str, runs: tuple[Path, str]) -> None:
    folder, _ = runs
    n, d, counts = SAMPLES[name]
    first, second = results(folder, name)
    assert [first["count"], second["count"]] == counts
    net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 3))
    net.load_state_dict(first["weights"])
    graph = InteractionGraph.load(folder / name / "lib" / "final.safetensors")
    layers = [layer.removeprefix("net.") for layer in graph.node_layers]
    basis = RUNS[name][1].get("basis", "lib")
    alone = compute_interaction_graph(
        net, [samples(RUNS_ON.get(name, n), d)[:n]], layers, basis=basis, dtype=torch.float64
    )
    assert graph.info["n_samples"] == n
    assert graph.info["weights"] == (FINAL if name in OTHERS else TRAINED)
    # Activations and gradients in float32 are rounded to 6e-8, differently in batches of another size; edges hold
    # their fourth power.
    tolerance = 1e-10 if "dtype" not in RUNS[name][1] else 1e-5
    for one, expected in zip(graph.bases.values(), alone.bases.values(), strict=True):
        assert (one.importance - expected.importance).abs().max() < tolerance * expected.importance.max()
    for E, expected_E in zip(graph.edges.values(), alone.edges.values(), strict=True):
        assert (E - expected_E).abs().max() < tolerance * expected_E.max()


@pytest.mark.parametrize("name", sorted(RUNS))
def test_both_processes_have_the_same_results(name: str, runs: tuple[Path, str]) -> None:
    first, second = results(runs[0], name)
    # By default one at each of the 6 steps and before, else after every third one, or after every second one where the
    # settings say so. With a whole copy of the data on each process, there are 12 steps.
    expected = {"repeated": 7, "wide": 4, "empty_first": 4, "tensor_parallel": 5}.get(name, 3)
    assert first["snapshots"] == second["snapshots"] == expected
    assert all(torch.equal(a, b) for a, b in zip(first["edges"], second["edges"], strict=True))
    # What has changed since the snapshot before is unknown where there was none, and NaN is not equal to itself.
    numbers = [{k: str(v) for k, v in r["metrics"].items() if k != "lib/seconds"} for r in (first, second)]
    assert numbers[0] == numbers[1]
    assert first["metrics"]["lib/samples"] == SAMPLES[name][0]


@pytest.mark.parametrize("name", sorted(RUNS))
def test_files_are_written_once(name: str, runs: tuple[Path, str]) -> None:
    folder = runs[0] / name / "lib"
    assert (
        len(list(folder.glob("snapshots/*")))
        == len(list(folder.glob("figures/*")))
        == results(runs[0], name)[0]["snapshots"]
    )
    held_out = ["held-out-"] if RUNS[name][1].get("causal_every") else []
    assert sorted(p.name for p in folder.glob("samples/*")) == [
        f"{kind}{k}-of-2.pt" for kind in ("", *held_out, "reference-") for k in (1, 2)
    ]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"empty_first"}))
def test_samples_of_both_processes_are_rendered(name: str, runs: tuple[Path, str]) -> None:
    layer = InteractionGraph.load(runs[0] / name / "lib" / "final.safetensors").node_layers[0]
    assert len(check_rows(runs[0] / name / "lib", layer)) == 1


def test_failure_on_one_process_is_reported_by_both(runs: tuple[Path, str]) -> None:
    _, output = runs
    assert output.count("ValueError: this process fails") == 1
    assert output.count("PeerProcessError: Process 1 has failed; its own message says why") == 1
    assert output.count("failed and is skipped") == 2, "by no other process"


def test_both_processes_skip_what_the_first_one_cannot_afford(runs: tuple[Path, str]) -> None:
    folder, output = runs
    steps = [int(path.stem.removeprefix("step-")) for path in (folder / "budget" / "lib" / "snapshots").iterdir()]
    # Two seconds each, for 1.5 of each second of training: those so far, one more, and the last one.
    assert sorted(steps) == [0, 4, 6]
    first, second = results(folder, "budget")
    assert first["n_skipped"] == second["n_skipped"] == 4
    assert first["metrics"]["lib/overhead"] == second["metrics"]["lib/overhead"] == 1
    assert output.count("is skipped, as are later ones") == 1
    assert output.count("took 6 s, beside 6 s of training; 4 were skipped to stay below max_overhead=1.5") == 1


def test_probes_of_two_processes_estimate_the_same_metric(runs: tuple[Path, str]) -> None:
    graphs = [InteractionGraph.load(runs[0] / name / "lib" / "final.safetensors") for name in ("repeated", "probes")]
    exact, sampled = (graph.bases["net.0:input"].importance for graph in graphs)
    assert 0 < (exact.sum() - sampled.sum()).abs() / exact.sum() < 0.2


@pytest.mark.parametrize(("name", "score"), [("causal", None), ("causal_empty", label_logit)])
def test_features_matter_to_two_processes_as_to_one(name: str, score: Any, runs: tuple[Path, str]) -> None:
    first, second = results(runs[0], name)
    graph = InteractionGraph.load(runs[0] / name / "lib" / "final.safetensors")
    model, x = Labelled(None), samples(71)
    model.net.load_state_dict(first["weights"])
    assert (graph.info["causal"]["samples"], graph.info["causal"]["features"]) == (71, 11)
    expected = feature_effects(model, [(x, labels_of(x))], graph, score, dtype=torch.float64)
    found = {
        feature: (float(effects.changes[j]), float(effects.errors[j]), bool(effects.significant[j]))
        for layer, effects in graph.effects.items()
        for j, feature in enumerate(graph.feature_ids(layer))
    }
    assert found.keys() == expected.keys()
    for feature, (change, error, significant) in found.items():
        assert (change, error) == pytest.approx((expected[feature].change, expected[feature].error), abs=1e-10)
        assert significant == expected[feature].significant
    count = sum(effect.significant for effect in expected.values())
    assert 0 < count < len(expected)
    assert first["causal"] == second["causal"] == count


def test_two_processes_obey_sigterm_in_the_middle_of_a_snapshot(tmp_path: Path) -> None:
    torchrun("tests/stopped_processes.py", tmp_path)
    for found in (torch.load(tmp_path / f"process-{rank}.pt") for rank in (0, 1)):
        assert found["kind"] == "SIGTERMException"
        assert found["seconds"] < 2
        assert (found["snapshots"], found["steps"]) == (0, 0)
        assert found["same"]
        assert all(found["modes"]), "in training mode, as before"
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.tmp"))
