"""Where the samples enter a model: the first tensors of a forward pass that differ if the samples do.

The same model is run on two sets of samples, and every tensor that an operation uses is compared between the two
passes. Whatever made a tensor (an embedding, an index, a conversion of integers, NumPy, an attribute of the module), if
it differs, it carries the samples. A *source* is one of those that no operation has computed from another source. In a
third pass each source becomes a leaf of autograd's graph in the place where it is used first, so that gradients show
what depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib_lightning.model.autograd_graph import swap_in
from lib_lightning.model.batch import tensors_in
from lib_lightning.model.precision import to_float64
from lib_lightning.model.torch_internals import has_memory, is_functorch_tensor

# The place of a tensor in a forward pass: index of the operation that uses it, and index among its arguments.
_Place = tuple[int, int]
# Attributes of tensors that give tensors; all others are read by models for shapes, dtypes and devices.
_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
# Sums of the same numbers may differ by this much of their size, on devices that add in any order.
_ROUNDING = 1e-9


class SampleSources:
    """Finds the sources of a model, by runs on two sets of samples.

    Args:
        model: The model. Its parameters and buffers are no sources.

    Example:
        >>> embed = nn.Embedding(5, 2).requires_grad_(False)
        >>> tokens, others = torch.tensor([0, 1]), torch.tensor([1, 0])
        >>> search = SampleSources(embed)
        >>> for samples in (tokens, others):
        ...     with search.compare(), in_model():
        ...         _ = embed(samples) + 1
        >>> with search.mark() as sources, in_model():
        ...     out = embed(tokens) + 1
        >>> len(sources), out.requires_grad
        (1, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self._fixed = _Fixed(model)
        self._first: dict[_Place, Tensor] | None = None
        self._others: list[dict[_Place, Tensor]] = []
        self._masks: dict[int, Tensor] | None = None
        self._changed: set[_Place] | None = None
        self._marked: list[Tensor] = []

    @contextmanager
    def compare(self, hold_masks: bool = False) -> Iterator[None]:
        """Run the model in this block: in the first block on the samples to look at, then on others.

        Args:
            hold_masks: Whether to replace boolean tensors that the model computes from integers (``tokens == pad``) by
                those of the first block, so that they are the same for all samples.
        """
        fingerprints = _Fingerprints(self._fixed, self._held(hold_masks))
        with _following(fingerprints):
            yield
        if self._first is None:
            self._first = fingerprints.found
        else:
            self._others.append(fingerprints.found)
        self._changed = None

    @contextmanager
    def holding_masks(self) -> Iterator[None]:
        """Replace boolean tensors as `compare` does, and nothing else."""
        with _following(_Operations(self._fixed, self._held(True))):
            yield

    @contextmanager
    def mark(self, again: bool = False, hold_masks: bool = False) -> Iterator[list[Tensor]]:
        """Make leaves of the sources, in a run on the first set of samples.

        What differs from the first run on them does not come from the samples, such as random numbers that no seed
        reaches, and is no source.

        Args:
            again: Whether a tensor without history is a source although it was computed from one (under ``no_grad``).
            hold_masks: As for `compare`.

        Yields:
            The leaves; filled during the block.
        """
        candidates = {place: self._first[place] for place in self.changed} if self._first else {}
        leaves = _Leaves(self._fixed, candidates, again, self._held(hold_masks))
        with _following(leaves):
            yield leaves.found
        self._marked += leaves.marked

    @property
    def changed(self) -> set[_Place]:
        """Places of the tensors that differed."""
        if self._changed is None:
            first = self._first or {}
            self._changed = set().union(*(_different(first, run) for run in self._others))
        return self._changed

    def forget(self) -> None:
        """Forget the runs, to compare other samples."""
        self._first, self._others, self._masks, self._changed = None, [], None, None

    def release(self) -> None:
        """Remove the history of tensors that outlive the run, such as those stored by a module."""
        for t in self._marked:
            t.detach_()
        self._marked.clear()

    def _held(self, hold: bool) -> dict[int, Tensor] | None:
        if hold and self._masks is None:
            self._masks = {}
        return self._masks if hold else None


@contextmanager
def in_model(inside: bool = True) -> Iterator[None]:
    """A block that runs the model; only there `SampleSources` takes notice of operations.

    Args:
        inside: False for a block in between that does not belong to the model, such as a hook.
    """
    before = [(mode, mode.paused) for mode in _ACTIVE]
    for mode, _ in before:
        mode.paused = not inside
    try:
        yield
    finally:
        for mode, paused in before:
            mode.paused = paused


def follow_use(tensors: Sequence[Tensor]) -> None:
    """Treat tensors as used here, as if by an operation; for the inputs and outputs of modules."""
    for mode in _ACTIVE:
        if not mode.paused:
            with in_model(False):
                mode.use(tensors)


class _Fixed:
    """Tensors that do not come from the samples: parameters and buffers, and what gathers them where they are sharded.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ids = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._is_sharded = any(hasattr(p, "full_tensor") for p in model.parameters())

    def __contains__(self, t: Tensor) -> bool:
        return id(t) in self._ids

    def gathers_weights(self) -> bool:
        """Whether the present operation belongs to torch's code for sharded models."""
        frame = sys._getframe(2) if self._is_sharded else None
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("torch.distributed."):
                return True
            frame = frame.f_back
        return False


class _Operations(TorchFunctionMode):
    """Numbers the operations of a forward pass and the tensors they use."""

    def __init__(self, fixed: _Fixed, masks: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.paused = True
        self._fixed, self._masks = fixed, masks
        self._count = 0
        # Keeps tensors in memory, because their `id` may otherwise become that of another one.
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or _is_query(func) or self._fixed.gathers_weights():
            return func(*args, **kwargs)
        number, tensors = self._count, [t for t in tensors_in((args, kwargs)) if not is_functorch_tensor(t)]
        self.use(tensors)
        out = func(*args, **kwargs)
        self.leave(tensors, out)
        return out if self._masks is None else self._hold(number, tensors, out)

    def use(self, tensors: Sequence[Tensor]) -> None:
        """An operation is about to use some tensors."""
        number, self._count = self._count, self._count + 1
        for index, t in enumerate(tensors):
            if (t.is_floating_point() or t.is_complex()) and t not in self._fixed and has_memory(t):
                self.visit((number, index), t)

    def visit(self, place: _Place, t: Tensor) -> None:
        """Called for every floating-point tensor that is used, except parameters and buffers."""

    def leave(self, tensors: Sequence[Tensor], out: Any) -> None:
        """Called after an operation with the tensors it used, and its result."""

    def _hold(self, number: int, tensors: Sequence[Tensor], out: Any) -> Any:
        is_mask = isinstance(out, Tensor) and out.dtype == torch.bool
        if self._masks is None or not is_mask or not tensors or any(t.is_floating_point() for t in tensors):
            return out
        first = self._masks.setdefault(number, out.clone())
        return first.clone() if first.shape == out.shape else out


_ACTIVE: list[_Operations] = []


@contextmanager
def _following(mode: _Operations) -> Iterator[None]:
    _ACTIVE.append(mode)
    try:
        with mode:
            yield
    finally:
        _ACTIVE.remove(mode)


class _Fingerprints(_Operations):
    """Two numbers for each tensor that is used: a random combination of its entries, and their size."""

    def __init__(self, fixed: _Fixed, masks: dict[int, Tensor] | None) -> None:
        super().__init__(fixed, masks)
        self.found: dict[_Place, Tensor] = {}
        self._known: dict[tuple[int, int], Tensor] = {}
        self._fingerprint = _Fingerprint()

    def visit(self, place: _Place, t: Tensor) -> None:
        key = id(t), t._version if not t.is_inference() else 0
        if key not in self._known:
            self._alive.append(t)
            self._known[key] = self._fingerprint(t.detach())
        self.found[place] = self._known[key]


class _Fingerprint:
    """The function from a tensor to its two numbers. Equal tensors have equal ones."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, t: Tensor) -> Tensor:
        try:
            numbers = torch.view_as_real(t) if t.is_complex() else t
            numbers = torch.nan_to_num(to_float64(numbers), nan=2.0, posinf=1.0, neginf=-1.0).flatten()
            place = len(numbers), numbers.device
            if place not in self._weights:
                generator = torch.Generator("cpu").manual_seed(0)
                weights = torch.rand(len(numbers), generator=generator, dtype=torch.float64, device="cpu")
                self._weights[place] = weights.to(numbers.device)
            weights = self._weights[place]
            return torch.stack([weights @ numbers, weights @ numbers.abs()])
        except (RuntimeError, NotImplementedError):  # sparse and nested tensors, among others
            return torch.zeros(2, dtype=torch.float64, device="cpu")


class _Leaves(_Operations):
    """Makes a leaf of each tensor that differs between samples and was not computed from another one."""

    def __init__(
        self, fixed: _Fixed, changed: dict[_Place, Tensor], again: bool, masks: dict[int, Tensor] | None
    ) -> None:
        super().__init__(fixed, masks)
        self.found: list[Tensor] = []
        self.marked: list[Tensor] = []
        # Fingerprints, in the first run on the same samples, of the tensors that differ between samples.
        self._changed, self._again = changed, again
        self._computed: set[int] = set()
        self._fingerprint = _Fingerprint()

    def visit(self, place: _Place, t: Tensor) -> None:
        if t.requires_grad or place not in self._changed or (id(t) in self._computed and not self._again):
            return
        if _different({place: self._changed[place]}, {place: self._fingerprint(t.detach())}):
            return
        with torch.enable_grad():
            leaf = t.detach().clone().requires_grad_(True)
            if swap_in(t, leaf.clone()):
                self.found.append(leaf)
                self.marked.append(t)

    def leave(self, tensors: Sequence[Tensor], out: Any) -> None:
        if any(t.requires_grad or id(t) in self._computed for t in tensors):
            results = tensors_in(out)
            self._alive += results
            self._computed |= {id(t) for t in results}


def _is_query(func: Any) -> bool:
    """Whether a function of torch only reads an attribute of a tensor that is no tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VIEWS
    return name in ("dim", "size", "numel", "is_floating_point", "is_complex", "stride", "is_contiguous", "__len__")


def _different(first: dict[_Place, Tensor], other: dict[_Place, Tensor]) -> set[_Place]:
    places = [place for place in first if place in other]
    if not places:
        return set()
    a, b = (torch.stack([found[place].cpu() for place in places]) for found in (first, other))
    size = torch.maximum(a[:, 1], b[:, 1])
    changed = (a - b).abs().amax(1) > _ROUNDING * size
    return {place for place, has_changed in zip(places, changed.tolist(), strict=True) if has_changed}
