"""A literal transcription of the paper's algorithm with dense Jacobians: slow and simple, to test against.

Source: arXiv 2405.10928. Works on a chain of plain functions (`tests.cases.Case.sections`), one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Chain = Sequence[Callable[[Tensor], Tensor]]


@dataclass
class Reference:
    """Maps to features, maps back, importances, edges and attributions, one entry for each node layer or section."""

    activations: list[Tensor]
    mean: list[Tensor]
    C: list[Tensor]
    C_pinv: list[Tensor]
    Lambda: list[Tensor]
    E: list[Tensor]
    A: list[Tensor]


def activations(a: Tensor, chain: Chain) -> list[Tensor]:
    """Activations ``(n, S, d)`` of every node layer, starting from the first."""
    result = [a.detach()]
    for F in chain:
        result.append(F(result[-1]).detach())
    return result


def jacobian(F: Callable[[Tensor], Tensor], a_x: Tensor) -> Tensor:
    """Dense Jacobian ``(S', d', S, d)`` of a section at one sample ``a_x`` of shape ``(S, d)``."""
    return torch.autograd.functional.jacobian(lambda a: F(a[None])[0], a_x)


def averaged_jacobian(F: Callable[[Tensor], Tensor], a_x: Tensor, mu: Tensor, steps: int, valid: Tensor) -> Tensor:
    """Jacobian averaged along the straight path from the mean at valid positions; at the activations for 0 steps."""
    if steps == 0:
        return jacobian(F, a_x)
    points, weights = np.polynomial.legendre.leggauss(steps)
    start = torch.where(valid[:, None], mu, a_x)
    return sum(w / 2 * jacobian(F, start + (p + 1) / 2 * (a_x - start)) for p, w in zip(points, weights, strict=True))


def nonzero_eigh(A: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Nonzero eigenvalues in descending order, and their eigenvectors."""
    values, vectors = torch.linalg.eigh(A)
    keep = values > rtol * values.max()
    return values[keep].flip(0), vectors[:, keep].flip(1)


def transcribe(
    a0: Tensor,
    chain: Chain,
    basis: str = "lib",
    final: str = "neuron",
    steps: int = 0,
    rtol: float = 1e-11,
    masks: Sequence[Tensor] = (),
    output: str | None = None,
) -> Reference:
    """Bases and edges of a chain.

    Args:
        a0: Activations of the first node layer, shape ``(n, S, d)``, float64.
        chain: The sections.
        basis: ``"lib"``, ``"pca"`` or ``"neuron"``.
        final: Basis of the last node layer, ``"neuron"``, ``"pca"``, ``"centered"`` or ``"fisher"``.
        steps: Points of the integration path.
        rtol: Eigenvalues below this share of the largest are zero.
        masks: True at valid positions of each node layer, ``(n, S)``; other positions are excluded from every sum.
        output: Measure all node layers but the last by what the last predicts; see `fisher_information`.

    Returns:
        Activations, bases, edges and attributions.
    """
    a = activations(a0, chain)
    L = len(chain)
    valid = list(masks) or [torch.ones(x.shape[:2], dtype=torch.bool) for x in a]
    mean, C, C_pinv, Lambda = ([torch.empty(0)] * (L + 1) for _ in range(4))
    for l in reversed(range(L + 1)):
        d = a[l].shape[-1]
        rows = a[l][valid[l]]
        mean[l] = rows.mean(0)
        Sigma = sum(torch.outer(r - mean[l], r - mean[l]) for r in rows) / len(rows)
        D, U = nonzero_eigh(Sigma, rtol)
        kind = final if l == L else basis
        if kind == "neuron":
            C[l], C_pinv[l], Lambda[l] = torch.eye(d).double(), torch.eye(d).double(), Sigma.diagonal()
        elif kind == "centered":
            P = torch.eye(d).double() - torch.ones(d, d).double() / d
            C[l], C_pinv[l], Lambda[l] = P, P, (P @ Sigma @ P).diagonal()
        elif kind == "pca":
            C[l], C_pinv[l], Lambda[l] = U, U.T, D
        else:
            if kind == "fisher":
                M = fisher_metric(rows)
            elif output is not None:
                M = output_metric(chain[l:], a[l], a[L], valid[l], valid[L], output)
            else:
                M = jacobian_metric(chain[l], a[l], mean[l], C[l + 1], valid[l], valid[l + 1], steps)
            Lambda[l], V = nonzero_eigh(D.sqrt().diag() @ U.T @ M @ U @ D.sqrt().diag(), rtol)
            C[l] = U @ D.rsqrt().diag() @ V @ Lambda[l].sqrt().diag()
            C_pinv[l] = Lambda[l].rsqrt().diag() @ V.T @ D.sqrt().diag() @ U.T
    E, A = [], []
    for l in range(L):
        y = interactions(chain[l], a[l], mean[l], C[l], C_pinv[l], C[l + 1], valid[l], valid[l + 1], steps)
        fhat_next = [(a_x[v] - mean[l + 1]) @ C[l + 1] for a_x, v in zip(a[l + 1], valid[l + 1], strict=True)]
        E.append(sum(y_x.square().sum(0) for y_x in y) / valid[l].sum())
        signed = [torch.einsum("tij,ti->ij", y_x, f) for y_x, f in zip(y, fhat_next, strict=True)]
        A.append(sum(signed) / valid[l + 1].sum())
    return Reference(a, mean, C, C_pinv, Lambda, E, A)


def fisher_metric(logits: Tensor) -> Tensor:
    """Mean of ``diag(p) - p p^T`` over logits, one vector a row, with ``p = softmax(logits)``."""
    p = logits.softmax(-1)
    return sum(p_x.diag() - torch.outer(p_x, p_x) for p_x in p) / len(p)


def fisher_information(a: Tensor, kind: str) -> Tensor:
    """Fisher information of one output position ``a`` of shape ``(d,)``: of logits, or of the mean of a Gaussian."""
    if kind == "categorical":
        p = a.softmax(-1)
        return p.diag() - torch.outer(p, p)
    if kind == "bernoulli":
        return (a.sigmoid() * (1 - a.sigmoid())).diag()
    return torch.eye(len(a)).double()


def gradients_of_output(chain: Chain, a_x: Tensor, valid: Tensor) -> Tensor:
    """Dense Jacobian ``(S', d', S, d)`` of the rest of a chain at one sample; of valid output positions."""

    def rest(a: Tensor) -> Tensor:
        for F in chain:
            a = F(a)
        return a

    return jacobian(rest, a_x)[valid]


def output_metric(chain: Chain, a: Tensor, a_out: Tensor, valid: Tensor, valid_out: Tensor, kind: str) -> Tensor:
    """``M_out = 1/(n S) sum_x sum_{t,s} J_ts^T F_t J_ts`` of a node layer, from samples ``a`` of shape ``(n, S, d)``.

    With ``F = 1``, this is the metric of the authors' "naive gradient flow": that of a network with two node layers,
    this one and the last, whose features are neurons.
    """
    M = torch.zeros(a.shape[-1], a.shape[-1]).double()
    for x, a_x in enumerate(a):
        J = gradients_of_output(chain, a_x, valid_out[x])[:, :, valid[x]]
        for J_t, out in zip(J, a_out[x][valid_out[x]], strict=True):
            M += torch.einsum("isd,ij,jse->de", J_t, fisher_information(out, kind), J_t) / valid.sum()
    return M


def output_importance(
    chain: Chain,
    a: Tensor,
    a_out: Tensor,
    valid: Tensor,
    valid_out: Tensor,
    kind: str,
    features: Tensor,
    C_pinv: Tensor,
) -> Tensor:
    """``o_j = 1/2 1/(n S) sum_x sum_{t,s} (J_ts v)^T F_t (J_ts v)`` with ``v = fhat_{s,j} C^+_j``."""
    o = torch.zeros(len(C_pinv)).double()
    for x, a_x in enumerate(a):
        J = gradients_of_output(chain, a_x, valid_out[x])
        for j in range(len(C_pinv)):
            moved = torch.einsum("tisd,s,d->tis", J, features[x, :, j], C_pinv[j])[:, :, valid[x]]
            for moved_t, out in zip(moved, a_out[x][valid_out[x]], strict=True):
                o[j] += torch.einsum("is,ij,js->", moved_t, fisher_information(out, kind), moved_t) / 2 / valid.sum()
    return o


def jacobian_metric(
    F: Callable[[Tensor], Tensor],
    a: Tensor,
    mu: Tensor,
    C_next: Tensor,
    valid: Tensor,
    valid_next: Tensor,
    steps: int = 0,
) -> Tensor:
    """The metric ``M`` of the node layer before a section, from samples ``a`` of shape ``(n, S, d)``."""
    M = torch.zeros(a.shape[-1], a.shape[-1]).double()
    for x, a_x in enumerate(a):
        J = averaged_jacobian(F, a_x, mu, steps, valid[x])  # (S', d', S, d)
        J = J[valid_next[x]][:, :, valid[x]]
        g = torch.einsum("pi,tpsd->tisd", C_next, J).reshape(-1, a.shape[-1])
        M += g.T @ g / valid.sum()
    return M


def interactions(
    F: Callable[[Tensor], Tensor],
    a: Tensor,
    mu: Tensor,
    C: Tensor,
    C_pinv: Tensor,
    C_next: Tensor,
    valid: Tensor,
    valid_next: Tensor,
    steps: int = 0,
) -> list[Tensor]:
    """``y_ij(x, t) = sum_s [d fhat'_{t,i} / d fhat_{s,j}] fhat_{s,j}`` of each sample, ``(S', r', r)``.

    Samples ``a`` have the shape ``(n, S, d)``; only valid positions count.
    """
    y = []
    for x, a_x in enumerate(a):
        J = averaged_jacobian(F, a_x, mu, steps, valid[x])
        J = J[valid_next[x]][:, :, valid[x]]
        J_hat = torch.einsum("pi,tpsd,jd->tisj", C_next, J, C_pinv)
        fhat = (a_x[valid[x]] - mu) @ C
        y.append(torch.einsum("tisj,sj->tij", J_hat, fhat))
    return y


def edges(
    F: Callable[[Tensor], Tensor],
    a: Tensor,
    mu: Tensor,
    C: Tensor,
    C_pinv: Tensor,
    C_next: Tensor,
    valid: Tensor,
    valid_next: Tensor,
    steps: int = 0,
) -> Tensor:
    """The edges ``E`` of a section between two bases, from samples ``a`` of shape ``(n, S, d)``."""
    y = interactions(F, a, mu, C, C_pinv, C_next, valid, valid_next, steps)
    return sum(y_x.square().sum(0) for y_x in y) / valid.sum()


def keep_features(a: Tensor, mean: Tensor, C: Tensor, C_pinv: Tensor, kept: Sequence[int], valid: Tensor) -> Tensor:
    """Activations ``(n, S, d)`` reconstructed from some features; masked positions are unchanged."""
    result = a.clone()
    for x, s in valid.nonzero().tolist():
        result[x, s] = mean + sum(((a[x, s] - mean) @ C[:, j]) * C_pinv[j] for j in kept)
    return result


def run_on(a: Tensor, chain: Chain) -> Tensor:
    """The output of a chain."""
    for F in chain:
        a = F(a)
    return a.detach()


def node_ablation(
    a: Sequence[Tensor], chain: Chain, l: int, basis: tuple[Tensor, Tensor, Tensor], kept: Sequence[int], valid: Tensor
) -> Tensor:
    """The last activations ``(n, S, d)`` if node layer ``l`` keeps only some features.

    Args:
        a: Activations of every node layer.
        chain: The sections.
        l: Index of the node layer.
        basis: Its mean, map to features and map back.
        kept: Indices of the features to keep.
        valid: Its valid positions, ``(n, S)``.

    Returns:
        Activations of the last node layer.
    """
    return run_on(keep_features(a[l], *basis, kept, valid), chain[l:])


def edge_ablation(
    a: Sequence[Tensor],
    chain: Chain,
    l: int,
    bases: Sequence[tuple[Tensor, Tensor, Tensor]],
    mask: Tensor,
    valid: Sequence[Tensor],
) -> Tensor:
    """The last activations ``(n, S, d)`` if the section after node layer ``l`` keeps only some edges.

    Args:
        a: Activations of every node layer.
        chain: The sections.
        l: Index of the node layer before the section.
        bases: Mean, map to features and map back of every node layer.
        mask: True where an edge is kept, shape ``(r_out, r_in)``.
        valid: Valid positions of every node layer, ``(n, S)``.

    Returns:
        Activations of the last node layer.
    """
    mean, C, C_pinv = bases[l + 1]
    result = a[l + 1].clone()
    result[valid[l + 1]] = mean
    for i in range(len(mask)):
        kept = mask[i].nonzero().flatten().tolist()
        a_next = chain[l](keep_features(a[l], *bases[l], kept, valid[l])).detach()
        for x, s in valid[l + 1].nonzero().tolist():
            result[x, s] += ((a_next[x, s] - mean) @ C[:, i]) * C_pinv[i]
    return run_on(result, chain[l + 1 :])
