"""Synthetic runs on disk, in the format that training writes: lineages that are born, split and die."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from lib_lightning.algorithm.basis import Basis, neuron_basis
from lib_lightning.graph import InteractionGraph, Lineages

CLASSES = 4


@dataclass
class Lineage:
    """A lineage over time: present from snapshot ``birth`` until before ``death``."""

    birth: int
    death: int
    size: float
    growth: float
    parent: int


@dataclass
class SavedRun:
    """A run of synthetic graphs.

    Args:
        layers: Names of the node layers; the last one has single neurons.
        features: Number of lineages of each other layer.
        snapshots: Number of snapshots, 10 steps apart; at least two.
        seed: Random seed.
        kind: Basis of all but the last layer.
    """

    layers: Sequence[str] = ("input", "hidden", "output")
    features: int = 12
    snapshots: int = 8
    seed: int = 0
    kind: str = "lib"
    lineages: list[list[Lineage]] = field(init=False)
    strength: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.lineages = [[self._draw(rng, i) for i in range(self.features)] for _ in self.layers[:-1]]
        wide = [*(self.features for _ in self.layers[:-1]), CLASSES]
        self.strength = [10.0 ** rng.uniform(-4, 0, (after, before)) for before, after in itertools.pairwise(wide)]

    def _draw(self, rng: np.random.Generator, i: int) -> Lineage:
        """The first half is present from the start; every second one of the others splits from one of these."""
        early = i < self.features // 2
        birth = 0 if early else int(rng.integers(1, max(2, self.snapshots)))
        death = int(rng.integers(birth + 1, self.snapshots + 1)) if i % 3 == 2 else self.snapshots
        parent = i - self.features // 2 if not early and i % 2 == 0 else -1
        return Lineage(birth, death, float(10 ** -rng.uniform(0, 3)), float(rng.uniform(-0.5, 0.5)), parent)

    @property
    def steps(self) -> list[int]:
        """Steps of all snapshots."""
        return [10 * k for k in range(self.snapshots)]

    def graph(self, k: int) -> InteractionGraph:
        """The graph of a snapshot, with features in order of importance."""
        importances = [
            {
                i: one.size * 10 ** (one.growth * k / self.snapshots)
                for i, one in enumerate(layer)
                if self._is_alive(one, k)
            }
            for layer in self.lineages
        ]
        ids = [sorted(found, key=lambda i, found=found: -found[i]) for found in importances]
        bases = {
            name: self._basis(name, torch.tensor([found[i] for i in own], dtype=torch.float64))
            for name, found, own in zip(self.layers[:-1], importances, ids, strict=True)
        }
        last = self.layers[-1]
        bases[last] = neuron_basis(
            last, torch.zeros(CLASSES).double(), torch.diag(torch.arange(1.0, 1 + CLASSES)).double()
        )
        rows = [*ids, list(range(CLASSES))]
        pairs = list(itertools.pairwise(self.layers))
        edges = {
            pair: torch.from_numpy(self.strength[i][np.ix_(rows[i + 1], rows[i])] * (1 + k / self.snapshots))
            for i, pair in enumerate(pairs)
        }
        edges[pairs[0]][0, -1] = 0.0  # a missing edge
        graph = InteractionGraph(
            bases,
            edges,
            {"step": 10 * k, "epoch": k // 3, "n_samples": 1740, "notes": [], "modules_tracked": True},
            {pair: E / 10 for pair, E in edges.items()},
            {name: torch.tensor([i % 3 - 1 for i in own]) for name, own in zip(self.layers, rows, strict=True)},
            {name: [self._label(i, k) for i in own] for name, own in zip(self.layers, ids, strict=False)},
        )
        graph.attributions = {pair: (0.5 - E / E.max()) * E for pair, E in edges.items()}
        graph.attribution_errors = {pair: E / 20 for pair, E in edges.items()}
        for name, layer, own in zip(self.layers, self.lineages, ids, strict=False):
            new = torch.tensor([k == 0 or layer[i].birth == k for i in own])
            similarity = torch.tensor([0.9 + 0.01 * (i % 9) for i in own], dtype=torch.float64)
            parents = torch.tensor([layer[i].parent if layer[i].birth == k else -1 for i in own])
            graph.lineages[name] = Lineages(torch.tensor(own), similarity.masked_fill(new, torch.nan), parents)
        graph.measure()
        graph.info["metrics"]["features/total"]["error"] = 0.125
        return graph

    def events(self) -> list[dict[str, object]]:
        """Events in the format of the callback."""
        found: list[dict[str, object]] = []
        for name, layer in zip(self.layers, self.lineages, strict=False):
            for i, one in enumerate(layer):
                for kind, k in (("emerged", one.birth), ("vanished", one.death)):
                    if 0 < k < self.snapshots:
                        text = f"feature {name}/{i} {kind} at step {10 * k:,}"
                        found.append({"step": 10 * k, "kind": kind, "text": text, "layer": name, "lineage": i})
        return sorted(found, key=lambda event: str(event["step"]).zfill(9))

    def write(self, folder: Path, snapshots: Sequence[int] | None = None) -> None:
        """Write events and basis files, by default of all snapshots."""
        for k in range(self.snapshots) if snapshots is None else snapshots:
            self.graph(k).save(folder / "snapshots" / f"step-{10 * k:08d}.safetensors")
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events()))

    @staticmethod
    def _is_alive(one: Lineage, k: int) -> bool:
        return one.birth <= k < one.death

    @staticmethod
    def _label(i: int, k: int) -> str:
        """Labels change over time and contain special characters."""
        return "" if i % 4 == 3 else f"k={i} <a&b> {50 + k}%"

    def _basis(self, name: str, importance: torch.Tensor) -> Basis:
        r, d = len(importance), self.features
        C = torch.eye(d, r, dtype=torch.float64)
        degenerate = torch.arange(r) % 5 == 4
        return Basis(
            name,
            self.kind,
            torch.zeros(d).double(),
            C,
            C.T,
            importance,
            importance / 20,
            degenerate,
            importance / 100,
            importance / 1000,
        )


def write_run(
    logs: Path,
    layers: Sequence[str] = ("input", "hidden", "output"),
    features: int = 12,
    snapshots: int = 8,
    seed: int = 0,
) -> SavedRun:
    """Write a run to its log directory: graphs in ``lib``, a baseline in ``pca``, and an event file with a loss."""
    saved = SavedRun(layers, features, snapshots, seed)
    saved.write(logs / "lib")
    SavedRun(layers, features, snapshots, seed + 1, kind="pca").write(logs / "pca")
    with SummaryWriter(str(logs)) as writer:
        for step in range(10 * snapshots):
            writer.add_scalar("loss/train", 2.0 * 0.99**step, step)
        writer.add_scalar("lib/features/total", 1.0, 0)
        writer.add_scalar("epoch", 0, 0)
    return saved
