"""Which latents of a dictionary are the features of a graph: those that are active in its samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import NotFiniteError, counted
from lib_lightning.model.precision import to_float64

_TOO_MANY = (
    "{} of the {} latents of '{}' are active, too many for matrices of edges: features are the {} with the largest "
    "mean squares, {:.3g}% of the sum, and the others belong to the error. A larger memory_limit allows for more."
)
_NO_DERIVATIVE = (
    "The encoder of the dictionary of '{}' has no derivative (torch.no_grad, detach, or a step function?), so that no "
    "feature acts on its latents."
)
_NOT_AFFINE = (
    "The decoder of the dictionary of '{}' is not affine, so that its latents have no importance for the output, and "
    "no outputs that they raise or lower."
)
_UNTRAINED = "The dictionary of '{}' has not been trained yet."


def choose_latents(
    dictionary: AdaptedDictionary, rows: Iterable[tuple[Tensor, int]], most: int, process_group: ProcessGroup
) -> tuple[DictionaryBasis, list[str]]:
    """The basis of the latents that are active anywhere.

    Args:
        dictionary: The dictionary.
        rows: Activations of this process, one a row, ``(m, d)``, and something else.
        most: Largest number of latents.
        process_group: The processes.

    Returns:
        The basis, and notes if there are too many, nothing can act on them, their directions vary, or they are
        untrained; its error has no importance yet.

    Raises:
        NotFiniteError: If a latent is NaN or infinite for a sample.
    """
    r, d = dictionary.n_latents, dictionary.d
    squares = largest = where = None
    count = 0
    for part, _ in rows:
        with torch.no_grad():
            for a in part.split(max(1, 2**22 // r)):
                f = dictionary.encode(a)
                if squares is None or largest is None or where is None:
                    squares = to_float64(f).new_zeros(r)
                    largest, where = f.new_zeros(r), a.new_zeros(r, d)
                squares += to_float64(f).square().sum(0)
                values, index = f.abs().max(0)
                is_larger = values > largest
                largest = torch.where(is_larger, values, largest)
                where[is_larger] = a[index[is_larger]]
                count += len(a)
    if squares is None or largest is None or where is None:  # only other processes have samples
        cpu = torch.device("cpu")
        squares, largest, where = (
            torch.zeros(r, dtype=torch.float64, device=cpu),
            *(torch.zeros(x, device=cpu) for x in ((r,), (r, d))),
        )
    total, rows_of_all = process_group.sum([squares, torch.tensor(count, device="cpu")])
    mean_squares = total / int(rows_of_all)
    if not (finite := torch.isfinite(mean_squares)).all():
        broken = counted(int((~finite).sum()), "latent")
        raise NotFiniteError(
            f"The dictionary of '{dictionary.name}' returns NaN or infinite values for {broken}, the first of them "
            f"{int((~finite).nonzero()[0])}. Check its weights, and the type in which they are."
        )
    kept, notes = (mean_squares > 0).nonzero().flatten(), list[str]()
    if not dictionary.is_differentiable:
        notes.append(_NO_DERIVATIVE.format(dictionary.name))
    if not dictionary.is_affine:
        notes.append(_NOT_AFFINE.format(dictionary.name))
    if getattr(dictionary.dictionary, "is_trained", True) is False:
        notes.append(_UNTRAINED.format(dictionary.name))
    if len(kept) > most:
        share = 100 * float(mean_squares.topk(most).values.sum() / mean_squares.sum())
        notes.append(_TOO_MANY.format(f"{len(kept):,}", f"{r:,}", dictionary.name, f"{most:,}", share))
        kept = mean_squares.topk(most).indices.sort().values
    gradients = _gradients(dictionary, kept, largest, where, process_group)
    importance = torch.cat([mean_squares[kept], mean_squares.new_zeros(1)])
    return DictionaryBasis.of(dictionary, kept, importance, gradients.T), notes


def _gradients(
    dictionary: AdaptedDictionary, kept: Tensor, largest: Tensor, where: Tensor, process_group: ProcessGroup
) -> Tensor:
    """Gradients of some latents where they are largest, ``(k, d)``, float64."""
    index = kept.to(where.device)
    every = torch.stack([t.cpu() for t in process_group.gather(largest[index])])
    is_own = (every.argmax(0) == process_group.rank) if len(every) > 1 else torch.ones_like(every[0], dtype=torch.bool)
    own = is_own.to(where.device)[:, None]
    found = dictionary.encoder_gradients(where[index], index[:, None], own)[:, 0]
    (total,) = process_group.sum([to_float64(found)])
    return total
