"""The finite-difference oracle: the expected graph of any model, computed by running it with one number changed.

It uses neither this library nor autograd. A model is run as its user runs it; hooks read the tensors at the taps, and
overwrite them in place. Jacobians are finite differences of fourth order in float64. The paper's formulas (arXiv
2405.10928) are evaluated with dense matrices.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph

# With a step of 1e-4 of the activations' standard deviation, differences are accurate to about 1e-11: the truncation
# error, of fourth order, is below the rounding error divided by the step.
STEP = 1e-4
# Directions down to 1e-8 of the largest variance are kept. Features magnify the error of 1e-11 by 1e4, and squares of
# features are compared.
RTOL, TOLERANCE = 1e-8, 1e-6


def randomize(model: nn.Module) -> nn.Module:
    """Convert a model to float64 and perturb all parameters, so that biases and norms have an effect."""
    model.double()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter += 0.3 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def check_against_finite_differences(
    model: nn.Module,
    batch: Tensor | dict[str, Any],
    node_layers: Sequence[str | NodeLayer],
    step: float = STEP,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> InteractionGraph:
    """Compute a model's interaction graph, compare it with the oracle, and return it."""
    graph = compute_interaction_graph(model, [batch], node_layers, rtol=RTOL, **options)
    assert_exact(graph, *dense(model, batch, node_layers, step), tolerance=tolerance)
    return graph


def assert_exact(
    graph: InteractionGraph,
    activations: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    masks: Sequence[Tensor] = (),
    tolerance: float = TOLERANCE,
) -> None:
    """Compare a graph with dense Jacobians: every formula and every exact identity of the method.

    Args:
        graph: The graph to check.
        activations: ``a^l`` of each node layer, ``(n, S, d)``.
        jacobians: ``d a^{l+1} / d a^l`` of each section, ``(n, S', d', S, d)``.
        masks: For each node layer True at valid positions, ``(n, S)``; by default all positions are valid.
        tolerance: Largest error, relative to the largest entry.
    """
    close, spectrum = partial(assert_close, tolerance=tolerance), partial(assert_spectrum, tolerance=tolerance)
    bases = list(graph.bases.values())
    masks = list(masks) or [torch.ones(a.shape[:2], dtype=torch.bool) for a in activations]
    features = []
    for basis, a, mask in zip(bases, activations, masks, strict=True):
        rows = a[mask]
        close(basis.mean, rows.mean(0))
        fhat = (rows - rows.mean(0)) @ basis.to_features
        second = fhat.T @ fhat / len(fhat)  # E[fhat fhat^T] = diag(Lambda), the diagonal alone for neurons
        close(second.diagonal().diag() if basis.kind == "neuron" else second, basis.importance.diag())
        close(basis.from_features @ basis.to_features, torch.eye(len(basis.importance)).double())
        features.append(torch.where(mask[..., None], (a - basis.mean) @ basis.to_features, 0.0))
    last = (activations[-1] - bases[-1].mean)[masks[-1]]
    if bases[-1].kind == "pca":
        spectrum(bases[-1].importance, last.T @ last / len(last))
    for l, J in enumerate(jacobians):
        J = J * masks[l + 1][:, :, None, None, None] * masks[l][:, None, None, :, None]
        count = masks[l].sum()
        G = torch.einsum("pi,ntpsd->ntisd", bases[l + 1].to_features, J)
        if bases[l].kind == "lib":
            M = torch.einsum("ntisd,ntise->de", G, G) / count
            centred = (activations[l] - bases[l].mean)[masks[l]]
            values, vectors = torch.linalg.eigh(centred.T @ centred / count)
            root = vectors * values.clamp(min=0).sqrt() @ vectors.T
            spectrum(bases[l].importance, root @ M @ root)
            Jhat = torch.einsum("ntisd,jd->ntisj", G, bases[l].from_features)
            identity = torch.einsum("ntisj,ntisk->jk", Jhat, Jhat) / count
            close(identity, torch.eye(len(identity)).double())
        moved = torch.einsum("ntisd,jd,nsj->ntij", G, bases[l].from_features, features[l])
        section = graph.node_layers[l], graph.node_layers[l + 1]
        close(graph.edges[section], moved.square().sum((0, 1)) / count)
        A = torch.einsum("ntij,nti->ij", moved, features[l + 1]) / masks[l + 1].sum()
        # Where positive and negative terms cancel, what is left has the error of the terms.
        terms = torch.einsum("ntij,nti->ij", moved.abs(), features[l + 1].abs()) / masks[l + 1].sum()
        assert_close(graph.attributions[section], A, tolerance, terms)


def assert_same_graph(actual: InteractionGraph, expected: InteractionGraph, tolerance: float = 1e-8) -> None:
    """Compare two graphs, up to the names of node layers and the signs of features."""
    for basis, other in zip(actual.bases.values(), expected.bases.values(), strict=True):
        assert_close(basis.mean, other.mean, tolerance)
        assert_close(basis.importance, other.importance, tolerance)
        projections = (b.to_features @ b.from_features for b in (basis, other))
        assert_close(*projections, tolerance)
    for E, expected_E in zip(actual.edges.values(), expected.edges.values(), strict=True):
        assert expected_E.max() > 0
        assert_close(E, expected_E, tolerance)
    for A, expected_A, E in zip(
        actual.attributions.values(), expected.attributions.values(), expected.edges.values(), strict=True
    ):
        assert_close(A, expected_A, tolerance, E)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE, scale: Tensor | None = None) -> None:
    """Compare tensors with a tolerance relative to the largest entry, or to that of another tensor."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / (expected if scale is None else scale).abs().max().clamp(min=1e-12)
    assert error < tolerance, f"off by {error:.1e} of the largest entry"


def assert_spectrum(importance: Tensor, matrix: Tensor, tolerance: float) -> None:
    """Compare importances with the eigenvalues of a matrix; the smallest eigenvalues may be truncated."""
    values = torch.linalg.eigvalsh(matrix).flip(0)
    assert importance.max() > 0
    assert_close(torch.cat([importance, importance.new_zeros(len(values) - len(importance))]), values, tolerance)


@torch.no_grad()
def dense(
    model: nn.Module, batch: Tensor | Mapping[str, Any], node_layers: Sequence[str | NodeLayer], step: float = STEP
) -> tuple[list[Tensor], list[Tensor]]:
    """Activations of every node layer and Jacobians of every section, with the model in evaluation mode.

    Args:
        model: Any model.
        batch: Its argument, or a dict of its keyword arguments.
        node_layers: As for `compute_interaction_graph`.
        step: Step of the finite differences, as a share of the activations' standard deviation.

    Returns:
        ``a^l``, ``(n, S, d)``, and ``d a^{l+1} / d a^l``, ``(n, S', d', S, d)``.
    """
    layers = [NodeLayer([spec]) if isinstance(spec, str) else spec for spec in node_layers]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        as_found = run(model, batch, layers)
        a = [read(as_found, l, layer) for l, layer in enumerate(layers)]
        jacobians = []
        for l, layer in enumerate(layers[:-1]):
            h = step * a[l].std()
            own = {(l, k): as_found[l, k] for k in range(len(layer.taps))}
            blocks = []
            for key, t in own.items():
                index = entries(layer, t)
                columns = []
                for number in index.flatten().tolist():
                    moved = []
                    for steps in (-2, -1, 1, 2):
                        new = t.clone()
                        new.flatten(1)[:, number] += steps * h
                        moved.append(read(run(model, batch, layers, {**own, key: new}), l + 1, layers[l + 1]))
                    columns.append((moved[0] - 8 * moved[1] + 8 * moved[2] - moved[3]) / (12 * h))
                blocks.append(torch.stack(columns, -1).unflatten(-1, index.shape))
            jacobians.append(torch.cat(blocks, -1 if layer.join == "features" else -2))
        return a, jacobians
    finally:
        for module in training:
            module.training = True


Seen = dict[tuple[int, int], Tensor]


def read(seen: Seen, l: int, layer: NodeLayer) -> Tensor:
    """Activations ``(n, S, d)`` of node layer ``l``, with its taps concatenated."""
    tapped = [seen[l, k] for k in range(len(layer.taps))]
    return torch.cat([t.flatten(1)[:, entries(layer, t)] for t in tapped], -1 if layer.join == "features" else -2)


def entries(layer: NodeLayer, t: Tensor) -> Tensor:
    """Indices ``(S, d)`` of positions and features in a flattened sample."""
    index = torch.arange(t[0].numel()).reshape(t.shape[1:])
    if layer.feature_dim is not None or t.ndim == 4:
        axis = 1 if layer.feature_dim is None else layer.feature_dim
        index = index.movedim(axis if axis < 0 else axis - 1, -1)
    index = index.reshape(-1, index.shape[-1] if index.ndim else 1)
    if layer.positions is None:
        return index
    return index[[layer.positions] if isinstance(layer.positions, int) else list(layer.positions)]


def run(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    layers: Sequence[NodeLayer],
    overwrite: Mapping[tuple[int, int], Tensor] | None = None,
) -> Seen:
    """Run a model; return the tensor at each tap, before it was overwritten."""
    seen: Seen = {}
    handles = []
    for key, name in (((l, k), tap) for l, layer in enumerate(layers) for k, tap in enumerate(layer.taps)):
        path, _, side = (":" + name if name in ("input", "output") else name).partition(":")
        path, _, number = path.partition("#")
        calls = itertools.count()

        def look(value: Any, key: tuple[int, int] = key, call: int = int(number or 0), calls: Any = calls) -> None:
            if next(calls) == call:
                t = tensors_in(value)[0]
                seen[key] = t.clone(memory_format=torch.contiguous_format)
                if overwrite and key in overwrite:
                    t.copy_(overwrite[key])

        module = model.get_submodule(path)
        if side == "input":
            before = partial(lambda look, module, args, kwargs: look((args, kwargs)), look)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(lambda look, module, args, out: look(out), look)))
    try:
        batch = copy.deepcopy(batch)
        model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors with an axis, in order."""
    if torch.is_tensor(value):
        return [value] if value.ndim else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (tuple, list)) else []
