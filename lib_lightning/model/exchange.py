"""Two sets of samples that differ: what a model computes from its input is tested by exchanging one for the other.

Samples of one batch are exchanged with each other, those of batches with a single sample across batches. If all samples
are the same, the numbers within each sample change places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.model.batch import map_tensors, tensors_in
from lib_lightning.model.batch_layout import BatchLayout

# Batches to look for samples in.
_BATCHES = 8


@dataclass(frozen=True)
class Exchange:
    """A batch, and the same batch with other samples.

    Attributes:
        batch: The batch.
        other: A batch of the same form.
        entries: Indices of the tensors that differ, among all tensors of the batch; None if the batches are exchanged
            as a whole, because they cannot be compared tensor by tensor.
        held: Names of entries of the batch that differ between samples and are the same in both.
    """

    batch: Any
    other: Any
    entries: tuple[int, ...] | None
    held: tuple[str, ...] = ()

    @classmethod
    def of(cls, batch: Any, other: Any) -> Exchange | None:
        """The exchange of one batch for another; None if they are equal."""
        a, b = _dense_tensors(batch), _dense_tensors(other)
        if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b] or not a:
            return cls(batch, other, None)
        different = tuple(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not _same(x, y))
        return cls(batch, other, different) if different else None

    def only(self, entries: Sequence[int]) -> Exchange:
        """The exchange of some of the tensors."""
        new = dict(enumerate(tensors_in(self.other)))
        count = itertools.count()

        def choose(t: Tensor) -> Tensor:
            index = next(count)
            return new[index] if index in entries else t

        names = _names(self.batch)
        held = tuple(dict.fromkeys(names[i] for i in self.entries or () if i not in entries))
        return Exchange(self.batch, map_tensors(self.batch, choose), tuple(entries), held)

    def without_context(self) -> Exchange | None:
        """The exchange of the data alone, without masks and lengths.

        Boolean tensors, integers that are only 0 and 1, and integers of which there is one for each sample are masks
        or lengths, if there are other tensors beside them.

        Returns:
            The exchange; None if it would be the same.
        """
        if self.entries is None:
            return None
        tensors = _dense_tensors(self.batch)
        per_sample = {
            i: tensors[i].numel() / max(1, tensors[i].shape[0] if tensors[i].ndim else 1) for i in self.entries
        }
        largest = max(per_sample.values())
        data = [
            i
            for i in self.entries
            if not (_is_mask(tensors[i]) or (_is_integer(tensors[i]) and per_sample[i] == 1 < largest))
        ]
        return self.only(data) if data and len(data) < len(self.entries) else None


def exchanges(batches: Sequence[Any], layout: BatchLayout, limit: int) -> Iterator[Exchange]:
    """Sets of samples that differ, the best ones first.

    Args:
        batches: Batches with samples.
        layout: Which parts of a batch have one entry for each sample.
        limit: Number of samples in each set, at most; 0 for whole batches.

    Yields:
        Exchanges. Nothing if all samples are the same and cannot be changed, such as a single whole number.
    """
    batches = batches[:_BATCHES]
    few = [first_samples(batch, layout, limit) for batch in batches]
    for batch in batches:
        for samples in _different_samples(batch, layout, limit):
            yield from _checked(samples, _rolled(samples, layout))
    pooled = _pooled([first_samples(batch, layout, 1) for batch in batches][: max(2, limit)])
    if pooled is not None:
        yield from _checked(pooled, _rolled(pooled, layout))
    others = [found for other in few[1:] for found in _checked(few[0], other)]
    yield from (found for found in others if found.entries is not None)
    if tensors_in(few[0]):
        n = layout.num_samples(few[0])
        yield from _checked(few[0], map_tensors(few[0], lambda t: _moved(t, n)))
    # Samples of other sizes last: what depends on the size differs as well.
    yield from (found for found in others if found.entries is None)


def first_samples(batch: Any, layout: BatchLayout, limit: int) -> Any:
    """The first samples of a batch, at most ``limit``; all of them if that is 0."""
    return layout.select(batch, slice(0, limit)) if 0 < limit < layout.num_samples(batch) else batch


def _checked(batch: Any, other: Any) -> Iterator[Exchange]:
    found = Exchange.of(batch, other)
    if found is not None:
        yield found


def _different_samples(batch: Any, layout: BatchLayout, limit: int) -> Iterator[Any]:
    """Samples of a batch that differ from the first: in any of its tensors, and in each one of them."""
    found: list[Tensor] = []
    n = layout.num_samples(batch)
    for t in _dense_tensors(batch):
        if n > 1 and t.ndim > 0 and t.shape[0] == n:
            found.append((t != t[:1]).flatten(1).any(1).cpu() if t.ndim > 1 else (t != t[:1]).cpu())
    tried: set[tuple[int, ...]] = set()
    if not found and n > 1:  # samples that are not rows of tensors
        found.append(torch.ones(n, dtype=torch.bool, device="cpu"))
    for differs in (torch.stack(found).any(0), *found) if found else ():
        index = tuple([0, *differs.nonzero()[:, 0].tolist()][: limit or n])
        if len(index) > 1 and index not in tried:
            tried.add(index)
            yield layout.select(batch, torch.tensor(index, device="cpu")) if limit else batch
            if not limit:
                return


def _rolled(batch: Any, layout: BatchLayout) -> Any:
    """The same samples in another order."""
    return layout.select(batch, torch.arange(layout.num_samples(batch), device="cpu").roll(1))


def _pooled(batches: Sequence[Any]) -> Any:
    """One batch of the samples of several; None if their tensors do not fit together."""
    tensors = [tensors_in(batch) for batch in batches]
    if len(batches) < 2 or len({len(found) for found in tensors}) > 1 or not tensors[0]:
        return None
    try:
        joined = iter(
            [torch.cat(parts) if parts[0].shape[:1] == (1,) else parts[0] for parts in zip(*tensors, strict=True)]
        )
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return map_tensors(batches[0], lambda t: next(joined))


def _moved(t: Tensor, n: int) -> Tensor:
    """The numbers of each sample at other places; real numbers that are all the same are changed."""
    if t.ndim == 0 or t.layout != torch.strided or t.is_nested or t.numel() == 0:
        return t
    moved = t.flatten(1).roll(1, 1).view_as(t) if t.ndim > 1 and t.shape[0] == n else t
    return moved if not _same(moved, t) or not t.is_floating_point() else t + 0.25 * (1 + t.abs())


def _dense_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, those of other layouts as ordinary ones, to be compared."""
    return [_dense(t) for t in tensors_in(batch)]


def _dense(t: Tensor) -> Tensor:
    if t.is_nested:
        padded: Tensor = torch.nested.to_padded_tensor(t, 0.0)
        return padded
    return t if t.layout == torch.strided else t.to_dense()


def _same(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except (RuntimeError, NotImplementedError):
        return False


def _is_integer(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


def _is_mask(t: Tensor) -> bool:
    return t.dtype == torch.bool or (_is_integer(t) and bool(((t == 0) | (t == 1)).all()))


def _names(batch: Any) -> list[str]:
    """For each tensor of a batch the name of the entry that it is part of."""
    if isinstance(batch, Mapping):
        items: list[tuple[str, Any]] = [(f"'{key}'", value) for key, value in batch.items()]
    elif isinstance(batch, (tuple, list)):
        items = [(f"entry {index}", value) for index, value in enumerate(batch)]
    else:
        items = [("a part", batch)]
    return [name for name, value in items for _ in tensors_in(value)]
