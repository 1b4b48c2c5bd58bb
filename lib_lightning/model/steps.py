"""Steps of a LightningModule: which modules they call, and with which arguments.

A step knows how its model is called: which part of the batch is the input, what is converted before. So it is run on
the first batch, in the session that a snapshot runs in, until it calls the model. If the model then receives entries of
the batch as they are, the step is not needed any more; if it receives tensors that the step has computed, the step is
run again for each batch, up to there. Only if it calls several modules one after another, is the step itself the
forward pass, from the input of the first to the output of the last.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, is_out_of_memory
from lib_lightning.model.batch import map_tensors, tensors_in
from lib_lightning.model.batch_layout import Path
from lib_lightning.model.calls import Arguments, Call, InputFn, ModelCall, find_arguments, without_subclass
from lib_lightning.model.module_paths import accepts_hooks, find_module, module_paths
from lib_lightning.model.saved_state import preserve_attributes, save_buffers

# In this order: the batches are validation batches.
STEPS = ("validation_step", "training_step", "predict_step")

# What a step does beside calling the model, of a LightningModule.
_REPORTS_AND_UPDATES = (
    "log", "log_dict", "print", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"
)  # fmt: skip

_preparing: ContextVar[bool] = ContextVar("preparing", default=False)


class StopStep(BaseException):
    """Ends a step when all that is needed of it has run."""


def is_preparing() -> bool:
    """Whether a step runs to find the arguments of a call: what its modules do until then is not the forward pass."""
    return _preparing.get()


def is_lightning_module(module: nn.Module) -> bool:
    """Whether a module is a LightningModule, of either of the two packages that define one."""
    return _lightning_class(module) is not None


def steps_of(model: nn.Module) -> list[str]:
    """Names of the steps that a LightningModule defines, the one to prefer first.

    Args:
        model: Any module.

    Returns:
        The names; none for other modules.

    Example:
        >>> steps_of(nn.Linear(1, 1))
        []
    """
    base = _lightning_class(model)
    own = [name for name in STEPS if base and getattr(type(model), name, None) is not getattr(base, name, None)]
    steps = {name: step for name in own if callable(step := getattr(model, name))}
    return [name for name, step in steps.items() if "dataloader_iter" not in inspect.signature(step).parameters]


def _lightning_class(module: nn.Module) -> type | None:
    return next((cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule"), None)


def find_call(model: nn.Module, batch: Any, input_fn: InputFn | ModelCall | None = None) -> ModelCall:
    """Find how a model is called on a batch.

    Args:
        model: The model, in the state in which a snapshot runs it.
        batch: One batch.
        input_fn: The user's function from a batch to arguments, or a call that has been found earlier; None to find.

    Returns:
        The call.

    Raises:
        LIBError: If none works.

    Example:
        >>> print(find_call(nn.Linear(2, 1), {"input": torch.ones(3, 2), "label": torch.zeros(3)}))
        forward(input=batch['input'])
    """
    if isinstance(input_fn, ModelCall):
        return input_fn
    if input_fn is not None:
        return ModelCall(input_fn=input_fn)
    problems = []
    for step in steps_of(model):
        with state_restored(model):
            found = find_call_in_step(model, step, map_tensors(batch, lambda t: t.detach().clone()))
        if isinstance(found, ModelCall):
            return found
        problems.append((step, found))
    try:
        with state_restored(model):
            return find_arguments(model, batch)
    except LIBError as error:
        failed = [f"{step}: {type(problem).__name__}: {problem}" for step, problem in problems if problem]
        if not failed:
            raise
        raise LIBError(f"{error}\n({failed[0]})") from error.__cause__


@contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """What a forward pass writes into buffers and attributes of modules is undone after the block."""
    restore = save_buffers(model), preserve_attributes(model)
    try:
        yield
    finally:
        for one in restore:
            one()


def can_be_called(model: nn.Module, input_fn: object) -> bool:
    """Whether a model without ``forward`` has steps that call its modules, and nothing else says how to call it."""
    return (input_fn is None or isinstance(input_fn, ModelCall)) and bool(steps_of(model))


def run_step(model: nn.Module, step: str, batch: Any) -> Any:
    """Run a step without what it reports and updates: logging, optimizers.

    Args:
        model: The LightningModule.
        step: Name of the step.
        batch: The batch.

    Returns:
        What the step returns.
    """
    function = getattr(model, step)
    indices = 0
    for p in list(inspect.signature(function).parameters.values())[1:]:
        if p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name == "batch_idx"):
            indices += 1  # of the batch and its data loader, whatever they are called
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values()):
        indices = max(indices, 1)
    with _without_training(model):
        return function(batch, *(0 for _ in range(indices)))


@contextmanager
def _without_training(model: nn.Module) -> Iterator[None]:
    """LightningModules do not log or optimize in the block."""
    trainer = vars(model).get("_trainer")
    optimizers = [_Nothing() for _ in getattr(trainer, "optimizers", None) or [None]]
    found = optimizers if len(optimizers) > 1 else optimizers[0]
    nothing = (
        "log",
        "log_dict",
        "print",
        "manual_backward",
        "clip_gradients",
        "toggle_optimizer",
        "untoggle_optimizer",
    )
    attributes: dict[str, Any] = dict.fromkeys(nothing, _do_nothing)
    attributes |= dict.fromkeys(("optimizers", "lr_schedulers"), lambda *args, **kwargs: found)
    with ExitStack() as stack:
        for module in model.modules():
            if is_lightning_module(module):
                for name, value in attributes.items():
                    stack.enter_context(_attribute(module, name, value))
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module in a block, without a call of the module's ``__setattr__``."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before


class _Nothing:
    """Stands for an optimizer or a scheduler: does nothing, whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass
class _Record:
    """One call of a module in a step."""

    call: Call
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    depends: bool
    inner: list[_Record] = field(default_factory=list)
    is_scalar: bool | None = None  # None as long as it has not returned


def find_call_in_step(model: nn.Module, step: str, batch: Any) -> ModelCall | Exception | None:
    """Run a step of a LightningModule on a batch to find how it calls the model.

    Args:
        model: The LightningModule; its parameters do not require gradients.
        step: Name of the step.
        batch: A copy of the batch, which the step may write into.

    Returns:
        The call; None if the step calls no module that has parameters, and the error if it failed before it did.
    """
    places = _places(batch)
    recorder = _StepRecorder(model)
    problem: Exception | None = None
    try:
        with recorder.hooked(), torch.enable_grad():
            run_step(model, step, batch)
    except StopStep:
        pass
    except Exception as error:  # after the model has been called, the rest of a step is of no interest
        if is_out_of_memory(error):
            raise
        problem = error
    chain = recorder.chain()
    if not chain:
        return problem
    arguments = tensors_in((chain[0].args, chain[0].kwargs))
    if isinstance(batch, Tensor) and any(t.shape == batch.shape[1:] for t in arguments):
        return TypeError("takes the first row of a tensor for the inputs: it expects a tuple of inputs and labels")
    calls = tuple(record.call for record in chain)
    if len(calls) > 1:
        return ModelCall(step, calls, found_in=step)
    template = _template(chain[0], places)
    return ModelCall(None if template else step, calls, template, found_in=step)


class _StepRecorder:
    """Hooks at all modules while a step runs: which ones it calls itself, and which of them use the outputs of earlier.

    Dependence is seen by gradients: parameters have none, and the input of the first module gets one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._root = find_module(model, "")
        self._all = {id(p) for p in model.parameters()}
        self._outermost: list[_Record] = []
        self._stack: list[_Record] = []
        self._modes: list[bool] = []
        self._n_calls: Counter[int] = Counter()
        self._is_marked = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the hooks."""
        paths: dict[int, str] = {}
        with ExitStack() as stack:
            for path in module_paths(self._model):
                module = find_module(self._model, path)
                if id(module) in paths or not accepts_hooks(module) or _is_metric(module):
                    continue
                paths[id(module)] = path
                before, after = self._hooks(path)
                stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, always_call=True).remove)
            if "" in paths.values():
                # Some steps call self.forward(x), which no hook sees.
                stack.enter_context(_attribute(self._root, "forward", self._forward(self._root.forward)))
            yield

    def chain(self) -> list[_Record]:
        """The first call of a module with parameters, and later ones that depend on it, until a module repeats."""
        calls = list(_with_outputs(self._outermost))
        chain = calls[:1]
        for record in calls[1:]:
            if record.call.path in {earlier.call.path for earlier in calls[: calls.index(record)]}:
                break
            if record.depends:
                chain.append(record)
        return chain

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if not any(record.module is self._root for record in self._stack):
                self._start("", self._root, args, kwargs)
                raise StopStep
            return forward(*args, **kwargs)

        return recorded

    def _start(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Record:
        call = Call(path, self._n_calls[id(module)])
        self._n_calls[id(module)] += 1
        depends = any(t.requires_grad for t in tensors_in((args, kwargs)))
        record = _Record(call, module, args, kwargs, depends)
        (self._stack[-1].inner if self._stack else self._outermost).append(record)
        return record

    def _hooks(self, path: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            is_outermost = not self._stack
            record = self._start(path, module, args, kwargs)
            own = {id(p) for p in module.parameters()}
            # The whole model: what follows does not matter.
            if is_outermost and (module is self._root or (own and own >= self._all)):
                raise StopStep
            self._stack.append(record)
            self._modes.append(torch.is_grad_enabled())
            torch.set_grad_enabled(True)
            if own and not self._is_marked and not record.depends:
                args, kwargs = map_tensors((args, kwargs), _marked)
                return args, kwargs
            return None

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self._stack or self._stack[-1].module is not module:
                return None
            record = self._stack.pop()
            torch.set_grad_enabled(self._modes.pop())
            tensors = tensors_in(output)
            record.is_scalar = not any(t.numel() > 1 for t in tensors)
            if not self._is_marked and not self._stack and record in list(_with_outputs(self._outermost)):
                self._is_marked = True
                if not any(t.requires_grad for t in tensors):  # integer inputs
                    return map_tensors(output, _marked)
            return None

        return before, after


def _with_outputs(records: list[_Record]) -> Iterator[_Record]:
    """Calls of modules with parameters that returned activations; in place of one that returns a loss, those in it."""
    for record in records:
        if record.is_scalar and record.inner:
            yield from _with_outputs(record.inner)
        elif not record.is_scalar and next(record.module.parameters(), None) is not None:
            yield record


def _marked(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(True) if t.is_floating_point() else t


def _is_metric(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("torchmetrics") for cls in type(module).__mro__)


def _places(batch: Any) -> dict[int, tuple[Path, Any, tuple[Any, ...]]]:
    """For each object in a batch, by its id: where it is, the object, and what it consists of."""
    found: dict[int, tuple[Path, Any, tuple[Any, ...]]] = {}

    def visit(value: Any, path: Path) -> None:
        found.setdefault(id(value), (path, value, _contents(value)))
        if isinstance(value, dict):
            for key, item in value.items():
                if isinstance(key, (str, int)):
                    visit(item, (*path, key))
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                visit(item, (*path, index))
        elif not isinstance(value, (Tensor, type)) and hasattr(value, "__dict__"):
            for name, item in vars(value).items():
                if isinstance(item, Tensor):
                    visit(item, (*path, name))

    visit(batch, ())
    return found


def _contents(value: Any) -> tuple[Any, ...]:
    return tuple((id(t), t._version) for t in tensors_in(value) if not t.is_inference())


def _template(record: _Record, places: dict[int, tuple[Path, Any, tuple[Any, ...]]]) -> Arguments | None:
    """Where the arguments of a call are in the batch; None if one of them has been computed from it."""

    def place(value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        path, _, contents = places.get(id(value), (None, None, ()))
        # Tensors and containers only: equal numbers may be the same object by chance.
        if path is None or isinstance(value, (int, float)) or contents != _contents(value) or not contents:
            raise LookupError
        return path

    try:
        return Arguments(tuple(map(place, record.args)), {name: place(v) for name, v in record.kwargs.items()})
    except LookupError:
        return None


@contextmanager
def _preparation() -> Iterator[None]:
    token = _preparing.set(True)
    try:
        yield
    finally:
        _preparing.reset(token)


def arguments_in_step(model: nn.Module, call: ModelCall, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run a step up to the first call of the forward pass, and return the arguments of that call.

    Args:
        model: The LightningModule.
        call: How it is called, with a step.
        batch: A copy of the batch.

    Returns:
        Positional and keyword arguments.

    Raises:
        LookupError: If the step does not call that module on this batch.
    """
    assert call.step is not None
    first, found = call.calls[0], []
    module = find_module(model, first.path)
    n_calls = 0

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls > first.index:
            found.append((args, kwargs))
            raise StopStep

    with ExitStack() as stack:
        stack.enter_context(_preparation())
        stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        if not first.path:
            stack.enter_context(_attribute(module, "forward", lambda *args, **kwargs: before(module, args, kwargs)))
        stack.enter_context(torch.no_grad())
        try:
            run_step(model, call.step, batch)
        except StopStep:
            pass
        except Exception:  # a step with a catch-all handler may continue for a while, and fail
            if not found:
                raise
    if not found:
        raise LookupError(f"{call.step} does not call '{first.path or 'forward'}' on this batch.")
    args, kwargs = map_tensors(found[0], without_subclass)
    return args, kwargs


def forward_in_step(model: nn.Module, call: ModelCall, batch: Any) -> Any:
    """Run a step as the forward pass, up to the end of the last call, and return the output of that call.

    Args:
        model: The LightningModule.
        call: How it is called, with several calls.
        batch: A copy of the batch.

    Returns:
        The output of the last module.

    Raises:
        LookupError: If the step does not call that module on this batch.
    """
    assert call.step is not None
    last, outputs = call.calls[-1], []
    n_calls: Counter[str] = Counter()
    modes: list[bool] = []

    def enter(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Some steps disable gradients.
        modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(enabled)
        return map_tensors((args, kwargs), without_subclass)

    def leave(path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.set_grad_enabled(modes.pop())
        n_calls[path] += 1
        if path == last.path and n_calls[path] > last.index:
            outputs.append(output)
            raise StopStep

    enabled = torch.is_grad_enabled()
    with ExitStack() as stack:
        for path in {c.path for c in call.calls}:
            module = find_module(model, path)
            # First before and last after the module: taps are inside.
            before = module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: enter(path, m, args, kwargs), prepend=True, with_kwargs=True
            )
            after = module.register_forward_hook(lambda m, args, output, path=path: leave(path, m, args, output))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.callback(torch.set_grad_enabled, enabled)
        with suppress(StopStep):
            run_step(model, call.step, batch)
    if not outputs:
        raise LookupError(f"{call.step} does not call '{last.path}' on this batch.")
    return outputs[0]
