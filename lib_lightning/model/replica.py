"""Copies of models, on which everything runs: whatever a forward pass changes, it changes in the copy.

`copy.deepcopy` would not do: it leaves functions as they are, so that a hook or a closure continues to change the
objects of the original; it fails at locks, open files and tensors with a graph; and it copies data sets and trainers
along with a model that refers to them. The rules are those of the pickle protocol, as in `copy`, with these exceptions:

- Functions with a closure, bound methods and weak references are copied, and refer to the copies of their objects.
- Tensors are copied without their graph. Those that have memory in common, have it in common afterwards as well.
- A lock becomes a new lock. What writes to files or runs in a thread becomes an object that accepts every call and does
  nothing. A generator in mid-run becomes one that says so when it is used, since using the original would advance it.
  So does an iterator of itertools where Python cannot copy these.
- Trainers and loggers of Lightning become read-only views; see `lib_lightning.model.trainer_view`.
- Data sets, data loaders and optimizers are not copied. Nor is an object whose ``__deepcopy__`` returns it, in which
  hooks can note what happens to a copy.
"""

from __future__ import annotations

import asyncio
import copy
import copyreg
import functools
import io
import itertools
import queue
import socket
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lib_lightning.errors import LIBError
from lib_lightning.model.torch_internals import attributes_to_copy, compiled_function, storage_key
from lib_lightning.model.trainer_view import Inert, is_lightning, silence, view_of

_ATOMIC = frozenset(
    {
        type(None), type(Ellipsis), type(NotImplemented), int, float, bool, complex, str, bytes, range, slice, property,
        type, types.ModuleType, types.CodeType, torch.dtype, torch.device, torch.Size, torch.layout,
        torch.memory_format, torch.finfo, torch.iinfo,
    }
)  # fmt: skip
# Not part of a model's state, and possibly large.
NOT_STATE = (Dataset, DataLoader, Sampler, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_OUTPUTS = (io.IOBase, socket.socket, threading.Thread, queue.Queue, queue.SimpleQueue, asyncio.AbstractEventLoop)
_GENERATORS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_KNOWN_RULES = (
    "torch.nn.utils.parametrize",
    "torch.nn.modules.rnn",
    *(f"{x}.core.module" for x in ("lightning.pytorch", "pytorch_lightning")),
)
_LOCKS: dict[type, Callable[[], Any]] = {type(new()): new for new in (threading.Lock, threading.RLock)}


class CannotCopyError(Exception):
    """A module or tensor cannot be copied."""


class Copier:
    """Copies objects; what several of them refer to is copied once.

    Args:
        same: Objects that the copies share with the originals.
        shared_weights: Tensors whose memory the copies share with the originals.

    Attributes:
        kinds: The classes of all objects that have been copied.
        functions: All functions among them.
        uncopied: Objects that could not be copied, and are shared.
        shared: Objects whose own ``__deepcopy__`` returns them: they ask to be shared, with all that they hold.
    """

    def __init__(self, same: Iterable[Any] = (), shared_weights: Iterable[Tensor] = ()) -> None:
        self.kinds: set[type] = set()
        self.functions: list[types.FunctionType] = []
        self.uncopied: list[Any] = []
        self.shared: list[Any] = []
        self._originals: list[Any] = list(same)  # keeps them alive, so that each id means one object
        # Has the form of the memo of `copy.deepcopy`, and is given to the objects that copy themselves.
        self._copies: dict[int, Any] = {id(x): x for x in self._originals}
        self._shared_memory = {storage_key(t) for t in shared_weights}
        self._memory: dict[int, torch.UntypedStorage] = {}

    def __call__(self, value: Any) -> Any:
        """The copy of an object.

        Args:
            value: Any object.

        Returns:
            Its copy; the object itself if it cannot change.

        Raises:
            CannotCopyError: For a module or a tensor that refuses to be copied.
        """
        kind = type(value)
        if kind in _ATOMIC or isinstance(value, type):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        self._originals.append(value)
        try:
            new = self._copy(value, kind)
        except CannotCopyError:
            raise
        except Exception as error:
            if isinstance(value, (nn.Module, Tensor)):
                raise CannotCopyError(f"{kind.__name__} ({type(error).__name__}: {error})") from error
            self.uncopied.append(value)
            new = value
        self._copies[id(value)] = new
        return new

    def copies(self) -> list[Any]:
        """All copies that have been made, without what is shared with the originals."""
        return [self._copies[id(x)] for x in self._originals if self._copies[id(x)] is not x]

    def known(self, value: Any) -> Any:
        """The copy of an object that has been copied; any other object unchanged."""
        return self._copies.get(id(value), value)

    def _copy(self, value: Any, kind: type) -> Any:
        if kind in _COPY:
            return _COPY[kind](self, value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind in _LOCKS:
            return _LOCKS[kind]()
        if isinstance(value, _OUTPUTS):
            return Inert()
        if isinstance(value, _GENERATORS):
            return Unusable(kind.__name__)
        if kind.__module__ == "itertools":
            return self._iterator(value, kind)
        if is_lightning(value, "Trainer", "Logger"):
            return view_of(value, self.known)
        if isinstance(value, NOT_STATE) or is_lightning(value, "Fabric", "LightningDataModule", "Callback"):
            return value
        if kind.__module__.startswith("torch._dynamo") and not isinstance(value, nn.Module):
            return value
        self.kinds.add(kind)
        if isinstance(value, nn.Module) and _is_sum_of_attributes(kind):
            return self._module(value, kind)
        own = getattr(kind, "__deepcopy__", None)
        if own is None:
            return self._reduced(value, kind)
        new = own(value, self._copies)
        if new is value and not isinstance(value, nn.Module):
            self.shared.append(value)
        return new

    def _module(self, module: nn.Module, kind: Any) -> Any:
        new = kind.__new__(kind)
        self._copies[id(module)] = new
        for name, value in attributes_to_copy(module).items():
            vars(new)[name] = type(value)() if type(value) in (dict, OrderedDict) and not value else self(value)
        return new

    def _iterator(self, value: Any, kind: type) -> Any:
        """Copy an iterator of itertools, which Python 3.12 and 3.13 advise against and 3.14 cannot do."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                return self._reduced(value, kind)
            except TypeError:
                return Unusable(kind.__name__)

    def _reduced(self, value: Any, kind: type) -> Any:
        """Copy an object as pickle would."""
        reduce = copyreg.dispatch_table.get(kind)
        parts: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        if isinstance(parts, str):  # a global object
            return value
        make, args, state, items, pairs = (*parts, None, None, None)[:5]
        new = make(*map(self, args))
        self._copies[id(value)] = new
        if state is not None:
            state = self(state)
            if hasattr(new, "__setstate__"):
                new.__setstate__(state)
            else:
                state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                vars(new).update(state or {})
                for name, x in (slots or {}).items():
                    object.__setattr__(new, name, x)
        for item in items or ():
            new.append(self(item))
        for key, item in pairs or ():
            new[self(key)] = self(item)
        return new

    def _tensor(self, t: Tensor) -> Tensor:
        if hasattr(t, "full_tensor"):
            raise CannotCopyError("a tensor that is sharded over processes")
        plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not (t.is_quantized or t.is_meta)
        with torch.inference_mode(False), torch.no_grad():
            if not plain:
                # A class of its own may hold more than its memory.
                new = (
                    t.detach().clone() if type(t) in (Tensor, nn.Parameter) else copy.deepcopy(t.detach(), self._copies)
                )
            elif storage_key(t) in self._shared_memory:
                new = t.detach()
            elif t.is_conj() or t.is_neg() or _is_small_part(t):
                new = t.detach().clone()
            else:
                key = storage_key(t)
                if key not in self._memory:
                    self._memory[key] = t.untyped_storage().clone()
                new = t.new_empty(0).set_(self._memory[key], t.storage_offset(), t.size(), t.stride())
            if type(t) is nn.Parameter:
                new = nn.Parameter(new, requires_grad=False)
        self._copies[id(t)] = new
        if t.__dict__:
            vars(new).update(self(t.__dict__))
        return new

    def _list(self, value: list[Any]) -> list[Any]:
        new: list[Any] = []
        self._copies[id(value)] = new
        new.extend(map(self, value))
        return new

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        items = tuple(map(self, value))
        if id(value) in self._copies:  # a list in it holds the tuple itself
            return self._copies[id(value)]
        return value if all(map(lambda a, b: a is b, value, items)) else items

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        new = type(value)()
        self._copies[id(value)] = new
        for key, item in value.items():
            new[self(key)] = self(item)
        return new

    def _set(self, value: set[Any]) -> set[Any]:
        return type(value)(map(self, value))

    def _deque(self, value: deque[Any]) -> deque[Any]:
        new: deque[Any] = deque(maxlen=value.maxlen)
        self._copies[id(value)] = new
        new.extend(map(self, value))
        return new

    def _function(self, function: types.FunctionType) -> Any:
        self.functions.append(function)
        eager = compiled_function(function)
        if eager is not None:
            return self(eager)
        cells = function.__closure__ or ()
        if not any(map(_may_change, cells)) and not function.__dict__ and not function.__kwdefaults__:
            defaults = self(function.__defaults__)
            if defaults is function.__defaults__:
                return function
        new_cells = tuple(map(self, cells))
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, new_cells or None)
        self._copies[id(function)] = new
        new.__defaults__, new.__kwdefaults__ = self(function.__defaults__), self(function.__kwdefaults__)
        new.__qualname__, new.__module__ = function.__qualname__, function.__module__
        new.__doc__, new.__annotations__ = function.__doc__, function.__annotations__
        new.__dict__.update(self(function.__dict__))
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        new = types.CellType()
        self._copies[id(cell)] = new
        if (value := contents_of(cell)) is not EMPTY:
            new.cell_contents = self(value)
        return new

    def _method(self, method: types.MethodType) -> types.MethodType:
        return types.MethodType(self(method.__func__), self(method.__self__))

    def _builtin_method(self, method: types.BuiltinMethodType) -> Any:
        owner = method.__self__
        if owner is None or isinstance(owner, (type, types.ModuleType)):
            return method
        return getattr(self(owner), method.__name__)

    def _weak_reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        target = reference()
        return weakref.ref(self(target)) if isinstance(target, (nn.Module, Tensor)) else reference

    def _cached_function(self, function: Any) -> Any:
        return functools.lru_cache(**function.cache_parameters())(self(function.__wrapped__))

    def _generator(self, generator: torch.Generator) -> torch.Generator:
        return torch.Generator(generator.device).set_state(generator.get_state())


_COPY: dict[type, Callable[[Copier, Any], Any]] = {
    list: Copier._list,
    tuple: Copier._tuple,
    dict: Copier._dict,
    OrderedDict: Copier._dict,
    set: Copier._set,
    frozenset: Copier._set,
    deque: Copier._deque,
    types.FunctionType: Copier._function,
    types.CellType: Copier._cell,
    types.MethodType: Copier._method,
    types.BuiltinMethodType: Copier._builtin_method,
    type([].__len__): Copier._builtin_method,
    weakref.ref: Copier._weak_reference,
    type(functools.lru_cache(len)): Copier._cached_function,
    torch.Generator: Copier._generator,
}
# The contents of a variable of a closure that has not been assigned.
EMPTY = object()


class Unusable:
    """Takes the place of a generator: its use is an error.

    Args:
        kind: Name of its type.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise LIBError(
            f"The forward pass takes its next value from a {self._kind} that the model holds. It cannot be copied, and "
            "taking a value would leave training without it. Hold a list, or an iterator class that can be copied."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__next__()


def copy_model(model: nn.Module, max_bytes: int) -> tuple[nn.Module, list[nn.Parameter], Copier]:
    """Copy a model.

    Args:
        model: The model.
        max_bytes: Copy its parameters if they need no more memory than this; otherwise share their memory.

    Returns:
        The copy, the parameters whose memory is shared, and the copier.

    Raises:
        CannotCopyError: If the model cannot be copied.
    """
    shared = [] if num_bytes(model) <= max_bytes else [p for p in model.parameters() if _can_share(p)]
    # Lookups shorten the vectors of these tables.
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm}
    shared = [p for p in shared if id(p) not in tables]
    copier = Copier(shared_weights=shared)
    with torch.inference_mode(False), torch.no_grad():
        for t in itertools.chain(model.parameters(), model.buffers()):
            copier(t)  # ahead of modules that copy themselves, which would copy shared memory
        new: nn.Module = copier(model)
    for module in model.modules():
        silence(copier.known(module), copier(vars(module).get("_trainer")))
    return new, shared, copier


class CopiedState:
    """What copies hold at one moment.

    Args:
        copies: The copies, with all that they hold.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.calls = [0]
        >>> copy, _, copier = copy_model(model, 10**6)
        >>> state = CopiedState(copier.copies())
        >>> copy.calls[0] += 1
        >>> state.is_unchanged()
        False
    """

    def __init__(self, copies: Iterable[Any]) -> None:
        # Values are kept, so that no other one can be taken for them.
        self._contents = [(x, _contents(x)) for x in copies]

    def is_unchanged(self) -> bool:
        """Whether nothing has been assigned to any of them, or written to their tensors."""
        return all(_same_contents(_contents(x), before) for x, before in self._contents)


def _contents(value: Any) -> Any:
    """What an object holds itself: values by name or place, whose own contents do not matter."""
    if isinstance(value, Tensor):
        return {"version": None if value.is_inference() else value._version, "grad": value.requires_grad}
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, types.CellType):
        return [contents_of(value)]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if hasattr(type(value), "tobytes"):  # of NumPy
        return value.tobytes()
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        for name in [slots] if isinstance(slots := kind.__dict__.get("__slots__", ()), str) else slots:
            found[name] = getattr(value, name, None)
    # Dictionaries of modules that are empty are not among the copies.
    lengths = {f"number of {name}": len(x) for name, x in found.items() if isinstance(x, (dict, OrderedDict))}
    return found | lengths


def _same_contents(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return len(a) == len(b) and all(key in b and _is_same(x, b[key]) for key, x in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return bool(a == b)


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in (int, float, bool, str) and a == b)


def num_bytes(model: nn.Module) -> int:
    """Memory of the parameters of a model, in bytes."""
    return sum({storage_key(p): p.untyped_storage().nbytes() for p in model.parameters() if _can_share(p)}.values())


def discard(model: nn.Module) -> None:
    """Free the memory of a copy, also if references in a circle would keep it until the next garbage collection.

    Args:
        model: The copy, which is of no use afterwards.
    """
    for module in list(model.modules()):
        vars(module).clear()


def _is_sum_of_attributes(kind: type) -> bool:
    """Whether nothing but the attributes of a module has to be copied: its class has no rules of its own."""
    for name in ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"):
        rule = getattr(kind, name, None)
        # Those of parametrized modules refuse to be pickled, that of a LightningModule only omits its trainer, and that
        # of a recurrent one updates weak references.
        known = rule is getattr(nn.Module, name, None) or getattr(rule, "__module__", "") in _KNOWN_RULES
        if not known:
            return False
    return True


def _can_share(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_inference()


def _is_small_part(t: Tensor) -> bool:
    """Whether a tensor is a small part of a large memory, which is not copied with it."""
    return not isinstance(t, nn.Parameter) and 2 * t.numel() * t.element_size() < t.untyped_storage().nbytes()


def contents_of(cell: types.CellType) -> Any:
    """What a variable of a closure holds; `EMPTY` if it has not been assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return EMPTY


def _may_change(cell: types.CellType) -> bool:
    value = contents_of(cell)
    if isinstance(value, types.FunctionType):
        return bool(value.__closure__)
    return not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType))
