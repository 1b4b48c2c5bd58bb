"""Models are called as their own steps call them: with no argument, in real trainers, whatever the batches are like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib_lightning import LIBCallback, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_format import NUM_SAMPLES

N, D = 12, 4


class Base(pl.LightningModule):
    """A perceptron, trained on a few batches of one form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 3))
        self.batches = [self.batch_of(torch.randn(N, D), torch.randint(0, 3, (N,))) for _ in range(3)]

    def batch_of(self, x: Tensor, y: Tensor) -> Any:
        return x, y

    def x_of(self, batch: Any) -> Any:
        """What `net` is to be called with, for the graph to compare with."""
        return batch[0]

    def loss(self, out: Tensor) -> Tensor:
        return out.square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net[2].weight.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)


class ForwardOfX(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        self.log("val/loss", self.loss(self(x)))


class ForwardOfBatch(Base):
    def forward(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch))


class ForwardOfXAndY(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x) + 0 * y[:, None]

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(*batch))


class CalledByForward(Base):
    """Calls ``self.forward``, which hooks do not see."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.forward(batch[0]))


class NoForward(Base):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]))


class ExtraKeys(Base):
    def batch_of(self, x: Tensor, y: Tensor) -> Any:
        return {"id": [f"sample {i}" for i in range(len(x))], "weights": torch.ones(3), "image": x, "label": y}

    def x_of(self, batch: Any) -> Any:
        return batch["image"]

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.loss(self(batch["image"])) * batch["weights"]).mean()


class TwoViews(Base):
    """Self-supervised: the same encoder for two views of each sample."""

    def batch_of(self, x: Tensor, y: Tensor) -> Any:
        return [[x, x + 0.1], y, ["file"] * len(x)]

    def x_of(self, batch: Any) -> Any:
        return batch[0][0]

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        (first, second), _, _ = batch
        return (self.net(first) * self.net(second)).sum()


@dataclasses.dataclass
class Series:
    past: Tensor
    scale: float
    static: Tensor | None = None


class Converted(Base):
    """Converts a dataclass in the step."""

    def batch_of(self, x: Tensor, y: Tensor) -> Any:
        return Series(x, 2.0)

    def x_of(self, batch: Any) -> Any:
        return torch.cat([batch.past[:, :2], batch.past[:, 2:]], 1) * batch.scale

    def forward(self, inputs: tuple[Tensor, Tensor | None]) -> Tensor:
        x, _ = inputs
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat([batch.past[:, :2], batch.past[:, 2:]], 1) * batch.scale
        return self.loss(self((x, batch.static)))


class NeedsTheTrainer(Base):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        assert self.trainer.max_epochs == 2
        assert (batch_idx, dataloader_idx) == (0, 0) or batch_idx > 0
        self.log("a", float(self.current_epoch))
        self.logger.log_metrics({"b": 1.0})
        return self.loss(self.net(batch[0] + self.trainer.max_epochs))

    def x_of(self, batch: Any) -> Any:
        return batch[0] + 2


class WithoutGradients(Base):
    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]))


class ManualOptimisation(Base):
    """Has a training step only, which steps its optimizers itself; batches come from the callback's own loader."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(self.net(batch[0]))
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


class WithMetrics(Base):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.MeanMetric()
        self.criterion = nn.CrossEntropyLoss()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self.net(x)
        self.accuracy.update((out.argmax(1) == y).float())
        self.log("accuracy", self.accuracy)
        self.log("loss", self.criterion(out, y))


class PredictsOnly(Base):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


MODELS = [
    ForwardOfX, ForwardOfBatch, ForwardOfXAndY, CalledByForward, NoForward, ExtraKeys, TwoViews, Converted,
    NeedsTheTrainer, WithoutGradients, ManualOptimisation, WithMetrics, PredictsOnly,
]  # fmt: skip
LAYERS = ["net.0:input", "net.1", "net.2"]


def fit(model: pl.LightningModule, tmp_path: Path, **options: Any) -> LIBCallback:
    callback = LIBCallback(options.pop("node_layers", LAYERS), every_n_validations=1, **options)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[callback], default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model)
    return callback


def importances(graph: InteractionGraph | None) -> dict[str, Tensor]:
    assert graph is not None
    return {name: basis.importance for name, basis in graph.bases.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(x.shape == y.shape and bool(torch.allclose(x, y, rtol=1e-4)) for x, y in zip(a.values(), b.values()))  # noqa: B905


@pytest.mark.parametrize("kind", MODELS)
def test_no_argument_is_needed(kind: Callable[[], Base], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = kind()
    callback = fit(model, tmp_path)
    assert callback.snapshots >= 2
    inputs = [model.x_of(batch) for batch in model.batches]
    expected = compute_interaction_graph(model.net, inputs, ["0:input", "1", "2"])
    assert same(importances(callback.graph), importances(expected))
    assert len([line for line in caplog.messages if "the model is called as" in line]) == 1
    assert callback.graph.model_call == callback.state.call  # type: ignore[union-attr]
    assert callback.graph.info[NUM_SAMPLES] == 3 * N  # type: ignore[union-attr]


def test_weights_are_the_same_as_without_the_callback(tmp_path: Path) -> None:
    class Trained(WithMetrics):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(self.net(batch[0]))

    with_callback, without = Trained(), Trained()
    fit(with_callback, tmp_path)
    trainer = pl.Trainer(
        max_epochs=2, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(without)
    for a, b in zip(with_callback.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert trainer.callback_metrics["accuracy"] == with_callback.trainer.callback_metrics["accuracy"]


class Autoencoder(Base):
    """Two modules one after another, with code of its own in between."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 3), nn.Linear(3, D)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        code = self.encoder(batch[0] * 2).tanh()
        return self.loss(self.decoder(code) - batch[0])


class AutoencoderWithForward(Autoencoder):
    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize("given", [False, True])
def test_a_step_that_calls_several_modules_is_the_forward_pass(
    given: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Autoencoder()
    callback = fit(model, tmp_path, node_layers=["input", "output"] if given else None)
    assert "from the input of 'encoder' to the output of 'decoder'" in caplog.text
    assert callback.state.node_layers[0] == "input"
    assert callback.state.node_layers[-1] == "output"
    other = AutoencoderWithForward()
    other.load_state_dict(model.state_dict())
    inputs = [batch[0] * 2 for batch in model.batches]
    expected = compute_interaction_graph(
        other, inputs, ["encoder:input", *callback.state.node_layers[1:-1], "output"], input_fn=lambda batch: batch
    )
    assert same(importances(callback.graph), importances(expected))


class Windows(Base):
    """A step that cuts each series of a batch into windows, which are what the model predicts from."""

    def batch_of(self, x: Tensor, y: Tensor) -> Any:
        return {"series": torch.randn(N, 3 * D), "extra": y}

    def forward(self, windows: dict[str, Tensor]) -> Tensor:
        return self.net(windows["inside"])

    def windows_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"inside": batch["series"].unfold(1, D, D).flatten(0, 1)}

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(self.windows_of(batch)))


def test_a_step_that_divides_samples_is_refused_with_a_way_that_works(tmp_path: Path) -> None:
    with pytest.raises(LIBError, match=f"computes {3 * N} rows of {N} samples .* LIBCallback\\(dataloader=batches, in"):
        fit(Windows(), tmp_path, node_layers=None)
    model = Windows()
    batches = [model.windows_of(batch) for batch in model.batches]
    callback = fit(model, tmp_path, node_layers=None, dataloader=batches, input_fn=lambda batch: (batch,))
    assert callback.graph is not None
    assert callback.graph.info[NUM_SAMPLES] == 9 * N
    assert [basis.n_features > 0 for basis in callback.graph.bases.values()] == [True] * 3


def test_input_fn_comes_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ForwardOfX()
    callback = fit(model, tmp_path, input_fn=lambda batch: batch[0] + 1)
    assert "with the arguments that input_fn returns" in caplog.text
    expected = compute_interaction_graph(model.net, [batch[0] + 1 for batch in model.batches], ["0:input", "1", "2"])
    assert same(importances(callback.graph), importances(expected))


def test_what_cannot_be_called_is_refused_with_two_lines_to_paste(tmp_path: Path) -> None:
    class Opaque(Base):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return self.net(a + b + c)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(Exception, match=r"Say how to call forward\(a(.|\n)*input_fn=lambda batch: ") as error:
        fit(Opaque(), tmp_path)
    assert len(str(error.value).splitlines()) <= 5


def test_a_failing_collection_never_ends_a_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Strange:
        """Cannot be copied any more once training has begun."""

        armed = False

        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __copy__(self) -> Any:
            if Strange.armed:
                raise RuntimeError("do not touch")
            return Strange(self.x)

    class Model(Base):
        def batch_of(self, x: Tensor, y: Tensor) -> Any:
            return Strange(x)

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(self.net(batch.x))

        def on_train_start(self) -> None:
            Strange.armed = True

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    try:
        callback = fit(Model(), tmp_path)
        assert callback.snapshots == 0 or callback.graph is not None
    finally:
        Strange.armed = False
    assert len([line for line in caplog.messages if "No samples for snapshots are collected" in line]) == 1


# The property: whatever the structure of batches and the style of the step, no argument gives the same as input_fn.

KEYS = ["x", "other", "weights", "scalar", "names", "none", "y"]


def _entries(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {
        "x": x,
        "other": torch.ones(len(x), 2),
        "weights": torch.tensor([0.2, 0.3, 0.5]),
        "scalar": torch.tensor(2.0),
        "names": [str(i) for i in range(len(x))],
        "none": None,
        "y": y,
    }


@dataclasses.dataclass
class Box:
    entries: dict[str, Any]

    def to(self, device: Any) -> Box:
        return self


def _pack(kind: str, order: list[str], entries: dict[str, Any]) -> Any:
    values = [entries[key] for key in order]
    found = {key: entries[key] for key in order}
    return {
        "tuple": tuple(values), "list": values, "dict": found, "nested": (values, {"more": found}), "box": Box(found),
    }[kind]  # fmt: skip


def _unpack(kind: str, order: list[str], batch: Any) -> dict[str, Any]:
    if kind in ("tuple", "list"):
        return dict(zip(order, batch, strict=True))
    return {"dict": lambda: batch, "nested": lambda: batch[1]["more"], "box": lambda: batch.entries}[kind]()


STYLES: dict[str, Callable[[Any, dict[str, Any], Any], Any]] = {
    "forward": lambda model, found, batch: model(found["x"]),
    "forward method": lambda model, found, batch: model.forward(found["x"]),
    "module": lambda model, found, batch: model.net(found["x"]),
    "converted": lambda model, found, batch: model(found["x"] * found["scalar"]),
    "keyword": lambda model, found, batch: model(x=found["x"]),
    "no_grad": lambda model, found, batch: torch.no_grad()(lambda: model(found["x"]))(),
    "twice": lambda model, found, batch: (model.net(found["x"]), model.net(found["x"] + 1))[0],
    "several modules": lambda model, found, batch: model.net[2](model.net[1](model.net[0](found["x"]))),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[str], str, str, int]:
    kind = draw(st.sampled_from(["tuple", "list", "dict", "nested", "box"]))
    order = draw(st.permutations(KEYS))
    if kind in ("tuple", "list") and draw(st.booleans()):
        order = ["x", *[key for key in order if key != "x"]]
    step = draw(st.sampled_from(["validation_step", "training_step", "predict_step"]))
    return kind, order, draw(st.sampled_from(sorted(STYLES))), step, draw(st.sampled_from([2, 3, 5]))


def _model(kind: str, order: list[str], style: str, step: str, n: int) -> Base:
    class Generated(Base):
        def batch_of(self, x: Tensor, y: Tensor) -> Any:
            return _pack(kind, order, _entries(x[:n], y[:n]))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def run(self: Any, batch: Any, batch_idx: int) -> Tensor:
        out = STYLES[style](self, _unpack(kind, order, batch), batch)
        return out.square().mean()

    setattr(Generated, step, run)
    return Generated()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases())
def test_any_batch_and_any_step(case: tuple[str, list[str], str, str, int]) -> None:
    kind, order, style, _, n = case
    model = _model(*case)
    with torch.no_grad():
        scale = 2.0 if style == "converted" else 1.0
        expected = compute_interaction_graph(
            model, model.batches, LAYERS, input_fn=lambda b: _unpack(kind, order, b)["x"] * scale
        )
    graph = compute_interaction_graph(model, model.batches, LAYERS)
    assert same(importances(graph), importances(expected)), graph.info["settings"]["call"]
    assert graph.info[NUM_SAMPLES] == 3 * n
    again = compute_interaction_graph(model, model.batches, LAYERS, memory_limit=1e-4)
    assert same(importances(graph), importances(again)), "chunks of samples are the samples"


@pytest.mark.parametrize("kind", ["tuple", "dict", "box"])
def test_in_a_trainer(kind: str, tmp_path: Path) -> None:
    order = ["weights", "scalar", "names", "other", "x", "none", "y"]
    model = _model(kind, order, "converted", "validation_step", 3)
    callback = fit(model, tmp_path, num_samples=7)
    inputs = [_unpack(kind, order, batch)["x"] * 2 for batch in model.batches]
    expected = compute_interaction_graph(model, [torch.cat(inputs)[:7]], LAYERS)
    assert callback.graph is not None
    assert callback.graph.info[NUM_SAMPLES] == 7
    assert same(importances(callback.graph), importances(expected))
