"""A synthetic run whose features have examples, signed interactions and effects, with samples of any kind."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_lightning.algorithm.examples import NUM_BINS, FeatureExamples
from lib_lightning.graph import FeatureEffects, InteractionGraph, OutputEffects
from tests.viewer.saved_run import CLASSES, SavedRun

SAMPLES, COUNTS, AROUND = 40, (6, 6, 4), 5
SHAPES: dict[str, tuple[int, ...]] = {"tokens": (14,), "image": (4, 4), "row": (), "series": (24,), "text": ()}
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "old",
    "town",
    "and",
    "dogs",
    "ran",
    "home",
)
OUTPUT_NAMES = ["zero", "one", "<two>", "three"]


@dataclass
class ExampleRun(SavedRun):
    """A run with everything that a feature's page shows.

    Args:
        rendering: Kind of the samples.
    """

    rendering: str = "tokens"

    @property
    def positions(self) -> int:
        """Number of positions of a sample."""
        return int(np.prod(SHAPES[self.rendering], dtype=int))

    def values(self, layer: int, lineage: int, k: int) -> np.ndarray:
        """Values of a feature at all positions of all samples, ``(samples, positions)``: noise at first."""
        early, late = (np.random.default_rng([self.seed, layer, lineage, s]) for s in (0, 1))
        kept = k / max(1, self.snapshots - 1)
        noise = [rng.normal(size=(SAMPLES, self.positions)) for rng in (early, late)]
        liked = (np.add.outer(np.arange(SAMPLES) * 3, np.arange(self.positions)) % len(WORDS)) == lineage % len(WORDS)
        return (1 - kept) * noise[0] + kept * (0.4 * noise[1] + (3.0 if lineage % 2 else -3.0) * liked)

    def graph(self, k: int) -> InteractionGraph:
        """The graph of a snapshot; effects on a score are known in every third one."""
        graph = super().graph(k)
        for layer, name in enumerate(self.layers):
            r = graph.bases[name].n_features
            ids = graph.lineages[name].ids.tolist() if name in graph.lineages else range(r)
            graph.examples[name] = self._examples([self.values(layer, i, k) for i in ids])
            rng = np.random.default_rng([self.seed, layer, k])
            changes = np.sort(rng.normal(size=(r, 4)), axis=1)[:, [3, 2, 0, 1]]
            graph.output_effects[name] = OutputEffects(
                torch.from_numpy(np.stack([rng.permutation(CLASSES) for _ in range(r)])).int(),
                torch.from_numpy(changes).float(),
                torch.full((r, 4), 0.05),
            )
            if k % 3 == 0:
                drop = -torch.rand(r, dtype=torch.float64, generator=torch.Generator().manual_seed(k + layer)) / 10
                drop[r - 1] = torch.nan  # not tried
                graph.effects[name] = FeatureEffects(drop, drop.abs() / 5, drop.abs() > 0.02)
            if name in graph.labels:
                scores = torch.linspace(0.99, 0.6, r)
                graph.label_scores[name] = scores.masked_fill(
                    torch.tensor([not x for x in graph.labels[name]]), torch.nan
                )
        for section, E in graph.edges.items():
            signs = torch.from_numpy(np.random.default_rng(self.seed).choice([-1.0, 1.0], size=tuple(E.shape)))
            graph.attributions[section] = signs * E.sqrt()
            graph.attribution_errors[section] = E.sqrt() / 8
        graph.info |= {"output_names": OUTPUT_NAMES, "causal": {"score": "accuracy", "level": 0.05, "n_samples": 500}}
        return graph

    def _examples(self, values: Sequence[np.ndarray]) -> FeatureExamples:
        r, K = len(values), sum(COUNTS)
        is_sequence = len(SHAPES[self.rendering]) == 1
        W = 2 * AROUND + 1 if is_sequence else 0
        samples, positions = np.full((r, K), -1), np.full((r, K), -1)
        found, context = np.full((r, K), np.nan), np.full((r, K, W), np.nan)
        histogram, width = np.zeros((r, NUM_BINS)), np.zeros(r)
        for i, x in enumerate(values):
            places = [np.argmax(x, axis=1), np.argmin(x, axis=1)]
            ends = [np.take_along_axis(x, place[:, None], 1)[:, 0] for place in places]
            for start, of_sample, place, order in (
                (0, ends[0], places[0], np.argsort(-ends[0])),
                (COUNTS[0], ends[1], places[1], np.argsort(ends[1])),
            ):
                for n, s in enumerate(order[: COUNTS[0]]):
                    samples[i, start + n], positions[i, start + n], found[i, start + n] = s, place[s], of_sample[s]
            flat = np.argsort(-x, axis=None)[:: max(1, x.size // (COUNTS[2] + 1))][1 : COUNTS[2] + 1]
            for n, place in enumerate(flat):
                at = COUNTS[0] + COUNTS[1] + n
                samples[i, at], positions[i, at] = divmod(int(place), self.positions)
                found[i, at] = x.flat[place]
            for n in range(K if is_sequence else 0):
                for w in range(W):
                    if 0 <= (p := positions[i, n] - AROUND + w) < self.positions:
                        context[i, n, w] = x[samples[i, n], p]
            width[i] = x.std() / 8 * 2 ** np.ceil(np.log2(np.abs(x).max() / (x.std() * NUM_BINS / 16)))
            edges = (np.arange(NUM_BINS + 1) - NUM_BINS / 2) * width[i]
            histogram[i] = np.histogram(x, edges)[0]
        return FeatureExamples(
            torch.from_numpy(samples).int(),
            torch.from_numpy(positions).int(),
            torch.from_numpy(found).float(),
            COUNTS,
            SHAPES[self.rendering],
            torch.from_numpy(context).half(),
            AROUND if is_sequence else 0,
            torch.from_numpy(histogram).long(),
            torch.from_numpy(width).float(),
        )

    def sample(self, n: int) -> dict[str, Any]:
        """How a sample looks."""
        rng = np.random.default_rng([self.seed, n])
        words = [WORDS[(3 * n + p) % len(WORDS)] for p in range(14)]
        looks: dict[str, dict[str, Any]] = {
            "tokens": {"tokens": [" " + word if p else word.title() for p, word in enumerate(words)]},
            "image": {"png": _png(rng), "size": [8, 8]},
            "row": {
                "columns": [f"column {c}" for c in range(11)],
                "values": ["a", *rng.normal(size=10).round(3).tolist()],
            },
            "series": {"values": rng.normal(size=(2, 24)).cumsum(axis=1).round(3).tolist()},
            "text": {"text": " ".join(words)},
        }
        return {"kind": self.rendering, **looks[self.rendering], "label": OUTPUT_NAMES[n % CLASSES]}

    def write(self, folder: Path, snapshots: Sequence[int] | None = None) -> None:
        """Write the run, and how its samples look."""
        super().write(folder, snapshots)
        lines = [json.dumps({"sample": n, **self.sample(n)}) for n in range(SAMPLES)]
        (folder / "samples.jsonl").write_text("".join(line + "\n" for line in lines))


def _png(rng: np.random.Generator) -> str:
    y, x = np.mgrid[:8, :8]
    cx, cy = rng.uniform(1, 6, size=2)
    blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 4)
    stream = io.BytesIO()
    Image.fromarray((255 * blob).astype(np.uint8)).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()
