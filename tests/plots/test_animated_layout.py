"""Layout of successive graphs: features keep their positions."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Annotation
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.graph import Annotations, draw_graph
from lib_lightning.plots.layout import Column
from tests.plots.pages import assert_readable, words


def layer(name: str, importance: Tensor, kind: str = "lib") -> Basis:
    eye = torch.eye(len(importance))
    return Basis(name, kind, torch.zeros(len(importance)), eye, eye, importance.double())


def heights_by_lineage(column: Column) -> dict[int, float]:
    assert column.lineages is not None
    return dict(zip(column.lineages.tolist(), column.heights.tolist(), strict=True))


Frame = tuple[list[Basis], list[Tensor], list[Tensor], list[Tensor]]


def frames(count: int, sizes: tuple[int, ...] = (60, 30, 12)) -> list[Frame]:
    """Graphs in which some features are replaced and all are reordered; the last layer consists of neurons."""
    torch.manual_seed(0)
    ids = [torch.arange(r) for r in sizes]
    made = []
    for t in range(count):
        order = [torch.randperm(r) for r in sizes[:-1]] + [torch.arange(sizes[-1])]
        ids = [of_layer[index] for of_layer, index in zip(ids, order, strict=True)]
        for k, r in enumerate(sizes[:-1]):
            ids[k] = ids[k].clone()
            ids[k][: r // 10] = torch.arange(1000 * (t + 1), 1000 * (t + 1) + r // 10)
        bases = [layer(str(k), torch.rand(r), "neuron" if k == len(sizes) - 1 else "lib") for k, r in enumerate(sizes)]
        edges = [torch.rand(b, a) ** 9 for a, b in pairwise(sizes)]
        made.append((bases, list(ids), edges, [torch.randint(-1, 9, (r,)) for r in sizes]))
    return made


def test_features_that_remain_visible_keep_their_height_exactly() -> None:
    layout, before = AnimatedLayout(limit=20), None
    stayed = 0
    for bases, ids, edges, modules in frames(12):
        columns = layout.columns(bases, ids, edges, modules)
        now = [heights_by_lineage(column) for column in columns]
        for column, height, basis, own in zip(columns, now, bases, ids, strict=True):
            assert len(height) == len(set(height.values())) == min(20, basis.n_features)
            wanted = set(own[basis.importance.argsort(descending=True)[:20]].tolist())
            assert set(height) == wanted
            assert own[torch.from_numpy(column.shown)].tolist() == list(height)
            assert (np.diff(column.heights) < 0).all()
        if before is not None:
            for old, new in zip(before, now, strict=True):
                stay = old.keys() & new.keys()
                stayed += len(stay)
                assert {k: old[k] for k in stay} == {k: new[k] for k in stay}
        before = now
    assert stayed > 100


def test_single_neurons_are_ordered_by_index() -> None:
    torch.manual_seed(0)
    for kind in ("neuron", "centered"):
        layout, seen = AnimatedLayout(limit=5), {}
        for _ in range(6):
            (column,) = layout.columns([layer("output", torch.rand(14), kind)], [torch.arange(14)], [])
            assert (np.diff(column.shown) > 0).all()
            for neuron, height in heights_by_lineage(column).items():
                assert seen.setdefault(neuron, height) == height == pytest.approx(1 - neuron / 13)


def test_a_new_feature_gets_the_free_slot_nearest_to_its_neighbours() -> None:
    output = layer("output", torch.ones(12), "neuron")
    numbers, layout = torch.arange(12), AnimatedLayout(limit=40)
    first = layer("a", torch.tensor([2.0, 1.0]))
    layout.columns([first, output], [torch.tensor([0, 1]), numbers], [torch.ones(12, 2)])
    grown, E = layer("a", torch.tensor([2.0, 1.0, 0.5, 0.4])), torch.zeros(12, 4)
    E[2, 2], E[10, 2], E[:, :2] = 3.0, 1.0, 1.0  # neighbours of the third feature; the fourth has none
    column = layout.columns([grown, output], [torch.tensor([0, 1, 7, 8]), numbers], [E])[0]
    height, spacing = heights_by_lineage(column), 1 / 49
    assert height[7] == pytest.approx(1 - (3 * 2 + 10) / 4 / 11, abs=spacing / 2 + 1e-9)
    assert abs(height[8] - 0.5) <= 3 * spacing
    # The same neighbours again: the nearest slot is occupied, so the next one is used.
    more, E = layer("a", torch.tensor([2.0, 1.0, 0.5, 0.4, 0.3])), torch.cat([E, E[:, 2:3]], 1)
    again = heights_by_lineage(layout.columns([more, output], [torch.tensor([0, 1, 7, 8, 9]), numbers], [E])[0])
    assert abs(again[9] - again[7]) == pytest.approx(spacing)


def test_state_dict_round_trip_through_a_checkpoint() -> None:
    first, second, third = frames(3)
    layout = AnimatedLayout(limit=15)
    for bases, ids, edges, modules in (first, second):
        layout.columns(bases, ids, edges, modules)
    file = io.BytesIO()
    torch.save(layout.state_dict(), file)
    file.seek(0)
    resumed = AnimatedLayout()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    bases, ids, edges, modules = third
    columns, same_columns = (one.columns(bases, ids, edges, modules) for one in (layout, resumed))
    assert [heights_by_lineage(column) for column in columns] == [heights_by_lineage(column) for column in same_columns]
    assert layout.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("with_modules", [True, False])
def test_a_figure_uses_the_layout(with_modules: bool) -> None:
    layout, heights, colors = AnimatedLayout(limit=9), {}, {}
    for bases, ids, edges, _ in frames(4, (9, 7, 5)):
        modules = [of_layer % 3 for of_layer in ids] if with_modules else None
        figure = draw_graph(bases, edges, annotations=Annotations(modules, lineages=ids), layout=layout)
        assert_readable(figure)
        assert ("numbers: ids" in words(figure), "modules" in words(figure)) == (True, with_modules)
        assert not figure.axes[0].patches, "no bands"
        dots = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
        notes = [t for t in figure.axes[0].texts if isinstance(t, Annotation)]
        # The number to the left of a dot is its lineage id.
        written = {t.xy: int(t.get_text()) for t in notes if t.get_text().isdigit()}
        for x, of_layer in enumerate(dots):
            offsets, faces = np.asarray(of_layer.get_offsets()), of_layer.get_facecolors()
            assert (np.diff(of_layer.get_sizes()) <= 0).all(), "small dots lie on large ones"
            for (_, height), face in zip(offsets, faces, strict=True):
                if (lineage := written.get((x, height))) is not None:
                    heights.setdefault((x, lineage), set()).add(height)
                    colors.setdefault(lineage % 3, set()).add(to_hex(face))
    assert max(map(len, heights.values())) == 1
    assert [len(found) for found in colors.values()] == [1, 1, 1]
    assert len(set.union(*colors.values())) == (3 if with_modules else 1)


def test_a_layout_requires_lineages() -> None:
    basis = layer("a", torch.ones(2))
    with pytest.raises(ValueError, match="have no lineages"):
        draw_graph([basis, replace(basis, name="b")], [torch.eye(2)], layout=AnimatedLayout())
