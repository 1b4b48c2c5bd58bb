"""Edges between latents by dense Jacobians: the definition, written down literally, with no shortcut at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_edges(
    section: Callable[[Tensor], Tensor],
    a: Tensor,
    before: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    after: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
) -> tuple[Tensor, Tensor]:
    """Edges ``E`` and attributions ``A`` between all latents of two dictionaries, the errors last.

    Args:
        section: From the activations ``(S, d)`` of one sample to those of the next node layer, ``(S', d')``.
        a: Activations, shape ``(n, S, d)``.
        before: Encoder and decoder of the first node layer.
        after: Encoder and decoder of the second one.

    Returns:
        Both of shape ``(r' + 1, r + 1)``.
    """
    jacobian = torch.autograd.functional.jacobian
    E = A = torch.zeros(0)
    for x in a:
        f = before[0](x)  # (S, r)
        e = x - before[1](f)
        J_dec = jacobian(before[1], f)  # (S, d, S, r)
        # What each feature contributes to the activations: (S, r + 1, d).
        of_latents = torch.stack([J_dec[s, :, s] * f[s] for s in range(len(f))]).mT
        v = torch.cat([of_latents, e[:, None]], 1)
        J = jacobian(section, x)  # (S', d', S, d)
        w = torch.einsum("tesd,sjd->tje", J, v)  # (S', r + 1, d')
        x_next = section(x)
        f_next = after[0](x_next)
        e_next = x_next - after[1](f_next)
        J_enc = jacobian(after[0], x_next)  # (S', r', S', d')
        J_dec_next = jacobian(after[1], f_next)  # (S', d', S', r')
        y = torch.stack([w[t] @ J_enc[t, :, t].T for t in range(len(w))])  # (S', r + 1, r')
        left = w - torch.stack([y[t] @ J_dec_next[t, :, t].T for t in range(len(w))])
        squares = torch.cat([y.square().sum(0).T, left.square().sum((0, 2))[None]])
        signed = torch.cat([torch.einsum("tji,ti->ij", y, f_next), torch.einsum("tje,te->j", left, e_next)[None]])
        E, A = (squares, signed) if not E.numel() else (E + squares, A + signed)
    n, S = a.shape[:2]
    return E / (n * S), A / (n * len(w))
