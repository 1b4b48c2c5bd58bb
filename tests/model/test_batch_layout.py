"""The samples of a batch: from what the model is called with and returns, whatever else has the same length."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lib_lightning import compute_interaction_graph, list_node_layers
from lib_lightning.errors import ActivationError, LIBError
from lib_lightning.model.batch_layout import BatchLayout
from lib_lightning.model.calls import ModelCall
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec

D = 4


def net(inputs: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, 3))


class Named(nn.Module):
    """Uses what its name says, by keyword."""

    def __init__(self, uses: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.uses = net(), uses

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = torch.stack(batch["images"]) if "images" in self.uses else batch["x"]
        out = self.net(x)
        if "weights" in self.uses:
            out = out * batch["weights"]
        if "scales" in self.uses:
            out = out * batch["scales"][:, None]
        if "scalar" in self.uses:
            out = out * batch["scalar"]
        return out


def batch_of(n: int, order: list[str]) -> dict[str, Any]:
    x = torch.randn(n, D)
    entries = {
        "x": x,
        "images": list(x),
        "weights": torch.rand(3),
        "scales": torch.rand(n) + 1,
        "scalar": torch.tensor(2.0),
        "names": [f"sample {i}" for i in range(n)],
        "none": None,
        "y": torch.zeros(n, dtype=torch.long),
    }
    return {key: entries[key] for key in order}


KEYS = ["x", "images", "weights", "scales", "scalar", "names", "none", "y"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 6),
    st.permutations(KEYS),
    st.lists(st.sampled_from(["images", "weights", "scales", "scalar"]), unique=True),
)
def test_samples_are_those_of_the_model(n: int, order: list[str], uses: list[str]) -> None:
    torch.manual_seed(0)
    model, batch = Named(uses), batch_of(n, order)
    with torch.no_grad():
        whole = model(batch)
    instrumented = InstrumentedModel(model, [])
    assert instrumented.num_samples(batch) == n
    if n < 2:
        return
    index = torch.tensor([n - 1, 0])
    part = instrumented.select(batch, index)
    with torch.no_grad():
        assert torch.allclose(model(part), whole[index], atol=1e-6)
    assert part["y"].shape == (2,)
    assert len(part["names"]) == 2
    assert torch.equal(part["weights"], batch["weights"]) or n == 3 != ("weights" in uses)
    plain = instrumented.spec.call.plain  # type: ignore[union-attr]
    assert ModelCall.from_plain(plain) == instrumented.spec.call
    assert instrumented.num_samples(instrumented.select(batch, slice(0, 1))) == 1


def test_the_numbers_do_not_depend_on_chunks() -> None:
    torch.manual_seed(0)
    model, batches = Named(["weights", "images"]), [batch_of(3, ["weights", *KEYS]) for _ in range(4)]
    layers = ["net.0:input", "net.1", "output"]
    whole, chunks = (compute_interaction_graph(model, batches, layers, memory_limit=limit) for limit in (2.0, 1e-4))
    for name, basis in whole.bases.items():
        assert torch.allclose(basis.importance, chunks.bases[name].importance, rtol=1e-4)
    assert whole.info["n_samples"] == 12


def test_a_batch_of_one_sample_does_not_decide() -> None:
    instrumented = InstrumentedModel(Named(["weights"]), [])
    assert instrumented.num_samples(batch_of(1, KEYS)) == 1
    assert not instrumented.layout(batch_of(1, KEYS)).is_certain
    assert instrumented.num_samples(batch_of(5, KEYS)) == 5
    assert instrumented.layout(batch_of(1, KEYS)).is_certain


def test_several_possibilities_are_refused_in_one_sentence() -> None:
    class Gram(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.mean() + b.mean() + 0 * a[:1].mean() + torch.zeros(len(a) + len(b) - 4, 2)

    instrumented = InstrumentedModel(Gram(), [], ModelSpec())
    with pytest.raises(LIBError, match=r"cannot be told: both batch\[1\] and batch\[0\] could"):
        instrumented.num_samples((torch.ones(4, 2), torch.ones(4, 3)))


# Classes of batches.


def packed(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.randn(k, D) for k in lengths], enforce_sorted=False)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(D, 5, batch_first=True), net(5)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.head(self.rnn(x)[1][-1])


class MeanOfNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.Linear(D, 5), net(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([t.mean(0) for t in self.rnn(x).unbind()]))


class OfSparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(D, 5)), net(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sparse.mm(x, self.weight))


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(k, D) for k in (2, 5, 3, 4)], layout=layout)


@dataclasses.dataclass
class Sample:
    x: Tensor
    name: str = ""


class OfDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = net()

    def forward(self, sample: Sample) -> Tensor:
        return self.head(sample.x)


class Pair(tuple):  # type: ignore[type-arg]
    """A tuple with arguments of its own."""

    def __new__(cls, x: Tensor, y: Tensor) -> Pair:
        return super().__new__(cls, (x, y))


class Tagged(Tensor):
    """A subclass that only adds attributes."""


CLASSES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[str], int]] = {
    "packed": (LastState, lambda: packed(2, 5, 3, 4), ["head:input", "output"], 4),
    "jagged": (MeanOfNested, lambda: nested(torch.jagged), ["head:input", "output"], 4),
    "nested": (MeanOfNested, lambda: nested(torch.strided), ["head:input", "output"], 4),
    "coo": (OfSparse, lambda: torch.randn(6, D).relu().to_sparse(), ["head:input", "output"], 6),
    "csr": (OfSparse, lambda: torch.randn(6, D).relu().to_sparse_csr(), ["head:input", "output"], 6),
    "dataclass": (OfDataclass, lambda: Sample(torch.randn(5, D)), ["input", "output"], 5),
    "tuple subclass": (net, lambda: Pair(torch.randn(5, D), torch.zeros(5)), ["input", "output"], 5),
    "tensor subclass": (net, lambda: torch.randn(5, D).as_subclass(Tagged), ["input", "output"], 5),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|Sparse).*")
@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_batches(name: str) -> None:
    model, make, layers, n = CLASSES[name]
    torch.manual_seed(0)
    graph = compute_interaction_graph(model(), [make(), make()], layers)
    assert graph.info["n_samples"] == 2 * n
    assert all(basis.n_features for basis in graph.bases.values())


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|Sparse).*")
@pytest.mark.parametrize(("name", "layer"), [("packed", "rnn"), ("jagged", "rnn"), ("nested", "rnn"), ("coo", "input")])
def test_rows_that_are_not_of_samples_are_refused_in_one_sentence(name: str, layer: str) -> None:
    model, make, _, _ = CLASSES[name]
    with pytest.raises(ActivationError, match=f"'{layer}' holds a (PackedSequence|nested tensor|sparse tensor)"):
        compute_interaction_graph(model(), [make()], [layer, "output"])


# Graphs: a stand-in for the classes of PyTorch Geometric.


class Graphs:
    """Several graphs as one, with the nodes of all of them on axis 0."""

    def __init__(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> None:
        self.x, self.edge_index, self.batch = x, edge_index, batch

    @property
    def num_graphs(self) -> int:
        return int(self.batch.max()) + 1

    @property
    def num_nodes(self) -> int:
        return len(self.x)

    def keys(self) -> list[str]:
        return ["x", "edge_index", "batch"]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Graphs:
        self.x, self.edge_index, self.batch = fn(self.x), fn(self.edge_index), fn(self.batch)
        return self

    def __copy__(self) -> Graphs:
        return Graphs(self.x, self.edge_index, self.batch)

    def to_data_list(self) -> list[Graphs]:
        found = []
        for i in range(self.num_graphs):
            nodes = (self.batch == i).nonzero()[:, 0]
            inside = (self.batch[self.edge_index[0]] == i).nonzero()[:, 0]
            edges = self.edge_index[:, inside] - nodes[0]
            found.append(Graphs(self.x[nodes], edges, torch.zeros(len(nodes), dtype=torch.long)))
        return found

    @classmethod
    def from_data_list(cls, graphs: list[Graphs]) -> Graphs:
        starts = torch.tensor([0, *[len(g.x) for g in graphs]]).cumsum(0)
        edges = torch.cat([g.edge_index + start for g, start in zip(graphs, starts, strict=False)], 1)
        batch = torch.cat([torch.full((len(g.x),), i) for i, g in enumerate(graphs)])
        return cls(torch.cat([g.x for g in graphs]), edges, batch)


def ring(k: int) -> Graphs:
    i = torch.arange(k)
    return Graphs(torch.randn(k, D), torch.stack([i, (i + 1) % k]), torch.zeros(k, dtype=torch.long))


class Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.linear(x.index_add(0, edge_index[1], x[edge_index[0]])).tanh()


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Convolution(D, 5), Convolution(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.second(self.first(x, edge_index), edge_index)
        pooled = h.new_zeros(int(batch.max()) + 1, h.shape[1]).index_add(0, batch, h)
        return self.head(pooled)


class Dense(GraphNetwork):
    """The same for graphs of one size, as an ordinary batch of samples and positions."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        def convolve(layer: Convolution, h: Tensor) -> Tensor:
            return layer.linear(h + h.roll(1, 1)).tanh()

        self.h1 = self.one(convolve(self.first, x))
        h2 = self.two(convolve(self.second, self.h1))
        return self.head(h2.sum(1))

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()


@pytest.mark.parametrize("sizes", [[6] * 5, [4, 6, 4, 6, 5]])
def test_nodes_of_graphs_are_positions(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, graphs = GraphNetwork(), [[ring(k) for k in sizes] for _ in range(4)]
    graph = compute_interaction_graph(
        model, [Graphs.from_data_list(part) for part in graphs], ["first", "second", "output"]
    )
    dense = [torch.stack([g.x for g in part if len(g.x) == size]) for part in graphs for size in sorted(set(sizes))]
    expected = compute_interaction_graph(Dense(), dense, ["one", "two", "output"])
    assert graph.info["n_samples"] == expected.info["n_samples"] == 20
    for a, b in zip(graph.bases.values(), expected.bases.values(), strict=True):
        assert torch.allclose(a.importance, b.importance, rtol=1e-4)
    for a, b in zip(graph.edges.values(), expected.edges.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(b.max()))


def test_proposals_of_graph_networks_have_nodes_as_positions() -> None:
    torch.manual_seed(0)
    cuts = {
        cut.tap: cut for cut in list_node_layers(GraphNetwork(), Graphs.from_data_list([ring(6) for _ in range(5)]))
    }
    assert (cuts["first"].positions, cuts["first"].features) == (6, 5)
    assert (cuts["output"].positions, cuts["output"].features) == (1, 3)


def test_rows_of_edges_are_refused() -> None:
    class Edges(GraphNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.message = nn.Linear(D, 5)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            doubled = torch.cat([edge_index, edge_index], 1)
            messages = self.message(x[doubled[0]])
            h = messages.new_zeros(len(x), 5).index_add(0, doubled[1], messages)
            return self.head(self.second.linear(h))

    batch = Graphs.from_data_list([ring(6) for _ in range(5)])
    with pytest.raises(ActivationError, match="'message' has 36 rows in a batch of 3 graphs"):
        compute_interaction_graph(Edges(), [batch], ["message", "output"])


def test_batches_are_left_as_they_are() -> None:
    batch = batch_of(5, KEYS)
    before = copy.deepcopy(batch)
    InstrumentedModel(Named(["weights"]), []).num_samples(batch)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[key], before[key]) for key in ("x", "weights", "scales"))
    layout = BatchLayout()
    assert layout.select(batch, slice(0, 2))["x"].shape == (2, D)


@dataclasses.dataclass(slots=True)
class WithSlots:
    x: Tensor
    label: Tensor | None = None


def test_dataclasses_with_slots() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: WithSlots) -> Tensor:
            return self.net(batch.x)

    graph = compute_interaction_graph(Model(), [WithSlots(torch.randn(12, D))], ["net.0", "output"])
    assert graph.info["n_samples"] == 12
