"""Baselines in other rotations of the same whitened activations, in a training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lib_lightning import LIBCallback
from lib_lightning.algorithm.basis_kinds import ROTATED
from lib_lightning.viewer import Run
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of
from tests.training.test_callback import run


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[LIBCallback, Path, object]:
    """A short training with all of these baselines."""
    folder = tmp_path_factory.mktemp("watched")
    callback = LIBCallback(NODE_LAYERS, baselines=list(ROTATED), at_steps=[0, 4, 8, 12], dtype="float64")
    logger = TensorBoardLogger(folder, name="", version="logs")
    trained = run(Classifier(), folder, callback, logger=logger)
    return callback, folder / "logs", trained


def test_training_is_unchanged(watched: tuple[LIBCallback, Path, object], tmp_path: Path) -> None:
    assert run(Classifier(), tmp_path) == watched[2]


def test_each_is_logged_and_written_beside_the_lib(watched: tuple[LIBCallback, Path, object]) -> None:
    callback, folder, _ = watched
    scalars, lib = callback.state.scalars, callback.graph
    assert lib is not None
    for kind in ROTATED:
        graph = callback.graphs[kind]
        assert [basis.kind for basis in graph.bases.values()] == [kind, kind, "neuron"]
        total = scalars[f"{kind}/effective_edges/total"]
        assert total > 0
        assert scalars[f"lib_over_{kind}/effective_edges/total"] == scalars["lib/effective_edges/total"] / total
        # The same number of features and the same importance: only how sparse they are differs.
        assert scalars[f"lib_over_{kind}/features/total"] == 1
        for layer in NODE_LAYERS:
            of_lib, of_kind = lib.bases[layer].importance.sum(), graph.bases[layer].importance.sum()
            assert math.isclose(of_lib, of_kind, rel_tol=1e-9)
        assert Run(folder / kind).steps == [0, 4, 8, 12]
    # A folder with a run and its baselines is that run.
    assert Run(folder).name.endswith("/lib")
    assert (folder / "lib" / "sparsity_over_time.png").exists()


def test_random_features_change_as_slowly_as_their_subspace(watched: tuple[LIBCallback, Path, object]) -> None:
    _, folder, _ = watched
    ids = [Run(folder / "random").graph(step).lineages[NODE_LAYERS[0]].ids.tolist() for step in (4, 8)]
    assert set(ids[0]) & set(ids[1])


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
