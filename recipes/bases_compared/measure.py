"""The columns of the table: what is measured of one basis of one network."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lib_lightning.ablation import EdgeAttack, attack_edges, edges_required, log_likelihood
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.interventions import feature_effects
from lib_lightning.labels import ExampleLabels
from lib_lightning.labels.labeller import FeatureSamples
from lib_lightning.metrics.functional import effective_edges, standard_error
from recipes.bases_compared.fit import Fit, usual
from recipes.bases_compared.subjects import ATTACKED
from recipes.features_required import NodeAblations, change, features_required
from recipes.token_text import TokensOf

# A short search, as in recipes/attacked_edges.py.
ATTACK = EdgeAttack("pgd", n_steps=5, n_starts=1)
# For comparison: a search by descent that finds no more than random subsets is none. Few draws where scores are slow.
RANDOM_ATTACK, FEW_DRAWS = EdgeAttack("random"), EdgeAttack("random", n_draws=4)
COLUMNS = ("features", "against_pca", "edges", "names", "causal", "largest_causal", "edges_required", "attacked")


def most_important(basis: Basis, count: int) -> Tensor:
    """True for the most important features, shape ``(r,)``."""
    is_kept = torch.zeros(basis.n_features, dtype=torch.bool)
    is_kept[basis.importance.argsort(descending=True, stable=True)[:count]] = True
    return is_kept


def effective_with_error(E: Tensor, replicates: Sequence[Tensor] | Tensor) -> dict[str, float | None]:
    """Effective edges, their standard error over samples, and their bias by the jackknife.

    Args:
        E: Edges of a section, shape ``(r_out, r_in)``.
        replicates: Edges without one group of samples at a time; empty where there are none.

    Returns:
        ``"effective"``, ``"error"`` and ``"bias"``; the last two are None without replicates.

    Note:
        Source of the bias, of a function of means of G groups: Quenouille (1956), "Notes on bias in estimation".
    """
    value = float(effective_edges(E))
    if not len(replicates):
        return {"effective": value, "error": None, "bias": None}
    values = torch.stack([torch.as_tensor(effective_edges(one)) for one in replicates])
    bias = (len(values) - 1) * (float(values.mean()) - value)
    return {"effective": value, "error": float(standard_error(values)), "bias": bias}


def with_edges(E: Tensor) -> float:
    """Share of the features in front of a section that have any edges: of others, none was pushed forward.

    Args:
        E: Edges of a section, shape ``(r_out, r_in)``.

    Returns:
        The share.

    Example:
        >>> with_edges(torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
        0.5
    """
    return float((E != 0).any(0).double().mean())


class Measurements:
    """What is measured of the bases of one network.

    Args:
        fit: The bases.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit, self.subject = fit, fit.subject

    def column(self, name: str, kind: str, section: tuple[str, str] | None = None) -> Any:
        """One of `COLUMNS`.

        Args:
            name: The column.
            kind: The basis, one of `recipes.bases_compared.fit.BASES`.
            section: The section whose edges required are counted; None for all of them.

        Returns:
            Numbers, as they are written to a file; None if the column is not measured on this network.
        """
        columns: dict[str, Callable[[str], Any]] = {
            "features": self._features,
            "against_pca": self._against_pca,
            "edges": self._edges,
            "names": self._names,
            "causal": self._causal,
            "largest_causal": self._largest_causal,
            "edges_required": partial(self._edges_required, self.subject.sections if section is None else [section]),
            "attacked": self._attacked,
        }
        start = time.process_time()
        found = columns[name](kind)
        seconds = time.process_time() - start
        sys.stderr.write(f"{self.fit.folder.name}: {name} of {kind}, {seconds:.0f} CPU s\n")
        return None if found is None else {**found, "seconds": round(seconds, 1)}

    @cached_property
    def ablations(self) -> NodeAblations:
        """The network with node ablations."""
        return NodeAblations(self.fit.instrumented, self.subject.batches(self.subject.scored), log_likelihood)

    def _features(self, kind: str) -> dict[str, Any]:
        """Numbers of features, and of features required; changes of the loss with all of them."""
        layers = {}
        for i, basis in enumerate(self.fit.bases(kind)):
            changes = partial(self.ablations.changes, i, basis)
            is_latents = isinstance(basis, DictionaryBasis)
            required = partial(
                features_required, changes, basis.importance, self.subject.tolerance, self.subject.search
            )
            found = required(always=torch.tensor([basis.error])) if isinstance(basis, DictionaryBasis) else required()
            layers[basis.name] = {"features": basis.n_features - is_latents, "width": len(basis.mean), **found}
            if isinstance(basis, DictionaryBasis):
                is_kept = torch.ones(basis.n_features, dtype=torch.bool)
                is_kept[basis.error] = False
                layers[basis.name] |= {
                    "without error": change(changes(is_kept)),
                    "explained": self._explained(i),
                    "error's share": float(basis.importance[basis.error] / basis.importance.sum()),
                }
        return {"unablated": self.ablations.unablated, "samples": len(self.subject.scored), "layers": layers}

    def _against_pca(self, kind: str) -> dict[str, Any] | None:
        """Log likelihood with as many features as principal components are required, minus that with these.

        On text on which the numbers were not chosen; differences of the same pieces, so that their errors are small.
        """
        if kind in ("pca", "sae"):
            return None
        layers = {}
        for i, (basis, (k, of_pca)) in enumerate(zip(self.fit.bases(kind), self._required_of_pca, strict=True)):
            scores = self._other_ablations.changes(i, basis, most_important(basis, k))
            layers[basis.name] = {"features": k, **change(scores - of_pca)}
        return {"samples": len(self.subject.compared), "layers": layers}

    @cached_property
    def _required_of_pca(self) -> list[tuple[int, Tensor]]:
        """How many principal components each node layer requires, and changes of the scores of other text with them."""
        found = []
        counted = self._features("pca")["layers"]
        for i, basis in enumerate(self.fit.bases("pca")):
            k = counted[basis.name]["count"] or basis.n_features  # all, where even they do not suffice
            found.append((k, self._other_ablations.changes(i, basis, most_important(basis, k))))
        return found

    @cached_property
    def _other_ablations(self) -> NodeAblations:
        batches = self.subject.batches(self.subject.compared)
        return NodeAblations(self.fit.instrumented, batches, log_likelihood, keep=False)

    def _explained(self, i: int) -> float:
        """Share of the variance of other activations that an autoencoder explains, without those of massive length."""
        rows = usual(self._named_activations[i].flatten(0, 1))
        with torch.no_grad():
            left = (rows - self.fit.autoencoder(i)(rows)).square().sum()
        return float(1 - left / (rows - rows.mean(0)).square().sum())

    @cached_property
    def _named_activations(self) -> list[Tensor]:
        return self.fit.activations_on(self.subject.named)

    def _edges(self, kind: str) -> dict[str, Any]:
        """Effective edges of each section, with standard errors over samples and the bias by the jackknife."""
        graph = self.fit.graph(kind)
        sections = {}
        for pair, E in graph.edges.items():
            replicates = graph.info["edge replicates"][pair]
            found = {"edges": E.numel(), "with edges": with_edges(E), **effective_with_error(E, replicates)}
            before, after = (graph.bases[name] for name in pair)
            if isinstance(before, DictionaryBasis) and isinstance(after, DictionaryBasis):
                latents = (slice(after.error), slice(before.error))
                found["of latents alone"] = effective_with_error(E[latents], [one[latents] for one in replicates])
                found["error's share"] = float(1 - E[latents].sum() / E.sum())
            sections["-to-".join(pair)] = found
        return {"samples": self.subject.n_metric, "sections": sections}

    def _names(self, kind: str) -> dict[str, Any]:
        """How many features have a name that predicts where they are active."""
        pieces = self.subject.named
        labeller = ExampleLabels(renderer=TokensOf(self.subject.tokenizer))
        skipped = pieces.shape[1] - self._named_activations[0].shape[1]
        positions = torch.arange(skipped, pieces.shape[1]).expand(len(pieces), -1)
        layers = {}
        for basis, a in zip(self.fit.bases(kind), self._named_activations, strict=True):
            importance, f = basis.importance, self._values(basis, a)
            importance = importance[: f.shape[2]]
            found = labeller.label(FeatureSamples(f, positions, pieces.shape[1], pieces))
            is_named = torch.tensor([name != "" for name in found.names])
            assert found.scores is not None
            layers[basis.name] = {
                "features": len(importance),
                "named": int(is_named.sum()),
                "importance": float(importance[is_named].sum() / importance.sum()),
                "median score": float(found.scores[is_named].median()) if is_named.any() else None,
            }
        return {"samples": len(pieces), "layers": layers}

    @staticmethod
    def _values(basis: Basis, a: Tensor) -> Tensor:
        """Values of the features, without those of the error of a dictionary."""
        with torch.no_grad():
            f = basis.encode(a).float()
        return f[..., : basis.error] if isinstance(basis, DictionaryBasis) else f

    def _causal(self, kind: str) -> dict[str, Any]:
        """How many features change the loss, each set to its mean alone: all, or some of all ranks."""

        def ranks(n: int) -> list[int]:
            count = n if self.subject.causal is None else min(n, self.subject.causal)
            # The middles of equal parts of the ranks, so that each stands for as many features.
            return [(2 * k + 1) * n // (2 * count) for k in range(count)]

        return self._causal_of(kind, ranks)

    def _largest_causal(self, kind: str) -> dict[str, Any] | None:
        """How many of the most important features do, where not all are tried."""
        count = self.subject.causal
        return None if count is None else self._causal_of(kind, lambda n: list(range(min(n, count))))

    def _causal_of(self, kind: str, ranks: Callable[[int], list[int]]) -> dict[str, Any]:
        """How many features of some ranks, given the number of features, change the loss."""
        graph = self.fit.graph(kind)
        chosen: list[str] = []
        for name, basis in graph.bases.items():
            n = basis.error if isinstance(basis, DictionaryBasis) else basis.n_features
            ids = graph.feature_ids(name)
            ranked = basis.importance[:n].argsort(descending=True, stable=True).tolist()
            chosen += [ids[ranked[k]] for k in ranks(n)]
        batches = self.subject.batches(self.subject.tested)
        effects = feature_effects(self.subject.model, batches, graph, log_likelihood, chosen)
        layers = {name: [effects[one] for one in chosen if one.rpartition("/")[0] == name] for name in graph.bases}
        return {
            "samples": len(self.subject.tested),
            "layers": {
                name: {"tested": len(of_layer), "significant": sum(one.significant for one in of_layer)}
                for name, of_layer in layers.items()
            },
        }

    def _attacked(self, kind: str) -> dict[str, Any] | None:
        """Edges required in one section under attack; in a small model under one at random, too."""
        if self.subject.attack is None:
            found = self._edges_required([ATTACKED], kind, ATTACK)
            return found | {"random": self._edges_required([ATTACKED], kind, RANDOM_ATTACK)["sections"]}
        if kind == "sae":
            return None  # each of the features needs a forward and a backward pass of its own in each attack
        return self._edges_required([ATTACKED], kind, self.subject.attack)

    def _edges_required(
        self, chosen: Sequence[tuple[str, str]], kind: str, attack: EdgeAttack | None = None
    ) -> dict[str, Any]:
        """Edges required in some sections, by ablation alone or under attack."""
        graph = self.fit.graph(kind)
        batches = self.subject.batches(self.subject.scored[: self.subject.attacked])
        sections = {}
        for section in chosen:
            found = edges_required(
                self.subject.model, batches, graph, log_likelihood, self.subject.tolerance, [section],
                self.subject.edge_search, attack,
            )[section]  # fmt: skip
            sections["-to-".join(section)] = {
                "edges": graph.edges[section].numel(), "count": found.count,
                "low": found.bounds[0], "high": found.bounds[1], "error": found.error,
            }  # fmt: skip
            if attack is None and self.subject.attack is not None and section == ATTACKED:
                worst, at_random = (
                    attack_edges(self.subject.model, batches, graph, log_likelihood, section, found.mask, one)
                    for one in (self.subject.attack, FEW_DRAWS)
                )
                sections["-to-".join(section)] |= {
                    "dropped": found.score - found.unablated, "worst": worst.score - found.unablated,
                    "worst error": worst.error, "random": at_random.score - found.unablated,
                    "random error": at_random.error,
                }  # fmt: skip
        return {"samples": self.subject.attacked, "sections": sections}
