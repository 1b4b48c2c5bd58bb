"""Attributions: their exact identities, and where they are kept. Their values are tested with those of the edges."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lib_lightning import InteractionGraph
from lib_lightning.errors import LIBError
from tests.algorithm.test_build import close, graph_of
from tests.conftest import CASES

# Among them one with four positions before and one after. The convolution pads with zeros: what it makes of the mean
# depends on the position.
AFFINE = [(name, l) for name, case in sorted(CASES.items()) for l in sorted(case.affine) if (name, l) != ("conv", 0)]


def assert_sums_to_the_variance(graph: InteractionGraph, before: str, after: str, rtol: float = 1e-8) -> None:
    expected = graph.bases[after].importance
    assert (graph.attributions[before, after].sum(1) - expected).abs().max() <= rtol * expected.max()


@pytest.mark.parametrize("options", [{}, {"final_metric": "fisher"}], ids=str)
@pytest.mark.parametrize(("name", "l"), AFFINE)
def test_attributions_of_an_affine_section_sum_to_the_variance(name: str, l: int, options: dict[str, object]) -> None:
    graph = graph_of(CASES[name], **options)
    assert_sums_to_the_variance(graph, *graph.node_layers[l : l + 2])


def test_with_integrated_gradients_in_any_section_of_one_position() -> None:
    """The interactions along the path from the mean are the whole difference to the features at the mean."""
    case = CASES["mlp_tanh"]
    graph = graph_of(case, integration_steps=20)
    for section in graph.edges:
        assert_sums_to_the_variance(graph, *section)
    at_the_activations = graph_of(case).attributions["input", "2:input"].sum(1)
    assert not close(at_the_activations, graph_of(case).bases["2:input"].importance)


def test_attributions_are_kept_in_files_and_in_networkx(tmp_path: Path) -> None:
    graph = graph_of(CASES["mlp_gelu"])
    assert graph.attributions.keys() == graph.attribution_errors.keys() == graph.edges.keys()
    graph.save(tmp_path / "file")
    loaded = InteractionGraph.load(tmp_path / "file")
    for (before, j), (after, i), known in loaded.to_networkx().edges(data=True):
        assert known["attribution"] == float(graph.attributions[before, after][i, j])
    torch.testing.assert_close(loaded.attribution_errors, graph.attribution_errors, rtol=0, atol=0)
    loaded.attributions = {}  # as in files of earlier versions
    assert all("attribution" not in known for *_, known in loaded.to_networkx().edges(data=True))
    with pytest.raises(LIBError, match=r"no attributions.*earlier version.*Compute it again"):
        loaded.plot(signs=True)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "interactions.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/interactions.md", "exec"), {"__name__": "page"})
    assert (tmp_path / "signs.png").exists()
