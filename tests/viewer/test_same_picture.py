"""One graph in all pictures of it, figure, notebook, tab and film: the same colours, ids, counts and legend."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from werkzeug.test import Client

from lib_lightning import InteractionGraph
from lib_lightning.algorithm.basis import Basis
from lib_lightning.graph import Lineages
from lib_lightning.plots.image import render_png
from lib_lightning.plots.palette import (
    AGAINST,
    BETWEEN_MODULES,
    BLUE,
    DRIVES,
    MODULES,
    MUTED,
    VERMILION,
    label_group,
    module_color,
    paler,
)
from lib_lightning.viewer import Run
from lib_lightning.viewer.plugin import LIBPlugin
from tests.viewer.node import evaluate, write_modules

STEP = 3000
# For each dot its id, colour and whether it is hollow; for each edge the ids of its ends and its colour.
SCENE = """((run, snapshot) => {
  const history = new History(run);
  const k = history.steps.indexOf(snapshot.step);
  const view = {width: 900, height: 480, threshold: 0, color: "module", signs: data.signs};
  const scene = buildScene(history, k, snapshot, heightsByLineage(history, 40)[k], view);
  const id = (dot) => `${history.layers[dot.l].name}/${dot.id}`;
  return {
    dots: scene.columns.flatMap(({dots}) => dots.map((dot) => [id(dot), dot.color, dot.hollow])),
    edges: scene.sections.flatMap(({edges}) => edges.map(({from, to, color}) => [id(from), id(to), color])),
    features: scene.columns.map(({dots, total}) => [dots.length, total]),
    counts: scene.sections.map((section) => [section.edges.length, section.count]),
    modules: history.hasModules ? modulesShown(scene) : null,
  };
})(data.run, data.snapshot)"""
IMPORTS = {"history.js": "History", "layout.js": "heightsByLineage", "scene.js": "buildScene, modulesShown"}


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(tmp_path_factory.mktemp("viewer"))


@st.composite
def graphs(draw: st.DrawFn) -> InteractionGraph:
    """Graphs of any size, with or without modules, lineages and labels; modules also beyond the palette."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    with_modules, with_lineages, with_labels, single = (draw(st.booleans()) for _ in range(4))
    highest = draw(st.integers(0, len(MODULES) + 3))
    bases, modules, lineages, labels = {}, {}, {}, {}
    for k, r in enumerate(sizes):
        name = f"layer.{k}:input" if k % 2 else f"layer.{k}"
        kind = "neuron" if single and k == len(sizes) - 1 else "lib"
        importance = torch.from_numpy(10 ** rng.uniform(-3, 0, r))
        importance = importance if kind == "neuron" else importance.sort(descending=True).values
        eye = torch.eye(r, dtype=torch.float64)
        degenerate = torch.from_numpy(rng.random(r) < 0.2)
        bases[name] = Basis(name, kind, torch.zeros(r).double(), eye, eye, importance, degenerate=degenerate)
        modules[name] = torch.from_numpy(rng.integers(-1, highest, r, endpoint=True))
        ids = torch.arange(r) if kind == "neuron" else torch.from_numpy(rng.permutation(30)[:r])
        lineages[name] = Lineages(ids, torch.full((r,), 0.9).double(), torch.full((r,), -1))
        labels[name] = [f"k={j % 3} a+b {90 - j}%" if j % 2 else "" for j in range(r)]
    edges = {}
    for before, after in itertools.pairwise(bases.values()):
        strength = 10 ** rng.uniform(-3, 0, (after.n_features, before.n_features))
        edges[before.name, after.name] = torch.from_numpy(strength)
    for E in edges.values():
        E[torch.from_numpy(rng.random(E.shape) < 0.2)] = 0.0
    return InteractionGraph(
        bases,
        edges,
        {"step": STEP, "n_samples": 9, "notes": [], "modules_tracked": True},
        modules=modules if with_modules else {},
        labels=labels if with_labels else {},
        lineages=lineages if with_lineages else {},
        attributions={pair: E * torch.from_numpy(rng.choice([-1.0, 1.0], E.shape)) for pair, E in edges.items()},
    )


def in_figure(graph: InteractionGraph, signs: bool) -> dict[str, Any]:
    """What the figure shows, in the form of `SCENE`; dots without a number beside them have None for an id."""
    figure = graph.plot(max_edges=10**6, signs=signs)
    axes = figure.axes[0]
    columns = [c for c in axes.collections if isinstance(c, PathCollection)]
    numbers = {text.xy: text.get_text() for text in axes.texts if text.get_text().isdigit() and hasattr(text, "xy")}
    dots, id_at = [], {}
    for x, (name, column) in enumerate(zip(graph.node_layers, columns, strict=True)):
        parts = zip(column.get_offsets(), column.get_facecolor(), column.get_edgecolor(), strict=True)
        for (_, y), face, edge in parts:
            hollow = to_hex(face) == "#ffffff"
            number = numbers.get((x, y))
            id_at[x, float(y)] = None if number is None else f"{name}/{number}"
            dots.append([id_at[x, float(y)], to_hex(edge if hollow else face).upper(), hollow])
    edges = [
        [*(id_at[int(x), float(y)] for x, y in segment), to_hex(color).upper()]
        for lines in axes.collections
        if isinstance(lines, LineCollection)
        for segment, color in zip(lines.get_segments(), lines.get_colors(), strict=True)
    ]
    said = [text.get_text() for text in axes.texts]
    features = [re.match(r"(\d+)(?: of (\d+))? (?:features|neurons)", text) for text in said]
    counts = [re.match(r"(\d+) of (\d+) edges", text) for text in said]
    legend = [[t.get_text() for t in one.get_texts()] for one in figure.legends]
    return {
        "dots": dots,
        "edges": edges,
        "features": [[int(found[1]), int(found[2] or found[1])] for found in features if found],
        "counts": [[int(found[1]), int(found[2])] for found in counts if found],
        "modules": legend[-1] if graph.modules else None,
    }


def in_tab(logs: Path) -> dict[str, Any]:
    """What the tab gets from TensorBoard."""
    apps = LIBPlugin(SimpleNamespace(logdir=str(logs), flags=None)).get_plugin_apps()
    (run,) = json.loads(Client(apps["/runs"]).get("/").get_data())
    read = {"run": f"/?run={run['name']}", "snapshot": f"/?run={run['name']}&step={STEP}"}
    return {key: json.loads(Client(apps[f"/{key}"]).get(address).get_data()) for key, address in read.items()}


def in_film(page: str) -> dict[str, Any]:
    """What a film contains."""
    content, snapshot = (
        json.loads(gzip.decompress(base64.b64decode(found)))
        for found in (
            re.search(r'id="lib-runs">([^<]*)<', page)[1],  # type: ignore[index]
            re.search(rf'data-step="{STEP}">([^<]*)<', page)[1],  # type: ignore[index]
        )
    )
    (run,) = content["run"].values()
    return {"run": run, "snapshot": snapshot}


def legend_of(modules: dict[str, Any] | None) -> list[str] | None:
    if modules is None:
        return None
    others = [f"{modules['others']} more"] if modules["others"] else []
    return [*map(str, modules["colored"]), *others, *["none"] * modules["none"]]


@settings(max_examples=15, deadline=None)
@given(graph=graphs(), signs=st.booleans())
def test_all_pictures_of_a_graph_are_the_same(viewer: Path, graph: InteractionGraph, signs: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder).resolve() / "version_0"
        graph.save(logs / "lib" / "snapshots" / f"step-{STEP:08d}.safetensors")
        run = Run(logs)
        read = run.graph(STEP)
        film = run.view(logs / "film.html").read_text()
        frame = re.search(r'srcdoc="([^"]*)"', run._repr_html_())
        assert frame is not None
        shown = [in_tab(logs), in_film(film), in_film(html.unescape(frame[1]))]
    picture, *others = [evaluate(viewer, IMPORTS, SCENE, {**data, "signs": signs}) for data in (shown[0], shown[2])]
    # The film has the same data as the tab, and so has the notebook, but for the names of runs and numbers of edges.
    assert shown[1]["snapshot"] == shown[0]["snapshot"]
    assert others == [picture]
    # A graph in a notebook is its figure.
    png = render_png(read.plot()).data
    assert base64.b64encode(png).decode() in read._repr_html_()
    figure = in_figure(read, signs)
    assert Counter((color, hollow) for _, color, hollow in figure["dots"]) == Counter(
        (color, hollow) for _, color, hollow in picture["dots"]
    )
    dots = {feature: (color, hollow) for feature, color, hollow in picture["dots"]}
    assert all(dots[feature] == (color, hollow) for feature, color, hollow in figure["dots"] if feature)
    assert Counter(color for *_, color in figure["edges"]) == Counter(color for *_, color in picture["edges"])
    edges = {(a, b): color for a, b, color in picture["edges"]}
    assert all(edges[a, b] == color for a, b, color in figure["edges"] if a and b)
    assert figure["features"] == picture["features"]
    assert figure["counts"] == picture["counts"]
    assert figure["modules"] == legend_of(picture["modules"])
    # And what they show is what is in the graph.
    nodes = read.to_networkx().nodes(data=True)
    for (layer, index), node in nodes:
        feature = read.feature((layer, index))
        assert feature == read.feature(feature.id) == read.feature((layer, read.index(feature.id)))
        assert (node["id"], node["label"], node["importance"]) == (feature.id, feature.label, feature.importance)
        color = (MUTED if signs else VERMILION) if feature.module is None else module_color(feature.module)
        degenerate = read.bases[layer].degenerate
        assert degenerate is not None
        assert dots[feature.id] == (color, bool(degenerate[index]))
    for (a, b), color in edges.items():
        before, after = read.feature(a), read.feature(b)
        assert read.edges[before.layer, after.layer][after.index, before.index] > 0
        inside = before.module == after.module != -1
        expected = BLUE if before.module is None else module_color(before.module) if inside else BETWEEN_MODULES
        if signs:
            A = read.attributions[before.layer, after.layer][after.index, before.index]
            expected = DRIVES if A >= 0 else AGAINST
            expected = expected if inside or before.module is None else paler(expected)
        assert color == expected
    assert len(edges) == sum(int((E > 0).sum()) for E in read.edges.values())


labels = st.one_of(st.text("ab=1.9 %k+é", max_size=12), st.from_regex(r"[a-z]=[0-9]+ a\+b [0-9]{1,3}%", fullmatch=True))


@settings(max_examples=10, deadline=None)
@given(st.lists(labels, max_size=60))
def test_labels_have_the_same_groups_everywhere(viewer: Path, some: list[str]) -> None:
    assert evaluate(viewer, {"history.js": "labelGroup"}, "data.map(labelGroup)", some) == [
        label_group(x) for x in some
    ]
