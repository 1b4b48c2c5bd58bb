"""The paper's claims, measured again: the whole in a small setting, and the table of docs/claims.md."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.modular_addition import ModularAdditionTransformer
from recipes.paper.__main__ import Task, main, run, tasks
from recipes.paper.measure import BASES, measure_all
from recipes.paper.networks import cifar10, followed, language_model, modular_addition
from recipes.paper.table import counted_as_published, features_of_published, mean_and_error, report
from recipes.paper.train import Shuffles, logits_of_pairs, train

PAGE = (Path(__file__).parents[1] / "docs" / "claims.md").read_text()


def test_the_readme_shows_what_the_committed_results_say() -> None:
    assert report() in PAGE


def test_logits_of_pairs_are_those_of_the_model() -> None:
    p = 11
    model = ModularAdditionTransformer(p, 16, 2, 32).double()
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    tokens = torch.stack([a, b, torch.full_like(a, p)], 1)
    torch.testing.assert_close(logits_of_pairs(model, a, b), model(tokens), rtol=1e-12, atol=1e-12)
    logits_of_pairs(model, a, b).square().sum().backward()
    fast = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(tokens).square().sum().backward()
    for gradient, parameter in zip(fast, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-10)


def test_batches_go_through_all_pairs() -> None:
    batches = list(Shuffles(10, 4, 7))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(batches[3:6]).tolist()) == list(range(10))


def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    weights = []
    # The third one finds nothing to do.
    for epochs in (1, 2, 2):
        checkpoint = torch.load(train(0, tmp_path, epochs, steps_per_epoch=2), weights_only=True)
        assert checkpoint["global_step"] == checkpoint["optimizer_states"][0]["state"][0]["step"] == 2 * epochs
        weights.append(checkpoint["state_dict"]["transformer.unembed.weight"])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_label_of_a_byte_is_the_next_one() -> None:
    assert followed(torch.tensor([[3, 4, 5]])).tolist() == [[4, 5, -1]]


def test_means_and_errors() -> None:
    # Deviations of 1 from the mean, n - 1 = 1: a standard deviation of 2 ** 0.5, over 2 ** 0.5.
    assert mean_and_error([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_error([0.25], 2, "+") == "+0.25"
    assert mean_and_error([1.0, float("nan")], 1) == "-"


def write(folder: Path, seed: int, lib: int, pca: int | None) -> None:
    """A file of results, as `measure_all` writes it."""

    def one(total: int | None) -> dict[str, Any]:
        named = ("features", "features_required", "effective_edges", "modularity")
        metrics = {metric: {"total": 2.0} for metric in named}
        last = {} if total is None else {"b-to-output": total - 5}
        return {**metrics, "edges_required": {"a-to-b": 5, **last, "total": total}}

    found = {"task": "T", "seed": seed, "bases": {"lib": one(lib), "pca": one(pca)}}
    (folder / f"t_seed{seed}.json").write_text(json.dumps(found))


def test_ratios_are_those_of_the_same_network(tmp_path: Path) -> None:
    write(tmp_path, 0, 10, 20)
    write(tmp_path, 1, 30, 40)
    lines = report(tmp_path).splitlines()
    assert "| T (2) | lib | 2 ± 0 | 2 ± 0 | 20 ± 10 | 2 ± 0 | 2.00 ± 0.00 |" in lines
    assert "| T (2) | lib / pca | 1.00 ± 0.00 | 1.00 ± 0.00 | 0.62 ± 0.12 | 1.00 ± 0.00 | +0.00 ± 0.00 |" in lines
    assert "| T (2) | lib / pca, before the output | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | - | - |" in lines
    assert not any("neuron" in line for line in lines)
    write(tmp_path, 1, 30, None)
    assert "| T (2) | pca | 2 ± 0 | 2 ± 0 | - | 2 ± 0 | 2.00 ± 0.00 |" in report(tmp_path).splitlines()


def test_the_table_has_the_published_numbers() -> None:
    ours = {"edges_required": {"resid_mid-to-resid_post": 7, "total": 7}}
    one = {"seed": 1, "bases": {"lib": ours, "pca": ours}}
    theirs = {"1": {basis: {"edges_required": {"resid_mid": n}} for basis, n in (("lib", 8), ("pca", 9))}}
    row = "| 1 | resid_mid-to-resid_post | 7 | 7 |"
    assert counted_as_published([one], None).splitlines()[-1] == row
    assert counted_as_published([one], theirs).splitlines()[-1] == f"{row} 8 | 9 |"


def test_the_table_has_the_features_of_the_published_networks() -> None:
    lib = {"features": {"a": 5.0, "b": 3.0, "total": 5.0}, "features_required": {"a": 4, "total": 4}}
    one = {"seed": 0, "bases": {"lib": lib, "pca": {**lib, "features_required": {"a": None, "total": None}}}}
    assert features_of_published([one]).splitlines()[-1] == "| 0 | a | 4 of 5 | - of 5 |"
    bare = {"seed": 0, "bases": {"lib": {}, "pca": {}}}  # of an earlier version
    assert len(features_of_published([bare]).splitlines()) == 2


def test_what_is_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LIB_REFERENCE_DIR", raising=False)
    for task in tasks(tmp_path):
        for seed in range(task.seeds):
            path = tmp_path / f"{task.name.replace(' ', '_').lower()}_seed{seed}.json"
            path.write_text(json.dumps({"task": task.name, "seed": seed, "bases": {basis: {} for basis in BASES}}))
    main(["--folder", str(tmp_path / "none"), "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("| network (seeds) | basis |")
    assert not (tmp_path / "none").exists()


@pytest.mark.recipe
def test_all_of_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": rng.integers(0, high, shape).astype(np.uint8)
        for split, n in (("train", 80), ("test", 40))
        for kind, high, shape in (("x", 256, (n, 3, 32, 32)), ("y", 10, n))
    }
    np.savez(tmp_path / "images.npz", **arrays)
    small = [
        Task("Modular addition", 1, partial(modular_addition, folder=tmp_path, epochs=1, steps_per_epoch=2, fitted=150,
                                            scored=20), ("lib", "pca")),
        Task("Language model", 2, partial(language_model, folder=tmp_path, max_steps=3, fitted=2, scored=2)),
        Task("CIFAR-10", 2, partial(cifar10, folder=tmp_path, images=tmp_path / "images.npz", epochs=1)),
    ]  # fmt: skip
    printed = run(small, tmp_path / "results")
    assert printed == report(tmp_path / "results") == run(small, tmp_path / "results")
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert sorted(results) == [
        "cifar-10_seed0", "cifar-10_seed1", "language_model_seed0", "language_model_seed1", "modular_addition_seed0",
    ]  # fmt: skip
    assert {name: list(one["bases"]) for name, one in results.items()} == {
        name: ["lib", "pca"] if name == "modular_addition_seed0" else list(BASES) for name in results
    }
    perceptron = results["cifar-10_seed0"]
    assert (perceptron["scored"], perceptron["score"], perceptron["tolerance"]) == (40, "accuracy", 0.01)
    lib = perceptron["bases"]["lib"]
    assert lib["samples"] == 80
    assert lib["features"]["total"] == lib["features"]["hidden1"] + lib["features"]["hidden2"]
    assert list(lib["edges_required"]) == ["hidden1-to-hidden2", "hidden2-to-output", "total"]
    assert list(lib["features_required"]) == ["hidden1", "hidden2", "total"]
    language = results["language_model_seed0"]
    assert list(language["bases"]["pca"]["edges_required"]) == ["resid0-to-resid2", "resid2-to-resid4", "total"]
    assert language["settings"] == {"sections": ["resid0-to-resid2", "resid2-to-resid4"]}
    # A basis that is missing is measured, and nothing else.
    path = tmp_path / "results" / "cifar-10_seed1.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "bases": {"pca": whole["bases"]["pca"]}}))
    again = json.loads(measure_all(small[2].make(1), tmp_path / "results").read_text())
    assert again["bases"]["pca"] == whole["bases"]["pca"]  # seconds among it
    assert again["bases"]["neuron"]["features_required"] == whole["bases"]["neuron"]["features_required"]
    assert again["bases"]["lib"]["edges_required"] == whole["bases"]["lib"]["edges_required"]
