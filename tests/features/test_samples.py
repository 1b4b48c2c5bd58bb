"""Single samples of batches, as renderers see them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.errors import LIBError, SettingError, SettingTypeError
from lib_lightning.features import Sample, TableRenderer, TextRenderer, TokenRenderer, render_samples
from lib_lightning.features.output_names import OutputNames, check_output_names, find_output_names
from lib_lightning.features.render import mentioned_samples
from lib_lightning.features.sample import SampleReader, locate_labels
from lib_lightning.model.instrumented import InstrumentedModel

X = torch.arange(12.0).view(6, 2)
Y = torch.tensor([0, 2, 1, 1, 0, 2])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Embedding(4, 3)

    def forward(self, numbers: Tensor, kind: Tensor) -> Tensor:
        return self.a(numbers) + self.b(kind)


class Own(pl.LightningModule):
    """Its step computes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(torch.cat([x, -x], 1)), y)


def read(model: nn.Module, batches: list[Any], wanted: list[int], first: int = 0, **options: Any) -> dict[int, Sample]:
    instrumented = InstrumentedModel(model, [], **options)
    with instrumented.session():
        return dict(SampleReader.of_model(instrumented, batches[0]).read(batches, wanted, first))


@pytest.mark.parametrize("first", [0, 100])
def test_samples_are_numbered_over_batches(first: int) -> None:
    batches = [(X[:2], Y[:2]), (X[2:5], Y[2:5]), (X[5:], Y[5:])]
    found = read(nn.Linear(2, 3), batches, [first + i for i in (0, 3, 5, 6)], first)
    assert list(found) == [first, first + 3, first + 5]
    for i, sample in found.items():
        assert torch.equal(sample.input, X[i - first])
        assert sample.label == str(int(Y[i - first]))
        assert torch.equal(sample.batch[0], X[i - first : i - first + 1])


def test_inputs_have_the_names_of_arguments() -> None:
    for batch in ((X, Y, 1 - Y % 2), {"numbers": X, "kind": Y, "label": 1 - Y % 2, "id": Y}):
        sample = read(TwoInputs(), [batch], [1])[1]
        assert list(sample.inputs) == ["numbers", "kind"]
        assert int(sample.inputs["kind"]) == 2
        assert sample.label == "1"
        row = TableRenderer()(sample)
        assert (row["columns"], row["values"]) == (["numbers[0]", "numbers[1]", "kind"], [2, 3, 2])


def test_a_step_that_computes_inputs() -> None:
    sample = read(Own(), [(X, Y)], [0, 4])[4]
    assert sample.input.tolist() == [8, 9, -8, -9]
    assert sample.label == "0"
    assert sample.batch[0].tolist() == [[8, 9]]


@pytest.mark.parametrize(
    ("others", "path"),
    [
        ((Y,), (1,)),
        ((Y[:, None],), (1,)),
        ((Y.float(),), None),  # numbers to predict
        (((Y > 0).float(),), (1,)),
        ((torch.eye(3)[Y],), (1,)),
        ((torch.rand(6, 3),), None),
        ((torch.arange(6), Y), (2,)),  # the first ones are numbers of samples
        ((torch.randint(0, 9, (6, 5)),), None),
        ((["a", "b"] * 3,), None),
        ((), None),
    ],
)
def test_labels_are_found(others: tuple[Any, ...], path: Any) -> None:
    assert locate_labels((X, *others), ((X,), {}), 6) == path
    named = {"x": X, **{f"{'target' if k + 1 == len(others) else 'other'}": t for k, t in enumerate(others)}}
    found = locate_labels(named, ((X,), {}), 6)
    texts = bool(others) and isinstance(others[-1], list)
    assert found == (("target",) if path is not None or texts else None)


def test_labels_are_no_inputs_and_have_names() -> None:
    assert locate_labels({"tokens": Y, "y": Y}, ((Y,), {}), 6) is None
    batch = {"x": X, "labels": ["cat", "dog", "cow"] * 2}
    instrumented = InstrumentedModel(nn.Linear(2, 3), [])
    assert locate_labels(batch, ((X,), {}), 6) == ("labels",)
    reader = SampleReader.of_model(instrumented, (X, Y)).with_names(OutputNames(("zero", "one")).of)
    assert [s.label for _, s in reader.read([(X, Y)], range(3))] == ["zero", "2", "one"]


def with_examples(*batches: Any, model: nn.Module | None = None, **options: Any) -> InteractionGraph:
    return compute_interaction_graph(model or nn.Linear(2, 3), batches, ["input", "output"], **options)


def test_render_samples() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3), torch.randn(40, 2), torch.randint(0, 3, (40,))
    batches = [(x[:30], y[:30]), (x[:0], y[:0]), (x[30:], y[30:])]
    graph = with_examples(*batches, model=model)
    wanted = mentioned_samples(graph)
    assert {int(i) for one in graph.examples.values() for i in one.samples.flatten()} - {-1} == set(wanted)
    for options in ({}, {"model": model}):
        found = render_samples(graph, batches, **options)
        assert list(found) == wanted
        for i, rendering in found.items():
            assert rendering["values"] == pytest.approx(x[i].tolist(), rel=1e-4)
            assert rendering["label"] == str(int(y[i]))
    graph.info["output_names"] = ["a", "b", "c"]
    assert {r["label"] for r in render_samples(graph, batches).values()} == {"a", "b", "c"}


def test_a_renderer_that_fails_costs_single_renderings(caplog: pytest.LogCaptureFixture) -> None:
    graph = with_examples(X)
    wanted = mentioned_samples(graph)

    def some(sample: Sample) -> str:
        return f"{1 / (sample.input[0].item() - 4)}"

    found = render_samples(graph, [X], TextRenderer(some))
    assert set(found) == set(wanted) - {2}
    assert caplog.text.count("Sample 2 could not be rendered (ZeroDivisionError") == 1
    with pytest.raises(LIBError, match="1 column"):
        render_samples(graph, [X], TableRenderer(["one"]))
    assert render_samples(InteractionGraph({}, {}), [X]) == {}


class Config:
    def __init__(self, *names: str) -> None:
        self.id2label = dict(enumerate(names))


def test_output_names() -> None:
    model, batch = nn.Linear(2, 3), (X, Y)

    def names_of(setting: Any, renderer: Any = None, model: nn.Module = model) -> OutputNames | None:
        check_output_names(setting)
        return find_output_names(setting, renderer, InstrumentedModel(model, []), batch)

    for setting in (["a", "b", "c"], {0: "a", 1: "b", 2: "c"}, {"2": "c", "1": "b", "0": "a"}, Config("a", "b", "c"),
                    "abc".__getitem__):  # fmt: skip
        names = names_of(setting)
        assert names is not None
        assert names.of([0, 2, -1]) == {0: "a", 2: "c"}
        assert names.plain(InteractionGraph({}, {})) == ["a", "b", "c"]
    configured = nn.Linear(2, 3)
    configured.config = Config("a", "b", "c")  # type: ignore[assignment]
    assert names_of(None, model=configured) == OutputNames(("a", "b", "c"), count=3)
    configured.config = Config("LABEL_0", "LABEL_1", "LABEL_2")  # type: ignore[assignment]
    assert names_of(None, model=configured) is None
    # Outputs are tokens where there are at least as many of them.
    assert names_of(None, TokenRenderer(["x", "y", "z"])).of([1]) == {1: "y"}  # type: ignore[union-attr]
    assert names_of(None, TokenRenderer("bytes")) is None
    with pytest.raises(SettingError, match="2 names, and the model has 3 outputs"):
        names_of(["a", "b"])
    with pytest.raises(SettingTypeError, match="output_names is a list"):
        names_of(3)
    with pytest.raises(SettingTypeError, match="output_names is a list"):
        names_of("abc")


def test_names_of_many_outputs_are_those_that_a_graph_mentions() -> None:
    from lib_lightning.graph import OutputEffects

    names = OutputNames(name_of=lambda i: f"token {i}", count=50_000)
    outputs = torch.tensor([[7, 40_000, -1]], dtype=torch.int32)
    graph = InteractionGraph({}, {}, output_effects={"a": OutputEffects(outputs, outputs, outputs)})
    graph.info["output_names"] = names.plain(graph)
    assert graph.info["output_names"] == {"7": "token 7", "40000": "token 40000"}
    assert OutputNames.of_graph(graph).of([7]) == {7: "token 7"}
