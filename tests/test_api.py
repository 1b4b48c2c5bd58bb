"""Arguments of `compute_interaction_graph`, and its progress bar."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from tqdm.auto import tqdm

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.errors import ActivationError


@pytest.mark.parametrize(
    "options", [{}, {"basis": "pca"}, {"final_metric": "fisher"}, {"memory_limit": 0.02}], ids=lambda o: str(o)
)
def test_progress_bar_ends_at_its_total(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr("lib_lightning.api.tqdm", Bar)
    # The first node layer is so wide that its basis needs a second pass over the batches.
    model, x = nn.Sequential(nn.Linear(600, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(30, 600)
    heard = []
    with on_phase(heard.append):
        compute_interaction_graph(model, x.split(10), ["input", "1", "output"], progress=True, **options)
    (bar,) = bars
    assert bar.n == bar.total
    assert bar.desc == "standard errors: "
    assert {"moments", "basis of input", "edges from 1 to output"} <= set(heard), "other listeners are not replaced"


def test_no_progress_bar_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    compute_interaction_graph(nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
    assert capsys.readouterr() == ("", "")


def test_batches_may_be_an_iterator() -> None:
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    once = compute_interaction_graph(model, iter(x.split(3)), ["input", "output"], progress=True)
    assert once.info["n_samples"] == 8
    assert torch.equal(
        once.edges["input", "output"],
        compute_interaction_graph(model, x.split(3), ["input", "output"]).edges["input", "output"],
    )


def test_a_single_tensor_is_not_a_list_of_batches() -> None:
    with pytest.raises(TypeError, match=r"For a single batch, write \[batch\]"):
        compute_interaction_graph(nn.Linear(2, 2), torch.randn(5, 2), ["input", "output"])
    with pytest.raises(TypeError, match=r"dtype is a floating-point type such as torch\.float64"):
        compute_interaction_graph(nn.Linear(2, 2), [torch.randn(5, 2)], ["input", "output"], dtype="float64")


def test_there_must_be_samples() -> None:
    with pytest.raises(ActivationError, match="no samples"):
        compute_interaction_graph(nn.Linear(2, 2), [], ["input", "output"])
