"""All bases of one network, from the same activations: 16,384 tokens for moments, fewer pieces of text for metrics.

`lib_lightning.compute_interaction_graph` takes one set of samples for everything. Here means and covariances come from
more text than a metric, and all bases share the forward passes, the metrics and the pieces that edges are measured on.
The parts are those of the library (`lib_lightning.algorithm.build` has them in the order of the paper).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_lightning import InteractionGraph
from lib_lightning.algorithm.basis import Basis, neuron_basis, pca_basis
from lib_lightning.algorithm.covariance import RunningCovariance
from lib_lightning.algorithm.dictionary_basis import ERROR, DictionaryBasis
from lib_lightning.algorithm.dictionary_edges import DictionaryEdges
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.feature_reader import FeatureReader
from lib_lightning.algorithm.fisher_metric import LOGITS
from lib_lightning.algorithm.gradient_metric import GradientMetric
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.algorithm.latent_choice import choose_latents
from lib_lightning.algorithm.linalg import Cutoff
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.output_gradients import OutputGradients, output_metrics
from lib_lightning.algorithm.rotations import rotated, rotation_of
from lib_lightning.algorithm.section_cache import SectionCache
from lib_lightning.algorithm.wide_layers import eigenproblem
from lib_lightning.dictionaries import TopKSAE
from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.dictionaries.topk_training import BATCH, EPOCHS, TopKSettings, TopKTraining
from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.graph import Lineages
from lib_lightning.io import basis_format as keys
from lib_lightning.jacobian.closed_form_detect import NoClosedForms
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import NodeLayer
from recipes.bases_compared.subjects import Subject

# The bases, and their names in the tables.
BASES = {
    "lib": "LIB",
    "fisher": "LIB, end by Fisher metric",
    "output": "LIB, all by Fisher metric",
    "pca": "PCA",
    "neuron": "neurons",
    "ica": "ICA",
    "random": "random rotation",
    "sae": "SAE",
}
_RTOL = 1e-6
_ROTATED = ("ica", "random")
# Rows at a time, when all activations are read.
_ROWS = 8192


class Fit:
    """The bases of a network. Use it within a session of `instrumented`.

    Args:
        subject: The network.
        folder: Folder for activations, bases and autoencoders, which are computed once.

    Attributes:
        instrumented: The network, as it runs.
        names: Names of the node layers.
    """

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder / f"{subject.name.replace(' ', '_')}-{subject.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.instrumented = InstrumentedModel(subject.model, subject.node_layers)
        self.names = [layer.name for layer in self.instrumented.layers]

    @cached_property
    def activations(self) -> list[Tensor]:
        """Activations of each node layer on all pieces at the positions that count, ``(n, S, d)``."""
        return self._kept("activations", lambda: self.activations_on(self.subject.fit))

    def activations_on(self, pieces: Tensor) -> list[Tensor]:
        """Activations of each node layer at the positions that count.

        Args:
            pieces: Pieces of text, shape ``(n, S)``.

        Returns:
            For each node layer ``(n, S, d)``.
        """
        parts = []
        for batch in self.subject.batches(pieces):
            with torch.no_grad():
                captured = self.instrumented.capture(batch)
            first = captured[0].mask
            valid = slice(None) if first is None else first[0]
            parts.append([layer.a[:, valid].detach().clone() for layer in captured])
        return [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]

    @cached_property
    def moments(self) -> list[RunningCovariance]:
        """Mean and covariance of each node layer."""
        found = []
        for a in self.activations:
            one = RunningCovariance()
            for part in a.split(256):
                one.update(part.flatten(0, 1), len(part))
            found.append(one)
        return found

    @cached_property
    def metric_pieces(self) -> Tensor:
        """The first pieces without activations of massive length, for metrics and edges: one such position decides all.

        Edges hold fourth powers of activations. With five of these positions in 16,128, the standard errors of
        effective edges in SmolLM2 were several times the numbers.
        """
        is_usual = torch.stack([is_usual_length(a).all(1) for a in self.activations]).all(0)
        return self.subject.fit[is_usual][: self.subject.n_metric]

    @cached_property
    def cache(self) -> SectionCache:
        """The sections on the pieces for metrics and edges, with their graphs."""
        batches = self.subject.batches(self.metric_pieces)
        plan = MemoryPlan(keep_graphs=True)
        return SectionCache.collect(self.instrumented, batches, plan, NoClosedForms, 0, lambda captured: None)

    def bases(self, kind: str) -> list[Basis]:
        """The bases of all node layers.

        Args:
            kind: One of `BASES`.

        Returns:
            One for each node layer.
        """
        if kind == "sae":
            return list(self.latents)
        return self._kept(f"basis-{kind}", lambda: self._computed(kind))

    def _computed(self, kind: str) -> list[Basis]:
        if kind in ("pca", "neuron"):
            return [self._from_covariance(kind, i) for i in range(len(self.names))]
        if kind in _ROTATED:
            # Rotations of the whitened activations of the LIB whose last node layer has a metric as well.
            return [self._rotated(kind, i, lib) for i, lib in enumerate(self.bases("fisher"))]
        found: list[Basis] = []
        for i in reversed(range(len(self.names))):
            found.insert(0, self._lib(kind, i, found[0] if found else None))
        return found

    def _cutoff(self, i: int) -> Cutoff:
        return Cutoff(_RTOL, len(self.moments[i].mean), torch.float32)

    def _from_covariance(self, kind: str, i: int) -> Basis:
        mean, covariance = self.moments[i].mean, self.moments[i].covariance
        if kind == "neuron":
            return neuron_basis(self.names[i], mean, covariance)
        return pca_basis(self.names[i], mean, covariance, self._cutoff(i))

    def _lib(self, kind: str, i: int, next_layer: Basis | None) -> Basis:
        if next_layer is None and kind == "lib":
            return self._from_covariance("pca", i)
        metric: GradientMetric
        if next_layer is None or kind == "output":
            metric = self._output_metrics[i]
        else:
            d, generator = len(self.moments[i].mean), torch.Generator().manual_seed(i)
            groups = MemoryPlan().groups
            metric = JacobianMetric(d, next_layer.to_features, self.subject.n_probes, generator, groups)
            metric.add_batches(self.cache, i, "metric")
        cutoff = self._cutoff(i)
        problem = eigenproblem(self.moments[i], metric.factor(cutoff.metric), SINGLE_PROCESS, keep=False)
        if problem.needs_rows:
            for rows in self.activations[i].flatten(0, 1).split(_ROWS):
                problem.update(rows)
        return problem.solve(self.names[i], cutoff)[0]

    @cached_property
    def _output_metrics(self) -> dict[int, GradientMetric]:
        """The Fisher metric of the predictions at each node layer."""
        batches = self.subject.batches(self.metric_pieces)
        gradients = OutputGradients(
            self.instrumented, batches, LOGITS, self.cache.group_slices, MemoryPlan().stack_elements
        )
        layers, widths = list(range(len(self.names))), [len(one.mean) for one in self.moments]
        return output_metrics(gradients, layers, widths, self.subject.n_probes, MemoryPlan().groups, LowRankGram)

    def _rotated(self, kind: str, i: int, lib: Basis) -> Basis:
        rows = self.activations[i].flatten(0, 1)
        rotation = rotation_of(kind, lib, self._output_metrics[i], len(rows), 1, self.subject.seed + i)
        for part in rows.split(_ROWS) if rotation.needs_rows else ():
            rotation.update(part, 0)
        R, _ = rotation.solve()
        return rotated(lib, kind, R)[0]

    @cached_property
    def latents(self) -> list[DictionaryBasis]:
        """Latents of autoencoders that are trained here, and what they leave out."""
        found = []
        for i, (name, a) in enumerate(zip(self.names, self.activations, strict=True)):
            rows = a.flatten(0, 1)
            sae = self.autoencoder(i)
            basis, _ = choose_latents(AdaptedDictionary(sae, rows[:64], name), [(rows, 0)], 2**31, SINGLE_PROCESS)
            with torch.no_grad():
                squares = sum(basis.encode(part).double().square().sum(0) for part in rows.split(1024))
            assert isinstance(squares, Tensor)
            found.append(replace(basis, importance=squares / len(rows)))
        return found

    def autoencoder(self, i: int) -> TopKSAE:
        """The autoencoder of a node layer, trained on the activations of all pieces."""
        path = self.folder / f"sae-{i}.safetensors"
        if not path.exists():
            rows = self.activations[i].flatten(0, 1)
            path.write_bytes(trained_autoencoder(rows, self.subject.settings, self.subject.steps).to_bytes())
        return TopKSAE.load(path)

    def graph(self, kind: str) -> InteractionGraph:
        """The interaction graph in a basis, on the pieces for edges, with jackknife replicates of the edges.

        Args:
            kind: One of `BASES`.

        Returns:
            The graph; ``info["edge replicates"]`` are the replicates of each section.
        """
        bases = self.bases(kind)
        E, replicates = self._kept(f"edges-{kind}", lambda: self._edges(bases))
        return graph_of(self.instrumented.layers, bases, E, replicates)

    def _edges(self, bases: Sequence[Basis]) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        # Groups of few samples, for standard errors; latents are many, and have fewer groups.
        is_dense = not any(isinstance(basis, DictionaryBasis) for basis in bases)
        kind = Edges if is_dense else DictionaryEdges
        n = self.subject.n_pushed
        edges = [
            # Of more latents than dimensions, as many times as many.
            kind(before, after, MemoryPlan().groups, True, n and n * times_as_wide(after), generator)
            for before, after in itertools.pairwise(bases)
        ]
        readers = [FeatureReader(basis) for basis in bases]
        following = torch.empty(0)
        for _, i, section in self.cache.sections("edges"):
            fhat = following if i else readers[0].next(section.a, section.mask_in)
            following = readers[i + 1].next(section.a_out, section.mask_out)
            edges[i].update(section, fhat, following)
        return [one.E for one in edges], [one.replicates for one in edges]

    def _kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """What is in a file of the folder, or is computed and written there."""
        path = self.folder / f"{name}.pt"
        if path.exists():
            return torch.load(path, weights_only=False)
        start = time.process_time()
        found = compute()
        part = path.with_suffix(".part")
        torch.save(found, part)
        part.replace(path)
        sys.stderr.write(f"{self.folder.name}: {name}, {time.process_time() - start:.0f} CPU s\n")
        return found


def times_as_wide(basis: Basis) -> int:
    """How many times as many features as dimensions there are, rounded, and at least 1."""
    return max(1, round(basis.n_features / len(basis.mean)))


def trained_autoencoder(rows: Tensor, settings: TopKSettings, steps: int) -> TopKSAE:
    """Train a top-k sparse autoencoder.

    Args:
        rows: Activations, shape ``(m, d)``; only the `usual` ones are used.
        settings: Its sizes, learning rate and seed.
        steps: Number of steps.

    Returns:
        The autoencoder.
    """
    rows = usual(rows)
    training = TopKTraining(rows.shape[1], settings)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(-(-steps // EPOCHS)):
        training.add(rows[torch.randint(len(rows), (BATCH,), generator=generator)])
        training.train()
    return training.sae


def usual(rows: Tensor) -> Tensor:
    """Activations without those of massive length.

    In SmolLM2, five of 16,128 positions have 94% of the variance after half of the blocks. An autoencoder would learn
    nothing else, and its reconstruction of these would hide how it does on all others.

    Args:
        rows: Activations, shape ``(m, d)``.

    Returns:
        Those that are not ten times as long as the median.

    Example:
        >>> usual(torch.tensor([[1.0], [2.0], [30.0]]))
        tensor([[1.],
                [2.]])
    """
    return rows[is_usual_length(rows)]


def is_usual_length(a: Tensor) -> Tensor:
    """Which activations ``(..., d)`` are at most ten times as long as the median.

    Example:
        >>> is_usual_length(torch.tensor([[1.0], [2.0], [30.0]]))
        tensor([ True,  True, False])
    """
    lengths = a.norm(dim=-1)
    return lengths <= 10 * lengths.median()


def graph_of(
    layers: Sequence[NodeLayer], bases: Sequence[Basis], E: Sequence[Tensor], replicates: Sequence[Tensor]
) -> InteractionGraph:
    """A graph of bases and edges that were computed separately.

    Args:
        layers: Node layers.
        bases: Their bases.
        E: Edges of each section.
        replicates: Jackknife replicates of these.

    Returns:
        The graph.
    """
    names = [basis.name for basis in bases]
    pairs = list(itertools.pairwise(names))
    latents = [basis for basis in bases if isinstance(basis, DictionaryBasis)]
    info = {
        keys.NODE_LAYERS: [
            {"name": x.name, "taps": list(x.taps), "positions": x.positions, "feature_dim": x.feature_dim}
            | ({} if x.skip_positions is None else {"skip_positions": x.skip_positions})
            for x in layers
        ],
        "edge replicates": dict(zip(pairs, replicates, strict=True)),
    }
    return InteractionGraph(
        dict(zip(names, bases, strict=True)),
        dict(zip(pairs, E, strict=True)),
        info,
        lineages={basis.name: Lineages.new(basis.numbers) for basis in latents},
        labels={basis.name: [""] * basis.error + [ERROR] for basis in latents},
    )
