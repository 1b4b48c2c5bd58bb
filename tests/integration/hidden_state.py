"""Places in which a forward pass can keep state: one function each, which returns how to use it and how to read it."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import random
import sys
import tempfile
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Adds to the state, given the module and its input, and returns a number that depends on it.
Use = Callable[[nn.Module, Tensor], Any]
# Reads the state as a value that can be compared, given the module.
Read = Callable[[nn.Module], Any]
Place = Callable[[nn.Module], tuple[Use, Read]]

CALLS = 0
SEEN: dict[str, int] = {"calls": 0}


class Cache:
    """A plain object; its class counts, too."""

    total = 0
    log: list[int] = []  # noqa: RUF012 (state of the class)

    def __init__(self) -> None:
        self.calls, self.rows, self.inner = 0, torch.zeros(2), SimpleNamespace(n=0)

    def add(self) -> int:
        self.calls += 1
        self.rows += 1
        self.inner.n += 1
        return self.calls


class Registry:
    """Never instantiated."""

    calls = 0
    entries: dict[str, list[int]] = {}  # noqa: RUF012 (state of the class)

    @classmethod
    def add(cls) -> int:
        cls.calls += 1
        cls.entries.setdefault("all", []).append(cls.calls)
        return cls.calls


def count_in_registry() -> int:
    """A function of the file that a forward pass calls."""
    return Registry.add()


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls.clone()


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Endless:
    """An iterator with its position as an attribute."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.position += 1
        return self.position


def number(m: Any) -> tuple[Use, Read]:
    m.calls = 0

    def use(m: Any, x: Tensor) -> int:
        m.calls += 1
        return m.calls

    return use, lambda m: m.calls


def new_attribute(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> int:
        first = not hasattr(m, "table")
        m.table = x.detach().sum(0)
        return 2 * first

    return use, lambda m: m.table.tolist() if hasattr(m, "table") else None


def tensor_in_place(m: Any) -> tuple[Use, Read]:
    m.running = torch.zeros(2)

    def use(m: Any, x: Tensor) -> Tensor:
        m.running.add_(1)
        return m.running.sum()

    return use, lambda m: m.running.tolist()


def tensor_with_graph(m: Any) -> tuple[Use, Read]:
    m.hidden = (m.first.weight * 2).sum(1)

    def use(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.hidden += 1
        return m.hidden.detach().sum()

    return use, lambda m: m.hidden.tolist()


def two_views_of_a_tensor(m: Any) -> tuple[Use, Read]:
    whole = torch.zeros(4)
    m.left, m.right = whole[:3], whole[1:]

    def use(m: Any, x: Tensor) -> Tensor:
        m.left += 1
        return m.right[0] * 2

    return use, lambda m: (m.left.tolist(), m.right.tolist())


def buffer(m: Any) -> tuple[Use, Read]:
    m.register_buffer("total", torch.zeros(2))

    def use(m: Any, x: Tensor) -> Tensor:
        m.total = m.total + x.detach().mean()
        return m.total.sum()

    return use, lambda m: m.total.tolist()


def containers(m: Any) -> tuple[Use, Read]:
    m.kept = [deque([0], maxlen=3), {"a": [0]}, {0}, defaultdict(list), OrderedDict(a=0)]

    def use(m: Any, x: Tensor) -> int:
        n = len(m.kept[1]["a"])
        m.kept[0].append(n)
        m.kept[1]["a"].append(n)
        m.kept[2].add(n)
        m.kept[3]["new"].append(n)
        m.kept[4][str(n)] = n
        return n

    return use, lambda m: repr(m.kept)


def plain_object(m: Any) -> tuple[Use, Read]:
    m.cache = Cache()
    return lambda m, x: m.cache.add(), lambda m: (m.cache.calls, m.cache.rows.tolist(), m.cache.inner.n)


def dict_of_objects(m: Any) -> tuple[Use, Read]:
    m.caches = {"a": [Cache()], "b": (Cache(), Slotted())}

    def use(m: Any, x: Tensor) -> int:
        m.caches["b"][1].calls += 1
        return m.caches["a"][0].add() + m.caches["b"][0].add() + m.caches["b"][1].calls

    return use, lambda m: (m.caches["a"][0].calls, m.caches["b"][0].calls, m.caches["b"][1].calls)


def object_that_knows_the_module(m: Any) -> tuple[Use, Read]:
    m.helper = SimpleNamespace(owner=m, way=m.first)
    m.helper_calls = 0

    def use(m: Any, x: Tensor) -> Tensor:
        m.helper.owner.helper_calls += 1
        return m.helper.way(x).detach().sum() + m.helper_calls

    return use, lambda m: m.helper_calls


def class_attribute(m: Any) -> tuple[Use, Read]:
    type(m).n_calls, type(m).table_of_class = 0, {}

    def use(m: Any, x: Tensor) -> int:
        type(m).n_calls += 1
        type(m).table_of_class[type(m).n_calls] = x
        return type(m).n_calls

    return use, lambda m: (type(m).n_calls, len(type(m).table_of_class))


def class_attribute_of_an_object(m: Any) -> tuple[Use, Read]:
    m.counter, Cache.total, Cache.log = Cache(), 0, []

    def use(m: Any, x: Tensor) -> int:
        Cache.total += 1
        Cache.log.append(Cache.total)
        return m.counter.total + len(m.counter.log)

    return use, lambda m: (Cache.total, len(Cache.log))


def class_used_by_name(m: Any) -> tuple[Use, Read]:
    Registry.calls, Registry.entries = 0, {}

    def use(m: Any, x: Tensor) -> int:
        return count_in_registry()

    return use, lambda m: (Registry.calls, repr(Registry.entries))


def attribute_of_a_function(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> int:
        use.calls += 1
        return use.calls

    use.calls = 0
    m.function = use
    return lambda m, x: m.function(m, x), lambda m: m.function.calls


def cached_in_the_input(m: Any) -> tuple[Use, Read]:
    m.last_input = SimpleNamespace(x=torch.zeros(3))

    def use(m: Any, x: Tensor) -> int:
        m.last_input.x += x.detach()[0]
        m.last_input.x = m.last_input.x + 1
        return 0

    return use, lambda m: m.last_input.x.tolist()


def global_variables(m: Any) -> tuple[Use, Read]:
    global CALLS
    CALLS = SEEN["calls"] = 0

    def use(m: Any, x: Tensor) -> int:
        global CALLS
        CALLS += 1
        SEEN["calls"] += 1
        return CALLS + SEEN["calls"]

    m.use_globals = use
    return lambda m, x: m.use_globals(m, x), lambda m: (CALLS, SEEN["calls"])


def closure(m: Any) -> tuple[Use, Read]:
    calls, rows = 0, [0]

    def count() -> int:
        nonlocal calls
        calls += 1
        rows.append(calls)
        return calls

    m.count, m.read_count = count, lambda: (calls, list(rows))
    return lambda m, x: m.count(), lambda m: m.read_count()


def closure_with_the_module(m: Any) -> tuple[Use, Read]:
    m.closure_calls = 0

    def count(x: Tensor) -> Tensor:
        m.closure_calls += 1
        return m.first(x).detach().sum() + m.closure_calls

    m.count_there = count
    return lambda m, x: m.count_there(x), lambda m: m.closure_calls


def default_argument(m: Any) -> tuple[Use, Read]:
    def count(rows: list[int] = []) -> int:  # noqa: B006 (state of the function)
        rows.append(1)
        return len(rows)

    m.count_default = count
    return lambda m, x: m.count_default(), lambda m: len(m.count_default.__defaults__[0])


def hook_with_closure(m: Any) -> tuple[Use, Read]:
    calls: list[int] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output + 1e-3 * len(calls)

    m.first.register_forward_hook(hook)
    m.hook_calls = calls
    return lambda m, x: 0, lambda m: len(m.hook_calls)


def hook_installed_by_the_first_call(m: Any) -> tuple[Use, Read]:
    m.is_installed = False

    def use(m: Any, x: Tensor) -> int:
        if not m.is_installed:
            m.second.register_forward_hook(lambda module, args, output: output * 2)
            m.is_installed = True
        return 0

    return use, lambda m: (m.is_installed, len(m.second._forward_hooks))


def hook_that_removes_itself(m: Any) -> tuple[Use, Read]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        m.handle.remove()
        return output * 3

    m.handle = m.second.register_forward_hook(hook)
    return lambda m, x: 0, lambda m: len(m.second._forward_hooks)


def replaced_forward(m: Any) -> tuple[Use, Read]:
    usual, calls = m.second.forward, [0]

    @functools.wraps(usual)
    def forward(x: Tensor) -> Tensor:
        calls[0] += 1
        return usual(x) * calls[0]

    m.second.forward = forward
    m.forward_calls = calls
    return lambda m, x: 0, lambda m: m.forward_calls[0]


def bound_methods(m: Any) -> tuple[Use, Read]:
    m.pushed, m.tally = [], Cache()
    m.push, m.add, m.add_later = m.pushed.append, m.tally.add, functools.partial(Cache.add, m.tally)

    def use(m: Any, x: Tensor) -> int:
        m.push(1)
        return m.add() + m.add_later() + len(m.pushed)

    return use, lambda m: (len(m.pushed), m.tally.calls)


def weak_reference(m: Any) -> tuple[Use, Read]:
    m.weak, m.weak_calls = weakref.ref(m), 0

    def use(m: Any, x: Tensor) -> int:
        m.weak().weak_calls += 1
        return m.weak_calls

    return use, lambda m: m.weak_calls


def cached_function(m: Any) -> tuple[Use, Read]:
    rows: list[int] = []

    def compute(n: int) -> int:
        rows.append(n)
        return n + len(rows)

    m.compute, m.computed = functools.lru_cache(compute), rows
    return lambda m, x: m.compute(len(x)), lambda m: len(m.computed)


def generators(m: Any) -> tuple[Use, Read]:
    m.torch_rng, m.numpy_rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    m.python_rng, m.old_rng = random.Random(0), np.random.RandomState(0)

    def use(m: Any, x: Tensor) -> Tensor:
        drawn = m.numpy_rng.random() + m.python_rng.random() + m.old_rng.rand()
        return torch.rand(1, generator=m.torch_rng) + drawn

    def read(m: Any) -> Any:
        bits = m.numpy_rng.bit_generator.state, m.python_rng.getstate(), m.old_rng.get_state()[2]
        return m.torch_rng.get_state().tolist(), repr(bits)

    return use, read


def random_numbers_of_the_process(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> Tensor:
        return torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002

    return use, lambda m: (torch.get_rng_state().tolist(), random.getstate()[1][-1])


def iterators(m: Any) -> tuple[Use, Read]:
    m.endless, m.cycle = Endless(), itertools.cycle([1, 2, 3])

    def read(m: Any) -> Any:
        if sys.version_info >= (3, 14):  # where iterators of itertools cannot be copied any more
            return m.endless.position
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return m.endless.position, next(copy.deepcopy(m.cycle))

    return lambda m, x: next(m.endless) + next(m.cycle), read


def lock(m: Any) -> tuple[Use, Read]:
    m.lock, m.condition, m.locked_calls = threading.Lock(), threading.Condition(), 0

    def use(m: Any, x: Tensor) -> int:
        with m.lock, m.condition:
            m.condition.notify()
            m.locked_calls += 1
            return m.locked_calls

    return use, lambda m: m.locked_calls


def open_file(m: Any) -> tuple[Use, Read]:
    m.file, m.text = tempfile.TemporaryFile("w+"), io.StringIO()  # noqa: SIM115
    weakref.finalize(m, m.file.close)

    def use(m: Any, x: Tensor) -> int:
        print(len(x), file=m.file, flush=True)
        m.text.write("x")
        return 0

    return use, lambda m: (m.file.tell(), m.text.getvalue())


def module_in_a_list(m: Any) -> tuple[Use, Read]:
    m.unregistered = [Counting()]
    return (
        lambda m, x: m.unregistered[0](x),
        lambda m: (m.unregistered[0].calls.item(), m.unregistered[0].training),
    )


def module_added_later(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> int:
        m.add_module(f"new{len(list(m.children()))}", nn.Identity())
        return len(list(m.children()))

    return use, lambda m: len(list(m.children()))


def batch_norm(m: Any) -> tuple[Use, Read]:
    m.norm = nn.BatchNorm1d(3)
    return lambda m, x: m.norm(x).detach().sum(), lambda m: (m.norm.running_mean.tolist(), m.norm.training)


def weights_written(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> int:
        with torch.no_grad():
            m.second.weight.mul_(0.9)
            m.first.weight.data.add_(0.01)
        return 0

    return use, lambda m: (m.first.weight.tolist(), m.second.weight.tolist())


def weights_assigned(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> int:
        m.second.weight.data = m.second.weight.data * 0.9
        return 0

    return use, lambda m: m.second.weight.tolist()


def weights_scaled_by_mode(m: Any) -> tuple[Use, Read]:
    m.is_scaled = False

    def use(m: Any, x: Tensor) -> int:
        if m.is_scaled == m.training:
            with torch.no_grad():
                m.second.weight.mul_(2.0 if m.training else 0.5)
            m.is_scaled = not m.training
        return 0

    return use, lambda m: (m.second.weight.tolist(), m.is_scaled)


def mode_changed(m: Any) -> tuple[Use, Read]:
    def use(m: Any, x: Tensor) -> int:
        m.first.train()
        m.first.weight.requires_grad_(not m.first.weight.requires_grad)
        return 0

    return use, lambda m: (m.first.training, m.first.weight.requires_grad)


PLACES: list[Place] = [
    number, new_attribute, tensor_in_place, tensor_with_graph, two_views_of_a_tensor, buffer, containers, plain_object,
    dict_of_objects, object_that_knows_the_module, class_attribute, class_attribute_of_an_object, class_used_by_name,
    attribute_of_a_function, cached_in_the_input, global_variables,
    closure, closure_with_the_module, default_argument, hook_with_closure, hook_installed_by_the_first_call,
    hook_that_removes_itself, replaced_forward, bound_methods, weak_reference, cached_function, generators,
    random_numbers_of_the_process, iterators, lock, open_file, module_in_a_list, module_added_later, batch_norm,
    weights_written, weights_assigned, weights_scaled_by_mode, mode_changed,
]  # fmt: skip


def stateful(places: list[Place], refuses_copies: bool = False) -> tuple[nn.Module, Read]:
    """A network with state in some places, and how to read all of it.

    Its class is made anew, so that class attributes are those of this network.

    Args:
        places: Where the state is.
        refuses_copies: Whether it cannot be copied.

    Returns:
        The network, from ``(n, 3)`` to ``(n, 2)``, and the function that reads its state.
    """

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.uses: list[Use] = []

        def forward(self, x: Tensor) -> Tensor:
            scale = 1.0
            for use in self.uses:
                scale = scale + 1e-3 * use(self, x)
            return self.third(torch.tanh(self.second(torch.tanh(self.first(x) * scale))))

    if refuses_copies:

        def refuse(self: Any, memo: object) -> None:
            raise RuntimeError("no copies")

        Stateful.__deepcopy__ = refuse  # type: ignore[attr-defined]
    model = Stateful()
    found = [place(model) for place in places]
    model.uses = [use for use, _ in found]
    return model, lambda m: [read(m) for _, read in found]
