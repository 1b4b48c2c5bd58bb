"""Controls in a training: other rotations of the same whitened activations, and re-initialised weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lib_lightning import LIBCallback, compute_interaction_graph
from lib_lightning.algorithm.basis_kinds import ROTATED
from lib_lightning.errors import SettingError
from lib_lightning.plots.palette import basis_styles
from lib_lightning.viewer import Run
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of
from tests.training.test_callback import run


class Watched(NamedTuple):
    """A training with all controls: its callback, its log directory, and how it ended."""

    callback: LIBCallback
    folder: Path
    trained: dict[str, Any]
    samples: Tensor


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    callback = LIBCallback(
        NODE_LAYERS, baselines=[*ROTATED, "random", "ica", "random"], control="reinit", at_steps=[0, 4, 8, 12],
        dtype="float64", basis_seed=3, dataloader=[(x, x.sum(1).gt(0).long())], causal_every=0,
    )  # fmt: skip
    logger = TensorBoardLogger(folder, name="", version="logs")
    return Watched(callback, folder / "logs", run(Classifier(), folder, callback, logger=logger), x)


def test_training_is_unchanged(watched: Watched, tmp_path: Path) -> None:
    assert run(Classifier(), tmp_path) == watched.trained


def test_each_is_logged_and_written_beside_the_lib(watched: Watched) -> None:
    scalars, lib = watched.callback.state.scalars, watched.callback.graph
    assert lib is not None
    for kind in ROTATED:
        graph = watched.callback.graphs[kind]
        assert [basis.kind for basis in graph.bases.values()] == [kind, kind, "neuron"]
        total = scalars[f"{kind}/effective_edges/total"]
        assert total > 0
        assert scalars[f"lib_over_{kind}/effective_edges/total"] == scalars["lib/effective_edges/total"] / total
        # The same number of features and the same importance: only how sparse they are differs.
        assert scalars[f"lib_over_{kind}/features/total"] == 1
        for layer in NODE_LAYERS:
            of_lib, of_kind = lib.bases[layer].importance.sum(), graph.bases[layer].importance.sum()
            assert math.isclose(of_lib, of_kind, rel_tol=1e-9)
        assert Run(watched.folder / kind).steps == [0, 4, 8, 12]
    # A folder with a run, its baselines and its control is that run.
    assert Run(watched.folder).name.endswith("/lib")
    assert (watched.folder / "lib" / "sparsity_over_time.png").exists()


def test_several_draws_of_a_baseline(watched: Watched) -> None:
    scalars, model = watched.callback.state.scalars, Classifier()
    weights = watched.trained["weights and buffers"]
    model.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    found = set()
    for number, prefix in enumerate(("random", "random_2", "random_3")):
        graph = watched.callback.graphs[prefix]
        expected = compute_interaction_graph(
            model, [watched.samples], NODE_LAYERS, "random", dtype=torch.float64, effort="exact", input_fn=lambda x: x,
            basis_seed=3 + number,
        )  # fmt: skip
        for pair, E in expected.edges.items():
            torch.testing.assert_close(graph.edges[pair].abs(), E.abs(), rtol=1e-6, atol=1e-12)
        total = scalars[f"{prefix}/effective_edges/total"]
        assert scalars[f"lib_over_{prefix}/effective_edges/total"] == scalars["lib/effective_edges/total"] / total
        assert Run(watched.folder / prefix).steps == [0, 4, 8, 12]
        found.add(total)
    assert len(found) == 3
    assert "random_4" not in watched.callback.graphs
    assert "ica_2" in watched.callback.graphs
    # In a figure they are draws of the same kind.
    styles = basis_styles(["lib", "random", "random_2"])
    assert styles["random"] == styles["random_2"] != styles["lib"]


@pytest.mark.parametrize("baselines", [["pca", "pca"], ["random", "pca", "varimax", "varimax"], ["random", "lib"]])
def test_bases_without_a_seed_have_one_draw(baselines: list[str]) -> None:
    with pytest.raises(SettingError, match="several draws of 'random', 'ica'"):
        LIBCallback(NODE_LAYERS, baselines=baselines)


def test_the_control_is_the_graph_of_reinitialised_weights(watched: Watched) -> None:
    graph, scalars = watched.callback.graphs["reinit"], watched.callback.state.scalars
    assert graph.info["control"] == {"kind": "reinit", "seed": 3, "permuted": []}
    model = Classifier()
    torch.manual_seed(3)
    for module in model.net:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = compute_interaction_graph(
        model, [watched.samples], NODE_LAYERS, dtype=torch.float64, effort="exact", input_fn=lambda x: x
    )
    for layer in NODE_LAYERS:
        torch.testing.assert_close(graph.bases[layer].importance, expected.bases[layer].importance, rtol=1e-6, atol=0)
    # Once in a run, with the first snapshot; its scalars stay.
    assert Run(watched.folder / "reinit").steps == [0]
    value = scalars["reinit/effective_edges/total"]
    assert value == pytest.approx(graph.measure()["effective_edges/total"])
    ratio = scalars["lib/effective_edges/total"] / value
    assert scalars["lib_over_reinit/effective_edges/total"] == ratio
    assert watched.callback.state.history.totals["effective_edges"]["reinit"] == [value] * 4
    assert len({e.value for e in EventAccumulator(str(watched.folder)).Reload().Scalars("reinit/edges/total")}) == 1
    legend = watched.callback.graphs["lib"].plot_spectrum([graph]).legends
    assert any("weights re-initialised" in text.get_text() for one in legend for text in one.get_texts())


def test_random_features_change_as_slowly_as_their_subspace(watched: Watched) -> None:
    ids = [Run(watched.folder / "random").graph(step).lineages[NODE_LAYERS[0]].ids.tolist() for step in (4, 8)]
    assert set(ids[0]) & set(ids[1])


class CannotReset(Classifier):
    def reset_parameters(self) -> None:
        raise RuntimeError("no other weights")


def test_a_control_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LIBCallback(NODE_LAYERS, control="reinit", at_steps=[0, 4, 8], dtype="float64")
    run(CannotReset(), tmp_path, callback)
    assert callback.snapshots == 4
    assert math.isnan(callback.state.scalars["reinit/edges/total"])
    assert list(callback.graphs) == ["lib"]
    assert sum("no other weights" in record.getMessage() for record in caplog.records) == 1


def test_a_resumed_run_keeps_its_control(tmp_path: Path) -> None:
    callback, again = (LIBCallback(NODE_LAYERS, control="reinit", every_n_steps=6, causal_every=0) for _ in range(2))
    trainer = trainer_of(tmp_path, callback, max_epochs=1)
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer_of(tmp_path, again, max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    assert again.snapshots > callback.snapshots
    for key, value in callback.state.scalars.items():
        if key.startswith("reinit/"):
            assert again.state.scalars[key] == value
    totals = again.state.history.totals["edges"]["reinit"]
    assert len(totals) == again.snapshots
    assert len(set(totals)) == 1


def test_an_unknown_control_is_refused() -> None:
    with pytest.raises(SettingError, match="control must be one of 'reinit'; got 'shuffle'"):
        LIBCallback(NODE_LAYERS, control="shuffle")  # type: ignore[arg-type]


def test_random_features_of_another_seed_are_others(tmp_path: Path) -> None:
    first = []
    for seed in (0, 0, 1):
        callback = LIBCallback(NODE_LAYERS, basis="random", basis_seed=seed, at_steps=[0], dtype="float64")
        run(Classifier(), tmp_path / str(len(first)), callback)
        graph = callback.graph
        assert graph is not None
        first.append(graph.bases[NODE_LAYERS[0]].to_features[:, 0])
    assert (first[0] == first[1]).all()
    assert not (first[0] - first[2]).abs().max() < 1e-3
