"""Which parts of a batch have one entry for each sample.

That is decided once in a run, from the tensors that the model is called with and what it returns: a length that several
tensors have by chance is no evidence. Where the batch has more than the one tensor that the model is called with, a few
samples are run on their own, and the result compared with that of the whole batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lib_lightning.errors import ActivationError, LIBError, is_out_of_memory
from lib_lightning.model.agreement import half_of_the_digits, same_numbers
from lib_lightning.model.batch import batch_size, replace_items, tensors_in
from lib_lightning.model.node_layer import NodeLayer, NodesAsPositions

Path = tuple[str | int, ...]
Index = slice | Tensor

# Entries of a batch that may be left out of its samples, at most, when it is found out which of them are.
_MAX_LEFT_OUT = 2


@dataclass(frozen=True)
class BatchLayout:
    """Which parts of a batch have one entry for each sample.

    Attributes:
        paths: Keys, indices and names of attributes from the batch to each such part: a tensor or array with the
            samples on axis 0, a list with one entry for each, or an object that knows its samples. None for every
            tensor of the length of the first one, where nothing else is known.
        counted: The part whose length is the number of samples; None for that of the first tensor.
        is_certain: Whether this has been decided on a batch of several samples.

    Example:
        >>> layout = BatchLayout(((1,), (2,)), (1,))
        >>> batch = torch.ones(3), torch.arange(4), ["a", "b", "c", "d"]
        >>> layout.num_samples(batch), layout.select(batch, slice(1, 3))
        (4, (tensor([1., 1., 1.]), tensor([1, 2]), ['b', 'c']))
    """

    paths: tuple[Path, ...] | None = None
    counted: Path | None = None
    is_certain: bool = False

    @property
    def plain(self) -> dict[str, Any]:
        """The same in lists, strings and numbers, for files and checkpoints."""
        paths = None if self.paths is None else [list(path) for path in self.paths]
        return {
            "paths": paths,
            "counted": None if self.counted is None else list(self.counted),
            "certain": self.is_certain,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> BatchLayout:
        """The layout that `plain` describes."""
        paths = None if plain["paths"] is None else tuple(map(tuple, plain["paths"]))
        return cls(paths, None if plain["counted"] is None else tuple(plain["counted"]), plain["certain"])

    def num_samples(self, batch: Any) -> int:
        """Number of samples in a batch."""
        if self.counted is None:
            return batch_size(batch)
        lengths = (length_of(part) for path, part in parts_of(batch) if path == self.counted)
        return next((n for n in lengths if n is not None), None) or batch_size(batch)

    def uniform_parts(self, batch: Any) -> list[Any]:
        """A batch of graphs as batches of graphs with equally many nodes; any other batch unchanged."""
        found = next((part for _, part in parts_of(batch) if _is_graph_batch(part)), None)
        sizes = [] if found is None else _node_counts(found)
        if len(set(sizes)) < 2:
            return [batch]
        chosen = (
            torch.tensor([i for i, size in enumerate(sizes) if size == k], device="cpu") for k in sorted(set(sizes))
        )
        return [self.select(batch, index) for index in chosen]

    def can_split(self, batch: Any) -> bool:
        """Whether samples of a batch can be selected."""
        return self.paths is None or any(path in self.paths for path, _ in parts_of(batch))

    def select(self, batch: Any, index: Index) -> Any:
        """Select samples of a batch.

        Args:
            batch: One batch.
            index: A slice, or indices of shape ``(k,)``, int64.

        Returns:
            The same structure, with the samples; the batch itself if it cannot be split.
        """
        n = self.num_samples(batch)
        paths = self.paths

        def has_samples(path: Path, part: Any) -> bool:
            is_chosen = isinstance(part, Tensor) if paths is None else path in paths
            return is_chosen and length_of(part) == n

        return _select(batch, (), has_samples, index)


@dataclass(frozen=True)
class GraphSizes:
    """The graphs of a batch.

    Attributes:
        count: Number of graphs.
        nodes: Number of nodes of each; None if they differ.
    """

    count: int
    nodes: int | None

    def fit(self, layer: NodeLayer, rows: int, tap: str) -> NodeLayer:
        """The node layer for a tensor with a number of rows: one for each graph, or one for each node.

        Args:
            layer: The node layer.
            rows: Number of rows of the tapped tensor.
            tap: Name of the tap, for messages.

        Returns:
            The node layer; its nodes are positions if there is one row for each.

        Raises:
            ActivationError: If the rows are neither.
        """
        if rows == self.count:
            return layer
        if self.nodes is None or rows != self.count * self.nodes:
            raise ActivationError(
                f"'{tap}' has {rows} rows in a batch of {self.count} graphs, neither one for each graph nor one for "
                "each node. Choose a node layer with one row for each node, or after pooling."
            )
        return NodesAsPositions(**{f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}, nodes=self.nodes)


def graph_sizes(batch: Any) -> GraphSizes | None:
    """Sizes of the graphs of a batch as in PyTorch Geometric; None for other batches."""
    found = next((part for _, part in parts_of(batch) if _is_graph_batch(part)), None)
    if found is None:
        return None
    sizes = _node_counts(found)
    return GraphSizes(len(sizes), int(sizes[0]) if len(set(sizes)) == 1 else None)


def _node_counts(graphs: Any) -> list[int]:
    return [int(graph.num_nodes) for graph in graphs.to_data_list()]


def find_layout(
    batch: Any, called_with: Sequence[Path] | None, run: Callable[[Any], Any], reseed: Callable[[], None]
) -> BatchLayout:
    """Find which parts of a batch have one entry for each sample.

    Args:
        batch: One batch.
        called_with: Where in the batch the model's arguments are; None if they are computed from the batch.
        run: Calls the model on a batch and returns its output, without gradients.
        reseed: Changes the seed of the random numbers that ``run`` draws.

    Returns:
        The layout.

    Raises:
        LIBError: If there are several possibilities that differ.
    """
    parts = {path: n for path, part in parts_of(batch) if (n := length_of(part)) is not None}
    for path, part in parts_of(batch):
        if _is_graph_batch(part):
            same_length = [other for other, length in parts.items() if length == parts[path]]
            return BatchLayout(_disjoint(same_length, parts[path], [path]), path, True)
    used = {path: n for path, n in parts.items() if called_with is None or _is_inside(path, called_with)}
    tensors = [path for path in used if isinstance(_get(batch, path), Tensor)]
    if called_with is not None and len(used) == len(tensors) == 1:
        n = used[tensors[0]]
        chosen = [path for path, length in parts.items() if length == n]
        return BatchLayout(_disjoint(chosen, n, tensors), tensors[0], n > 1)
    if not used:
        return BatchLayout((), None)
    whole = _rows(run(batch))
    n = _number_of_samples(whole, [used[path] for path in (*tensors, *(p for p in used if p not in tensors))])
    chosen = [path for path, length in parts.items() if length == n]
    doubtful = [path for path in chosen if path in used]
    counted = next(iter(doubtful), None)
    if n < 2:
        return BatchLayout(_disjoint(chosen, n, doubtful), counted, False)
    works = _Trial(batch, whole, n, run, reseed)
    for left_out in range(min(_MAX_LEFT_OUT, len(doubtful)) + 1):
        found = []
        for excluded in combinations(doubtful, left_out):
            rest = [path for path in chosen if path not in excluded]
            # If both work, the model does not use the list.
            ways = [_disjoint(rest, n, doubtful, prefer_lists) for prefer_lists in (False, True)]
            working = next((w for w in ways if any(path in used for path in w) and works(w)), None)
            if working is not None and working not in found:
                found.append(working)
        if len(found) > 1:
            raise LIBError(
                f"Which entries of the batch have one row for each of its {n} samples cannot be told: both "
                f"{_shown(found[0])} and {_shown(found[1])} could. Use a batch size that no other tensor has, or give "
                "input_fn= with only what the model needs."
            )
        if found:
            return BatchLayout(found[0], next(path for path in found[0] if path in used), True)
    return BatchLayout((), counted, True)


class _Trial:
    """Whether the rows of a few samples on their own are those of the whole batch."""

    def __init__(
        self, batch: Any, whole: Sequence[Tensor], n: int, run: Callable[[Any], Any], reseed: Callable[[], None]
    ) -> None:
        self._batch, self._whole, self._n, self._run, self._reseed = batch, whole, n, run, reseed
        self._is_random: bool | None = None

    def __call__(self, paths: tuple[Path, ...]) -> bool:
        few = 2 if self._n > 2 else 1
        try:
            rows = _rows(self._run(BatchLayout(paths, next(iter(paths))).select(self._batch, slice(0, few))))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        pairs = [(a, b) for a, b in zip(self._whole, rows, strict=False) if len(a) and len(a) % self._n == 0]
        if len(rows) != len(self._whole) or any(len(b) * self._n != len(a) * few for a, b in pairs):
            return False
        return bool(pairs) and (
            all(a.shape[1:] == b.shape[1:] and _close(a[: len(b)], b) for a, b in pairs)
            or (all(a.shape[1:] == b.shape[1:] for a, b in pairs) and self._random())
        )

    def _random(self) -> bool:
        """Whether the model draws random numbers, others for another number of samples."""
        if self._is_random is None:
            self._reseed()
            again = _rows(self._run(self._batch))
            self._is_random = any(
                a.shape == b.shape and not _close(a, b) for a, b in zip(self._whole, again, strict=False)
            )
        return self._is_random


def parts_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Go through the parts of a batch that may have one entry for each sample.

    Args:
        batch: Nested containers and objects.
        path: Where it is.

    Yields:
        Path and value of tensors, arrays, lists, and objects that know their samples; a list before its entries.
    """
    if length_of(batch) is not None:
        yield path, batch
    if isinstance(batch, Tensor) or _knows_samples(batch):
        return
    for key, item in _items(batch):
        yield from parts_of(item, (*path, key))


def length_of(part: Any) -> int | None:
    """Number of entries of a tensor, array, list or object that knows its samples; None for anything else."""
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    if _is_graph_batch(part):
        return int(part.num_graphs)
    if isinstance(part, Tensor):
        return part.size(0) if part.ndim else None
    if _is_tensor_dict(part):
        return int(part.batch_size[0]) if len(part.batch_size) else None
    if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
        return len(part)
    shape = getattr(part, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and shape else None


def _items(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, Mapping):
        return [(key, item) for key, item in value.items() if isinstance(key, (str, int))]
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return []
    return [(name, item) for name, item in vars(value).items() if isinstance(item, (Tensor, list))]


def _knows_samples(value: Any) -> bool:
    return isinstance(value, PackedSequence) or _is_graph_batch(value) or _is_tensor_dict(value)


def _is_graph_batch(value: Any) -> bool:
    """Whether a value is a batch of graphs as in PyTorch Geometric, which can be split into graphs again."""
    return hasattr(value, "to_data_list") and hasattr(value, "num_graphs") and hasattr(type(value), "from_data_list")


def _is_tensor_dict(value: Any) -> bool:
    return isinstance(getattr(value, "batch_size", None), torch.Size) and hasattr(value, "batch_dims")


def _select(value: Any, path: Path, has_samples: Callable[[Path, Any], bool], index: Index) -> Any:
    if length_of(value) is not None and has_samples(path, value):
        return _entries(value, index)
    if isinstance(value, Tensor) or _knows_samples(value):
        return value
    items = _items(value)
    new = {key: _select(item, (*path, key), has_samples, index) for key, item in items}
    changed = {key: new[key] for key, item in items if new[key] is not item}
    return replace_items(value, changed) if changed else value


def _entries(part: Any, index: Index) -> Any:
    """Entries of a part that has one for each sample."""
    if isinstance(part, PackedSequence):
        padded, lengths = pad_packed_sequence(part, batch_first=True)
        rows, lengths = _entries(padded, index), _entries(lengths, index)
        return pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
    if _is_graph_batch(part):
        return type(part).from_data_list(_entries(part.to_data_list(), index))
    if isinstance(part, Tensor):
        if part.is_nested:
            return torch.nested.as_nested_tensor(_entries(list(part.unbind()), index), layout=part.layout)
        if isinstance(index, Tensor):
            index = index.to(part.device)
        if part.layout == torch.strided:
            return part[index]
        rows = index if isinstance(index, Tensor) else torch.arange(part.size(0), device=part.device)[index]
        return part.to_sparse_coo().index_select(0, rows).to_sparse(layout=part.layout)
    if isinstance(part, (list, tuple)):
        chosen = list(part[index]) if isinstance(index, slice) else [part[i] for i in index.tolist()]
        if isinstance(part, list) and type(part) is not list:
            new = copy.copy(part)
            new[:] = chosen
            return new
        return chosen if isinstance(part, list) else tuple(chosen)
    return part[index if isinstance(index, slice) else index.tolist()]


def _number_of_samples(rows: Sequence[Tensor], lengths: Sequence[int]) -> int:
    """The first length that a result has, too; without one, the first of all."""
    for row in [row for row in rows if row.numel() > 1]:  # an output of one number is a loss
        if len(row) in lengths:
            return len(row)
    for row in rows:
        divisors = [n for n in lengths if n > 1 and len(row) % n == 0]  # positions of all samples, flattened
        if divisors:
            return divisors[0]
    return lengths[0]


def _rows(output: Any) -> list[Tensor]:
    found = [t for t in tensors_in(output) if t.ndim and not t.is_nested and t.layout == torch.strided]
    return [t.detach().clone() for t in found]


def _close(a: Tensor, b: Tensor) -> bool:
    # Another number of samples may use other kernels.
    return same_numbers(a, b, half_of_the_digits(b.dtype) if b.is_floating_point() else 0.0)


def _is_inside(path: Path, outer: Sequence[Path]) -> bool:
    return any(path[: len(place)] == place for place in outer)


def _disjoint(paths: Sequence[Path], n: int, used: Sequence[Path], prefer_lists: bool = False) -> tuple[Path, ...]:
    """Decide between a list and its entries, where both have the length of the batch.

    What is not used is not tried either: a list is one of samples there, unless all of its entries have that length.
    """
    kept = list(paths)
    for path in paths:
        inner = [other for other in kept if len(other) > len(path) and other[: len(path)] == path]
        if inner and path in kept:
            entries = sum(len(other) == len(path) + 1 for other in inner)
            is_list = prefer_lists if path in used else entries < n and not any(other in used for other in inner)
            kept = [other for other in kept if (other not in inner if is_list else other != path)]
    return tuple(kept)


def _get(batch: Any, path: Path) -> Any:
    for key in path:
        batch = dict(_items(batch))[key]
    return batch


def _shown(paths: Sequence[Path]) -> str:
    return " and ".join("batch" + "".join(f"[{key!r}]" for key in path) for path in paths)
