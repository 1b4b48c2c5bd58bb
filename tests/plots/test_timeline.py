"""The timeline figure: widths of bands, and marks for births, splits and deaths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb

from lib_lightning.plots.lineage_series import LayerSnapshot, lineage_table
from lib_lightning.plots.palette import MODULES, NO_MODULE, OTHER_MODULES
from lib_lightning.plots.timeline import draw_timeline
from tests.plots.pages import assert_readable, words

STEPS = [0, 1, 3, 10, 32, 100]


def layer_snapshot(
    ids: list[int],
    importance: list[float],
    modules: list[int] | None = None,
    labels: list[str] | None = None,
    parents: dict[int, int] | None = None,
) -> LayerSnapshot:
    return LayerSnapshot(
        torch.tensor(ids),
        torch.tensor(importance, dtype=torch.float64),
        None if modules is None else torch.tensor(modules),
        labels,
        None if parents is None else torch.tensor([parents.get(k, -1) for k in ids]),
    )


def example_run() -> list[LayerSnapshot]:
    """0 is there throughout, 1 is missing at step 3 and last seen at step 10, 2 splits from 0 at step 10."""
    return [
        layer_snapshot([0, 1], [3.0, 1.0]),
        layer_snapshot([1, 0], [1.0, 1.0]),
        layer_snapshot([0], [5.0]),
        layer_snapshot([2, 1, 0], [4.0, 1.0, 4.0], parents={2: 0, 0: 1}),
        layer_snapshot([0, 2], [9.0, 16.0]),
        layer_snapshot([0, 2], [1.0, 0.0]),
    ]


def bands(axes: Axes) -> list[np.ndarray]:
    """Polygons of the bands, one for each run of one colour."""
    (found,) = (c for c in axes.collections if type(c) is PolyCollection and c.get_zorder() == 2)
    return [path.vertices for path in found.get_paths()]


def faces(axes: Axes) -> list[str]:
    (found,) = (c for c in axes.collections if type(c) is PolyCollection and c.get_zorder() == 2)
    return [to_hex(color).upper() for color in found.get_facecolors()]


def width_at(band: np.ndarray, step: float) -> float:
    y = [point[1] for point in band if point[0] == step]
    return float(max(y) - min(y)) if y else 0.0


def marks(axes: Axes) -> list[np.ndarray]:
    """Positions of the marks for births and deaths."""
    return [np.asarray(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)]


@pytest.fixture
def axes() -> Axes:
    return draw_timeline(STEPS, {"fc": example_run()}).axes[0]


def test_lineages_are_continued_across_gaps() -> None:
    table = lineage_table(example_run())
    assert table.ids.tolist() == [0, 1, 2]
    assert table.first.tolist() == [0, 0, 3]
    assert table.last.tolist() == [5, 3, 5]
    assert table.parents.tolist() == [-1, -1, 0], "only the new ones have split"
    assert table.share[:, 1] == pytest.approx([0.25, 0.5, 0, 1 / 9, 0, 0])


def test_the_width_of_a_band_is_the_root_of_its_share(axes: Axes) -> None:
    by_lineage = bands(axes)  # 0, then 2, which split from it, then 1
    expected = np.sqrt([[0.75, 0.5, 1, 4 / 9, 0.36, 1], [0, 0, 0, 4 / 9, 0.64, 0], [0.25, 0.5, 0, 1 / 9, 0, 0]])
    for band, widths in zip(by_lineage, expected, strict=True):
        assert [width_at(band, step) for step in STEPS] == pytest.approx(widths, abs=1e-12)
    assert "training steps; each band is one feature, as wide as √ of its share" in words(axes.figure)
    assert {"100%", "10%"} <= set(words(axes.figure))
    scale = [np.ptp(line.get_ydata()) for line in axes.lines]
    assert scale == pytest.approx([1.0, np.sqrt(0.1)])


def test_the_scale_stays_within_its_panel() -> None:
    (axes,) = draw_timeline([0, 10], {"fc": [layer_snapshot([0], [1.0])] * 2}).axes
    assert [np.ptp(line.get_ydata()) for line in axes.lines] == [1.0]  # no room for another above it
    assert max(line.get_ydata().max() for line in axes.lines) <= axes.get_ylim()[1]


def test_bands_are_stacked_without_gaps_or_jumps(axes: Axes) -> None:
    lowest, middle, highest = bands(axes)
    for step in STEPS[3:4]:
        rims = [sorted({y for x, y in band if x == step}) for band in (lowest, middle, highest)]
        assert rims[0][0] == 0
        assert rims[0][-1] == pytest.approx(rims[1][0])
        assert rims[1][-1] == pytest.approx(rims[2][0])
    # A band opens at the snapshot before its first and closes at the one after its last.
    assert {x for x, _ in middle} == {3, 10, 32, 100}
    assert {x for x, _ in highest} == {0, 1, 3, 10, 32}


def test_births_deaths_and_splits_are_marked_at_their_snapshots(axes: Axes) -> None:
    born, dead = marks(axes)
    lineage_0, lineage_2, lineage_1 = bands(axes)
    assert born == pytest.approx(np.array([[10, np.mean([2 / 3, 4 / 3])]]))
    assert dead == pytest.approx(np.array([[10, np.mean([4 / 3, 5 / 3])]]))
    (link,) = (c for c in axes.collections if isinstance(c, LineCollection))
    assert link.get_segments()[0] == pytest.approx(np.array([[3, 0.5], [10, 1.0]]))
    assert len(link.get_segments()) == 1
    assert all(len(band) for band in (lineage_0, lineage_1, lineage_2))


def test_lineages_beyond_the_limit_are_combined_and_counted() -> None:
    figure = draw_timeline(STEPS, {"fc": example_run()}, limit=1)
    (axes,) = figure.axes
    assert "1 of 3 features in all" in texts_right(axes)
    assert len(bands(axes)) == 1
    others = next(c for c in axes.collections if c.get_zorder() == 1).get_paths()[0].vertices
    assert width_at(others, 10) == pytest.approx(np.sqrt(5 / 9))
    assert "3 features in all" in texts_right(draw_timeline(STEPS, {"fc": example_run()}).axes[0])


def texts_right(axes: Axes) -> str:
    return str(axes.get_title(loc="right"))


def test_colours_are_those_of_the_numbers_of_modules() -> None:
    moments = [
        layer_snapshot([0, 1, 2], [4.0, 2.0, 1.0], modules=[0, 1, -1]),
        layer_snapshot([0, 1, 2], [4.0, 2.0, 1.0], modules=[0, 1, -1]),
        layer_snapshot([0, 1, 2], [4.0, 2.0, 1.0], modules=[0, 0, 2]),
    ]
    (axes,) = draw_timeline([0, 10, 20], {"fc": moments}).axes
    assert faces(axes) == [MODULES[0], MODULES[1], MODULES[0], NO_MODULE, MODULES[2]]
    assert {"modules", "no module"} <= set(words(axes.figure))


def test_colours_correspond_to_the_common_part_of_labels() -> None:
    names = [["k=4 a 60%", "k=17 a+b 93%", ""], ["k=4 b 99%", "k=17 a+b 95%", "first word 12%"]]
    moments = [layer_snapshot([0, 1, 2], [1.0, 4.0, 1.5], labels=some) for some in names]
    figure = draw_timeline([0, 10], {"fc": moments, "output": [layer_snapshot([0], [1.0])] * 2})
    axes, output = figure.axes
    pale = faces(axes)[1]
    assert faces(axes) == [MODULES[0], pale, MODULES[1], MODULES[2]]  # 17, the third until and from 10 on, 4
    # Before it has a label, a band is pale in the colour of its first one.
    assert to_rgb(pale) == pytest.approx([1 - 0.35 * (1 - part) for part in to_rgb(MODULES[1])], abs=1 / 255)
    assert faces(output) == [NO_MODULE]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["k=17", "first word", "k=4", "no label", "pale: before its label"]
    written = {t.get_text() for t in axes.texts}
    assert {"k=17 a+b", "first word", "k=4 b"} <= written


def test_labels_beyond_the_palette_share_a_neutral_colour() -> None:
    n = len(MODULES) + 2
    names = [f"k={k} a+b 90%" for k in range(n)]
    figure = draw_timeline(
        [0, 10], {"fc": [layer_snapshot(list(range(n)), [float(n - k) for k in range(n)], None, names)] * 2}
    )
    assert faces(figure.axes[0]) == [*MODULES, OTHER_MODULES, OTHER_MODULES]
    assert "2 more" in words(figure)
    assert_readable(figure)


def test_the_legend_has_the_labels_that_are_drawn_and_what_numbers_are() -> None:
    moments = [layer_snapshot([0, 1], [4.0, 1.0], labels=["k=4 a 60%", "k=17 b 90%"])] * 3
    figure = draw_timeline(STEPS[:3], {"fc": moments, "output": [layer_snapshot([0], [1.0])] * 3}, limit=1)
    said = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"k=4", "id"} <= set(said)
    assert "k=17" not in said
    labelled = draw_timeline(STEPS[:3], {"fc": moments})
    assert "id" not in words(labelled)


def test_different_numbers_of_steps_and_snapshots_raise() -> None:
    with pytest.raises(ValueError, match="'fc' has 6 snapshots, but there are 2 steps"):
        draw_timeline([0, 1], {"fc": example_run()})


def crowd(snapshots: int, features: int, labels: bool) -> list[LayerSnapshot]:
    generator = torch.Generator().manual_seed(0)
    ids, moments, following = torch.arange(features), [], features
    for t in range(snapshots):
        parents = torch.full((features,), -1)
        if t:
            replaced = torch.randperm(features, generator=generator)[: features // 50]
            parents[replaced] = ids[(replaced + 1) % features]
            ids = ids.clone()
            ids[replaced] = torch.arange(following, following + len(replaced))
            following += len(replaced)
        modules = torch.randint(-1, 20, (features,), generator=generator)
        names = [f"k={m} a+b 9{m % 10}%" if m > 0 else "" for m in modules.tolist()] if labels else None
        importance = torch.rand(features, generator=generator).double() ** 8
        moments.append(LayerSnapshot(ids, importance, modules, names, parents))
    return moments


@pytest.mark.parametrize(
    ("snapshots", "features", "layers", "labels"),
    [
        (1, 3, 1, False),
        (2, 1, 2, True),
        (40, 60, 4, True),
        (200, 300, 8, False),
        (1000, 100, 2, True),
        (3, 0, 1, False),
    ],
)
def test_any_size_is_readable_and_drawn_with_few_artists(
    snapshots: int, features: int, layers: int, labels: bool
) -> None:
    moments = crowd(snapshots, features, labels)
    figure = draw_timeline(
        range(snapshots), {f"transformer.h.{k}.attention.dropout:input": moments for k in range(layers)}
    )
    # Drawing time grows with the number of artists: bands are polygons of one collection.
    assert all(len(axes.get_children()) < 100 for axes in figure.axes)
    assert_readable(figure)
