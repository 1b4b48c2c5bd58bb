"""How a model is called on a batch: decided at the first batch, the same for the rest of the run.

In this order: as the user's ``input_fn`` says; as the steps of a LightningModule call it, see
`lib_lightning.model.steps`; with the batch, its first entry, its entries by position, or its entries by name, whichever
the signature of ``forward`` takes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lib_lightning.errors import LIBError, is_out_of_memory
from lib_lightning.model.batch import map_tensors, tensors_in
from lib_lightning.model.batch_layout import BatchLayout, Path
from lib_lightning.model.module_paths import find_module
from lib_lightning.model.node_layer import INPUT, Tap

InputFn = Callable[[Any], Any]

# Names of a parameter that takes a whole batch.
_BATCH_NAMES = ("batch", "data", "sample", "samples", "batch_data", "tensordict", "td", "graph")
# Samples on which a way to call the model is tried: not two, which a model might unpack as inputs and labels.
_FEW = 3


@dataclass(frozen=True)
class Arguments:
    """Where in a batch the arguments of a call are.

    Args:
        positional: For each positional argument its path in the batch, or a constant.
        named: The same for keyword arguments.

    Example:
        >>> arguments = Arguments(((0,),), {"scale": (1, "s"), "verbose": False})
        >>> print(arguments)
        batch[0], scale=batch[1]['s'], verbose=False
        >>> arguments.of(("x", {"s": 2}))
        (('x',), {'scale': 2, 'verbose': False})
    """

    positional: tuple[Path | str | bool | None, ...] = ()
    named: Mapping[str, Path | str | bool | None] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """Places in the batch of all arguments that are not constants."""
        return [place for place in (*self.positional, *self.named.values()) if isinstance(place, tuple)]

    def of(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a batch. A keyword argument that the batch lacks is left out."""
        named = {name: entry(batch, place) for name, place in self.named.items() if _has(batch, place)}
        return tuple(entry(batch, place) for place in self.positional), named

    def __str__(self) -> str:
        named = [f"{name}={_shown(place)}" for name, place in self.named.items()]
        return ", ".join([*map(_shown, self.positional), *named])


def entry(batch: Any, place: Path | str | bool | None) -> Any:
    """An entry of a batch, or a constant.

    Args:
        batch: Nested containers and objects.
        place: Keys, indices and names of attributes from the batch to the entry; a constant if it is not a tuple.

    Returns:
        The entry.

    Example:
        >>> entry({"x": [5, 6]}, ("x", 1)), entry(None, "constant")
        (6, 'constant')
    """
    if not isinstance(place, tuple):
        return place
    for key in place:
        is_attribute = isinstance(key, str) and not isinstance(batch, Mapping) and hasattr(batch, key)
        batch = getattr(batch, str(key)) if is_attribute else batch[key]
    return batch


def _has(batch: Any, place: Path | str | bool | None) -> bool:
    try:
        entry(batch, place)
    except (KeyError, IndexError, AttributeError, TypeError):
        return False
    return True


def _shown(place: Path | str | bool | None) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in place) if isinstance(place, tuple) else repr(place)


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        path: Path of the module; empty for the model itself.
        index: Index among the calls of that module.
    """

    path: str = ""
    index: int = 0


@dataclass(frozen=True)
class ModelCall:
    """How a model is called on a batch.

    Attributes:
        step: Step of a LightningModule that is run on the batch: up to the first of ``calls`` if that is the only one,
            whose module is then called with the arguments it would have received; otherwise to the end of the last
            one. None if arguments come from the batch itself.
        calls: The calls that make up the forward pass. ``"input"`` is the input of the first, ``"output"`` the output
            of the last.
        arguments: Where in a batch the arguments are; None if they are computed.
        input_fn: The user's function from a batch to arguments; None if there is none.
        found_in: Step in which the arguments were found; None if they were not found in a step.
        layout: Which parts of a batch have one entry for each sample; None as long as it is not known.

    Example:
        >>> print(ModelCall(arguments=Arguments(((0,),))))
        forward(batch[0])
    """

    step: str | None = None
    calls: tuple[Call, ...] = (Call(),)
    arguments: Arguments | None = None
    input_fn: InputFn | None = None
    found_in: str | None = None
    layout: BatchLayout | None = None

    def __str__(self) -> str:
        first = self.calls[0].path or "forward"
        if self.input_fn is not None:
            return "forward, with the arguments that input_fn returns"
        if self.arguments is not None:
            where = f", as in {self.found_in}" if self.found_in else ""
            return f"{first}({self.arguments}){where}"
        if len(self.calls) == 1:
            return f"{first}, with the arguments that {self.step} computes"
        return f"{self.step}, from the input of '{first}' to the output of '{self.calls[-1].path}'"

    def locate(self, tap: Tap) -> Tap:
        """The tap of a module that a tap stands for: ``"input"`` and ``"output"`` are those of ``calls``."""
        if tap.path:
            return tap
        call = self.calls[0 if tap.side == INPUT else -1]
        return Tap(call.path, tap.side, call.index if len(self.calls) > 1 else tap.call)

    def __call__(self, batch: Any) -> Any:
        """Not for use: a call takes the place of ``input_fn``, but may need the model to find the arguments."""
        raise TypeError("A ModelCall is run by InstrumentedModel.")

    def arguments_of(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that are found without running a step."""
        if self.input_fn is None:
            assert self.arguments is not None
            return self.arguments.of(batch)
        inputs = self.input_fn(batch)
        if isinstance(inputs, Mapping):
            return (), dict(inputs)
        is_several = isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence)
        return (inputs if is_several else (inputs,)), {}

    @property
    def plain(self) -> dict[str, Any]:
        """The same in lists, dicts, strings and numbers, for files and checkpoints."""
        arguments = None
        if self.arguments is not None:
            arguments = {
                "positional": [_as_list(place) for place in self.arguments.positional],
                "named": {name: _as_list(place) for name, place in self.arguments.named.items()},
            }
        return {
            "step": self.step,
            "calls": [[call.path, call.index] for call in self.calls],
            "arguments": arguments,
            "input_fn": self.input_fn is not None,
            "found_in": self.found_in,
            "layout": None if self.layout is None else self.layout.plain,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any] | None) -> ModelCall | None:
        """The call that `plain` describes; None if that needs the user's ``input_fn``.

        Args:
            plain: What `plain` returned; None or empty for nothing known.

        Example:
            >>> call = ModelCall(arguments=Arguments(((0,),)))
            >>> ModelCall.from_plain(call.plain) == call
            True
        """
        if not plain or plain["input_fn"]:
            return None
        found, arguments = plain["arguments"], None
        if found is not None:
            named = {name: _as_place(place) for name, place in found["named"].items()}
            arguments = Arguments(tuple(map(_as_place, found["positional"])), named)
        calls = tuple(Call(path, index) for path, index in plain["calls"])
        layout = None if plain["layout"] is None else BatchLayout.from_plain(plain["layout"])
        return cls(plain["step"], calls, arguments, None, plain["found_in"], layout)


def _as_list(place: Any) -> Any:
    return list(place) if isinstance(place, tuple) else place


def _as_place(place: Any) -> Any:
    return tuple(place) if isinstance(place, list) else place


def find_arguments(model: nn.Module, batch: Any) -> ModelCall:
    """Find how a module is called on a batch, by the signature of its ``forward`` and by trying.

    Args:
        model: The module, which may be called several times.
        batch: One batch.

    Returns:
        The first way that works; the only one without a try.

    Raises:
        LIBError: If none works, with two lines to paste.

    Example:
        >>> print(find_arguments(nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3))))
        forward(batch[0])
    """
    ways = list({str(way): way for way in _ways(model, batch)}.values())
    if len(ways) == 1:
        return ModelCall(arguments=ways[0])
    problem: Exception | None = None
    for way in ways:
        # First with what are a few samples in most batches.
        for part in (BatchLayout().select(batch, slice(0, _FEW)), batch):
            try:
                args, kwargs = way.of(map_tensors(part, plain_copy))
                with torch.no_grad():
                    output = model(*args, **kwargs)
                if not tensors_in(output):
                    raise TypeError(f"forward returned no tensor, but {type(output).__name__}")
                return ModelCall(arguments=way)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                problem = problem or error
    assert problem is not None
    raise LIBError(cannot_be_called(model, batch, problem)) from problem


def cannot_be_called(model: nn.Module, batch: Any, error: Exception) -> str:
    """What to say where no way to call a model works: the reason, and two lines to paste.

    Args:
        model: The model.
        batch: The batch.
        error: Why the way that was most likely does not work.

    Returns:
        The message.
    """
    try:
        signature = str(inspect.signature(find_module(model, "").forward))
    except (TypeError, ValueError):
        signature = "(...)"
    return (
        f"{type(model).__name__} cannot be run on a batch ({describe(batch)}): {type(error).__name__}: {error}\n"
        f"Say how to call forward{signature}: a tuple becomes positional arguments, a dict keyword arguments:\n"
        f"    input_fn=lambda batch: {_example(batch)}"
    )


def describe(value: Any, depth: int = 0) -> str:
    """A batch in a few words: its containers, and the shapes of its tensors.

    Args:
        value: The batch.
        depth: How deep it is nested.

    Returns:
        The text.

    Example:
        >>> describe({"x": torch.ones(2, 3), "y": [1, "a"]})
        "{'x': Tensor (2, 3), 'y': [int, str]}"
    """
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {tuple(value.shape)}"
    if isinstance(value, Mapping) and depth < 3:
        inside = [f"{key!r}: {describe(item, depth + 1)}" for key, item in list(value.items())[:6]]
        return "{" + ", ".join(inside + ["..."] * (len(value) > 6)) + "}"
    if isinstance(value, (tuple, list)) and depth < 3:
        inside = [describe(item, depth + 1) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"({', '.join(inside)})" if isinstance(value, tuple) else f"[{', '.join(inside)}]"
    return type(value).__name__


def _example(batch: Any) -> str:
    if isinstance(batch, Mapping) and batch:
        return f"batch[{next(iter(batch))!r}]"
    if isinstance(batch, (tuple, list)):
        return "batch[0]"
    return "(batch.x, batch.y)"


def plain_copy(t: Tensor) -> Tensor:
    """A copy without history, of class Tensor where a subclass only adds attributes."""
    return without_subclass(t.detach()).clone()


def without_subclass(t: Tensor) -> Tensor:
    """A tensor of class Tensor, where a subclass stores its values as Tensor does."""
    is_wrapper = type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__  # DTensor, for example
    return t if type(t) is Tensor or is_wrapper else t.as_subclass(Tensor)


def _ways(model: nn.Module, batch: Any) -> Iterator[Arguments]:
    """Ways to call a module with a batch, the most likely one first."""
    whole = Arguments(((),))
    parameters = _parameters(model)
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wants_batch = len(required) == 1 and (required[0].name in _BATCH_NAMES or _is_container(required[0].annotation))
    if wants_batch:
        yield whole
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence) and len(batch):
        yield from _ways_of_sequence(batch, required, names, takes_any)
    elif isinstance(batch, Mapping):
        yield from _by_name(list(batch), (), required, names, takes_any)
    elif not isinstance(batch, Tensor):
        keys = batch.keys() if callable(getattr(batch, "keys", None)) else vars(batch) if _has_vars(batch) else ()
        if required and all(p.name in keys for p in required) and not wants_batch:
            yield Arguments(named={name: (name,) for name in names if name in keys})
        yield whole
        yield Arguments(named={name: (name,) for name in names if name in keys})
    yield whole


def _ways_of_sequence(
    batch: Sequence[Any], required: Sequence[inspect.Parameter], names: Sequence[str], takes_any: bool
) -> Iterator[Arguments]:
    first, needed = batch[0], len(required)
    positional = [Arguments(tuple((i,) for i in range(n))) for n in (needed, len(names)) if 1 < n <= len(batch)]
    if needed > 1 and not (isinstance(first, (tuple, list, Mapping)) and len(first) >= needed):
        yield from positional
    if isinstance(first, Mapping):
        yield from _by_name(list(first), (0,), required, names, takes_any)
    elif isinstance(first, (tuple, list)) and first:
        spread = Arguments(tuple((0, i) for i in range(len(first))))
        # A tuple becomes positional arguments, a list the only one, unless forward needs several.
        yield from (spread, Arguments(((0,),))) if type(first) is tuple or needed > 1 else (Arguments(((0,),)), spread)
    yield Arguments(((0,),))
    yield from positional


def _by_name(
    keys: Sequence[Any], path: Path, required: Sequence[inspect.Parameter], names: Sequence[str], takes_any: bool
) -> Iterator[Arguments]:
    named = {key: (*path, key) for key in keys if isinstance(key, str)}
    known = Arguments(named={key: place for key, place in named.items() if key in names})
    everything = Arguments(named=named)
    if all(p.name in named for p in required):
        yield from (everything, known) if takes_any or known == everything else (known,)
    if path:
        yield Arguments((path,))
    elif not takes_any and not known.named:
        yield Arguments(((),))
    yield everything


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(find_module(model, "").forward).parameters.values())
    except (TypeError, ValueError):  # TorchScript, functions of C
        return []


def _is_container(annotation: Any) -> bool:
    """Whether an annotation names a container or a class of batches, rather than a tensor."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return any(word in text.lower() for word in ("tuple", "dict", "mapping", "batch", "data"))


def _has_vars(value: Any) -> bool:
    return hasattr(value, "__dict__")
