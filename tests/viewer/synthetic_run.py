"""A synthetic run for tests in a browser: lineages that are born, split and die, in modules."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib_lightning.plots.palette import label_colors, label_group

_MODULES = 6


@dataclass
class Lineage:
    """A lineage over time."""

    id: int
    group: int
    birth: int
    death: int
    size: float
    rise: float
    parent: int = -1


@dataclass
class SyntheticRun:
    """Implements the methods of `lib_lightning.viewer.run_view.RunView` that the HTML export needs."""

    name: str
    all_steps: list[int]
    layers: list[tuple[str, str]]
    features: int = 24
    edges_: int = 400
    modules: bool = True
    # Version 0.1 numbered modules by size in each snapshot.
    numbers_vary: bool = False
    seed: int = 0
    written: int | None = None
    # As in the file of a comparison with another run.
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    lineages: list[list[Lineage]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        last = len(self.all_steps)
        for _ in self.layers:
            column: list[Lineage] = []
            for i in range(self.features):
                early = i < 0.6 * self.features
                birth = 0 if early else int(rng.integers(1, max(2, int(0.7 * last))))
                short = rng.random() < 0.3
                death = min(last, birth + int(rng.integers(2, max(3, last // 2)))) if short else last
                parent = int(rng.integers(0, i)) if not early and rng.random() < 0.5 else -1
                column.append(
                    Lineage(i, i % _MODULES, birth, death, 10 ** -rng.uniform(0, 3.5), rng.uniform(-1, 1), parent)
                )
            self.lineages.append(column)

    def alive(self, k: int, layer: int) -> list[Lineage]:
        """Lineages in a snapshot, the most important first."""
        alive = [one for one in self.lineages[layer] if one.birth <= k < one.death]
        return sorted(alive, key=lambda one: -self.importance(one, k))

    def importance(self, one: Lineage, k: int) -> float:
        """Importance in a snapshot: a smooth curve."""
        age = (k - one.birth) / max(1, len(self.all_steps) - 1)
        grown = min(1.0, 0.15 + 0.3 * (k - one.birth)) if one.birth else 1.0
        return float(one.size * grown * 10 ** (one.rise * age) * (1 + 0.1 * np.sin(k * 0.7 + one.id)))

    def label(self, layer: int, one: Lineage) -> str:
        """A label like those of `FourierLabels`; every fourth lineage has none."""
        return f"k={5 + 3 * one.group} {'a+b' if layer > 1 else 'ab'[one.id % 2]} {99 - one.id}%" if one.id % 4 else ""

    def numbers_of_modules(self, k: int) -> dict[int, int]:
        """The number of each group of features in a snapshot."""
        counts = np.zeros(_MODULES, dtype=int)
        for layer in range(len(self.layers)):
            for one in self.alive(k, layer):
                counts[one.group] += 1
        order = np.argsort(-counts, kind="stable") if self.numbers_vary else range(_MODULES)
        return {int(group): n for n, group in enumerate(order)}

    def _groups(self, k: int) -> dict[str, float]:
        groups: dict[str, float] = {}
        for layer in range(len(self.layers)):
            alive = self.alive(k, layer)
            total = sum(self.importance(one, k) for one in alive)
            for one in alive:
                group = label_group(self.label(layer, one))
                groups[group] = groups.get(group, 0.0) + self.importance(one, k) / total
        return groups

    @property
    def folder(self) -> Path:
        """There is none on disk."""
        return Path("/missing") / self.name

    def entry(self) -> dict[str, Any]:
        return {"name": self.name, "version": str(len(self.steps())), "snapshots": len(self.steps())}

    def steps(self, every: int = 1) -> list[int]:
        return self.all_steps[: self.written]

    def run(self, every: int = 1) -> str:
        labels = [
            {str(one.id): self.label(l, one) for one in column if self.label(l, one)}
            for l, column in enumerate(self.lineages)
        ]
        return json.dumps(
            {
                "name": self.name,
                "every": every,
                "version": str(len(self.steps())),
                "layers": [{"name": name, "kind": kind} for name, kind in self.layers],
                "snapshots": [self._outline(k) for k in range(len(self.steps()))],
                "labels": labels,
                "output_names": {},
                "label_colors": list(label_colors([self._groups(k) for k in range(len(self.steps()))]).items()),
                "module_numbers": [
                    {str(n): group for group, n in self.numbers_of_modules(k).items()} if self.numbers_vary else None
                    for k in range(len(self.steps()))
                ],
                "events": self._events(),
                "comparisons": self.comparisons,
                "fingerprints": {f"{self.name} {step}": step for step in self.steps()},
                "lifetimes": [],
                "scalars": self._scalars(),
            }
        )

    def _outline(self, k: int) -> dict[str, Any]:
        layers = [self._layer(k, l) for l in range(len(self.layers))]
        total = sum(len(layer["importance"]) for layer in layers)
        metrics = {
            "features/total": {"value": total, "error": None},
            "effective_edges/total": {"value": 900 * np.exp(-4 * k / len(self.all_steps)) + 60, "error": 12.5},
            "modularity/total": {"value": 0.2 + 0.5 * k / len(self.all_steps), "error": None},
        }
        keys = ("ids", "importance", "modules", "parents")
        return {
            "step": self.all_steps[k],
            "epoch": self.all_steps[k] // 10,
            "samples": 1740,
            "layers": [{key: layer[key] for key in keys} for layer in layers],
            "metrics": metrics,
        }

    def _layer(self, k: int, l: int) -> dict[str, Any]:
        alive = self.alive(k, l)
        numbers = self.numbers_of_modules(k)
        importance = [float(f"{self.importance(one, k):.5g}") for one in alive]
        return {
            "ids": [one.id for one in alive],
            "importance": importance,
            "error": [float(f"{0.06 * value:.5g}") for value in importance],
            "similarity": [None if one.birth == k else float(f"{1 - 0.003 * one.id:.5g}") for one in alive],
            "parents": [one.parent if one.birth == k and k > 0 else -1 for one in alive],
            "modules": [numbers[one.group] if one.id % 9 else -1 for one in alive] if self.modules else None,
            "labels": [self.label(l, one) for one in alive],
            "label_score": None,
            "degenerate": [one.id % 7 == 3 for one in alive],
            "nats": [float(f"{0.01 * value:.5g}") for value in importance],
            "nats_error": [float(f"{0.001 * value:.5g}") for value in importance],
        }

    def snapshot(self, step: int, edges: int = 400) -> str:
        k = self.all_steps.index(step)
        sections = []
        for l in range(len(self.layers) - 1):
            weight, source, target = self.section(k, l)
            kept = min(edges, self.edges_)
            held = {"source": source[:kept], "target": target[:kept], "weight": weight[:kept], "error": None}
            signs = [-1 if (i + j) % 3 == 0 else 1 for i, j in zip(source[:kept], target[:kept], strict=True)]
            held["attribution"] = [sign * w / 2 for sign, w in zip(signs, weight, strict=False)]
            held["attribution_error"] = [w / 10 for w in weight[:kept]]
            sections.append({"count": len(weight), "strength": sum(weight), "strongest": weight[0], "edges": held})
        layers = [self._layer(k, l) for l in range(len(self.layers))]
        return json.dumps({"step": step, "layers": layers, "sections": sections})

    def feature(self, step: int, layer: int, which: int) -> str:
        """Nothing but importances and edges, as for the file of an older version."""
        shown = json.loads(self.snapshot(step))
        of_layer, name = shown["layers"][layer], self.layers[layer][0]
        i = of_layer["ids"].index(which)
        history = [self._history_at(k, layer, which) for k in range(len(self.steps()))]
        unknown = ("effect", "effect_error", "effect_significant", "score")
        return json.dumps(
            {
                "step": step,
                "layer": name,
                "id": f"{name}/{which}",
                "index": i,
                "label": of_layer["labels"][i],
                "label_score": None,
                "importance": of_layer["importance"][i],
                "importance_error": of_layer["error"][i],
                "nats": of_layer["nats"][i],
                "nats_error": of_layer["nats_error"][i],
                "degenerate": of_layer["degenerate"][i],
                "samples": "",
                **dict.fromkeys(
                    (
                        "histogram",
                        "shape",
                        "examples",
                        "raised",
                        "lowered",
                        "effect",
                        "final_since",
                        "effects_by",
                        "effects_on",
                    )
                ),
                "inputs": self._interactions(shown, layer - 1, i, "target") if layer else None,
                "outputs": self._interactions(shown, layer, i, "source") if layer < len(self.layers) - 1 else None,
                "renderings": {},
                "note": "",
                "history": {
                    "steps": self.steps(),
                    **{key: [at[key] for at in history] for key in history[0]},
                    **{key: [None] * len(history) for key in unknown},
                },
            }
        )

    def _history_at(self, k: int, layer: int, which: int) -> dict[str, float | None]:
        of_layer = self._layer(k, layer)
        i = of_layer["ids"].index(which) if which in of_layer["ids"] else None
        keys = {"importance": "importance", "importance_error": "error", "nats": "nats", "nats_error": "nats_error"}
        return {name: None if i is None else of_layer[key][i] for name, key in keys.items()}

    def _interactions(self, shown: dict[str, Any], section: int, i: int, end: str) -> list[dict[str, Any]]:
        edges = shown["sections"][section]["edges"]
        other, l = ("source", section) if end == "target" else ("target", section + 1)
        name, of_layer = self.layers[l][0], shown["layers"][l]
        total = sum(w for w, own in zip(edges["weight"], edges[end], strict=True) if own == i)
        unknown = dict.fromkeys(("edge_error", "attribution", "attribution_error"))
        return [
            {"layer": name, "id": f"{name}/{of_layer['ids'][j]}", "label": of_layer["labels"][j], "share": w / total}
            | {"edge": w, **unknown}
            for w, own, j in zip(edges["weight"], edges[end], edges[other], strict=True)
            if own == i
        ][:8]

    def feature_pages(self, step: int, limit: int) -> list[Any]:
        """None: the film of this run has no pages of features."""
        return []

    def notes(self) -> dict[str, str]:
        return {}

    def final_forms(self) -> dict[str, int]:
        return {}

    def section(self, k: int, l: int) -> tuple[list[float], list[int], list[int]]:
        """Strengths of all edges of a section, the strongest first, and the indices of their features."""
        before, after = self.alive(k, l), self.alive(k, l + 1)
        rng = np.random.default_rng(self.seed + l)
        noise = 10 ** rng.uniform(-2.5, 0, (self.features, self.features))
        sharp = 0.5 * (k + 1) / len(self.all_steps) + 0.5
        sizes = [np.sqrt([self.importance(one, k) for one in column]) for column in (after, before)]
        ids, groups = ([[getattr(one, key) for one in column] for column in (after, before)] for key in ("id", "group"))
        inside = np.equal.outer(*groups)
        strength = noise[np.ix_(*ids)] * np.where(inside, 1.0, 1 - 0.97 * sharp) * np.outer(*sizes)
        order = np.argsort(-strength, axis=None, kind="stable")
        target, source = np.unravel_index(order, strength.shape)
        weight = [float(f"{value:.5g}") for value in strength.flat[order]]
        return weight, source.tolist(), target.tolist()

    def _events(self) -> list[dict[str, Any]]:
        events = []
        for (name, _), column in zip(self.layers, self.lineages, strict=True):
            for one in column:
                if 0 < one.birth < len(self.steps()):
                    step = self.all_steps[one.birth]
                    kind, text = "emerged", f"feature {name}/{one.id} emerged at step {step:,}"
                    if one.parent >= 0:
                        kind, text = "split", f"feature {name}/{one.id} split from {name}/{one.parent} at step {step:,}"
                    place = {"step": step, "layer": name, "lineage": one.id}
                    events.append({"kind": kind, "text": text, "at": step, "share": one.size, **place})
        return sorted(events, key=lambda event: event["step"])

    def _scalars(self) -> dict[str, Any]:
        steps = list(range(0, self.all_steps[-1] + 1, max(1, self.all_steps[-1] // 400)))
        loss = [float(f"{4 * np.exp(-6 * step / steps[-1]) + 0.02:.5g}") for step in steps]
        accuracy = [float(f"{1 / (1 + np.exp(-12 * (step / steps[-1] - 0.55))):.5g}") for step in steps]
        return {
            "loss/train": {"steps": steps, "values": loss},
            "accuracy/val": {"steps": steps, "values": accuracy},
        }
