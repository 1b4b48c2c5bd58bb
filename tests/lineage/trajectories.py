"""Synthetic trainings with known events of the features of one node layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib_lightning import Basis, InteractionGraph

SAMPLES = 1024


@dataclass
class Trajectory:
    """Features as directions in the space of samples, with known lineages.

    Features drift a little at every step, change sign at random, and are in random order.
    """

    seed: int
    count: int = 20
    drift: float = 0.03
    values: dict[int, Tensor] = field(default_factory=dict)  # by lineage
    next_id: int = 0

    def __post_init__(self) -> None:
        self.g = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            self.birth()

    def _new_direction(self) -> Tensor:
        new = torch.randn(SAMPLES, generator=self.g, dtype=torch.float64)
        new -= new.mean()
        for _ in range(2):  # twice is enough against rounding
            for old in self.values.values():
                new -= (new @ old) / (old @ old) * old
        return new / new.norm()

    def birth(self) -> int:
        self.values[self.next_id] = self._new_direction()
        self.next_id += 1
        return self.next_id - 1

    def death(self, lineage: int) -> None:
        del self.values[lineage]

    def rotate(self, lineages: list[int], angle: float | None = None) -> None:
        """Rotate some features among themselves: randomly, or two of them by an angle."""
        k = len(lineages)
        if angle is None:
            Q = torch.linalg.qr(torch.randn(k, k, generator=self.g, dtype=torch.float64)).Q
        else:
            c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
            Q = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        turned = torch.stack([self.values[i] for i in lineages], 1) @ Q
        for i, column in zip(lineages, turned.T, strict=True):
            self.values[i] = column

    def split(self, lineage: int, share: float = 0.64) -> int:
        """Split a feature in two; the more similar one continues the lineage."""
        old, new = self.values[lineage], self._new_direction()
        a, b = share**0.5, (1 - share) ** 0.5
        self.values[lineage], self.values[self.next_id] = a * old + b * new, b * old - a * new
        self.next_id += 1
        return self.next_id - 1

    def merge(self, lineage: int, into: int, share: float = 0.64) -> None:
        a, b = share**0.5, (1 - share) ** 0.5
        self.values[into] = a * self.values[into] + b * self.values.pop(lineage)

    def step(self) -> None:
        """Let all features drift a little in random directions."""
        for i in list(self.values):
            noise = torch.randn(SAMPLES, generator=self.g, dtype=torch.float64) / SAMPLES**0.5
            moved = self.values[i] + self.drift * noise
            self.values[i] = moved / moved.norm()

    def graph(self, step: int) -> tuple[InteractionGraph, list[int]]:
        """The graph of a snapshot, and the true lineage of each of its features."""
        order = torch.randperm(len(self.values), generator=self.g).tolist()
        lineages = [list(self.values)[k] for k in order]
        signs = torch.randint(0, 2, (len(order),), generator=self.g) * 2.0 - 1
        reference = torch.stack([self.values[i] for i in lineages], 1) * signs * SAMPLES**0.5
        return snapshot({"layer": reference}, step), lineages


def snapshot(values: dict[str, Tensor], step: int, kind: str = "lib", samples: str = "same") -> InteractionGraph:
    """A graph with given reference features."""
    bases = {}
    for name, x in values.items():
        eye = torch.eye(x.shape[1], dtype=torch.float64)
        bases[name] = Basis(name, kind, eye[0], eye, eye, torch.linspace(1, 0.1, x.shape[1], dtype=torch.float64))
    names = list(values)
    edges = {
        (a, b): torch.ones(values[b].shape[1], values[a].shape[1], dtype=torch.float64)
        for a, b in itertools.pairwise(names)
    }
    graph = InteractionGraph(bases, edges, {"step": step, "reference_samples": samples})
    graph.reference_features = {name: x.half() for name, x in values.items()}
    return graph
