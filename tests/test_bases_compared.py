"""Bases of language models compared: the recipe in its quick mode, its parts against the library, and its page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.ablation import EdgeAttack, log_likelihood, node_ablation_curve
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.dictionaries.topk_training import TopKSettings
from lib_lightning.interventions.significance import samples_needed
from lib_lightning.metrics.functional import effective_edges
from lib_lightning.model.instrumented import model_session
from recipes.bases_compared.__main__ import cell_path, measure, write
from recipes.bases_compared.fit import Fit
from recipes.bases_compared.measure import COLUMNS, Measurements, effective_with_error
from recipes.bases_compared.subjects import ATTACKED, LARGE_SECTIONS, Subject, small
from recipes.bases_compared.table import against_pca, by_section, effective_by_section, overview, read, report
from recipes.features_required import NodeAblations, features_required
from recipes.language_model import GPTNeo
from recipes.paper.networks import followed
from recipes.pretrained_lm import QUARTERS

PAGE = (Path(__file__).parents[1] / "docs" / "bases_compared.md").read_text()


@pytest.fixture
def subject() -> Subject:
    """An untrained network, all of whose pieces are used for everything."""
    torch.manual_seed(0)
    model = GPTNeo(vocabulary=11, n_positions=6, n_layers=4, d_model=8, n_heads=2, d_mlp=16)
    for parameter in model.parameters():
        parameter.data *= 8
    taps = ("h.1.ln_1", "h.2.ln_1", "h.3.ln_1", "ln_f")
    layers = [NodeLayer([f"transformer.{tap}:input"], name=name) for tap, name in zip(taps, "abcd", strict=True)]
    tokens = torch.randint(0, 11, (40, 6))
    return Subject(
        "Tiny", 0, model.double().eval(), layers, fit=tokens, scored=tokens[:10], tested=tokens[:10], named=tokens,
        tokenizer=None,
        n_metric=40, n_probes=None, n_pushed=None, settings=TopKSettings(16, 2), steps=8,
        tolerance=0.01, search="scan", causal=2, attacked=5, batch_size=20,
    )  # fmt: skip


def test_bases_are_those_of_the_library_on_the_same_samples(subject: Subject, tmp_path: Path) -> None:
    fit = Fit(subject, tmp_path)
    with model_session(fit.instrumented):
        for kind, final in (("lib", None), ("fisher", "fisher"), ("pca", None), ("neuron", None)):
            exact = compute_interaction_graph(
                subject.model, subject.batches(subject.fit), subject.node_layers,
                "lib" if kind == "fisher" else kind, effort="exact", final_metric=final,
                final_basis="neuron" if kind == "neuron" else "auto",
            )  # fmt: skip
            graph = fit.graph(kind)
            for name, basis in exact.bases.items():
                torch.testing.assert_close(graph.bases[name].importance, basis.importance, rtol=1e-6, atol=1e-8)
            for pair, E in exact.edges.items():
                torch.testing.assert_close(graph.edges[pair], E, rtol=1e-6, atol=1e-8)


def test_rotations_have_the_subspace_of_the_lib(subject: Subject, tmp_path: Path) -> None:
    fit = Fit(subject, tmp_path)
    with model_session(fit.instrumented):
        for kind in ("random", "ica"):
            for lib, basis in zip(fit.bases("fisher"), fit.bases(kind), strict=True):
                projections = [one.to_features @ one.from_features for one in (lib, basis)]
                torch.testing.assert_close(*projections, rtol=1e-6, atol=1e-6)


def test_ablations_are_those_of_the_library(subject: Subject, tmp_path: Path) -> None:
    fit = Fit(subject, tmp_path)
    batches = subject.batches(subject.scored)
    with model_session(fit.instrumented):
        graph = fit.graph("pca")
        ablations = NodeAblations(fit.instrumented, batches, log_likelihood)
        for index, (name, basis) in enumerate(graph.bases.items()):
            found = features_required(
                lambda kept, i=index, b=basis: ablations.changes(i, b, kept), basis.importance, 0.1
            )
            curve = node_ablation_curve(
                subject.model, batches, graph, log_likelihood, name, [int(k) for k in found["curve"]]
            )
            for count, score in curve.items():
                expected = score - ablations.unablated
                assert found["curve"][str(count)]["change"] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_scores_with_as_many_features_are_compared_piece_by_piece(subject: Subject, tmp_path: Path) -> None:
    fit = Fit(subject, tmp_path)
    with model_session(fit.instrumented):
        measurements = Measurements(fit)
        found = measurements.column("against_pca", "lib")
        counts = {name: one["count"] for name, one in measurements.column("features", "pca")["layers"].items()}
        batches = subject.batches(subject.compared)
        for name, one in found["layers"].items():
            k = one["features"]
            assert k == (counts[name] or 8)
            means = [
                node_ablation_curve(subject.model, batches, fit.graph(kind), log_likelihood, name, [k])[k]
                for kind in ("lib", "pca")
            ]
            assert one["change"] == pytest.approx(means[0] - means[1], rel=1e-3, abs=1e-9)
        assert one == {"features": k, "change": 0.0, "error": 0.0}, "the last basis of the LIB is that of PCA"
        assert measurements.column("against_pca", "pca") is None
    by_kind = {"lib": [{"features": measurements.column("features", "lib"), "against_pca": found}], "pca": [{}]}
    (table,) = against_pca(by_kind)
    assert table.count(" ± ") == 4
    assert "PCA |" not in table


def test_all_latents_and_the_error_are_the_activations(subject: Subject, tmp_path: Path) -> None:
    fit = Fit(subject, tmp_path)
    with model_session(fit.instrumented):
        basis = fit.bases("sae")[1]
        assert isinstance(basis, DictionaryBasis)
        ablations = NodeAblations(fit.instrumented, subject.batches(subject.scored), log_likelihood)
        is_kept = torch.ones(basis.n_features, dtype=torch.bool)
        assert ablations.changes(1, basis, is_kept).abs().max() < 1e-6
        is_kept[basis.error] = False
        # Without it, activations are what the autoencoder reconstructs.
        sae = fit.autoencoder(1).double()
        a = fit.activations_on(subject.scored)[1]
        output = fit.instrumented.output(subject.batches(subject.scored)[0], {1: sae(a)})
        batch = (subject.scored, followed(subject.scored))
        expected = log_likelihood(output, batch) - log_likelihood(subject.model(subject.scored), batch)
        torch.testing.assert_close(ablations.changes(1, basis, is_kept), expected, rtol=1e-5, atol=1e-5)


def test_edges_required_of_one_section_are_attacked_once(subject: Subject, tmp_path: Path) -> None:
    one = replace(subject, node_layers=renamed(subject.node_layers), attack=EdgeAttack("pgd", n_steps=1, n_starts=1))
    fit = Fit(one, tmp_path)
    with model_session(fit.instrumented):
        measurements = Measurements(fit)
        found = measurements.column("edges_required", "pca", ATTACKED)
        edges = measurements.column("edges", "pca")
        attacked = measurements.column("attacked", "pca")
    (section,), (withstood,) = found["sections"].values(), attacked["sections"].values()
    assert "worst" not in withstood
    assert withstood["count"] >= section["count"]
    assert section["worst"] <= section["dropped"]
    assert section["dropped"] >= -one.tolerance
    by_kind = {"pca": [{"edges": edges, "edges_required": found}]}
    (table,) = by_section(by_kind)
    assert table.count(f"{section['worst']:+.3f} ±") == 1
    assert f"| {section['count']:,} (" in table
    assert "edges required" not in overview(by_kind), "not all sections were counted"


def test_effective_edges_of_latents_are_those_without_the_error(subject: Subject, tmp_path: Path) -> None:
    fit = Fit(subject, tmp_path)
    with model_session(fit.instrumented):
        measurements = Measurements(fit)
        found, of_pca = measurements.column("edges", "sae"), measurements.column("edges", "pca")
        graph = fit.graph("sae")
    for pair, E in graph.edges.items():
        section = found["sections"]["-to-".join(pair)]
        latents = E[:-1, :-1]
        assert [graph.labels[name][-1] for name in pair] == ["error", "error"]
        assert section["effective"] == pytest.approx(float(effective_edges(E)))
        assert section["of latents alone"]["effective"] == pytest.approx(float(effective_edges(latents)))
        assert section["error's share"] == pytest.approx(float(1 - latents.sum() / E.sum()))
    table = effective_by_section({"pca": [{"edges": of_pca}], "sae": [{"edges": found}]})
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| PCA", "| SAE", "| SAE, latents alone"]


def test_the_bias_of_effective_edges_is_found_by_the_jackknife() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(8, 2, generator=generator, dtype=torch.float64) + 0.1
    mean = groups.mean(0)
    without = (groups.sum(0) - groups) / 7
    found = effective_with_error(torch.diag(mean), [torch.diag(one) for one in without])
    each = torch.stack([torch.as_tensor(effective_edges(torch.diag(one))) for one in without])
    assert found["bias"] == pytest.approx(7 * float(each.mean() - effective_edges(torch.diag(mean))))
    assert found["error"] == pytest.approx(float((7 / 8 * (each - each.mean()).square().sum()).sqrt()))
    # Edges that differ between groups by chance are fewer than their expectations would be.
    assert found["bias"] < 0
    alone = effective_with_error(torch.eye(3), torch.empty(0))
    assert alone == {"effective": pytest.approx(3.0), "error": None, "bias": None}


def renamed(layers: Sequence[NodeLayer]) -> list[NodeLayer]:
    """The same node layers with the names of the recipe."""
    return [replace(layer, name=name) for layer, name in zip(layers, QUARTERS, strict=True)]


def test_number_of_features_and_its_bounds() -> None:
    noise = torch.tensor([-1.0, 1.0])
    found = features_required(lambda kept: -(~kept).sum() + noise, torch.arange(10.0), 3.5)
    # The standard error of the mean of two values that differ by 2 is 1.
    assert (found["count"], found["low"], found["high"]) == (7, 6, 8)
    always = features_required(lambda kept: -(~kept).sum() + noise, torch.arange(10.0), 3.5, always=torch.tensor([0]))
    assert always["count"] == 6
    assert features_required(lambda kept: noise - 9, torch.arange(3.0), 1.0)["count"] is None


@pytest.mark.recipe
def test_recipe_in_its_quick_mode(tmp_path: Path) -> None:
    bases, results = ("fisher", "sae"), tmp_path / "results"
    measure(lambda: small(0, tmp_path, quick=True), "Small", 0, tmp_path, results, bases)
    assert len(list(results.iterdir())) == len(COLUMNS) * len(bases)
    (lib,), (sae,) = (read(results)["Small"][kind] for kind in bases)
    assert lib["features"]["layers"]["end"]["features"] <= 32
    assert sae["features"]["layers"]["end"]["features"] <= 64
    for one in (lib, sae):
        by_ablation, by_descent = (one[name]["sections"]["middle-to-three_quarters"] for name in COLUMNS[-2:])
        at_random = one["attacked"]["random"]["middle-to-three_quarters"]
        assert by_ablation["count"] <= at_random["count"] <= by_ablation["edges"]
        assert by_ablation["count"] <= by_descent["count"] <= by_ablation["edges"]
    assert re.search(r"^\| SAE \|", report(results), re.MULTILINE)
    # What is there is not measured again.
    measure(lambda: pytest.fail("nothing is missing"), "Small", 0, tmp_path, results, bases)


def test_sections_have_files_of_their_own(tmp_path: Path) -> None:
    for section in LARGE_SECTIONS[:2]:
        found = {"sections": {"-to-".join(section): {"count": 3}}, "samples": 2}
        path = cell_path(tmp_path, "A", 0, "edges_required", "pca", section)
        write(path, {"network": "A", "seed": 0, "basis": "pca", "edges_required": found})
    (pca,) = read(tmp_path)["A"]["pca"]
    assert [*pca["edges_required"]["sections"]] == ["-to-".join(section) for section in sorted(LARGE_SECTIONS[:2])]
    assert pca["edges_required"]["samples"] == 2


def too_small(basis: str, part: str | None = None) -> int:
    """By how many percent effective edges of SmolLM2 are too small by their bias."""
    sections = read()["SmolLM2-135M"][basis][0]["edges"]["sections"].values()
    found = [x if part is None else x[part] for x in sections]
    bias = sum(x["bias"] for x in found)
    return round(-100 * bias / (sum(x["effective"] for x in found) - bias))


def test_what_the_page_says_of_biases() -> None:
    text = " ".join(PAGE.split())
    found = [too_small(kind) for kind in ("lib", "fisher", "output", "pca")]
    assert f"{min(found)} to {max(found)}% too small in LIB and PCA, {too_small('neuron')}% in neurons" in text
    assert f"{too_small('random')}% in a random rotation and {too_small('ica')}% in ICA" in text
    assert f"{too_small('sae')}% with latents (of latents alone {too_small('sae', 'of latents alone')}%)" in text


def test_what_the_page_says_of_features_with_edges() -> None:
    def percent(*kinds: str) -> str:
        sections = [x for kind in kinds for x in read()["SmolLM2-135M"][kind][0]["edges"]["sections"].values()]
        found = [100 * x["with edges"] for x in sections]
        return f"{min(found):.0f} to {max(found):.0f}%"

    text = " ".join(PAGE.split())
    assert f"{percent('lib', 'fisher', 'output', 'pca')} of the features of a section have edges" in text
    assert f"({percent('neuron', 'ica', 'random')} of neurons, ICA and a random rotation)" in text
    assert f"and the error, 256 were pushed, and {percent('sae')} have edges" in text


def test_what_the_page_says_of_names_and_causal_features() -> None:
    text, found = " ".join(PAGE.split()), read()["SmolLM2-135M"]

    def important(*kinds: str) -> str:
        shares = [x["importance"] for kind in kinds for x in found[kind][0]["names"]["layers"].values()]
        return f"{min(shares):.0%} to {max(shares):.0%}".replace("%", "", 1)

    assert f"has a name in SmolLM2, {important('lib', 'pca')} of it" in text
    assert f"and in a random rotation mostly not, {important('random')}." in text
    assert found["ica"][0]["names"]["layers"]["end"]["named"] == 23
    assert samples_needed(80, 0.05) == 14
    for kind, (first, *_) in found.items():
        assert not sum(x["significant"] for x in first["causal"]["layers"].values())
        assert first["causal"]["samples"] == (12 if kind == "output" else 24)

    def largest(kind: str) -> int:
        return sum(x["significant"] for x in found[kind][0]["largest_causal"]["layers"].values())

    of_libs = f"{largest('lib')} in the LIB ({largest('fisher')} with the end by the Fisher metric)"
    assert f"{largest('pca')} of 80 do in PCA, {of_libs}, {largest('neuron')} among neurons" in text
    others = f"{largest('sae')} among latents, {largest('ica')} in ICA and {largest('random')} in a random rotation"
    assert others in text
    of_latents = found["sae"][0]["largest_causal"]["layers"]
    assert of_latents["middle"]["significant"] == of_latents["three_quarters"]["significant"] == 0


def test_what_the_page_says_of_edges_between_latents() -> None:
    text, found = " ".join(PAGE.split()), read()["SmolLM2-135M"]
    required = [found["sae"][0]["edges_required"]["sections"]["-to-".join(pair)] for pair in LARGE_SECTIONS[1:]]
    a, b, c = (one["count"] / 1e6 for one in required)
    assert f"{a:.1f} million of {required[0]['edges'] / 1e6:.1f} are required from a quarter to a half" in text
    assert f"and {b:.1f} million from there to three quarters" in text
    assert f"and {c:.1f} million in the last section" in text
    known = found["sae"][0]["edges"]["sections"]["-to-".join(LARGE_SECTIONS[-1])]
    assert required[-1]["low"] < known["with edges"] * known["edges"] < required[-1]["count"]
    for kind in ("lib", "pca"):
        sections = found[kind][0]["edges_required"]["sections"]
        shares = [x["count"] / x["edges"] for x in (sections["-to-".join(pair)] for pair in LARGE_SECTIONS[1:])]
        assert 0.15 < shares[0] < 0.19
        assert 0.15 < shares[1] < 0.19
        assert shares[2] < 0.5


def test_what_the_page_says_of_edges_required_of_smollm2() -> None:
    text, found = " ".join(PAGE.split()), read()["SmolLM2-135M"]

    def counts(kind: str) -> list[int]:
        sections = found[kind][0]["edges_required"]["sections"]
        return [sections["-to-".join(pair)]["count"] for pair in LARGE_SECTIONS]

    lib, fisher, pca, neuron = (round(sum(counts(kind)), -3) for kind in ("lib", "fisher", "pca", "neuron"))
    assert f"in all {lib:,} ({fisher:,} with the end by the Fisher metric) and {pca:,} of 1.3 million" in text
    assert f"Neurons require {neuron:,} of all 1.3 million, twice as many as PCA" in text
    assert [round(count / 331776, 1) for count in counts("neuron")[:3]] == [0.9, 0.6, 0.6]
    assert [round(count / 331776, 1) for count in counts("random")] == [1.0, 0.9, 1.0, 1.0]


def test_what_the_page_says_of_attacks_on_the_small_model() -> None:
    def counted(seeds: Sequence[dict[str, Any]], column: str, part: str = "sections") -> float:
        return sum(one[column][part]["-to-".join(ATTACKED)]["count"] for one in seeds) / len(seeds)

    more, by_descent = [], {}
    for kind, seeds in read()["Language model"].items():
        more.append(counted(seeds, "attacked", "random") - counted(seeds, "edges_required"))
        by_descent[kind] = counted(seeds, "attacked")
        assert by_descent[kind] > counted(seeds, "attacked", "random")
    assert 0 <= min(more) <= max(more) <= 9
    assert abs(by_descent["lib"] - by_descent["pca"]) < 10
    assert max(by_descent["fisher"], by_descent["output"]) < 784


def test_no_number_of_edges_of_smollm2_withstands_an_attack() -> None:
    found = read()["SmolLM2-135M"]
    for kind in ("lib", "pca"):
        section = found[kind][0]["attacked"]["sections"]["-to-".join(ATTACKED)]
        assert section["count"] == section["low"] == section["edges"]
        alone = found[kind][0]["edges_required"]["sections"]["-to-".join(ATTACKED)]
        assert alone["high"] < 0.21 * alone["edges"]


def test_the_control_differs_in_other_sections_than_the_trained_model() -> None:
    def differences(network: str) -> list[float]:
        lib, pca = (read()[network][kind][0]["edges"]["sections"] for kind in ("lib", "pca"))
        return [pca["-to-".join(pair)]["effective"] - lib["-to-".join(pair)]["effective"] for pair in LARGE_SECTIONS]

    trained, control = differences("SmolLM2-135M"), differences("SmolLM2-135M with new weights")
    assert trained[2] > 0.8 * sum(trained)
    assert trained[0] < 0
    assert control[0] > 0.95 * sum(control)
    assert abs(control[2]) < 100


def test_the_page_shows_what_the_committed_results_say() -> None:
    assert f"<!-- tables -->\n{report()}\n<!-- end of tables -->" in PAGE
