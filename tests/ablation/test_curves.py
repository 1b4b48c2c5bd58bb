"""The public functions: results, errors, all kinds of batches and models, and the model unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import MaskedLMOutput, Seq2SeqLMOutput

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.ablation import (
    EdgesRequiredResult,
    accuracy,
    edge_ablation_curve,
    edges_required,
    log_likelihood,
    node_ablation_curve,
)
from lib_lightning.dictionaries import TopKSAE
from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError
from lib_lightning.model.batch import first_tensor
from tests import reference
from tests.ablation.test_interventions import activations_of, counts_of, graph_of, maps_of
from tests.cases import Case
from tests.conftest import CASES
from tests.integration.models import gpt2, tokens
from tests.integration.oracle import randomize
from tests.integration.state_check import Shared, StateCheck
from tests.integration.test_stateful_models import KINDS, LAYERS, mlp

SECTION = ("1", "2")


def labelled(model: nn.Module, n: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4).double()
    with torch.no_grad():
        return x, model(x).argmax(-1)


def first_output(output: Tensor, batch: Any) -> Tensor:
    return output.flatten(1)[:, 0]


def ask_all(
    model: nn.Module, batches: list[Any], graph: InteractionGraph, score: Any = accuracy, **options: Any
) -> Any:
    """Every public function once."""
    section = graph.node_layers[1], graph.node_layers[2]
    return (
        node_ablation_curve(model, batches, graph, score, graph.node_layers[1], **options),
        edge_ablation_curve(model, batches, graph, score, section, **options),
        {k: (v.count, v.score, v.curve) for k, v in edges_required(model, batches, graph, score, **options).items()},
    )


def test_curves_are_means_of_the_transcription(case: Case) -> None:
    graph, a, maps = graph_of(case, "pca"), activations_of(case), maps_of(graph_of(case, "pca"))
    options = {"input_fn": case.input_fn, "mask": case.mask}

    def score(output: Any, batch: Any) -> Tensor:
        last = graph.node_layer_specs()[-1].read([first_tensor(output)])
        return last.flatten(1).square().mean(1)

    for l, (section, E) in enumerate(graph.edges.items()):
        counts = sorted({0, E.numel() // 3, E.numel()})
        curve = edge_ablation_curve(case.model, case.batches(7, 11), graph, score, section, counts, **options)
        for k in counts:
            kept = torch.zeros(E.numel(), dtype=torch.bool)
            kept[E.flatten().argsort(descending=True, stable=True)[:k]] = True
            expected = reference.edge_ablation(a, case.sections, l, maps, kept.view_as(E), counts_of(case))
            assert curve[k] == pytest.approx(float(expected.square().mean()), rel=1e-9)


def test_results_of_edges_required() -> None:
    model = randomize(mlp())
    with torch.no_grad():  # equally frequent classes
        model[4].bias -= model(torch.randn(100, 4).double()).mean(0)
    batches = [labelled(model), labelled(model, 13)]
    graph = compute_interaction_graph(model, batches, LAYERS)
    found = edges_required(model, batches, graph, accuracy, tolerance=0.05)
    assert list(found) == list(graph.edges)
    for section, answer in found.items():
        E = graph.edges[section]
        assert isinstance(answer, EdgesRequiredResult)
        assert answer.unablated == 1.0
        assert answer.mask.shape == E.shape
        assert answer.mask.dtype == torch.bool
        assert answer.mask.sum() == answer.count
        assert 0 < answer.count < E.numel()
        assert E[answer.mask].min() >= E[~answer.mask].max()
        assert answer.score == answer.curve[answer.count] >= 0.95
        assert list(answer.curve) == sorted(answer.curve)
        assert all(s >= 0.95 for k, s in answer.curve.items() if k >= answer.count)
        again = edge_ablation_curve(model, batches, graph, accuracy, section, list(answer.curve))
        assert again == answer.curve
    one = edges_required(model, batches, graph, accuracy, 0.05, [SECTION], "bisection")
    assert list(one) == [SECTION]
    assert one[SECTION].score >= 0.95
    tried = edge_ablation_curve(model, batches, graph, accuracy, SECTION, "bisection", 0.05)
    assert tried == one[SECTION].curve


def test_directions_outside_of_the_basis_may_be_required() -> None:
    # The graph was computed on data that vary along a single direction.
    model, x = randomize(mlp()), torch.randn(60, 4).double()
    with torch.no_grad():
        batch = x, model(x).argmax(-1)
    line = torch.randn(30, 1).double() * torch.ones(4).double()
    graph = compute_interaction_graph(model, [line], LAYERS)
    assert graph.bases["input"].n_features == 1
    section = ("input", "1")
    for search in ("scan", "bisection"):
        answer = edges_required(model, [batch], graph, accuracy, 0.01, [section], search)[section]
        assert answer.count is None
        assert answer.mask.all()
        assert answer.score == answer.curve[answer.mask.numel()] < 0.99


def test_score_of_the_user_and_dict_batches() -> None:
    case = CASES["dict_input"]
    graph = graph_of(case, "lib")
    with torch.no_grad():
        expected = first_output(case.model(**case.data), case.data)
    seen: list[Any] = []

    def score(output: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        assert not torch.is_grad_enabled()
        return output[:, 0]

    curve = node_ablation_curve(case.model, case.batches(7), graph, score, "head:input", [0, 2])
    assert curve[2] == pytest.approx(float(expected.mean()), abs=1e-12)
    assert all(set(batch) == {"left", "right"} for batch in seen)
    assert {len(batch["left"]) for batch in seen} == {7, 2}, "each sample has the same weight"


@pytest.mark.parametrize(
    ("score", "error", "match"),
    [
        (lambda output, batch: output, LIBError, r"one number for each of the 40 samples of a batch; got shape"),
        (lambda output, batch: output.mean(), LIBError, r"got shape \(\)"),
        (lambda output, batch: 0.5, LIBError, "got float"),
        (lambda output, batch: output[:, 0] * math.nan, NotFiniteError, "NaN or infinite"),
        (lambda output, batch: output[:, 0].log(), NotFiniteError, "NaN or infinite"),
    ],
)
def test_bad_scores_are_refused(score: Any, error: type[Exception], match: str) -> None:
    model = randomize(mlp())
    batch = labelled(model)
    graph = compute_interaction_graph(model, [batch], LAYERS)
    found = StateCheck(model)
    with pytest.raises(error, match=match):
        node_ablation_curve(model, [batch], graph, score, "1")
    found.assert_same()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tolerance": -1}, "tolerance must be at least 0; got -1"),
        ({"tolerance": math.nan}, "tolerance must be at least 0; got nan"),
        ({"attack": "PGD"}, "attack must be one of 'random', 'pgd'; got 'PGD'. Did you mean 'pgd'?"),
        ({"search": "corse"}, "search must be one of .* Did you mean 'coarse'?"),
        ({"sections": ("input", "output")}, "no section 'input'.*: sections is a list of them"),
    ],
)
def test_wrong_settings_of_edges_required(options: dict[str, Any], match: str) -> None:
    model, x = nn.Linear(3, 2), torch.randn(9, 3)
    graph = compute_interaction_graph(model, [x], ["input", "output"])
    with pytest.raises(LIBError, match=match):
        edges_required(model, [(x, model(x).argmax(-1))], graph, accuracy, **options)


def test_graphs_of_other_models_are_refused() -> None:
    model = randomize(mlp())
    batch = labelled(model)
    graph = compute_interaction_graph(model, [batch], LAYERS)
    with pytest.raises(NodeLayerError, match="no node layer '3'; it has 'input'"):
        node_ablation_curve(model, [batch], graph, accuracy, "3")
    for section in (("1", "output"), ("2", "1"), "1"):
        with pytest.raises(NodeLayerError, match="a section is a pair of consecutive node layers"):
            edge_ablation_curve(model, [batch], graph, accuracy, section)
        with pytest.raises(NodeLayerError, match="a section is a pair of consecutive node layers"):
            edges_required(model, [batch], graph, accuracy, sections=[section])
    with pytest.raises(ValueError, match="search must be one of 'scan', 'bisection', 'coarse'; got 'halving'"):
        edges_required(model, [batch], graph, accuracy, search="halving")
    with pytest.raises(ValueError, match="counts must be between 0 and 5"):
        node_ablation_curve(model, [batch], graph, accuracy, "1", [7])
    wider = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for ask in (
        lambda: node_ablation_curve(wider, [batch], graph, accuracy, "1"),
        lambda: edges_required(wider, [batch], graph, accuracy),
    ):
        with pytest.raises(NodeLayerError, match="'1' has width 6, but the model has 8 activations"):
            ask()
    with pytest.raises(NodeLayerError, match="has no module '1'"):
        node_ablation_curve(nn.Linear(4, 3).double(), [batch], graph, accuracy, "1")
    with pytest.raises(LIBError, match="no samples to score"):
        node_ablation_curve(model, [], graph, accuracy, "1")
    with pytest.raises(LIBError, match="no samples to score"):
        edges_required(model, [(batch[0][:0], batch[1][:0])], graph, accuracy)


def test_accuracy_and_log_likelihood() -> None:
    logits = torch.tensor([[[1.0, 3.0], [2.0, 0.0]], [[0.0, 1.0], [5.0, 5.0]]])
    labels = torch.tensor([[1, 1], [0, -100]])
    batch = {"labels": labels, "tokens": None}
    assert accuracy({"loss": torch.tensor(1.0), "logits": logits}, batch).tolist() == [0.5, 0.0]
    found = log_likelihood(logits, (None, labels))
    log_p = logits.double().log_softmax(-1)
    expected = [(log_p[0, 0, 1] + log_p[0, 1, 1]) / 2, log_p[1, 0, 0]]
    assert found.tolist() == pytest.approx([float(e) for e in expected])
    nothing = torch.full((2, 2), -100)
    assert accuracy(logits, (None, nothing)).tolist() == log_likelihood(logits, (None, nothing)).tolist() == [0, 0]
    assert accuracy(logits[:, 0], [None, labels[:, 0]]).tolist() == [1, 0]
    for bad in ({"x": labels}, (labels,), labels[0, 0], (None, labels[:, 0]), (None, "labels")):
        for score in (accuracy, log_likelihood):
            with pytest.raises(LIBError, match="Pass your own score function"):
                score(logits, bad)


def causal_language_model(kind: str) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=20))
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32))


@pytest.mark.parametrize("masked", [0, 4])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_labels_of_hugging_face_are_those_of_the_next_position(kind: str, masked: int) -> None:
    model, x = causal_language_model(kind).eval(), torch.randint(50, (6, 9))
    labels = x.clone()
    labels[:, :masked] = -100  # a prompt
    labels[0, -1] = -100
    batch = BatchEncoding({"input_ids": x, "labels": labels})
    with torch.no_grad():
        each = [model(a[None], labels=b[None]) for a, b in zip(x, labels, strict=True)]
    output = {"logits": torch.cat([one.logits for one in each])}
    found = log_likelihood(output, batch)
    assert found.tolist() == pytest.approx([-float(one.loss) for one in each], rel=1e-5)
    predicted = output["logits"][:, :-1].argmax(-1)
    valid = labels[:, 1:] >= 0
    assert torch.equal(accuracy(output, batch), (predicted.eq(x[:, 1:]) & valid).double().sum(1) / valid.sum(1))


def test_labels_that_are_not_the_input_are_those_of_the_same_position() -> None:
    logits, x = torch.randn(4, 7, 50), torch.randint(50, (4, 7))
    masked = x.clone()
    masked[:, 2:4] = 0  # as in a masked language model: labels where the input has been hidden
    hidden = torch.where(masked == x, -100, x)
    translated = (x + 1) % 50
    for batch in (
        {"input_ids": masked, "labels": hidden}, {"input_ids": x, "labels": translated}, {"labels": x}, (x, x),
    ):  # fmt: skip
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        valid = labels >= 0
        expected = ((logits.argmax(-1) == labels) & valid).double().sum(1) / valid.sum(1)
        assert torch.equal(accuracy(logits, batch), expected)
    # Models that copy: a decoder that is given what comes before, and one that sees all positions.
    batch: Any = {"input_ids": x, "labels": x}
    expected = (logits.argmax(-1) == x).double().mean(1)
    copied = Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=torch.randn(4, 7, 8))
    assert torch.equal(accuracy(copied, batch), expected)
    assert torch.equal(accuracy(MaskedLMOutput(logits=logits), batch), expected)
    # Several labels at each position.
    books = {"input_ids": x[:, None], "labels": x[:, None]}
    assert torch.equal(accuracy(logits[:, None], books), expected)

    class Keyed:
        """A batch with keys, of which Python does not know what it contains."""

        def keys(self) -> list[str]:
            return list(batch)

        def __getitem__(self, key: str) -> Tensor:
            return batch[key]

    shifted = (logits[:, :-1].argmax(-1) == x[:, 1:]).double().mean(1)
    assert torch.equal(accuracy(logits, Keyed()), shifted)
    single = {"input_ids": x[:, :1], "labels": x[:, :1]}
    assert torch.equal(accuracy(logits[:, :1], single), (logits[:, 0].argmax(-1) == x[:, 0]).double())


def test_a_single_sample_has_no_bounds() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(1, 4).double()
    graph = compute_interaction_graph(model, [torch.randn(30, 4).double()], ["input", "1", "output"])
    found = edges_required(model, [(x, torch.tensor([1]))], graph, log_likelihood, 0.1)["1", "output"]
    assert math.isnan(found.error)
    assert found.count is not None
    assert found.bounds == (None, None)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm.*is deprecated:FutureWarning")
def test_models_are_unchanged(make: Callable[[], nn.Module]) -> None:
    model, x = randomize(make()), torch.randn(20, 4).double()
    model.train()
    if any(p.requires_grad for p in model.parameters()):
        model(x).sum().backward()
    batch = (x, torch.randint(0, 3, (20,)))
    graph = compute_interaction_graph(model, [batch], LAYERS)
    found, data = StateCheck(model), [t.clone() for t in batch]
    ask_all(model, [batch], graph)
    found.assert_same()
    assert all(torch.equal(a, b) for a, b in zip(batch, data, strict=True))


def test_dropout_and_training_mode_change_no_scores() -> None:
    dropping = randomize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)))
    batch = (torch.randn(20, 4).double(), torch.randint(0, 3, (20,)))
    graph = compute_interaction_graph(dropping, [batch], ["input", "1", "output"])
    training = ask_all(dropping.train(), [batch], graph)
    assert ask_all(dropping.eval(), [batch], graph) == training


def test_hooks_of_the_user_still_run() -> None:
    model = randomize(mlp())
    batch = labelled(model)
    graph = compute_interaction_graph(model, [batch], LAYERS)
    plain = ask_all(model, [batch], graph, first_output)
    calls = Shared(pre=0, first=0, last=0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    model.register_forward_pre_hook(count("pre"))
    model[0].register_forward_hook(count("first"))
    model[4].register_forward_hook(count("last"))
    found = StateCheck(model)
    assert ask_all(model, [batch], graph, first_output) == plain
    found.assert_same()
    assert calls["pre"] == calls["first"] > calls["last"] > 0, "some passes end before the last module"
    # A hook that changes activations is part of the model.
    handle = model[0].register_forward_hook(lambda _, args, output: output * 2)
    doubled = ask_all(model, [batch], graph, first_output)
    assert doubled != plain
    handle.remove()
    assert ask_all(model, [batch], graph, first_output) == plain


class Stubborn(nn.Module):
    """Handles exceptions of its layers in various ways, or relies on reaching the end of forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.net, self.busy = kind, mlp(), False

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tries":
            try:
                return self.net(x)
            except Exception:
                return torch.zeros(len(x), 3).double()
        if self.kind == "catches all":
            try:
                return self.net(x)
            except BaseException:
                return torch.zeros(len(x), 3).double()
        if self.kind == "tries again":
            try:
                return self.net(x)
            except BaseException:
                return self.net(x)
        if self.kind == "fails":
            try:
                return self.net(x)
            except BaseException as error:
                raise ValueError("something is wrong") from error
        if self.busy:
            raise RuntimeError("busy")
        self.busy = True
        x = self.net(x)
        self.busy = False
        return x


@pytest.mark.parametrize("kind", ["tries", "catches all", "tries again", "fails", "busy"])
def test_models_that_catch_all_exceptions(kind: str) -> None:
    model = randomize(Stubborn(kind))
    batch = labelled(model.net)
    plain = compute_interaction_graph(model.net, [batch], LAYERS)
    expected = ask_all(model.net, [batch], plain, first_output)
    graph = compute_interaction_graph(model, [batch], ["input", "net.1", "net.2", "output"])
    found = StateCheck(model)
    nodes, edges, required = ask_all(model, [batch], graph, first_output)
    found.assert_same()
    assert nodes == pytest.approx(expected[0], abs=1e-12)
    assert edges == pytest.approx(expected[1], abs=1e-12)
    assert [answer[0] for answer in required.values()] == [answer[0] for answer in expected[2].values()]


def test_language_model_of_another_library() -> None:
    model = gpt2().train()
    inputs = tokens(12, 5)
    labels = torch.cat([inputs[:, 1:], torch.full((12, 1), -100)], 1)
    batches = [{"input_ids": inputs[:7], "labels": labels[:7]}, {"input_ids": inputs[7:], "labels": labels[7:]}]

    def input_fn(batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "use_cache": False}

    layers = ["transformer.h.0.ln_2:input", "transformer.h.1.ln_1:input", "transformer.ln_f:input", "output"]
    graph = compute_interaction_graph(model, batches, layers, input_fn=input_fn)
    found = StateCheck(model)
    answers = edges_required(model, batches, graph, log_likelihood, 0.01, input_fn=input_fn)
    found.assert_same()
    with torch.no_grad():
        logits = model.eval()(inputs).logits.log_softmax(-1)
    score = float(logits[:, :-1].gather(-1, inputs[:, 1:, None]).mean())
    for answer in answers.values():
        assert answer.unablated == pytest.approx(score, abs=1e-12)
        assert answer.count is not None
        assert answer.score >= score - 0.01
    middle = node_ablation_curve(model, batches, graph, log_likelihood, layers[1], "every", input_fn=input_fn)
    assert middle[graph.bases[layers[1]].n_features] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("name", ["mlp_tanh", "transformer", "padded"])
def test_memory_limits_do_not_change_scores(name: str) -> None:
    case = CASES[name]
    graph = graph_of(case, "lib")
    options = {"input_fn": case.input_fn, "mask": case.mask}
    nodes, edges, required = ask_all(case.model, case.batches(13), graph, first_output, **options)
    for part in (0, 4e-5):  # enough for none, or some of the batches
        found = ask_all(case.model, case.batches(13), graph, first_output, memory_limit=part, **options)
        # Rows that are computed together depend on what is kept, and the order of sums on these.
        assert found[0] == pytest.approx(nodes, rel=1e-12)
        assert found[1] == pytest.approx(edges, rel=1e-12)
        for section, (count, score, curve) in required.items():
            assert found[2][section][0] == count
            assert found[2][section][1:] == (pytest.approx(score, rel=1e-12), pytest.approx(curve, rel=1e-12))


def test_another_precision() -> None:
    model = randomize(mlp())
    batch = labelled(model)
    graph = compute_interaction_graph(model, [batch], LAYERS)
    found = StateCheck(model)
    exact, rounded = (ask_all(model, [batch], graph, first_output, dtype=dtype) for dtype in (None, torch.float32))
    found.assert_same()
    assert rounded[0] != exact[0]
    assert rounded[0] == pytest.approx(exact[0], abs=1e-5)
    assert rounded[1] == pytest.approx(exact[1], abs=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_whose_order_of_memory_the_model_relies_on(memory_format: torch.memory_format) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Linear(27, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.conv(x))
            if memory_format is torch.channels_last:
                h = h.permute(0, 2, 3, 1)
            return self.head(h.view(len(h), -1))  # no copy: fails in the other order

    model = Flat().double().to(memory_format=memory_format)
    x = torch.randn(40, 2, 4, 4).double().contiguous(memory_format=memory_format)
    batch = x, model(x).argmax(-1)
    graph = compute_interaction_graph(model, [batch], ["input", "conv", "act", "output"], basis="pca")
    curve = node_ablation_curve(model, [batch], graph, accuracy, "conv", [0, 3])
    assert curve[3] == 1  # all three directions
    assert curve[0] < 1
    ask_all(model, [batch], graph)


def test_batches_may_come_from_a_generator() -> None:
    model = randomize(mlp())
    batch = labelled(model)
    graph = compute_interaction_graph(model, [batch], LAYERS)
    assert ask_all(model, [batch], graph)[0] == node_ablation_curve(model, iter([batch]), graph, accuracy, "1")


def test_bisection_reaches_all_edges_between_more_latents_than_dimensions() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(60, 6).double()
    batches = [(x, model(x).argmax(-1))]
    directions = [nn.functional.normalize(torch.randn(24, 4), dim=1).double() for _ in range(2)]
    saes = {
        name: TopKSAE(W.T, torch.zeros(24).double(), W, torch.zeros(4).double(), k=6)
        for name, W in zip(("1", "3"), directions, strict=True)
    }
    graph = compute_interaction_graph(model, batches, ["1", "3", "output"], dictionaries=saes)
    # (4 + 1)^2 numbers would not be enough.
    assert graph.edges["1", "3"].numel() > 25
    found = edges_required(model, batches, graph, log_likelihood, 1e-6, [("1", "3")], "bisection")["1", "3"]
    assert found.count is not None
    assert found.count > 25
