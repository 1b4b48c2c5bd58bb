"""The interaction graph: bases, edges and everything computed from them; saved, loaded, measured and plotted."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lib_lightning._deprecated import renamed_arguments, renamed_fields
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import DRAWN, LATENTS
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.algorithm.dictionary_layers import check_dictionaries
from lib_lightning.algorithm.examples import FeatureExamples
from lib_lightning.algorithm.jackknife import standard_error
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.algorithm.output_changes import OutputEffects
from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.dictionaries.dictionary import Dictionary
from lib_lightning.errors import LIBError, SettingError, SettingTypeError, check_number, did_you_mean, quoted
from lib_lightning.io import basis_format as keys
from lib_lightning.io.basis_file import BasisFileError, read_file, write_file
from lib_lightning.model.node_layer import NodeLayer, with_known_axis

# Imported where they are used: together they take twice as long to import as torch.
if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure
    from torchmetrics import MetricCollection

    from lib_lightning.metrics.modules import Partitions
    from lib_lightning.metrics.summary import EdgeCurve, GraphMetrics
    from lib_lightning.plots.animated_layout import AnimatedLayout
    from lib_lightning.sample_graph.known_features import Renderings
    from lib_lightning.sample_graph.sample_graph import SampleGraph


@dataclass(frozen=True)
class Replicates:
    """Jackknife replicates of a graph: computed with one of ``G`` groups of samples omitted. They give standard errors.

    Attributes:
        importance: Importances of each node layer, shape ``(G, r)``.
        edges: Edges of each section, shape ``(G, r_out, r_in)``.
    """

    importance: dict[str, Tensor]
    edges: dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Lineages:
    """The lineages of the features of one node layer: which ones they continue from earlier snapshots.

    Attributes:
        ids: The lineage of each feature, shape ``(r,)``, int64: unique numbers from 0 in the order of birth. It is the
            number in a feature's id, such as ``"resid_post/17"``; its position in ``ids`` is the feature's index. Of
            latents of a dictionary, it is the number of the latent, in every snapshot; the error of the dictionary has
            the number of latents.
        similarity: Absolute correlation of each feature with the previous one of its lineage, shape ``(r,)``, float64;
            NaN for new lineages.
        parents: The lineage that a new one has split from, shape ``(r,)``, int64; -1 for none.
    """

    ids: Tensor
    similarity: Tensor
    parents: Tensor

    @classmethod
    def new(cls, ids: Tensor) -> Lineages:
        """Lineages without a past.

        Args:
            ids: The lineage of each feature, shape ``(r,)``, int64.

        Returns:
            Lineages that continue nothing.
        """
        return cls(ids, torch.full((len(ids),), math.nan, dtype=torch.float64, device="cpu"), torch.full_like(ids, -1))


@dataclass(frozen=True)
class FeatureEffects:
    """What setting each feature of a node layer alone to its mean does to a score.

    Attributes:
        changes: Mean change of the score, shape ``(r,)``, float64; NaN for features that were not tried.
        errors: Its standard error over samples, shape ``(r,)``, float64.
        significant: Whether the change is significant, with the false discovery rate controlled over all features that
            were tried, shape ``(r,)``, bool.
    """

    changes: Tensor
    errors: Tensor
    significant: Tensor


@dataclass(frozen=True)
class Feature:
    """One feature of a graph.

    Attributes:
        id: ``"layer/number"``, the name in events, figures, the tab and the log. In a run the number is the lineage, so
            the id is the same in all snapshots. A graph whose features are not tracked has the index in its place.
        layer: Name of the node layer.
        index: Position of the feature in this graph's bases, edges, labels and modules: its rank by importance, from 0,
            which changes from snapshot to snapshot. Neurons, centered logits and latents of a dictionary keep their own
            order.
        lineage: The lineage; None if features are not tracked.
        importance: Its importance.
        importance_error: Standard error of the importance; None if unknown.
        output_importance: What setting it to its mean at one position does to the model's predictions, in nats; None
            where it was not computed.
        label: Its name; "" for none.
        label_score: How well the label predicts the feature's activity on other samples, from 0.5 (chance) to 1; None
            if unknown.
        note: The user's note on it, of a graph of a run (`Run.annotate`); "" for none.
        module: Number of its module, -1 for none; None if modules have not been looked for.
        to_feature: The direction that is read, a column of ``C``, shape ``(d,)``, float64: the feature's value is
            ``(a - mean) @ to_feature``.
        from_feature: The direction that is written, a row of ``C^+``, shape ``(d,)``, float64: adding it to the
            activations adds 1 to the feature's value and nothing to those of the other features.
    """

    id: str
    layer: str
    index: int
    lineage: int | None
    importance: float
    importance_error: float | None
    output_importance: float | None
    label: str
    module: int | None
    to_feature: Tensor = field(repr=False, compare=False)
    from_feature: Tensor = field(repr=False, compare=False)
    label_score: float | None = None
    note: str = ""


@renamed_fields(probes="reference_features")
@dataclass
class InteractionGraph:
    """Features of every node layer, and the strengths of their interactions.

    Bases, edges, labels and modules are in the order of a feature's *index*: in most bases its rank by importance,
    which changes from snapshot to snapshot. Events, figures, the tab and the log name a feature by its *id*, such as
    ``"resid_post/17"``, which does not change. `feature`, `index` and `feature_ids` convert.

    Attributes:
        bases: A `Basis` for each node layer, by name, in forward order.
        edges: For each section, a pair of consecutive node layers ``(before, after)``, a matrix ``E`` of shape
            ``(r_after, r_before)``, float64, non-negative.
        info: Settings, node layers, number of samples and versions; step and epoch if computed in training.
        edge_errors: Standard errors of the edges, with their shapes; empty if unknown. They are conditional on these
            features. New samples also rotate the features a little, which changes edges more, in particular weak ones:
            on small networks, about twice as much in LIB and PCA bases, and not at all in neuron bases.
        modules: For each node layer the module of each feature, shape ``(r,)``, int64, -1 for none; empty before
            `find_modules`. In the snapshots of a run with tracked features, a module keeps its number, and with it its
            colour in every picture, for as long as it is found again; otherwise modules are numbered by size.
        labels: For node layers that have any, a name for each feature; "" for none.
        reference_features: For each node layer the values of its features on reference samples, each feature scaled to
            mean 0 and variance 1, shape ``(N, r)``, float16. The samples are the same throughout a run. Empty if the
            features are not tracked.
        lineages: For each node layer the lineages of its features; empty if they are not tracked.
        replicates: Jackknife replicates, for standard errors. They are not saved to files.
        attributions: For each section a matrix ``A`` of shape ``(r_after, r_before)``, float64: how much of the
            variance of feature ``i`` feature ``j`` accounts for, to first order. Positive where ``j`` drives ``i``
            (pushes its value the way it goes), negative where it holds against it (pulls it back). Empty in graphs from
            files of earlier versions.
        attribution_errors: Standard errors of the attributions, with their shapes; empty if unknown.
        examples: For each node layer, where its features are largest and smallest; empty in graphs from files of
            earlier versions.
        output_effects: For each node layer, the outputs that its features raise and lower most; empty if unknown.
        effects: For each node layer, what its features do to a score; empty if that has not been tried.
        notes: The user's notes on features, by id, of a graph of a run. They are not saved with the graph: the run has
            them in a file.
        label_scores: For node layers with labels that have one, how well each label predicts the activity of its
            feature on other samples, from 0.5 (chance) to 1, shape ``(r,)``, float32; NaN for features without a label.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
        >>> graph
        InteractionGraph(input: 2 lib -> output: 2 neuron, 9 samples)
        >>> graph.feature("input/1").index, graph.feature_ids("output")
        (1, ['output/0', 'output/1'])
    """

    bases: dict[str, Basis]
    edges: dict[tuple[str, str], Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    edge_errors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    reference_features: dict[str, Tensor] = field(default_factory=dict)
    lineages: dict[str, Lineages] = field(default_factory=dict)
    replicates: Replicates | None = field(default=None, repr=False, compare=False)
    attributions: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    attribution_errors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    examples: dict[str, FeatureExamples] = field(default_factory=dict)
    output_effects: dict[str, OutputEffects] = field(default_factory=dict)
    effects: dict[str, FeatureEffects] = field(default_factory=dict)
    label_scores: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def node_layers(self) -> list[str]:
        """Names of the node layers, in forward order."""
        return list(self.bases)

    def node_layer_specs(self) -> list[NodeLayer]:
        """The node layers as `NodeLayer` objects: where they are in the model.

        Returns:
            One `NodeLayer` for each name in `node_layers`.

        Raises:
            LIBError: If the graph does not know where its node layers are.
        """
        if keys.NODE_LAYERS not in self.info:
            raise LIBError(
                "The places of this graph's node layers in the model are unknown: info has no 'node_layers'."
            )
        return [with_known_axis(NodeLayer(**layer)) for layer in self.info[keys.NODE_LAYERS]]

    @property
    def model_call(self) -> dict[str, Any] | None:
        """How the model was called, as plain values; None in a graph that does not know."""
        found: dict[str, Any] | None = self.info.get(keys.MODEL_CALL)
        return found

    def layers(self) -> list[NodeLayer]:
        """Deprecated name of `node_layer_specs`."""
        warnings.warn("InteractionGraph.layers() is now node_layer_specs().", DeprecationWarning, stacklevel=2)
        return self.node_layer_specs()

    def __repr__(self) -> str:
        layers = " -> ".join(f"{b.name}: {b.n_features} {b.kind}" for b in self.bases.values())
        return f"InteractionGraph({layers}, {self.info.get(keys.NUM_SAMPLES, '?')} samples)"

    def feature(self, which: str | tuple[str, int]) -> Feature:
        """Look up a feature, by its id or by its index.

        Args:
            which: The id, such as ``"resid_post/17"``; or node layer and index, such as ``("resid_post", 2)``, like the
                nodes of `to_networkx`.

        Returns:
            Its index, id, label, importance and directions.

        Raises:
            LIBError: If there is no such feature in this graph.

        Example:
            >>> import torch
            >>> from lib_lightning import compute_interaction_graph
            >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
            >>> feature = graph.feature(("input", 0))
            >>> feature.id, graph.feature("input/0") == feature, feature.to_feature.shape
            ('input/0', True, torch.Size([3]))
        """
        layer, index = (which[0], which[1]) if isinstance(which, tuple) else self._place(which)
        basis = self._basis(layer)
        if not 0 <= index < basis.n_features:
            raise LIBError(
                f"'{layer}' has {basis.n_features:,} features, with indices from 0 to {basis.n_features - 1:,}; "
                f"got {index}. To look a feature up by its id, write '{layer}/{index}'."
            )
        modules, errors, nats = self.modules.get(layer), basis.importance_error, basis.output_importance
        score = float(self.label_scores[layer][index]) if layer in self.label_scores else math.nan
        feature_id = self.feature_ids(layer)[index]
        return Feature(
            feature_id,
            layer,
            index,
            int(self.lineages[layer].ids[index]) if layer in self.lineages else None,
            float(basis.importance[index]),
            None if errors is None else float(errors[index]),
            None if nats is None else float(nats[index]),
            self.labels[layer][index] if self.labels.get(layer) else "",
            None if modules is None else int(modules[index]),
            # Empty where the dictionary of a file is not there.
            basis.to_features[:, index] if basis.to_features.shape[1] else basis.mean[:0],
            basis.from_features[index] if len(basis.from_features) else basis.mean[:0],
            _or_none(score),
            self.notes.get(feature_id, ""),
        )

    def index(self, feature_id: str) -> int:
        """Position of a feature in this graph's bases, edges, labels and modules.

        Args:
            feature_id: Its id, such as ``"resid_post/17"``.

        Returns:
            The index: `Basis.to_features` of its node layer has the feature in this column.

        Raises:
            LIBError: If there is no such feature in this graph.

        Example:
            >>> import torch
            >>> from lib_lightning import compute_interaction_graph
            >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
            >>> graph.index("input/1")
            1
        """
        return self._place(feature_id)[1]

    def feature_ids(self, layer: str) -> list[str]:
        """Ids of the features of a node layer, in the order of their indices.

        Args:
            layer: Name of the node layer.

        Returns:
            The ids, such as ``"resid_post/17"``.

        Raises:
            LIBError: If there is no such node layer.
        """
        basis = self._basis(layer)
        numbers = self.lineages[layer].ids.tolist() if layer in self.lineages else range(basis.n_features)
        return [f"{layer}/{number}" for number in numbers]

    def _basis(self, layer: str) -> Basis:
        if layer not in self.bases:
            raise LIBError(f"This graph has no node layer '{layer}', only {quoted(self.node_layers)}.")
        return self.bases[layer]

    def _place(self, feature_id: str) -> tuple[str, int]:
        """Node layer and index of a feature."""
        layer, _, number = str(feature_id).rpartition("/")
        if not layer or not number.isdecimal():
            example = f"{self.node_layers[-1]}/0"
            raise LIBError(f"A feature's id is its node layer and a number, such as '{example}'; got {feature_id!r}.")
        ids = self.feature_ids(layer)
        wanted = f"{layer}/{int(number)}"
        if wanted in ids:
            return layer, ids.index(wanted)
        at_index = f" The feature with index {int(number)} is '{ids[int(number)]}'." if int(number) < len(ids) else ""
        raise LIBError(f"There is no feature '{wanted}' in this graph, whose '{layer}' has {quoted(ids)}.{at_index}")

    def save(self, path: str | PathLike[str], dictionary_weights: bool = False) -> None:
        """Write a basis file: safetensors with a JSON header. An existing file is replaced atomically.

        Args:
            path: The file; missing folders are created.
            dictionary_weights: Whether to write the weights of dictionaries as well, which `load` puts in
                ``bases[layer].weights``: an object of the same class can load them. Without them, the file has class
                and hash of each dictionary, and the numbers of its latents. In both cases, `load` needs the dictionary
                itself to encode activations.
        """
        tensors: dict[str, Tensor] = {}
        for i, (layer, basis) in enumerate(self.bases.items()):
            of_basis = keys.BASIS
            if isinstance(basis, DictionaryBasis):
                tensors[keys.LATENT_NUMBERS.format(i)] = basis.latents
                if dictionary_weights:
                    prefix = keys.DICTIONARY_WEIGHTS.format(i)
                    is_stored = basis.dictionary is None and basis.weights is not None
                    weights = basis.weights if is_stored else basis.known.state_dict()
                    tensors |= {f"{prefix}{name}": t for name, t in (weights or {}).items()}
                else:  # their directions are these weights
                    of_basis = {x: key for x, key in keys.BASIS.items() if x not in ("to_features", "from_features")}
            for name, key in of_basis.items():
                if (value := getattr(basis, name)) is not None:
                    tensors[key.format(i)] = value
            for name, key in keys.OF_LAYERS.items():
                if layer in (of_layers := getattr(self, name)):
                    tensors[key.format(i)] = of_layers[layer]
            for name, attributes in keys.RECORDS.items():
                if layer in (records := getattr(self, name)):
                    tensors |= {key.format(i): getattr(records[layer], part) for part, key in attributes.items()}
        for i, section in enumerate(self.edges):
            for name, key in keys.OF_SECTIONS.items():
                if section in (of_sections := getattr(self, name)):
                    tensors[key.format(i)] = of_sections[section]
        header: dict[str, Any] = {
            keys.LAYERS: self.node_layers,
            keys.KINDS: [basis.kind for basis in self.bases.values()],
            keys.INFO: self.info,
            keys.LABELS: self.labels,
        }
        if self.examples:
            header[keys.EXAMPLE_LAYOUTS] = {
                layer: {name: getattr(of_layer, name) for name in keys.EXAMPLE_LAYOUT}
                for layer, of_layer in self.examples.items()
            }
        write_file(path, tensors, header)

    @classmethod
    def load(cls, path: str | PathLike[str], dictionaries: Mapping[str, Dictionary] | None = None) -> InteractionGraph:
        """Read a basis file.

        Args:
            path: A file that `save` wrote, in this or an earlier version.
            dictionaries: The dictionaries of a graph whose features are latents, by node layer. Without them, the graph
                can be measured and drawn, but cannot encode activations.

        Returns:
            The graph, equal to the saved one, without `replicates`.

        Raises:
            BasisFileError: If the file is truncated, altered, not a basis file, or of a newer format.
            FileNotFoundError: If the file does not exist.
            SettingError: If a dictionary has other weights than the one that the graph was computed with.
        """
        tensors, header = read_file(path)
        try:
            info, labels = header[keys.INFO], header.get(keys.LABELS, {})
            if not isinstance(info, dict) or not isinstance(labels, dict):
                raise TypeError("info and labels must be JSON objects")
            layers, kinds = header[keys.LAYERS], header[keys.KINDS]
            sections = list(itertools.pairwise(layers))
            bases = {
                layer: _read_basis(tensors, i, layer, kind, info)
                for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
            }
            missing = [section for i, section in enumerate(sections) if keys.EDGES.format(i) not in tensors]
            if missing:
                raise KeyError(f"edges of {missing[0]}")
            layouts = {
                layer: {name: tuple(x) if isinstance(x, list) else x for name, x in layout.items()}
                for layer, layout in header.get(keys.EXAMPLE_LAYOUTS, {}).items()
            }
            others: dict[str, Any] = {name: _present(tensors, key, layers) for name, key in keys.OF_LAYERS.items()}
            others |= {name: _present(tensors, key, sections) for name, key in keys.OF_SECTIONS.items()}
            graph = cls(
                bases,
                info=info,
                labels=labels,
                **others,
                lineages=_records(tensors, keys.LINEAGES, layers, Lineages),
                examples=_records(tensors, keys.EXAMPLES, layers, FeatureExamples, layouts),
                output_effects=_records(tensors, keys.OUTPUT_EFFECTS, layers, OutputEffects),
                effects=_records(tensors, keys.EFFECTS, layers, FeatureEffects),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BasisFileError(f"'{path}' is a basis file, but a part of it is missing: {error}.") from error
        if dictionaries:
            graph.attach_dictionaries(dictionaries)
        return graph

    def attach_dictionaries(self, dictionaries: Mapping[str, Dictionary]) -> None:
        """Give a graph from a file the dictionaries whose latents are its features.

        Args:
            dictionaries: The dictionaries, by node layer.

        Raises:
            LIBError: If there is no such node layer.
            SettingError: If a node layer has no dictionary, or one with other weights.
            SettingTypeError: If this is no mapping from node layers to dictionaries.
        """
        for layer, dictionary in check_dictionaries(dictionaries, []).items():
            basis = self._basis(layer)
            if not isinstance(basis, DictionaryBasis):
                raise SettingError(
                    f"Features of '{layer}' are not latents of a dictionary, but of a {basis.kind} basis."
                )
            adapted = AdaptedDictionary.without_data(dictionary, basis.mean, layer)
            if adapted.n_latents != basis.reference["n_latents"]:
                raise SettingError(
                    f"The graph was computed with a dictionary of {basis.reference['n_latents']:,} latents at "
                    f"'{layer}', and this one has {adapted.n_latents:,}."
                )
            if adapted.hash != basis.reference["hash"]:
                raise SettingError(
                    f"The graph was computed with another dictionary of '{layer}', or with other weights of it: hash "
                    f"{basis.reference['hash']}, not {adapted.hash}."
                )
            self.bases[layer] = basis.with_dictionary(adapted)

    def find_modules(self, partitions: Partitions | None = None, **options: Any) -> dict[str, Tensor]:
        """Find the modules of the whole graph, and store them as `modules`.

        Args:
            partitions: Searches to reuse, such as those of `measure`; None for new ones.
            options: As for `lib_lightning.metrics.find_modules`.

        Returns:
            The module of each feature, by node layer.
        """
        partitions = self.partitions() if partitions is None else partitions
        self.modules = dict(zip(self.node_layers, partitions.find(**options), strict=True))
        return self.modules

    def partitions(self) -> Partitions:
        """Searches for the modules of this graph, to be shared by `measure` and `find_modules`."""
        from lib_lightning.metrics.modules import Partitions

        return Partitions(list(self.edges.values()))

    def measure(
        self,
        metrics: MetricCollection | GraphMetrics | None = None,
        curves: Mapping[tuple[str, str], EdgeCurve] | None = None,
        partitions: Partitions | None = None,
    ) -> dict[str, float]:
        """Compute metrics, and store them with their standard errors as ``info["metrics"]``.

        Standard errors are those of the jackknife over `replicates`. For metrics of modules, they hold for these
        modules. For metrics of ablation curves, they are unknown. Edges from a random choice of features look sparser
        than exact ones, as some are never chosen: there, errors also include that bias, as the jackknife estimates it
        (Quenouille 1956, https://doi.org/10.1093/biomet/43.3-4.353).

        Args:
            metrics: As for `lib_lightning.metrics.graph_scalars`, or prepared for several graphs.
            curves: Ablation curves by section: counts, scores and the unablated score.
            partitions: Searches for modules to reuse; None for new ones.

        Returns:
            The scalars, by name.

        Example:
            >>> import torch
            >>> from lib_lightning import compute_interaction_graph
            >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(90, 3)], ["input", "output"])
            >>> graph.measure()["features/total"], graph.info["metrics"]["features/total"]
            (4.0, {'value': 4.0, 'error': 0.0})
        """
        from lib_lightning.metrics.summary import GraphMetrics

        prepared = metrics if isinstance(metrics, GraphMetrics) else GraphMetrics(metrics)
        partitions = self.partitions() if partitions is None else partitions
        scalars = prepared.compute(
            list(self.bases.values()),
            list(self.edges.values()),
            None if curves is None else [curves.get(section) for section in self.edges],
            partitions,
        )
        errors = self._standard_errors(prepared, partitions, scalars)
        self.info[keys.METRICS] = {
            # JSON has no NaN.
            key: {"value": _or_none(value), "error": _or_none(errors.get(key, math.nan))}
            for key, value in scalars.items()
        }
        return scalars

    def _standard_errors(
        self, metrics: GraphMetrics, partitions: Partitions, scalars: Mapping[str, float]
    ) -> dict[str, float]:
        if self.replicates is None:
            return {}
        importance, edges = self.replicates.importance, self.replicates.edges
        replicates = [
            metrics.compute(
                [replace(basis, importance=importance[name][g]) for name, basis in self.bases.items()],
                [E[g] for E in edges.values()],
                partitions=partitions,
            )
            for g in range(min(len(E) for E in edges.values()))
        ]
        is_sampled = self.info.get(keys.SETTINGS, {}).get("n_pushed") is not None
        found = {}
        for key in replicates[0] if replicates else ():
            x = torch.tensor([r[key] for r in replicates], dtype=torch.float64, device="cpu")
            bias = (len(x) - 1) * (float(x.mean()) - scalars[key]) if is_sampled else 0.0
            found[key] = math.hypot(float(standard_error(x)), bias)
        return found

    def to_networkx(self) -> nx.DiGraph[tuple[str, int]]:
        """Convert to a directed graph.

        Returns:
            A graph with nodes ``(node layer, feature index)`` and edges with attribute ``weight``, without those of
            weight zero; and ``attribution``, signed, if known. Attributes of nodes are ``id`` (such as
            ``"resid_post/17"``, the name in events and figures), ``label``, ``importance``, ``layer`` (the index of the
            node layer), and ``module`` if modules are known.
        """
        import networkx as nx

        graph: nx.DiGraph[tuple[str, int]] = nx.DiGraph()
        for position, (name, basis) in enumerate(self.bases.items()):
            ids, labels = self.feature_ids(name), self.labels.get(name) or [""] * basis.n_features
            modules = self.modules[name].tolist() if name in self.modules else None
            for j, importance in enumerate(basis.importance.tolist()):
                known = {} if modules is None else {"module": modules[j]}
                graph.add_node(
                    (name, j), id=ids[j], label=labels[j], importance=importance, layer=position, **known
                )  # fmt: skip
        for (before, after), E in self.edges.items():
            A = self.attributions.get((before, after))
            for i, j in E.nonzero().tolist():
                known = {} if A is None else {"attribution": float(A[i, j])}
                graph.add_edge((before, j), (after, i), weight=float(E[i, j]), **known)
        return graph

    def sample_graph(
        self,
        sample: Any,
        model: nn.Module,
        index: int | None = None,
        outputs: Sequence[int] | None = None,
        position: int | None = None,
        max_features: int = 100,
        **options: Any,
    ) -> SampleGraph:
        """The graph of one sample: what its features at their positions contribute to each other, and to the outputs.

        Outputs are followed back, one vector-Jacobian product for each output and for each feature that is kept.

        Args:
            sample: A batch with one sample, as the model or `compute_interaction_graph` takes it.
            model: The model that the graph was computed on, or one of the same shape; it is not changed.
            index: Which sample, if the batch has several.
            outputs: Indices of the outputs to follow; by default, as in circuit-tracer, the most likely ones that have
                a probability of 95% together, ten at most. Of outputs that are numbers, the ten that are farthest from
                their mean.
            position: Position of the output to follow, negative from the end; by default the last one that is valid.
            max_features: Largest number of features at positions to keep in each node layer: those with most influence
                on the outputs.
            options: ``input_fn``, ``mask`` and ``dtype`` as for `compute_interaction_graph`; ``integration_steps`` as
                there, by default that of the graph (with more, linearisation leaves out less); and ``memory_limit`` in
                GiB for contributions: those that need more are computed twice.

        Returns:
            The graph. `SampleGraph.pruned` leaves out what matters little.

        Raises:
            SettingError: If the batch has several samples, or none, or an argument is outside its range.
            NodeLayerError: If the graph belongs to a model of a different shape.
            NotFiniteError: If activations are NaN or infinite.

        Example:
            >>> from lib_lightning import compute_interaction_graph
            >>> model, x = torch.nn.Linear(3, 2), torch.randn(9, 3)
            >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
            >>> graph.sample_graph(x, model, index=4, outputs=[0, 1])
            SampleGraph(1 input, 2 features, 1 error, 2 outputs, 8 edges)
        """
        from lib_lightning.model.instrumented import InstrumentedModel
        from lib_lightning.model.model_spec import ModelSpec
        from lib_lightning.sample_graph.sample_graph import FeatureNames, assemble
        from lib_lightning.sample_graph.trace import TraceSettings, trace_sample

        known = ("input_fn", "mask", "dtype", "integration_steps", "memory_limit")
        own = ("index", "outputs", "position", "max_features")
        for name in set(options) - set(known):
            raise SettingError(f"sample_graph has no argument '{name}'.{did_you_mean(name, [*known, *own])}")
        check_number("max_features", max_features, lambda x: x >= 1, "is a number of features, at least 1", True)
        memory_limit = options.pop("memory_limit", MEMORY_LIMIT)
        check_number("memory_limit", memory_limit, lambda x: x > 0, "is a number of GiB above 0")
        kind = (self.info.get(keys.OUTPUT_DISTRIBUTION) or {}).get("kind", "categorical")
        steps = options.pop("integration_steps", self.info.get(keys.SETTINGS, {}).get("integration_steps", 0))
        check_number("integration_steps", steps, lambda x: x >= 0, "is a number of points, or 0", True)
        settings = TraceSettings(outputs, position, max_features, memory_limit, steps, kind)
        instrumented = InstrumentedModel(model, self.node_layer_specs(), ModelSpec(**options))
        names = FeatureNames(
            {layer: self.feature_ids(layer) for layer in self.bases},
            self.labels,
            self._output_name,
        )
        trace = trace_sample(instrumented, sample, index, list(self.bases.values()), settings)
        return assemble(trace, names, {"model": type(instrumented.model).__name__, keys.STEP: self.info.get(keys.STEP)})

    def to_circuit_tracer(
        self,
        path: str | PathLike[str],
        sample: Any,
        model: nn.Module | None = None,
        tokens: Any = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        renderings: Renderings | str | PathLike[str] | None = None,
        **options: Any,
    ) -> SampleGraph:
        """Write the graph of one sample for the viewer of circuit-tracer.

        Beside the file, ``graph-metadata.json`` lists all graphs of the folder, and a folder of the same name has what
        is known of each feature. To look at them: ``circuit_tracer.frontend.local_server.serve("graphs")``.

        Args:
            path: The file, such as ``"graphs/cat.json"``.
            sample: A batch with one sample, or what `sample_graph` has returned.
            model: The model; not needed for a `SampleGraph`.
            tokens: A text for each position, or the model's tokenizer, or a `lib_lightning.features.TokenRenderer`; by
                default the numbers of the tokens.
            node_threshold: As for `SampleGraph.pruned`; 1 for all nodes.
            edge_threshold: As for `SampleGraph.pruned`.
            renderings: Renderings of the samples on which features are largest and smallest, to show them: the folder
                of the run, or what `lib_lightning.features.render_samples` has returned. None shows none.
            options: As for `sample_graph`.

        Returns:
            The graph that was written.

        Raises:
            SettingError: If the path does not end in ``.json``, or there are not as many texts as positions.
            LIBError: As for `sample_graph`; or if the folder has no renderings of the graph's samples.

        Example:
            >>> import json, tempfile
            >>> from pathlib import Path
            >>> from lib_lightning import compute_interaction_graph
            >>> model, x = torch.nn.Linear(3, 2), torch.randn(9, 3)
            >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     written = graph.to_circuit_tracer(f"{folder}/first.json", x[:1], model)
            ...     read = json.loads(Path(folder, "first.json").read_text())
            >>> len(read["nodes"]) == len(written.nodes), len(read["links"]) == len(written.weights)
            (True, True)
        """
        from lib_lightning.sample_graph.circuit_tracer import text_of_tokens, write_graph
        from lib_lightning.sample_graph.known_features import KnownFeatures, find_renderings
        from lib_lightning.sample_graph.sample_graph import SampleGraph

        looks = find_renderings(renderings, str(self.info.get(keys.SAMPLES, "")))
        if isinstance(sample, SampleGraph):
            everything = sample
        elif model is None:
            raise SettingTypeError("The model is needed: graph.to_circuit_tracer(path, sample, model).")
        else:
            everything = self.sample_graph(sample, model, **options)
        pruned = everything.pruned(node_threshold, edge_threshold)
        text_of = text_of_tokens(tokens) or str
        known = KnownFeatures(
            self.examples,
            self.output_effects,
            lambda output: self._output_name(output) or text_of(output),
            self.info.get(keys.PLACES) or {},
            looks,
        )
        write_graph(Path(path), pruned, everything, tokens, known.of)
        return pruned

    def _output_name(self, output: int) -> str:
        """Name of an output; "" for none."""
        names = self.info.get(keys.OUTPUT_NAMES) or []
        if isinstance(names, list):
            return str(names[output]) if output < len(names) else ""
        return str(names.get(str(output), ""))

    @renamed_arguments(film="layout")
    def plot(
        self,
        max_edges: int = 300,
        max_features: int = 12,
        layout: AnimatedLayout | None = None,
        signs: bool = False,
    ) -> Figure:
        """Draw the graph: one column per node layer, dots sized by importance, lines by edge strength.

        Modules, if known, are drawn as bands in the colours of their numbers; labels are written beside their features,
        with their scores. The number beside a dot is the one in the feature's id: its lineage in a run, else its index.

        Args:
            max_edges: Maximum number of edges to draw, divided equally among the sections.
            max_features: Maximum number of features to draw per node layer; how many there are is in its heading.
            layout: Layout of the previous graphs; features of the same lineages keep their positions.
            signs: Whether to draw edges by the sign of their attribution: solid where a feature drives the other,
                dashed and in another colour where it holds against it.

        Returns:
            A matplotlib figure that is not registered with pyplot.

        Raises:
            LIBError: If ``signs`` is set and the graph has no attributions.
            SettingError: If a number is too small.
        """
        check_number("max_edges", max_edges, lambda x: x >= 0, "must be at least 0", integer=True)
        check_number("max_features", max_features, lambda x: x >= 1, "must be at least 1", integer=True)
        if signs and self.attributions.keys() != self.edges.keys():
            raise LIBError(
                "This graph has no attributions, so the signs of its edges are unknown: it comes from a file of an "
                "earlier version. Compute it again."
            )
        from lib_lightning.plots.graph import Annotations, draw_graph

        bases = list(self.bases.values())
        lineages = [self.lineages[b.name].ids if b.name in self.lineages else None for b in bases]
        # Some layers, such as the output, may have no modules or labels.
        none = [torch.full((b.n_features,), -1, device="cpu") for b in bases]
        modules = [self.modules.get(b.name, no) for b, no in zip(bases, none, strict=True)] if self.modules else None
        labels = [self._scored_labels(b.name) for b in bases] if self.labels else None
        return draw_graph(
            bases,
            list(self.edges.values()),
            "Interaction graph" + self._when(),
            max_edges,
            max_features,
            Annotations(modules, labels, lineages),
            layout if None not in lineages else None,
            [self.attributions[section] for section in self.edges] if signs else None,
        )

    def _scored_labels(self, layer: str) -> list[str]:
        """Labels of a node layer, behind their scores, as there may be no space for the end of a long label."""
        names = self.labels.get(layer) or [""] * self.bases[layer].n_features
        scores = self.label_scores[layer].tolist() if layer in self.label_scores else [math.nan] * len(names)
        return [
            f"{score:.2f} {name}" if name and math.isfinite(score) else name
            for name, score in zip(names, scores, strict=True)
        ]

    def plot_spectrum(self, baselines: Sequence[InteractionGraph] = ()) -> Figure:
        """Draw the importance spectrum of every node layer.

        Args:
            baselines: Graphs of the same model to compare with, such as those in other bases. Graphs in a basis
                of the same kind are numbered, this one first.

        Returns:
            A matplotlib figure that is not registered with pyplot.

        Example:
            >>> from lib_lightning import compute_interaction_graph
            >>> model, batches = torch.nn.Linear(3, 2), [torch.randn(9, 3)]
            >>> lib, pca = (compute_interaction_graph(model, batches, basis=kind) for kind in ("lib", "pca"))
            >>> len(lib.plot_spectrum([pca]).axes)
            2
        """
        from lib_lightning.plots.palette import BASIS_NAMES
        from lib_lightning.plots.spectrum import draw_spectrum

        graphs: dict[str, list[Basis]] = {}
        for graph in (self, *baselines):
            kind, number = graph._kind(), 2
            name: str = kind
            while name in graphs:
                is_draw = kind in DRAWN  # all of them have one colour
                name = f"{kind}_{number}" if is_draw else f"{BASIS_NAMES.get(kind, kind)} ({number})"
                number += 1
            graphs[name] = list(graph.bases.values())
        return draw_spectrum(graphs, title="Importance of features" + self._when())

    def _repr_html_(self) -> str:
        from lib_lightning.plots.image import as_html, render_png

        return as_html(render_png(self.plot()), caption=f"{self!r}{self._when()}")

    def _when(self) -> str:
        step = self.info.get(keys.STEP)
        return f" after {step:,} steps" if step is not None else ""

    def _kind(self) -> str:
        # The last node layer may be in another basis than the others, such as single neurons (final_basis="auto").
        control = self.info.get(keys.CONTROL)
        return next(iter(self.bases.values())).kind if control is None else str(control["kind"])


def _read_basis(tensors: Mapping[str, Tensor], i: int, layer: str, kind: str, info: Mapping[str, Any]) -> Basis:
    """The basis of node layer ``i`` from the tensors of a file."""
    optional: dict[str, Any] = {name: tensors.get(key.format(i)) for name, key in keys.BASIS_OPTIONAL.items()}
    required = {name: key.format(i) for name, key in keys.BASIS_REQUIRED.items()}
    if kind != LATENTS:
        return Basis(layer, kind, **{name: tensors[key] for name, key in required.items()}, **optional)
    mean, importance = tensors[required["mean"]], tensors[required["importance"]]
    prefix = keys.DICTIONARY_WEIGHTS.format(i)
    weights = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    return DictionaryBasis(
        layer,
        kind,
        mean,
        tensors.get(required["to_features"], mean.new_zeros(len(mean), 0)),
        tensors.get(required["from_features"], mean.new_zeros(0, len(mean))),
        importance,
        **optional,
        latents=tensors[keys.LATENT_NUMBERS.format(i)],
        reference=info[keys.DICTIONARIES][layer],
        weights=weights or None,
    )


_Place = TypeVar("_Place")


def _present(tensors: Mapping[str, Tensor], key: str, places: Sequence[_Place]) -> dict[_Place, Tensor]:
    """The tensors of one kind in a file, by node layer or section."""
    return {place: tensors[key.format(i)] for i, place in enumerate(places) if key.format(i) in tensors}


_Record = TypeVar("_Record")


def _records(
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, str],
    layers: Sequence[str],
    kind: Callable[..., _Record],
    others: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, _Record]:
    """The tensors in a file that belong together, by node layer; ``others`` are attributes that are no tensors."""
    return {
        layer: kind(**{name: tensors[key.format(i)] for name, key in attributes.items()}, **others.get(layer, {}))
        for i, layer in enumerate(layers)
        if any(key.format(i) in tensors for key in attributes.values())
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
