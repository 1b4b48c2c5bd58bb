"""Dictionaries in training: every snapshot takes the weights that they have by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lib_lightning import LIBCallback, SAETrainer, compute_interaction_graph
from lib_lightning.dictionaries import AdaptedDictionary
from lib_lightning.errors import LIBError
from lib_lightning.viewer.run import Run
from tests.dictionaries.stand_ins import SparseDictionary
from tests.tiny_training import Classifier, Noisy


class WithManySamples(Classifier):
    """A classifier with enough activations in each batch to train a dictionary on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(6 * 256), batch_size=256)


class WithDictionary(Classifier):
    """A classifier beside which a dictionary of its hidden layer is trained."""

    def __init__(self, dictionary: SparseDictionary) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
        self.dictionary = dictionary

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a = self.net[:2](batch[0])
        x = a.detach()
        reconstruction = (self.dictionary.decode(self.dictionary.encode(x)) - x).square().mean()
        return F.cross_entropy(self.net[2](a), batch[1]) + reconstruction


def test_every_snapshot_has_the_newest_weights(tmp_path: Path) -> None:
    pl.seed_everything(0)
    dictionary = SparseDictionary(16, 40, k=4)
    before = AdaptedDictionary.without_data(dictionary, torch.zeros(16), "net.1").hash
    callback = LIBCallback(
        node_layers=["net.1", "output"], every_n_steps=6, dictionaries={"net.1": dictionary}, baselines=["pca"]
    )
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[callback], logger=pl.loggers.CSVLogger(tmp_path), accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(WithDictionary(dictionary))
    run = Run(tmp_path)
    graphs = [run.graph(step) for step in run.steps]
    assert [graph.bases["net.1"].kind for graph in graphs] == ["latents"] * 3
    hashes = [graph.info["dictionaries"]["net.1"]["hash"] for graph in graphs]
    assert hashes[0] == before
    assert len(set(hashes)) == 3
    assert hashes[-1] == AdaptedDictionary.without_data(dictionary, torch.zeros(16), "net.1").hash
    for graph in graphs:
        assert graph.lineages["net.1"].ids[:-1].tolist() == graph.bases["net.1"].latents.tolist()
        assert graph.lineages["net.1"].ids[-1] == 40
    assert callback.graphs["pca"].bases["net.1"].kind == "pca"
    latent = graphs[-1].feature_ids("net.1")[0]
    assert latent in str(run.feature(latent)._repr_html_())
    assert "lib/features/total" in trainer.callback_metrics
    # The graph in memory can be used; that of a file is given the dictionary.
    assert callback.graph is not None
    x = torch.randn(4, 16)
    graphs[-1].attach_dictionaries({"net.1": dictionary})
    assert torch.equal(callback.graph.bases["net.1"].encode(x), graphs[-1].bases["net.1"].encode(x))


def test_a_dictionary_that_the_library_trains_is_the_basis(tmp_path: Path) -> None:
    pl.seed_everything(0)
    saes = SAETrainer("net.1", n_latents=40, k=4, every_n_batches=1)
    callback = LIBCallback(["net.1", "output"], every_n_steps=6, basis={"net.1": saes.dictionary("net.1")})
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[saes, callback], logger=pl.loggers.CSVLogger(tmp_path), accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(WithManySamples())
    graphs = [Run(tmp_path).graph(step) for step in Run(tmp_path).steps]
    assert [graph.bases["net.1"].kind for graph in graphs] == ["latents"] * 3
    assert graphs[0].info["dictionaries"]["net.1"]["n_latents"] == 40
    assert len({graph.info["dictionaries"]["net.1"]["hash"] for graph in graphs}) > 1


def test_a_graph_knows_that_its_dictionary_has_changed() -> None:
    model, dictionary = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)), SparseDictionary(16, 40, k=4)
    graph = compute_interaction_graph(model, [torch.randn(20, 5)], ["1", "output"], {"1": dictionary})
    graph.bases["1"].encode(torch.randn(2, 16))
    optimizer = torch.optim.SGD(dictionary.parameters(), lr=0.1)
    dictionary.decode(dictionary.encode(torch.randn(3, 16))).sum().backward()
    optimizer.step()
    with pytest.raises(LIBError, match="other weights by now"):
        graph.bases["1"].encode(torch.randn(2, 16))
    assert graph.measure()["features/total"] > 1


class OfThree(SparseDictionary):
    """Decodes three activations only."""

    def decode(self, f: Tensor) -> Tensor:
        return super().decode(f)[..., :3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dictionaries": {"net.0": SparseDictionary(16, 40)}}, "no node layer 'net.0' for a dictionary"),
        ({"dictionaries": {"net.1": SparseDictionary(12, 40)}}, "does not take activations"),
        ({"dictionaries": {"net.1": OfThree(16, 40)}}, "reads 16 activations, and writes 3"),
        ({"dictionaries": {"net.1": SparseDictionary(16, 40)}, "integration_steps": 2}, "integration_steps"),
    ],
)
@pytest.mark.parametrize("has_sanity_check", [True, False])
def test_wrong_dictionaries_stop_the_training_before_its_first_step(
    options: dict[str, Any], message: str, has_sanity_check: bool
) -> None:
    trainer = pl.Trainer(
        max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=2 * has_sanity_check,
    )  # fmt: skip
    if not has_sanity_check:  # nothing is read of the validation before the first step
        options = {"every_n_validations": 1, **options}

    def fit() -> None:
        trainer.callbacks.append(LIBCallback(node_layers=["net.1", "output"], **options))  # type: ignore[attr-defined]
        trainer.fit(WithManySamples())

    with pytest.raises(LIBError, match=message):
        fit()
    assert trainer.global_step == 0
