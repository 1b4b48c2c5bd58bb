"""Runs on disk as training writes them, without the training: lineages that are born, split and die."""

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
    """A feature over time: there from snapshot ``birth`` to before ``death``."""

    birth: int
    death: int
    size: float
    growth: float
    parent: int


@dataclass
class Filmed:
    """A run of made-up graphs.

    Args:
        layers: Names of the node layers; the last one has single neurons.
        features: Number of features ever of each other layer.
        snapshots: Number of snapshots, 10 steps apart; two at least.
        seed: Of everything drawn.
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
        """The first half is there from the start; of the others, every second one splits from one of them."""
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
        """The graph of a snapshot, its features ordered by importance."""
        importances = [
            {
                i: one.size * 10 ** (one.growth * k / self.snapshots)
                for i, one in enumerate(layer)
                if self._lives(one, k)
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
        edges[pairs[0]][0, -1] = 0.0  # an edge that is not there
        graph = InteractionGraph(
            bases,
            edges,
            {"step": 10 * k, "epoch": k // 3, "n_samples": 1740, "notes": []},
            {pair: E / 10 for pair, E in edges.items()},
            {name: torch.tensor([i % 3 - 1 for i in own]) for name, own in zip(self.layers, rows, strict=True)},
            {name: [self._label(i, k) for i in own] for name, own in zip(self.layers, ids, strict=False)},
        )
        for name, layer, own in zip(self.layers, self.lineages, ids, strict=False):
            new = torch.tensor([k == 0 or layer[i].birth == k for i in own])
            similarity = torch.tensor([0.9 + 0.01 * (i % 9) for i in own], dtype=torch.float64)
            parents = torch.tensor([layer[i].parent if layer[i].birth == k else -1 for i in own])
            graph.lineages[name] = Lineages(torch.tensor(own), similarity.masked_fill(new, torch.nan), parents)
        graph.measure()
        graph.info["metrics"]["features/total"]["error"] = 0.125
        return graph

    def events(self) -> list[dict[str, object]]:
        """What happened, as the callback tells it."""
        found: list[dict[str, object]] = []
        for name, layer in zip(self.layers, self.lineages, strict=False):
            for i, one in enumerate(layer):
                for kind, k in (("emerged", one.birth), ("vanished", one.death)):
                    if 0 < k < self.snapshots:
                        text = f"feature {name}/{i} {kind} at step {10 * k:,}"
                        found.append({"step": 10 * k, "kind": kind, "text": text, "layer": name, "lineage": i})
        return sorted(found, key=lambda event: str(event["step"]).zfill(9))

    def write(self, folder: Path, snapshots: Sequence[int] | None = None) -> None:
        """Write basis files, all of them by default, and events."""
        for k in range(self.snapshots) if snapshots is None else snapshots:
            self.graph(k).save(folder / "snapshots" / f"step-{10 * k:08d}.safetensors")
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events()))

    @staticmethod
    def _lives(one: Lineage, k: int) -> bool:
        return one.birth <= k < one.death

    @staticmethod
    def _label(i: int, k: int) -> str:
        """Names change as features form, and are text of any kind."""
        return "" if i % 4 == 3 else f"k={i} <a&b> {50 + k}%"

    def _basis(self, name: str, importance: torch.Tensor) -> Basis:
        r, d = len(importance), self.features
        C = torch.eye(d, r, dtype=torch.float64)
        unsure = torch.arange(r) % 5 == 4
        return Basis(name, self.kind, torch.zeros(d).double(), C, C.T, importance, importance / 20, unsure)


def write_run(
    logs: Path,
    layers: Sequence[str] = ("input", "hidden", "output"),
    features: int = 12,
    snapshots: int = 8,
    seed: int = 0,
) -> Filmed:
    """Write a run to its log directory: graphs in ``lib``, a baseline in ``pca``, and an event file with a loss."""
    filmed = Filmed(layers, features, snapshots, seed)
    filmed.write(logs / "lib")
    Filmed(layers, features, snapshots, seed + 1, kind="pca").write(logs / "pca")
    with SummaryWriter(str(logs)) as writer:
        for step in range(10 * snapshots):
            writer.add_scalar("loss/train", 2.0 * 0.99**step, step)
        writer.add_scalar("lib/features/total", 1.0, 0)
        writer.add_scalar("epoch", 0, 0)
    return filmed
