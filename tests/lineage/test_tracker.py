"""Lineages in synthetic trainings: all events are detected, and no others."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_lightning import Basis, InteractionGraph
from lib_lightning.errors import LIBError
from lib_lightning.lineage import FeatureTracker
from lib_lightning.lineage.events import Event
from tests.lineage.trajectories import SAMPLES, Trajectory, snapshot


class Followed:
    """A trajectory and its tracker, with the true lineages translated into the tracker's ids."""

    def __init__(self, seed: int) -> None:
        self.true, self.tracker, self.now = Trajectory(seed), FeatureTracker(), 0
        self.ids: dict[int, int] = {}
        self.values: dict[int, Tensor] = {}
        assert self.see() == []

    def see(self) -> list[Event]:
        """Take a snapshot, and check that known features have kept their ids, and lineages their signs."""
        graph, lineages = self.true.graph(self.now)
        self.now += 10
        events = self.tracker.update(graph)
        found = dict(zip(lineages, graph.lineages["layer"].ids.tolist(), strict=True))
        assert {i: found[i] for i in self.ids if i in found} == {i: self.ids[i] for i in self.ids if i in found}
        assert len(set(found.values())) == len(found)
        self.ids |= found
        values = dict(
            zip(graph.lineages["layer"].ids.tolist(), graph.reference_features["layer"].T.double(), strict=True)
        )
        assert all(values[i] @ self.values[i] > 0 for i in values if i in self.values)
        self.values = values
        return events

    def quiet(self, snapshots: int) -> None:
        for _ in range(snapshots):
            self.true.step()
            assert self.see() == []


@pytest.mark.parametrize("seed", range(10))
def test_drift_causes_no_events(seed: int) -> None:
    Followed(seed).quiet(40)


@pytest.mark.parametrize("seed", range(10))
def test_all_events_are_detected(seed: int) -> None:
    run = Followed(seed)
    true = run.true

    def happens(what: Callable[[], object]) -> list[tuple[str, int | None, tuple[int, ...]]]:
        true.step()
        what()
        step = run.now
        events = run.see()
        assert all(event.step == step and event.layer == "layer" for event in events)
        run.quiet(3)
        return [(event.kind, event.lineage, event.others) for event in events]

    ids = run.ids
    assert happens(lambda: true.death(3)) == [("died", ids[3], ())]
    assert happens(true.birth) == [("born", ids[20], ())]
    assert happens(lambda: (true.rotate([0, 1, 2, 4]), ids.clear())) == []  # which of these is which is not defined
    assert happens(lambda: true.rotate([5, 6], 0.3)) == []
    assert happens(lambda: true.split(7)) == [("split", ids[21], (ids[7],))]
    assert happens(lambda: true.merge(8, into=9)) == [("merged", ids[8], (ids[9],))]
    # All at once.
    found = happens(lambda: (true.death(10), true.birth(), true.split(11), true.merge(12, into=13)))
    assert sorted(found) == sorted(
        [
            ("died", ids[10], ()),
            ("born", ids[22], ()),
            ("split", ids[23], (ids[11],)),
            ("merged", ids[12], (ids[13],)),
        ]
    )


@pytest.mark.parametrize("k", [2, 8, 20])
def test_rotation_within_a_subspace_ends_no_lineage(k: int) -> None:
    run = Followed(k)
    for _ in range(10):
        run.true.rotate(list(range(k)))
        run.ids.clear()  # which is which inside the subspace is not defined
        assert run.see() == []
        assert run.tracker.turnover["layer"].overlap == pytest.approx(1, abs=1e-4)
    graph, _ = run.true.graph(999)
    run.tracker.update(graph)
    assert sorted(graph.lineages["layer"].ids.tolist()) == list(range(20))


def test_similarity_is_the_correlation_with_the_feature_before() -> None:
    true, tracker = Trajectory(0), FeatureTracker()
    first, before = true.graph(0)
    tracker.update(first)
    assert first.lineages["layer"].similarity.isnan().all()
    true.step()
    second, after = true.graph(1)
    tracker.update(second)
    a, b = (graph.reference_features["layer"].double() for graph in (first, second))
    for j, lineage in enumerate(after):
        pair = torch.stack([a[:, before.index(lineage)], b[:, j]])
        expected = float(torch.corrcoef(pair)[0, 1].abs())
        assert float(second.lineages["layer"].similarity[j]) == pytest.approx(expected, abs=1e-12)


def test_ids_are_unique() -> None:
    run = Followed(1)
    for _ in range(5):
        newest = max(run.true.values)
        run.true.death(newest)
        run.see()
        run.true.birth()
        run.see()
    assert run.ids[24] == 24
    assert len(set(run.ids.values())) == 25


def test_shares_of_the_importance_come_with_events() -> None:
    tracker, x = FeatureTracker(), torch.linalg.qr(torch.randn(SAMPLES, 3, dtype=torch.float64)).Q * SAMPLES**0.5
    tracker.update(snapshot({"layer": x[:, :2]}, 0))
    born, died = tracker.update(snapshot({"layer": x[:, 1:]}, 7))
    # Importances are 1 and 0.1.
    assert (born.kind, born.lineage, born.after) == ("born", 2, pytest.approx(0.1 / 1.1))
    assert (died.kind, died.lineage, died.before) == ("died", 0, pytest.approx(1 / 1.1))


def test_state_survives_a_checkpoint() -> None:
    whole, interrupted = Trajectory(2), Trajectory(2)
    one, two = FeatureTracker(), FeatureTracker()
    for step in range(6):
        results = []
        for true, tracker in ((whole, one), (interrupted, two)):
            true.step()
            if step == 3:
                true.split(4)
                true.death(5)
            graph, _ = true.graph(step)
            results.append((tracker.update(graph), graph.lineages["layer"].ids.tolist()))
        assert results[0] == results[1]
        saved = io.BytesIO()
        torch.save(two.state_dict(), saved)
        saved.seek(0)
        two = FeatureTracker()
        two.load_state_dict(torch.load(saved, weights_only=True))


def test_copies_are_independent() -> None:
    true, tracker = Trajectory(3), FeatureTracker()
    tracker.update(true.graph(0)[0])
    aside = tracker.copy()
    true.birth()
    aside.update(true.graph(1)[0])
    graph, _ = true.graph(1)
    assert [event.kind for event in tracker.update(graph)] == ["born"]
    assert sorted(graph.lineages["layer"].ids.tolist()) == list(range(21))


def test_other_samples_start_all_lineages_anew() -> None:
    tracker, x = FeatureTracker(), torch.eye(8, dtype=torch.float64)
    tracker.update(snapshot({"layer": x}, 0))
    graph = snapshot({"layer": x}, 1, samples="others")
    assert tracker.update(graph) == []
    assert graph.lineages["layer"].ids.tolist() == list(range(8, 16))
    assert tracker.turnover == {}


def test_neurons_keep_their_numbers() -> None:
    tracker, x = FeatureTracker(), torch.randn(50, 5)
    for step in range(3):
        graph = snapshot({"layer": torch.randn(50, 5)}, step, kind="neuron")
        assert tracker.update(graph) == []
        assert graph.lineages["layer"].ids.tolist() == list(range(5))
    graph = snapshot({"layer": x}, 3, kind="neuron", samples="others")
    tracker.update(graph)
    assert graph.lineages["layer"].ids.tolist() == list(range(5))


def test_graphs_without_reference_features_or_step_are_refused() -> None:
    graph = snapshot({"layer": torch.randn(50, 5)}, 0)
    del graph.info["step"]
    with pytest.raises(LIBError, match="step="):
        FeatureTracker().update(graph)
    FeatureTracker().update(graph, step=3)
    graph.reference_features = {}
    with pytest.raises(LIBError, match="reference_features"):
        FeatureTracker().update(graph, step=3)


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=5))
def test_layers_without_features_are_followed_like_any_other(counts: list[tuple[int, int]]) -> None:
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    tracker, previous = FeatureTracker(), (0, 0)
    for step, sizes in enumerate(counts):
        bases = {name: pca_basis_of(name, r) for name, r in zip(("a", "b"), sizes, strict=True)}
        graph = InteractionGraph(bases, {("a", "b"): torch.zeros(sizes[1], sizes[0])}, {"step": step})
        graph.reference_features = {name: values[:, :r].half() for name, r in zip(("a", "b"), sizes, strict=True)}
        events = tracker.update(graph)
        for name, before, now in zip(("a", "b"), previous, sizes, strict=True):
            kinds = [event.kind for event in events if event.layer == name]
            assert kinds == ([] if step == 0 else ["born"] * (now - before) + ["died"] * (before - now))
            assert len(set(graph.lineages[name].ids.tolist())) == now
            assert (graph.lineages[name].parents == -1).all()
        previous = sizes


def pca_basis_of(name: str, r: int) -> Basis:
    C = torch.eye(3, dtype=torch.float64)[:, :r]
    return Basis(name, "pca", torch.zeros(3, dtype=torch.float64), C, C.T, torch.arange(r, 0, -1).double())
