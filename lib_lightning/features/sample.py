"""One sample as a renderer sees it: the batch with this sample alone, and the model's inputs for it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import first_tensor, map_tensors, tensors_in
from lib_lightning.model.batch_layout import BatchLayout, Path, length_of, parts_of
from lib_lightning.model.calls import ModelCall, entry
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec

# What a model is called with beside the data themselves.
_HELPERS = re.compile(r"mask|token_type|position_ids|lengths?$|labels?$|targets?$|cache|past_")
# Entries of a batch with the classes of its samples.
_LABELS = re.compile(r"label|target|class|^y$|answer", re.IGNORECASE)

ArgumentsFn = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Sample:
    """One of the samples that a graph was computed on.

    Attributes:
        batch: The batch, as the data loader gives it, with this sample alone: tensors have an axis of length 1 for it.
        inputs: The tensors that the model is called with, by name of the argument, without that axis, on the CPU.
        mask: True at the sample's valid positions, shape ``(S,)``; None if all are.
        label: Class of the sample, as text; "" for none.

    Example:
        >>> sample = Sample((torch.zeros(1, 3), torch.tensor([4])), {"x": torch.zeros(3)}, label="4")
        >>> sample.input.shape, list(sample.data)
        (torch.Size([3]), ['x'])
    """

    batch: Any
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    label: str = ""

    @cached_property
    def data(self) -> dict[str, Tensor]:
        """The inputs without masks, positions and others that only describe the data."""
        found = {name: t for name, t in self.inputs.items() if not _HELPERS.search(name.lower())}
        return found or dict(self.inputs)

    @property
    def input(self) -> Tensor:
        """The first of the `data`.

        Raises:
            LIBError: If the model is called with no tensor.
        """
        if not self.data:
            raise LIBError("The model is called with no tensor that has an entry for each sample.")
        return next(iter(self.data.values()))


@dataclass(frozen=True)
class SampleReader:
    """Takes single samples out of batches.

    Attributes:
        call: How the model is called; None if that is unknown: the input then is the first tensor of the batch.
        mask_of: From a batch to a mask of its valid positions, shape ``(n, S)``, or None.
        layout: Which parts of a batch have one entry for each sample.
        compute: For a model whose own step computes its arguments: from a batch to positional and keyword arguments.
        parameters: Names of the positional parameters of its ``forward``.
        class_names: From numbers of classes to the names of those that have one.
    """

    call: ModelCall | None
    mask_of: Callable[[Any], Tensor | None]
    layout: BatchLayout = field(default_factory=BatchLayout)
    compute: ArgumentsFn | None = None
    parameters: tuple[str, ...] = ()
    class_names: Callable[[Sequence[int]], Mapping[int, str]] = lambda _: {}

    @classmethod
    def of_model(cls, instrumented: InstrumentedModel, batch: Any) -> SampleReader:
        """Read what a model is called with. Read in a `session` of the model, as its own step may compute that.

        Args:
            instrumented: The model.
            batch: One batch, from which it becomes known how the model is called, unless it is known.

        Returns:
            The reader.
        """
        layout, spec = instrumented.layout(batch), instrumented.spec
        computes = spec.call is not None and spec.call.step is not None
        parameters = _parameters(instrumented.entry)
        return cls(spec.call, spec.mask_of, layout, instrumented.inputs if computes else None, parameters)

    @classmethod
    def of_graph(cls, graph: InteractionGraph, spec: ModelSpec) -> SampleReader:
        """Read samples without the model, as far as a graph says how it was called.

        Args:
            graph: The graph.
            spec: Its mask, and the function from a batch to the model's input if one was given.

        Returns:
            The reader.
        """
        plain = graph.model_call or {}
        call = spec.call or (ModelCall(input_fn=spec.input_fn) if spec.input_fn is not None else None)
        layout = BatchLayout.from_plain(plain["layout"]) if plain.get("layout") else BatchLayout()
        is_known = call is not None and call.step is None
        return cls(call if is_known else None, spec.mask_of, layout)

    def with_names(self, names: Callable[[Sequence[int]], Mapping[int, str]]) -> SampleReader:
        """The same, with a function from numbers of classes to their names, as far as they have any."""
        return replace(self, class_names=names)

    def read(self, batches: Iterable[Any], wanted: Collection[int], first: int = 0) -> Iterator[tuple[int, Sample]]:
        """Take samples out of batches.

        Args:
            batches: Batches, as the graph was computed on.
            wanted: Numbers of samples.
            first: Number of the first sample of the first batch.

        Yields:
            The number of each wanted sample that is in the batches, and the sample.
        """
        labels: Path | None = None
        for k, batch in enumerate(batches):
            n = self.layout.num_samples(batch)
            here = sorted(i for i in wanted if first <= i < first + n)
            arguments = self.arguments(batch) if k == 0 or (here and self.compute is not None) else None
            if k == 0:
                labels = locate_labels(batch, arguments, n)
            for i in here:
                yield i, self._one(batch, i - first, n, labels, arguments)
            first += n

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model for a batch."""
        if self.compute is not None:
            return self.compute(batch)
        return ((first_tensor(batch),), {}) if self.call is None else self.call.arguments_of(batch)

    def _one(self, batch: Any, index: int, n: int, labels: Path | None, arguments: Any) -> Sample:
        one = self.layout.select(batch, slice(index, index + 1))
        # What a step computes is computed once for all samples; anything else is an entry of the batch.
        args, kwargs = arguments if self.compute is not None else self.arguments(one)
        inputs = _inputs(args, kwargs, self.parameters, n if self.compute is not None else 1, index)
        mask = self.mask_of(one)
        label = None if labels is None else _class_of(entry(one, labels))
        return Sample(
            map_tensors(one, lambda t: t.detach().cpu()),
            inputs,
            None if mask is None else (mask[0] != 0).cpu(),
            ""
            if label is None
            else label
            if isinstance(label, str)
            else self.class_names([label]).get(label, str(label)),
        )


def _parameters(module: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # TorchScript, functions of C
        return ()


def _inputs(
    args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Sequence[str], n: int, index: int
) -> dict[str, Tensor]:
    """The tensors among arguments that have an entry for each of ``n`` samples: that of one sample, by name."""
    names = [parameters[i] if i < len(parameters) else f"input {i}" for i in range(len(args))]
    found: dict[str, Tensor] = {}
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        for path, part in parts_of(value):
            key = ".".join(map(str, [name, *path]))
            if isinstance(part, Tensor) and part.ndim and part.size(0) == n and part.layout == torch.strided:
                found[key] = part[index if n > 1 else 0].detach().cpu()
            elif isinstance(part, PackedSequence) and length_of(part) == n:
                padded, lengths = pad_packed_sequence(part, batch_first=True)
                found[key] = padded[index if n > 1 else 0, : int(lengths[index if n > 1 else 0])].detach().cpu()
    return found


def locate_labels(batch: Any, arguments: Any, n: int) -> Path | None:
    """Find the entry of a batch that holds the classes of its samples.

    It is no input of the model, and has an integer, a zero or one, or a row with a single one for each sample. Entries
    with a name are it only if the name says so.

    Args:
        batch: One batch.
        arguments: What the model is called with on it.
        n: Number of samples.

    Returns:
        Keys, indices and names of attributes from the batch to the entry; None if there is none.

    Example:
        >>> batch = {"x": torch.randn(4, 2), "index": torch.arange(4), "y": torch.tensor([0, 2, 1, 0])}
        >>> locate_labels(batch, (batch["x"],), 4)
        ('y',)
    """
    inputs = tensors_in(arguments)
    for path, part in parts_of(batch):
        is_named = bool(path) and isinstance(path[-1], str)
        if not path or length_of(part) != n or (is_named and not _LABELS.search(str(path[-1]))):
            continue
        if isinstance(part, (list, tuple)):
            if is_named and all(isinstance(item, (str, int)) for item in part):
                return path
            continue
        t = part if isinstance(part, Tensor) else torch.as_tensor(part, device="cpu")
        if not any(_same(t, x) for x in inputs) and _are_classes(t, n):
            return path
    return None


def _same(t: Tensor, x: Tensor) -> bool:
    return t is x or (t.shape == x.shape and t.dtype == x.dtype and torch.equal(t.to(x.device), x))


def _are_classes(t: Tensor, n: int) -> bool:
    is_binary = bool(((t == 0) | (t == 1)).all())
    if t.numel() != n:
        return t.ndim == 2 and is_binary and bool((t.sum(1) == 1).all())
    if t.is_floating_point() or t.is_complex():
        return is_binary
    flat = t.flatten()
    is_index = n > 2 and bool((flat[1:] - flat[:-1] == 1).all()) if t.dtype != torch.bool else False
    return not is_index


def _class_of(labels: Any) -> int | str:
    """The class of the only sample of a batch, by its entry with labels."""
    if isinstance(labels[0], str):
        return labels[0]
    row = torch.as_tensor(labels[0], device="cpu")
    return int(row) if row.numel() == 1 else int(row.argmax())
