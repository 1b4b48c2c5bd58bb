"""Notes about a single position, or a single feature, that has nearly all of the variance of a node layer."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_lightning import LIBCallback, NodeLayer, compute_interaction_graph
from lib_lightning.algorithm.dominance import PositionVariance
from lib_lightning.model.capture import CapturedLayer


def captured(a: Tensor, mask: Tensor | None = None, layer: NodeLayer | None = None) -> CapturedLayer:
    return CapturedLayer(layer or NodeLayer("x"), (a,), (a,), (0,), mask, mask)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), S=st.integers(2, 5), place=st.integers(0, 4), size=st.sampled_from([0.0, 3.0, 1e4]),
    offset=st.sampled_from([0.0, 1e4]), masked=st.booleans(), n_processes=st.integers(1, 3),
)  # fmt: skip
def test_against_variances_without_each_position(
    seed: int, S: int, place: int, size: float, offset: float, masked: bool, n_processes: int
) -> None:
    """In any batches and on any processes, with any mean, and among the valid positions of each sample."""
    generator = torch.Generator().manual_seed(seed)
    a = offset + torch.randn(12, S, 3, generator=generator, dtype=torch.float64)
    a[:, place % S] += size * torch.tensor([1.0, -2.0, 0.5])
    mask = torch.rand(12, S, generator=generator) < 0.8 if masked else None
    places = torch.arange(S).expand(12, S) if mask is None else mask.long().cumsum(1) - 1
    kept = torch.ones(12, S, dtype=torch.bool) if mask is None else mask

    def scatter(chosen: Tensor) -> float:
        rows = a[chosen]
        return float((rows - rows.mean(0)).square().sum()) if len(rows) else 0.0

    total = scatter(kept)
    found = [p for p in range(S) if total and scatter(kept & (places != p)) < 0.1 * total]
    whole = [PositionVariance() for _ in range(n_processes)]
    for index, batch in enumerate(a.split(2)):
        whole[index % n_processes].update(captured(batch, None if mask is None else mask[2 * index : 2 * index + 2]))
    merged = PositionVariance.merged([part.totals for part in whole])
    expected = found[0] if len(found) == 1 else None
    assert merged.dominant() == expected
    if n_processes == 1:
        assert whole[0].dominant() == expected


class Tokens(nn.Module):
    """Blocks of a residual stream in which one position is far from the others, as in pretrained language models."""

    def __init__(self, place: int | None, size: float = 300.0) -> None:
        super().__init__()
        self.embed, self.place, self.size = nn.Embedding(11, 8), place, size
        self.norm, self.mlp, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.sink = nn.Parameter(torch.randn(8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.place is not None:
            at = torch.zeros(x.shape[1]).index_fill(0, torch.tensor([self.place % x.shape[1]]), self.size)
            x = x + at[:, None] * self.sink
        x = x + torch.tanh(self.mlp(self.norm(x)))
        return self.head(self.norm(x))


TOKENS = torch.randint(0, 11, (64, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("place", "setting"), [(0, "1"), (-1, "-1"), (2, "[2]"), (None, None)])
def test_a_position_is_named_with_the_setting_that_leaves_it_out(place: int | None, setting: str | None) -> None:
    torch.manual_seed(0)
    model, layers = Tokens(place), ["embed", "norm#1:input", "output"]
    notes = compute_interaction_graph(model, TOKENS.split(16), layers).info["notes"]
    if place is None:
        assert notes == []
        return
    (note,) = notes
    assert note.startswith(f"Position {place % 6} of the samples has more than 90% of the variance of 'norm#1:input'")
    assert note.endswith(f"skip_positions={setting} leaves it out.")
    skip = eval(setting)
    assert compute_interaction_graph(model, [TOKENS], layers, skip_positions=skip).info["notes"] == []


def test_a_second_position_is_added_to_the_setting() -> None:
    torch.manual_seed(0)
    layers = ["embed", "norm#1:input", "output"]
    (note,) = compute_interaction_graph(Tokens(1), [TOKENS], layers, skip_positions=1).info["notes"]
    assert note.startswith("Position 1 of the samples")
    assert note.endswith("skip_positions=2 leaves it out.")


def test_a_feature_that_is_a_matter_of_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 17))
    x = torch.randn(200, 16)
    assert compute_interaction_graph(model, [x], ["input", "1", "output"], basis="pca").info["notes"] == []
    x[:, 3] *= 1000
    note, *_ = compute_interaction_graph(model, [x], ["input", "1", "output"], basis="pca").info["notes"]
    assert note.startswith("One feature has more than 90% of the importance of 'input'. If that is a matter of scale")


def test_a_result_of_one_dimension_is_said_once() -> None:
    """Everything before it has one important feature, too, as it should."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 17))
    with torch.no_grad():
        model[2].weight[0] *= 1000
    (note,) = compute_interaction_graph(model, [torch.randn(200, 16)], ["input", "1", "output"]).info["notes"]
    assert note.startswith("One feature has more than 90% of the variance of 'output', the last node layer")
    one = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    assert compute_interaction_graph(one, [torch.randn(200, 16)], ["1", "output"]).info["notes"] == []


class Training(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Tokens(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor) -> None:
        self.log("val", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_the_log_says_it_once_for_a_node_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(TOKENS, 16)
    layers = ["net.embed", "net.norm#1:input", "output"]
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[LIBCallback(layers, every_n_validations=1)], accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(Training(), data, data)
    said = [record.getMessage() for record in caplog.records if "more than 90%" in record.getMessage()]
    assert len(said) == 1
    assert "'net.norm#1:input'" in said[0]
    assert len(said[0]) < 300
