"""A function of one tensor, recorded as the operations of torch that depend on it, to be repeated on other values.

What does not depend on the tensor is computed once, in the recording: for a section of a model, all of the model before
it. What remains is a list of operations without modules, hooks and Python code between them, which can be repeated for
several values at once and differentiated.

A function whose operations depend on values (``if x.sum() > 0``, a number of selected rows), that draws random numbers
depending on the tensor, or that does something that is not an operation of torch, cannot be repeated. Most of these are
noticed in the recording. The others are not: whoever repeats a function compares it with the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lib_lightning.model.batch import map_tensors, tensors_in
from lib_lightning.model.torch_internals import operations_handled, storage_key, written_tensors

aten = torch.ops.aten
T = TypeVar("T")

# Operators that change what a tensor is, rather than its numbers.
_CHANGES_METADATA = ("set_", "resize_", "as_strided_", "resize_as_", "transpose_", "squeeze_", "unsqueeze_", "t_")
# Tags of operators whose results have values or shapes that depend on values, or that draw random numbers.
_NOT_REPEATABLE = (
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded,
)  # fmt: skip
# A tensor's memory, and what it sees of it. Two tensors with the same key are the same numbers.
_Key = tuple[Any, ...]


@dataclass(frozen=True)
class Slot:
    """A tensor that depends on the argument of a recorded function, in place of the tensor itself.

    Attributes:
        index: Its number, in the order in which the tensors were computed; 0 is the argument.
    """

    index: int


@dataclass(frozen=True)
class Operation:
    """One recorded operation.

    Attributes:
        function: The operator, or a function in place of one that writes to memory.
        name: Name of the operator, such as ``"aten::addmm"``.
        args: Positional arguments, with a `Slot` in place of each tensor that depends on the function's argument.
        kwargs: Keyword arguments, likewise.
        outputs: Numbers of the tensors in its result.
        writes: Whether it writes to memory in which there are other tensors as well.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    writes: bool = False

    @property
    def inputs(self) -> list[int]:
        """Numbers of the tensors that it reads."""
        return [slot.index for slot in _leaves((self.args, self.kwargs), Slot)]

    def repeat(self, values: dict[int, Tensor]) -> None:
        """Compute the outputs from the inputs.

        Args:
            values: Tensors by number; the outputs are added.
        """
        args, kwargs = self.args, self.kwargs
        if self._is_nested:
            args, kwargs = _mapped((args, kwargs), Slot, lambda slot: values[slot.index])
        else:
            args = tuple([values[value.index] if isinstance(value, Slot) else value for value in args])
        result = self.function(*args, **kwargs)
        if isinstance(result, Tensor):
            values[self.outputs[0]] = result
        else:
            values.update(zip(self.outputs, _leaves(result, Tensor), strict=True))

    @cached_property
    def _is_nested(self) -> bool:
        """Whether tensors that depend on the argument are in lists or among the keyword arguments."""
        return len(self.inputs) > sum(isinstance(value, Slot) for value in self.args)


@dataclass(frozen=True)
class _Constant:
    """A tensor that does not depend on the argument.

    Attributes:
        alias: The tensor, in an object of its own: the original object may become another tensor.
        original: The object that the model uses, which counts what is written to it.
        version: That count, in the recording.
    """

    alias: Tensor
    original: Tensor
    version: int


@dataclass
class RecordedFunction:
    """The operations of a function that depend on its argument.

    Attributes:
        operations: The operations, in order.
        values: The tensors of the recording, by number.
        result: What the function returned.
        output: Number of the first tensor in the result that depends on the argument.
        by_memory: Numbers of all tensors, by memory.
        written: Numbers of the tensors in memory that an operation with ``writes`` has written to.
        constants: The other tensors that the operations use, by memory.
    """

    operations: list[Operation] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    result: Any = None
    output: int = 0
    by_memory: dict[_Key, int] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    constants: dict[_Key, _Constant] = field(default_factory=dict)
    _steps: list[tuple[Operation, list[int]]] | None = None

    @property
    def is_intact(self) -> bool:
        """Whether all tensors that the operations use have the values that they had in the recording."""
        return all(_version(constant.original) == constant.version for constant in self.constants.values())

    @property
    def largest(self) -> int:
        """Number of entries of the largest tensor of the recording."""
        return max(t.numel() for t in self.values)

    def __call__(self, x: Tensor) -> Any:
        """Repeat the function on another value of its argument."""
        if self._steps is None:
            keys = [_key(t) for t in tensors_in(self.result) if _is_plain(t)]
            outputs = {self.by_memory[key] for key in keys if key in self.by_memory}
            operations = self.needed(outputs)
            self._steps = list(zip(operations, last_uses(operations, outputs), strict=True))
        values = {0: x}
        for operation, unused in self._steps:
            operation.repeat(values)
            for index in unused:
                values.pop(index, None)
        return map_tensors(self.result, lambda t: values.get(self.by_memory.get(_key(t), -1), t) if _is_plain(t) else t)

    def needed(self, outputs: Collection[int], known: Collection[int] = (0,)) -> list[Operation]:
        """The operations on which some tensors depend.

        Args:
            outputs: Numbers of the tensors.
            known: Numbers of tensors that need not be computed.

        Returns:
            The operations, in order. What writes to memory is always among them.
        """
        wanted, found = set(outputs), []
        for operation in reversed(self.operations):
            made = [index for index in operation.outputs if index not in known]
            if operation.writes or any(index in wanted for index in made):
                found.append(operation)
                wanted.update(operation.inputs)
        return found[::-1]


def last_uses(operations: Sequence[Operation], kept: Collection[int]) -> list[list[int]]:
    """The tensors that need not be kept after each operation.

    Args:
        operations: The operations, in order.
        kept: Numbers of tensors that are kept to the end.

    Returns:
        For each operation, the numbers of the tensors that are not used after it.
    """
    seen, found = set(kept), []
    for operation in reversed(operations):
        unused = {*operation.inputs, *operation.outputs} - seen
        seen |= unused
        found.append(sorted(unused))
    return found[::-1]


def record(function: Callable[[Tensor], T], x: Tensor, max_bytes: int = 2**31) -> tuple[T, RecordedFunction | None]:
    """Record the operations of a function of a tensor, without gradients.

    Args:
        function: The function; called once. It returns tensors in any nested containers.
        x: Its argument.
        max_bytes: Memory for all intermediate results, which exist at the same time in the recording.

    Returns:
        The function's result, and the operations; None if they cannot be repeated, need more memory, or are not visible
        in this version of torch.

    Example:
        >>> weight = torch.eye(2)
        >>> result, recorded = record(lambda x: torch.relu(x @ (weight * 2)) + 1, torch.zeros(1, 2))
        >>> [operation.name for operation in recorded.operations]
        ['aten::mm', 'aten::relu', 'aten::add.Tensor']
        >>> recorded(torch.tensor([[3.0, -3.0]]))
        tensor([[7., 1.]])
    """
    recorder = _Recorder(x, max_bytes)
    block = operations_handled(recorder.handle)
    if block is None:
        return function(x), None
    try:
        with torch.no_grad(), block:
            result = function(x)
        return result, recorder.finish(result)
    finally:
        # What handles operations is in a cycle of references, which would keep all tensors for a while.
        recorder.release()


class _Recorder:
    """What is known of the tensors that depend on the argument, during the recording.

    Args:
        x: The argument.
        max_bytes: Memory that they may take.
    """

    def __init__(self, x: Tensor, max_bytes: int) -> None:
        self.recorded = RecordedFunction()
        self._free_bytes = max_bytes
        self._is_repeatable = True
        # Numbers of tensors by key, and the keys in each memory. The tensors stay alive, so that no other tensor gets
        # the same memory.
        self._slots: dict[_Key, int] = {}
        self._keys: dict[int, set[_Key]] = {}
        self._alive: list[Tensor] = []
        self._written: set[int] = set()
        # For memory that a constant was in, the number of a tensor that sees all of it.
        self._whole: dict[int, int] = {}
        if _is_plain(x):
            self._add(x)
        else:
            self.release()

    def finish(self, result: Any) -> RecordedFunction | None:
        """The recorded function, after the call that returned a result."""
        plain = [t for t in tensors_in(result) if _is_plain(t)]
        outputs = [self._slots[_key(t)] for t in plain if _key(t) in self._slots]
        # A view whose making was not seen would be taken for a constant.
        is_complete = all(_key(t) in self._slots or not self._is_tracked(t) for t in plain)
        if not (self._is_repeatable and outputs and is_complete and self.recorded.is_intact):
            return None
        self.recorded.result, self.recorded.output = result, outputs[0]
        self.recorded.by_memory = self._slots
        self.recorded.written = {index for index, t in enumerate(self._alive) if storage_key(t) in self._written}
        return self.recorded

    def release(self) -> None:
        """End the recording, and free its memory."""
        self._is_repeatable = False
        self._slots, self._keys, self._alive, self.recorded = {}, {}, [], RecordedFunction()

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and record it if it depends on the argument."""
        tensors = _leaves((args, kwargs), Tensor)
        if not self._is_repeatable or not any(map(self._is_tracked, tensors)):
            return func(*args, **kwargs)
        written = written_tensors(func, args, kwargs)
        if not self._can_repeat(func, args, tensors, written):
            self.release()
            return func(*args, **kwargs)
        if written:
            return self._write(func, args, kwargs, written)
        given = self._with_slots((args, kwargs))
        result = func(*args, **kwargs)
        # Repeated with gradients, the operations are those of a function without detached parts.
        self._append(aten.alias.default if func is aten.detach.default else func, func.name(), given, result)
        return result

    def _can_repeat(
        self, func: Any, args: tuple[Any, ...], tensors: Sequence[Tensor], written: Sequence[Tensor]
    ) -> bool:
        if not hasattr(func, "tags") or not callable(getattr(func, "name", None)) or not all(map(_is_plain, tensors)):
            return False
        name = _base(func)
        if name in _CHANGES_METADATA or len(written) > 1:
            return False
        if name in ("index", "index_put", "index_put_"):  # their shape depends on values only if a mask does
            indices = _leaves(args[1], Tensor)
            return not any(t.dtype in (torch.bool, torch.uint8) and self._is_tracked(t) for t in indices)
        if name.startswith("_scaled_dot_product"):  # random only with dropout
            return not dict(zip((a.name for a in func._schema.arguments), args, strict=False)).get("dropout_p")
        return not any(tag in func.tags for tag in _NOT_REPEATABLE)

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]) -> Any:
        """Record an operation that writes to a tensor: as one that makes a new tensor, if nothing sees the old one."""
        (t,) = written
        key, memory = _key(t), storage_key(t)
        is_alone = self._keys.get(memory, set()) <= {key}
        is_first = bool(args) and args[0] is t
        if _base(func) == "copy_" and is_alone and is_first and _covers_memory(t):
            source = self._with_slots(args[1])
            self._keep_values(memory)
            result = func(*args, **kwargs)
            strides = t.stride()
            order = sorted(range(t.ndim), key=lambda axis: (-strides[axis], axis))
            self._append(_copied, "copied", ((source, tuple(t.shape), order, t.dtype, t.device), {}), t)
            return result
        pure = getattr(aten, _base(func).removesuffix("_"), None)
        pure = getattr(pure, func.name().partition(".")[2] or "default", None)
        same_type = all(other.dtype == t.dtype for other in _leaves((args, kwargs), Tensor))
        if (
            key in self._slots
            and is_alone
            and is_first
            and same_type
            and pure is not None
            and not written_tensors(pure, args, kwargs)
        ):
            given = self._with_slots((args, kwargs))
            self._keep_values(memory)
            result = func(*args, **kwargs)
            self._append(pure, func.name().replace("_.", ".").removesuffix("_"), given, t)
            return result
        if memory not in self._keys:
            self._copy_memory(t)
        given = self._with_slots((args, kwargs))
        self._written.add(memory)
        result = func(*args, **kwargs)
        self._append(func, func.name(), given, result, writes=True)
        return result

    def _keep_values(self, memory: int) -> None:
        """Keep the values of the tensors in some memory, which is about to be overwritten."""
        if memory in self._keys:
            for index, t in enumerate(self._alive):
                if self.recorded.values[index] is t and storage_key(t) == memory:
                    self.recorded.values[index] = t.clone()

    def _copy_memory(self, t: Tensor) -> None:
        """Let each repetition start from a copy of the memory of a constant, which the model writes to."""
        flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        kept = flat.clone()
        self.recorded.constants[_key(kept)] = _Constant(kept, kept, _version(kept))
        self._append(aten.clone.default, "aten::clone", ((kept,), {}), flat)
        self._whole[storage_key(t)] = self._slots.get(_key(flat), -1)

    def _append(
        self, function: Callable[..., Any], name: str, given: tuple[Any, Any], result: Any, writes: bool = False
    ) -> None:
        outputs = tuple(self._add(t) for t in _leaves(result, Tensor))
        if self._is_repeatable:
            self.recorded.operations.append(Operation(function, name, *given, outputs, writes))

    def _add(self, t: Tensor) -> int:
        """Give a tensor a number."""
        if self._is_repeatable and _is_plain(t) and storage_key(t) not in self._keys:
            self._free_bytes -= t.untyped_storage().nbytes()
        if not self._is_repeatable or not _is_plain(t) or self._free_bytes < 0:
            self.release()
            return -1
        index, key = len(self._alive), _key(t)
        alias = t.detach()  # the tensor object itself may become another tensor
        self._alive.append(alias)
        self.recorded.values.append(alias)
        self._slots[key] = index
        self._keys.setdefault(storage_key(t), set()).add(key)
        return index

    def _is_tracked(self, t: Tensor) -> bool:
        return t.layout == torch.strided and storage_key(t) in self._keys

    def _with_slots(self, value: Any) -> Any:
        return _mapped(value, Tensor, self._slot_of)

    def _slot_of(self, t: Tensor) -> Tensor | Slot:
        """The slot of a tensor that depends on the argument; the tensor itself if it is a constant."""
        if not self._is_tracked(t):
            constant = _Constant(t.detach(), t, _version(t))
            return self.recorded.constants.setdefault(_key(t), constant).alias
        key, memory = _key(t), storage_key(t)
        if key not in self._slots:
            if memory not in self._whole:  # a view whose making was not seen
                self.release()
                return t
            view = (Slot(self._whole[memory]), tuple(t.shape), t.stride(), t.storage_offset())
            self._append(aten.as_strided.default, "aten::as_strided", (view, {}), t)
        return Slot(self._slots[key])


def _copied(
    source: Tensor, shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A copy in a given order of memory, outermost axis first, as `Tensor.copy_` makes it."""
    whole = source.to(device, dtype).expand(shape).permute(*order).clone(memory_format=torch.contiguous_format)
    return whole.permute(*(order.index(axis) for axis in range(len(order))))


def _base(func: Any) -> str:
    """The name of an operator without namespace and overload."""
    return str(func.name()).partition("::")[2].partition(".")[0]


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and not t.is_quantized


def _key(t: Tensor) -> _Key:
    return storage_key(t), t.dtype, t.storage_offset(), tuple(t.shape), t.stride(), t.is_conj(), t.is_neg()


def _covers_memory(t: Tensor) -> bool:
    """Whether a tensor has each number of its memory exactly once."""
    size = t.untyped_storage().nbytes() // t.element_size()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.numel() == size == extent and all(
        n == 1 or stride > 0 for n, stride in zip(t.shape, t.stride(), strict=True)
    )


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _leaves(value: Any, kind: type) -> list[Any]:
    """Objects of a type in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part, kind)]
    return [leaf for part in value.values() for leaf in _leaves(part, kind)] if isinstance(value, Mapping) else []


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same with each object of the type changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        parts = [_mapped(part, kind, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return {key: _mapped(part, kind, change) for key, part in value.items()} if isinstance(value, dict) else value
