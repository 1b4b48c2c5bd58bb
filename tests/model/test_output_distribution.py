"""What an output stands for: how it is found out, and its Fisher information."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lib_lightning import compute_interaction_graph
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.output_distribution import OutputDistribution, agree, find_output_distribution
from tests import reference

KINDS = ["categorical", "bernoulli", "gaussian"]


@pytest.mark.parametrize("kind", KINDS)
def test_factor_and_sum_are_those_of_the_fisher_information(kind: str) -> None:
    distribution = OutputDistribution(kind)
    a = 3 * torch.randn(6, 5).double()
    F_x = torch.stack([reference.fisher_information(row, kind) for row in a])
    columns = [distribution.factor(a)(e.expand_as(a)) for e in torch.eye(5).double()]
    R = torch.stack(columns, -1)
    torch.testing.assert_close(R @ R.mT, F_x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(distribution.fisher_sum(a), F_x.sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_that_of_torch_and_has_the_fisher_information_as_its_hessian(kind: str) -> None:
    distribution = OutputDistribution(kind)
    a, v = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    made = {
        "categorical": lambda x: torch.distributions.Categorical(logits=x),
        "bernoulli": lambda x: torch.distributions.Independent(torch.distributions.Bernoulli(logits=x), 1),
        "gaussian": lambda x: torch.distributions.Independent(torch.distributions.Normal(x, 1), 1),
    }[kind]
    expected = torch.distributions.kl_divergence(made(a), made(a + v))
    torch.testing.assert_close(distribution.divergence(a, a + v), expected, rtol=1e-10, atol=1e-12)
    small = 1e-4 * v
    F_x = torch.stack([reference.fisher_information(row, kind) for row in a])
    quadratic = torch.einsum("ni,nij,nj->n", small, F_x, small) / 2
    torch.testing.assert_close(distribution.divergence(a, a + small), quadratic, rtol=1e-3, atol=0)


def test_extreme_logits_stay_finite() -> None:
    a = torch.tensor([[200.0, -200.0, 0.0]])
    for kind in KINDS:
        distribution = OutputDistribution(kind)
        assert torch.isfinite(distribution.factor(a)(torch.ones_like(a))).all()
        assert torch.isfinite(distribution.fisher_sum(a)).all()
        assert torch.isfinite(distribution.divergence(a, a.flip(1))).all()


class Net(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def module(package: Any, loss: Any, outputs: int, squeeze: bool = False) -> nn.Module:
    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(outputs)

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            out = self.net(x)
            return loss(out.squeeze(-1) if squeeze else out, y)

    return Module()


X = torch.randn(8, 4)
INTEGERS, NUMBERS, BITS = torch.randint(0, 3, (8,)), torch.randn(8, 3), torch.randint(0, 2, (8, 3)).float()


@pytest.mark.parametrize("package", [lightning, pytorch_lightning])
@pytest.mark.parametrize(
    ("loss", "target", "squeeze", "kind"),
    [
        (F.cross_entropy, INTEGERS, False, "categorical"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), INTEGERS, False, "categorical"),
        (lambda a, y: F.nll_loss(a.log_softmax(-1), y), INTEGERS, False, "categorical"),
        (F.mse_loss, NUMBERS, False, "gaussian"),
        (nn.SmoothL1Loss(), NUMBERS, False, "gaussian"),
        (nn.HuberLoss(), NUMBERS[:, 0], True, "gaussian"),
        # Integers in the batch alone would mean classes.
        (lambda a, y: F.mse_loss(a, y[:, None].float()), INTEGERS, False, "gaussian"),
        (F.binary_cross_entropy_with_logits, BITS, False, "bernoulli"),
        (nn.BCEWithLogitsLoss(), BITS[:, 0], True, "bernoulli"),
    ],
)
def test_the_loss_of_a_step_decides(package: Any, loss: Any, target: Tensor, squeeze: bool, kind: str) -> None:
    model = module(package, loss, 1 if squeeze or (target is INTEGERS and kind == "gaussian") else 3, squeeze)
    found = found_for(model, (X, target))
    assert found is not None
    assert found.kind == kind
    assert not found.is_guess
    assert "loss" in found.reason


def found_for(model: nn.Module, batch: Any, setting: Any = "auto") -> OutputDistribution | None:
    instrumented = InstrumentedModel(model, [], ModelSpec())
    with model_session(instrumented):
        return find_output_distribution(instrumented, batch, setting)


@pytest.mark.parametrize(
    ("model", "batch", "kind", "is_guess"),
    [
        (Net(3), (X, INTEGERS), "categorical", False),
        (Net(3), {"x": X, "label": INTEGERS}, "categorical", False),
        (Net(3), (X, NUMBERS), "gaussian", False),
        (Net(1), (X, NUMBERS[:, 0]), "gaussian", False),
        (Net(3), (X, BITS), "bernoulli", False),
        (Net(1), (X, BITS[:, 0].bool()), "bernoulli", False),
        (Net(3), X, "categorical", True),
        (Net(1), X, "gaussian", True),
        # A second input that looks like a target is none.
        (nn.Bilinear(4, 4, 4), (X, torch.randn(8, 4)), "categorical", True),
        (nn.Conv2d(1, 3, 1), (torch.randn(8, 1, 5, 5), torch.randint(0, 3, (8, 5, 5))), "categorical", False),
    ],
)
def test_labels_in_the_batch_decide_next(model: nn.Module, batch: Any, kind: str, is_guess: bool) -> None:
    found = found_for(model, batch)
    assert found is not None
    assert (found.kind, found.is_guess) == (kind, is_guess)


def gpt2(**options: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=8, n_embd=16, n_layer=2, n_head=2, **options))


def bert(labels: int, problem: str | None = None) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_labels=labels, problem_type=problem,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (gpt2(), "categorical"),
        (bert(3), "categorical"),
        (bert(1), "gaussian"),
        (bert(3, "regression"), "gaussian"),
        (bert(3, "multi_label_classification"), "bernoulli"),
    ],
)
def test_configuration_of_hugging_face_models(model: nn.Module, kind: str) -> None:
    found = found_for(model, {"input_ids": torch.randint(0, 37, (4, 8))})
    assert found is not None
    assert (found.kind, found.is_guess) == (kind, False)


def test_settings() -> None:
    assert found_for(Net(3), X, "none") is None
    found = found_for(Net(3), (X, INTEGERS), "gaussian")
    assert found is not None
    assert found.kind == "gaussian"


def test_output_without_floating_point_numbers_has_no_distribution() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(-1)

    assert found_for(Classes(), X) is None
    graph = compute_interaction_graph(Classes(), [X], ["net.a", "net.b"])
    assert graph.info["output_distribution"] is None
    assert all(basis.output_importance is None for basis in graph.bases.values())
    with pytest.raises(ValueError, match="no tensor of floating-point numbers"):
        compute_interaction_graph(Classes(), [X], ["net.a", "net.b"], metric="output")


def test_step_leaves_state_as_it_was() -> None:
    model = module(lightning, F.cross_entropy, 3)
    model.net.a.register_buffer("seen", torch.zeros(()))

    def count(layer: nn.Module, *_: Any) -> None:
        layer.seen.add_(1)

    model.net.a.register_forward_hook(count)
    before = torch.random.get_rng_state()
    compute_interaction_graph(model, [(X, INTEGERS)], ["net.a", "net.b"])
    assert model.net.a.seen == 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_processes_agree() -> None:
    group = SimpleNamespace(
        gather=lambda t: [torch.tensor([], dtype=torch.int64), torch.tensor([2, 7, 3, 0]), torch.tensor([0, 7, 3, 0])],
        broadcast=list,
    )
    found = agree(OutputDistribution("categorical", "by its labels"), group)
    assert found is not None
    assert (found.kind, found.width) == ("gaussian", 7)
    assert agree(None, SimpleNamespace(gather=lambda t: [t, t], broadcast=list)) is None
