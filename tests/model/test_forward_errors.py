"""Models in wrappers, of several types and devices, or that cannot be run or differentiated: handled, or a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import AveragedModel

from lib_lightning import compute_interaction_graph, list_node_layers
from lib_lightning.errors import LIBError
from lib_lightning.model.conversion import convert_attributes

LAYERS = ["input", "1", "output"]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fabric(model: nn.Module, precision: Any = "bf16-mixed") -> nn.Module:
    return Fabric(accelerator="cpu", devices=1, precision=precision).setup_module(model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def parallel(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fabric": fabric,
    "fabric of a compiled model": lambda model: fabric(compiled(model)),
    "compiled fabric": lambda model: compiled(fabric(model)),
    "ddp": parallel,
    "compiled ddp": lambda model: compiled(parallel(model)),
    "fabric of ddp": lambda model: fabric(parallel(model)),
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": compiled,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrapped_models_have_the_graph_and_the_paths_of_the_model_inside(wrapper: str) -> None:
    expected = compute_interaction_graph(mlp(), [X], LAYERS)
    model = WRAPPERS[wrapper](mlp())
    assert [cut.tap for cut in list_node_layers(model, X)] == ["input", "0", "1", "output"]
    graph = compute_interaction_graph(model, [X], LAYERS)
    for pair, edges in expected.edges.items():
        assert torch.equal(graph.edges[pair], edges)
    inner = next(path for path, module in model.named_modules() if type(module) is nn.Tanh)
    again = compute_interaction_graph(model, [X], ["input", inner, "output"])
    assert torch.equal(again.edges["input", inner], expected.edges["input", "1"])
    # Training goes on as before: the wrapper has seen none of it.
    for _ in range(2 if "fabric" not in wrapper else 0):  # whose backward is a method of Fabric
        model(X).sum().backward()


class Scaled(nn.Module):
    """A model with weights where `functional_call` does not find them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
        self.kind = kind
        held: dict[str, Any] = {
            "attribute": weight,
            "list": [weight, "name"],
            "dict": {"inner": (weight, None)},
            "parameter in a list": [nn.Parameter(weight)],
            "shared": [weight, weight],
        }
        self.held = held[kind]
        if kind == "shared":
            self.other = weight
        self.mask = torch.ones(3, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) @ self.weight() * self.mask

    def weight(self) -> Tensor:
        held = self.held["inner"] if self.kind == "dict" else self.held
        return held if self.kind == "attribute" else held[0]


@pytest.mark.parametrize("kind", ["attribute", "list", "dict", "parameter in a list", "shared"])
def test_weights_in_plain_attributes_are_converted(kind: str) -> None:
    model = Scaled(kind)
    graph = compute_interaction_graph(model, [X], ["fc", "output"], dtype=torch.float64)
    expected = compute_interaction_graph(Scaled(kind).double(), [X.double()], ["fc", "output"], dtype=torch.float64)
    assert torch.allclose(graph.edges["fc", "output"], expected.edges["fc", "output"], rtol=1e-6)
    assert all(t.dtype == torch.float32 for t in model.parameters())
    assert model.weight().dtype == torch.float32


def test_containers_without_numbers_and_cycles_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    loop: list[Any] = [torch.ones(1)]
    loop.append(loop)
    empty: list[Any] = []
    model.loop, model.cache, model.names = loop, empty, {"a": torch.ones(2, dtype=torch.int64)}  # type: ignore[assignment]
    before = dict(vars(model))
    convert_attributes(model, torch.float64)
    assert all(vars(model)[name] is value for name, value in before.items())


@dataclass
class Tables:
    weight: Tensor


class Holder:
    """A class whose tensors nothing converts."""

    def __init__(self) -> None:
        self.weight = torch.randn(4, 4)


class InObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.holder = nn.Linear(4, 4), Holder()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.holder.weight


class Spectral(nn.Module):
    """Complex weights, as in neural operators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.cfloat))
        self.register_buffer("shift", torch.randn(5, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(self.fc(x)) * self.weight + self.shift, n=8))


def test_complex_weights_are_of_the_precision_that_is_computed_in() -> None:
    model = Spectral()
    graph = compute_interaction_graph(model, [X], ["fc", "output"], dtype=torch.float64)
    model.double()
    model.weight.data, model.shift = model.weight.data.to(torch.cdouble), model.shift.to(torch.cdouble)
    expected = compute_interaction_graph(model, [X.double()], ["fc", "output"])
    assert torch.allclose(graph.edges["fc", "output"], expected.edges["fc", "output"], rtol=1e-10)


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a key " * 100)


class OnlyForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("no derivative of this")


class NoDerivative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(OnlyForward.apply(self.a(x)))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return mlp()


MISTAKES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "a function": (lambda: torch.tanh, X, {}, "model must be a torch.nn.Module; got <built-in"),
    "a class": (lambda: nn.Linear, X, {}, "A class needs its arguments"),
    "no weights": (on_meta, X, {}, r"'0.weight', '0.bias', '2.weight' and 1 more have no values: .*'meta'"),
    "wrong width": (mlp, X[:, :3], {}, "Sequential cannot be run on a batch.*mat1 and mat2"),
    "two types": (mlp, X.double(), {}, "two types; its weights are 'float32'.*dtype=torch.float32"),
    "half weights": (lambda: fabric(mlp(), "bf16-true"), X, {}, "two types; its weights are 'bfloat16'"),
    "tensors in objects": (InObject, X, {"dtype": torch.float64}, "register it as a buffer"),
    "inference mode": (Decorated, X, {}, "computes under torch.inference_mode"),
    "its own error": (Raises, X, {}, "Raises cannot be run on a batch.*KeyError"),
    "input_fn fails": (mlp, X, {"input_fn": lambda batch: batch["x"]}, "cannot be run on a batch"),
    "input_fn is none": (mlp, X, {"input_fn": "x"}, "input_fn is a function"),
    "derivative": (NoDerivative, X, {}, "no derivative of this"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake: str) -> None:
    make, batch, options, message = MISTAKES[mistake]
    model = make()
    layers = ["a", "output"] if hasattr(model, "a") else ["fc", "output"] if hasattr(model, "fc") else LAYERS
    with pytest.raises(LIBError, match=message) as error:
        compute_interaction_graph(model, [batch], layers, **options)
    assert len(str(error.value)) < 520
    assert "which should not happen" not in str(error.value)
