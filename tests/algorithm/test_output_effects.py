"""Which outputs features raise and lower: against editing one feature after another, and closed forms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.output_changes import TOP, OutputEffects, chosen_samples
from lib_lightning.algorithm.output_derivatives import differentiate_output
from lib_lightning.algorithm.output_effects import find_output_effects
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.interventions import edit_features
from lib_lightning.io.basis_format import EFFECT_SAMPLES, NOTES
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution
from tests.algorithm.test_effort import gpt2, llama
from tests.cases import Case


def by_editing(
    run: Callable[[], Tensor],
    model: nn.Module,
    graph: InteractionGraph,
    layer: str,
    length: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Changes of all outputs and their errors, ``(r, D)``, by moving one feature after another.

    Args:
        run: Returns the outputs ``(n, D)``: means over positions.
        model: The model.
        graph: Its graph.
        layer: A node layer.
        length: Length of the steps in standard deviations; short ones make derivatives.
        options: Those of `edit_features`.
    """
    changes, errors = [], []
    for j, variance in enumerate(graph.bases[layer].importance.tolist()):
        z, step = [], length * variance**0.5
        for sign in (1, -1):
            with (
                torch.no_grad(),
                edit_features(model, graph, {(layer, j): lambda f, step=sign * step: f + step}, **options),
            ):
                z.append(run())
        d = (z[0] - z[1]) / (2 * length)
        changes.append(d.mean(0))
        errors.append(d.std(0) / len(d) ** 0.5)
    return torch.stack(changes), torch.stack(errors)


def assert_top(graph: InteractionGraph, layer: str, changes: Tensor, errors: Tensor, tolerance: float = 1e-6) -> None:
    """The effects of a node layer are the largest and smallest of all changes, with their errors."""
    found = graph.output_effects[layer]
    k = min(TOP, changes.shape[1])
    for sign, start in ((1, 0), (-1, TOP)):
        expected = (sign * changes).topk(k).values
        columns = slice(start, start + k)
        outputs, values = found.outputs[:, columns].long(), sign * found.changes[:, columns].double()
        is_found = outputs >= 0
        # Nothing is said of outputs that a feature does not raise (or lower).
        assert (expected[~is_found] < 1e-9).all()
        assert values.isnan().equal(~is_found)
        assert torch.allclose(values[is_found], expected[is_found], atol=tolerance)
        own = (sign * changes).gather(1, outputs.clamp(min=0))
        assert torch.allclose(values[is_found], own[is_found], atol=tolerance)
        assert torch.allclose(
            found.errors[:, columns].double()[is_found],
            errors.gather(1, outputs.clamp(min=0))[is_found],
            atol=tolerance,
        )
    assert (found.outputs[:, k:TOP] == -1).all()


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("by", ["steps", "derivatives"])
def test_equal_to_editing_one_feature_after_another(case: Case, kind: Any, by: str) -> None:
    graph = compute_interaction_graph(
        case.model, [case.data], case.node_layers, input_fn=case.input_fn, mask=case.mask, effort="exact",
        output_distribution=kind,
    )  # fmt: skip
    args, kwargs = ((), case.data) if isinstance(case.data, dict) else ((case.data,), {})
    if case.input_fn is not None:
        args, kwargs = case.input_fn(case.data), {}
    elif isinstance(case.data, tuple):
        args = case.data[:1]
    *layers, last = graph.node_layer_specs()
    is_output = last.taps == ("output",)

    def run() -> Tensor:
        y = first_tensor(case.model(*args, **kwargs))
        assert y is not None
        y = y[:, None] if y.ndim == 2 else y.flatten(2).transpose(1, 2) if y.ndim == 4 else y
        y = y[:, -1:] if is_output and last.positions == -1 else y
        y = y.log_softmax(-1) if kind == "categorical" else y
        valid = case.masks[-1].to(y) if case.masks else torch.ones(y.shape[:2]).to(y)
        return (y * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)

    assert list(graph.output_effects) == [layer.name for layer in layers] + [last.name] * (not is_output)
    length = 1.0
    if by == "derivatives":
        length, graph.output_effects = 1e-4, derivatives(case, graph, kind)
    for layer in graph.output_effects:
        assert_top(graph, layer, *by_editing(run, case.model, graph, layer, length, mask=case.mask))


def derivatives(case: Case, graph: InteractionGraph, kind: Any) -> dict[str, OutputEffects]:
    """Effects to first order, of all features, on all samples."""
    spec = ModelSpec(input_fn=case.input_fn, mask=case.mask)
    instrumented = InstrumentedModel(case.model, graph.node_layer_specs(), spec)
    bases = [basis for layer, basis in graph.bases.items() if layer in graph.output_effects]
    bases += list(graph.bases.values())[len(bases) :]
    wanted = [(basis, torch.arange(basis.n_features if basis.name in graph.output_effects else 0)) for basis in bases]
    with model_session(instrumented):
        width = instrumented.capture_to_output(case.data)[-1].a.shape[-1]
        output = OutputDistribution(kind, width=width)
        found = differentiate_output(instrumented, [case.data], wanted, output, 10_000, width, 2**12, SINGLE_PROCESS)
    assert found is not None
    return {basis.name: one for basis, one in zip(bases, found[0], strict=True) if basis.name in graph.output_effects}


class Noisy(nn.Sequential):
    """Draws random numbers, the same with and without an edit."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y * (1 + torch.rand_like(y))


class Mixed(nn.Sequential):
    """Mixes the samples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y - y.mean(0)


def test_a_linear_model_has_the_closed_form() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 7)).double(), torch.randn(40, 8).double()
    for kind in ("gaussian", "bernoulli"):
        graph = compute_interaction_graph(model, [x[:13], x[13:]], ["input", "0", "output"], output_distribution=kind)
        W = model[1].weight.detach()
        for layer, J in (("input", W @ model[0].weight.detach()), ("0", W)):
            basis = graph.bases[layer]
            changes = basis.importance.sqrt()[:, None] * basis.from_features @ J.T
            assert_top(graph, layer, changes, torch.zeros_like(changes))
        assert graph.info[EFFECT_SAMPLES] == 40


def test_planted_classes_are_found() -> None:
    """Each hidden unit raises one class and lowers another; of a unit that leads nowhere nothing is said."""
    raised, lowered = [4, 0, 7, 2], [1, 9, 3, 5]
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 10))
    model[2].weight.data.zero_()
    for j, (up, down) in enumerate(zip(raised, lowered, strict=True)):
        model[2].weight.data[up, j], model[2].weight.data[down, j] = 2.0, -2.0
    x = torch.randn(64, 5)
    graph = compute_interaction_graph(model, [x], ["1", "output"], basis="neuron", output_distribution="categorical")
    found = graph.output_effects["1"]
    assert found.outputs[:4, 0].tolist() == raised
    assert found.outputs[:4, TOP].tolist() == lowered
    assert (found.changes[:4, 0] > 10 * found.errors[:4, 0]).all()
    assert (found.outputs[4] == -1).all()


def test_models_whose_samples_cannot_be_repeated() -> None:
    x = torch.randn(20, 4).double()
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)
    plain, noisy, mixed = (kind(*layers).double() for kind in (nn.Sequential, Noisy, Mixed))
    options: dict[str, Any] = {"basis": "neuron", "output_distribution": "gaussian", "effort": "exact"}
    graphs = [compute_interaction_graph(model, [x], ["1", "output"], **options) for model in (plain, noisy)]
    plain_effects, noisy_effects = (graph.output_effects["1"] for graph in graphs)
    assert torch.allclose(noisy_effects.changes, 1.5 * plain_effects.changes, rtol=0.3, equal_nan=True)
    assert (noisy_effects.errors > plain_effects.errors)[~noisy_effects.errors.isnan()].all()
    graph = compute_interaction_graph(mixed, [x], ["0", "1"], **options)
    for layer in ("0", "1"):
        # Of all samples at once, from which the mean is taken: nothing is left of it.
        assert_top(graph, layer, *by_editing(lambda: mixed(x), mixed, graph, layer))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_most_important_features_of_a_model_for_which_all_take_too_long(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_OPERATIONS", 1e9)
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_DERIVATIVES", 0)
    model, tokens = make()
    model.eval()
    layers = ["transformer.h.0", "transformer.h.1"] if make is gpt2 else ["model.layers.0", "model.layers.1"]
    rng = torch.get_rng_state()
    options: dict[str, Any] = {"n_probes": 2, "n_pushed": 2, "skip_positions": 1}
    graph, again = (compute_interaction_graph(model, [tokens], layers, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), rng)
    (note,) = [note for note in graph.info[NOTES] if "raises" in note]
    for layer, found in graph.output_effects.items():
        assert torch.equal(found.changes.nan_to_num(), again.output_effects[layer].changes.nan_to_num())
        has_any = (found.outputs >= 0).any(1)
        measured = int(has_any.sum())
        assert 0 < measured < len(has_any)
        assert has_any[:measured].all(), "the most important ones"
        assert f"{2 * measured} of " in note
    assert f"on {graph.info[EFFECT_SAMPLES]} samples" in note
    n = graph.info[EFFECT_SAMPLES]
    some = tokens[torch.arange(n) * len(tokens) // n]
    expected = by_editing(lambda: model(some).logits.log_softmax(-1).mean(1), model, graph, layers[1])
    found = graph.output_effects[layers[1]]
    assert float(found.changes[0, 0]) == pytest.approx(float(expected[0][0].max()), rel=1e-3)


LAYERS = {"gpt2": ["transformer.wte", "transformer.h.0"], "llama": ["model.embed_tokens", "model.layers.0"]}


@pytest.mark.parametrize("name", LAYERS)
def test_language_models_have_effects_of_all_features_from_few_backward_passes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_OPERATIONS", 0)
    sizes = {"vocab_size": 600, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, n_positions=12)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24)),
    }[name]()
    model, tokens = model.double().eval(), torch.randint(600, (40, 12))
    graph = compute_interaction_graph(model, [tokens[:9], tokens[9:]], LAYERS[name], n_probes=4, n_pushed=4)
    assert not [note for note in graph.info[NOTES] if "raises" in note]
    batches = [tokens[:9], tokens[9:]]
    chosen = chosen_samples([9, 31], graph.info[EFFECT_SAMPLES], SINGLE_PROCESS)
    some = torch.cat([batches[i][torch.arange(n) * len(batches[i]) // n] for i, n in chosen])
    assert 4 <= len(some) <= 40
    # Llama computes its norms in float32, whose rounding shorter steps would show.
    for layer in LAYERS[name]:
        expected = by_editing(lambda: model(some).logits.log_softmax(-1).mean(1), model, graph, layer, length=3e-3)
        assert_top(graph, layer, *expected)


def test_few_valid_positions_and_batches_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_OPERATIONS", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 400)).double()
    batches = []
    for number in (1, 2, 0):
        tokens, mask = torch.randint(400, (4, 6)), torch.zeros(4, 6)
        mask[:, :number] = 1
        batches.append({"input": tokens, "attention_mask": mask})
    options: dict[str, Any] = {"mask": "attention_mask", "n_probes": 2, "n_pushed": 2}
    for some in (batches, batches[:1]):
        graph = compute_interaction_graph(
            model, some, ["0", "2"], **options, input_fn=lambda batch: batch["input"], output_distribution="categorical"
        )
        assert not [note for note in graph.info[NOTES] if "raises" in note]
        assert list(graph.output_effects) == ["0", "2"]


def test_half_precision_has_none_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_OPERATIONS", 0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 600)).bfloat16()
    graph = compute_interaction_graph(
        model, [torch.randn(40, 8).bfloat16()], ["input", "1"], n_probes=4, output_distribution="categorical"
    )
    assert not graph.output_effects
    assert any("in half precision" in note for note in graph.info[NOTES])


def test_an_output_that_is_no_linear_map_of_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of it, rather than something wrong, and why."""
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_OPERATIONS", 0)

    class Capped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = super().forward(x)
            return 3 * (z / 3).tanh()

    layers = nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 600)
    x = torch.randn(12, 8)  # fewer than directions
    for kind, is_found in ((nn.Sequential, True), (Capped, False)):
        graph = compute_interaction_graph(
            kind(*layers), [x], ["input", "1"], n_probes=4, output_distribution="categorical", effort="exact"
        )
        assert bool(graph.output_effects) == is_found
        assert any("is no linear map" in note for note in graph.info[NOTES]) != is_found


class WaitingError(Exception):
    """The other process has not come so far."""


class OneOfTwo(ProcessGroup):
    """One of two processes that run by turns, from the start each time: models cannot run in two threads at once."""

    size = 2

    def __init__(self, rank: int, said: tuple[list[list[Tensor]], list[list[Tensor]]]) -> None:
        self.rank, self.said, self.count = rank, said, 0

    def exchange(self, tensors: Any) -> list[list[Tensor]]:
        if self.count == len(self.said[self.rank]):
            self.said[self.rank].append(list(tensors))
        if self.count == len(self.said[1 - self.rank]):
            raise WaitingError
        self.count += 1
        return [said[self.count - 1] for said in self.said]

    def sum(self, tensors: Any) -> list[Tensor]:
        return [x + y for x, y in zip(*self.exchange(tensors), strict=True)]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensors[0] for tensors in self.exchange([tensor])]

    def broadcast(self, tensors: Any) -> list[Tensor]:
        return self.exchange(tensors)[0]


@pytest.mark.parametrize("directions", [None, 9])
def test_two_processes_and_one(directions: int | None) -> None:
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 12)).double(), torch.randn(200, 6).double()
    batches = [[x[:10], x[10:26], x[26:130]], [x[130:151], x[151:]]]
    graph = compute_interaction_graph(model, [x], ["input", "1", "output"])
    bases = list(graph.bases.values())
    features = [torch.arange(6), torch.tensor([0, 3]), torch.arange(0)]
    output = OutputDistribution("categorical", width=12)
    config = LIBConfig(effect_samples=70, effect_directions=directions)

    def found(own: list[Tensor], group: ProcessGroup) -> tuple[dict[str, OutputEffects], int]:
        instrumented = InstrumentedModel(model, as_node_layers(["input", "1", "output"]))
        with model_session(instrumented):
            instrumented.capture(own[0])
            return find_output_effects(instrumented, own, bases, features, output, config, 2**12, group)

    alone, n = found([*batches[0], *batches[1]], SINGLE_PROCESS)
    said: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])
    results: dict[int, tuple[dict[str, OutputEffects], int]] = {}
    while len(results) < 2:
        for rank in (0, 1):
            with contextlib.suppress(WaitingError):
                results[rank] = found(batches[rank], OneOfTwo(rank, said))
    for both, n_both in results.values():
        assert n == n_both == 70
        assert list(both) == list(alone) == ["input", "1"]
        for layer, one in alone.items():
            assert torch.equal(one.outputs, both[layer].outputs)
            assert torch.allclose(one.changes, both[layer].changes, equal_nan=True)
            assert torch.allclose(one.errors, both[layer].errors, equal_nan=True)
        assert (both["1"].outputs >= 0).any(1).nonzero()[:, 0].tolist() == [0, 3]


def test_samples_are_spread_over_batches() -> None:
    assert chosen_samples([10, 10], 100, SINGLE_PROCESS) == [(0, 10), (1, 10)]
    assert chosen_samples([32] * 64, 64, SINGLE_PROCESS) == [(16, 32), (48, 32)]
    assert chosen_samples([13, 27], 40, SINGLE_PROCESS) == [(0, 13), (1, 27)]
    assert chosen_samples([1] * 6, 3, SINGLE_PROCESS) == [(1, 1), (3, 1), (5, 1)]
    assert chosen_samples([], 3, SINGLE_PROCESS) == []


def test_none_where_the_meaning_of_the_output_is_unknown_and_with_a_saved_graph(tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3)
    assert not compute_interaction_graph(model, [x], ["1", "output"], output_distribution="none").output_effects
    graph = compute_interaction_graph(model, [x], ["1", "output"])
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors").output_effects["1"]
    assert torch.equal(loaded.outputs, graph.output_effects["1"].outputs)
