"""What an accelerator must show, in a few minutes: ``tests/benchmarks/on_device.sh``; on a machine without one, small.

Each step writes its rows as soon as it is done, to one JSON file and one Markdown table. A step that fails or runs out
of its time leaves a row that says so, and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lib_lightning
from lib_lightning import InteractionGraph, compute_interaction_graph, estimate_cost
from lib_lightning.algorithm.effort import FLOP_FORMULAS
from lib_lightning.api import propose_node_layers
from lib_lightning.model.agreement import length
from lib_lightning.model.precision import supports_float64
from lib_lightning.model.torch_internals import operations_observed
from recipes.modular_addition import AllPairs
from recipes.paper.networks import published_transformer
from recipes.pretrained_lm import find_blocks, quarters_of
from tests.integration import models
from tests.integration.oracle import RTOL, assert_exact, dense

Row = dict[str, Any]
# Shapes of SmolLM2-135M and GPT-2 small; on a CPU a few blocks of the same kind.
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
}  # fmt: skip
PROBES, PUSHED = 4, 16
SETTINGS: dict[str, Any] = {"n_probes": PROBES, "n_pushed": PUSHED, "rtol": 1e-4}


@dataclass
class Machine:
    """The device, and what steps find out about it.

    Attributes:
        device: Where models run.
        small: Whether this is a CPU, for which models and data are small.
        reference: Folder of published results, if it is there.
        weights: Folder of a pretrained language model, if it is there.
        rates: Operations per second of large products, by type.
    """

    device: torch.device
    small: bool
    reference: Path | None
    weights: Path | None
    rates: dict[str, float] = field(default_factory=dict)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """The result of some work, and how long it took."""
        self.synchronize()
        started = time.perf_counter()
        result = work()
        self.synchronize()
        return result, time.perf_counter() - started

    def peak(self, work: Callable[[], Any]) -> tuple[Any, float | None]:
        """The result of some work, and its peak memory on the device in GiB, beside what was there before."""
        if self.device.type != "cuda":
            return work(), None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        return work(), (torch.cuda.max_memory_allocated(self.device) - before) / 2**30

    def to(self, model: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
        """A model in evaluation mode and tensors on the device."""
        return (model.to(self.device).eval(), *(t.to(self.device) for t in tensors))


def rates(machine: Machine) -> Iterator[Row]:
    """Rate of large matrix products in each type."""
    size = 1024 if machine.small else 8192
    types = [torch.float32, *([torch.float64] if supports_float64(machine.device) else []), torch.bfloat16]
    for dtype in types:
        a = torch.randn(size, size, device=machine.device).to(dtype)
        a @ a
        spent = min(machine.seconds(lambda a=a: a @ a)[1] for _ in range(3))
        name = str(dtype).removeprefix("torch.")
        machine.rates[name] = 2 * size**3 / spent
        yield {"what": f"products of {size} x {size}, {name}", "TFLOP/s": machine.rates[name] / 1e12}


def published(machine: Machine) -> Iterator[Row]:
    """The authors' own results, from their weights, computed on the device."""
    if machine.reference is None:
        yield {"what": "published results", "note": "no folder of published results"}
        return
    dtype = torch.float64 if supports_float64(machine.device) else torch.float32
    data = AllPairs(113, train_fraction=0.3)
    for seed in (0, 1):
        model = published_transformer(machine.reference / f"modular_addition_seed{seed}_weights.safetensors")
        model, tokens = machine.to(model.to(dtype), data.tokens[: data.n_train])
        layers = ["embed", "mlp:input", "unembed:input", "output"]
        graph, spent = machine.seconds(
            lambda m=model, t=tokens, n=layers: compute_interaction_graph(m, t.split(1000), n, rtol=0, effort="exact")
        )
        theirs = load_file(machine.reference / f"modular_addition_seed{seed}_published.safetensors")
        # The first section includes directions of numerical noise.
        yield _compared(f"modular addition, seed {seed}", graph, theirs, range(1, 3)) | {"seconds": spent}
    W = load_file(machine.reference / "cifar10_mlp_weights.safetensors")
    perceptron = nn.Sequential(
        nn.Linear(3072, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    ).to(dtype)  # fmt: skip
    state = {f"{2 * k}.weight": W[f"layers.{k}.W"].mT for k in range(3)}
    perceptron.load_state_dict(state | {f"{2 * k}.bias": W[f"layers.{k}.b"] for k in range(3)})
    with np.load(machine.reference / "cifar10_part.npz") as arrays:
        images = torch.from_numpy(arrays["x_train"]).to(dtype).flatten(1) / 255
    model, images = machine.to(perceptron, images)
    layers = ["0:input", "2:input", "4:input", "output"]
    graph, spent = machine.seconds(
        lambda: compute_interaction_graph(model, images.split(1000), layers, rtol=0, effort="exact")
    )
    theirs = load_file(machine.reference / "cifar10_mlp_published_method.safetensors")
    yield _compared("CIFAR-10 perceptron", graph, theirs, range(3)) | {"seconds": spent}


def _compared(what: str, graph: InteractionGraph, theirs: dict[str, Tensor], sections: Sequence[int]) -> Row:
    """The largest deviations from published importances, relative to each, and edges, relative to the largest."""
    importances, edges = [], []
    for l in sections:
        basis, E = graph.bases[graph.node_layers[l]], list(graph.edges.values())[l]
        Lambda, published_E = theirs[f"lib.importance.{l}"], theirs[f"lib.edges.{l}"]
        r = int((Lambda > 1e-6 * Lambda[0]).sum())
        importances.append(float((basis.importance[:r] / Lambda[:r] - 1).abs().max()))
        rows, columns = (min(a, b) for a, b in zip(E.shape, published_E.shape, strict=True))
        difference = E[:rows, :columns] - published_E[:rows, :columns]
        edges.append(float(difference.abs().max() / published_E.max()))
    return {"what": f"published: {what}", "off by, importances": max(importances), "off by, edges": max(edges)}


def oracle(machine: Machine) -> Iterator[Row]:
    """Graphs computed on the device against finite differences of the model, computed on the CPU."""
    if not supports_float64(machine.device):
        yield {"what": "oracle", "note": "the device has no float64"}
        return
    x = models.tokens(4, 5)
    cases: dict[str, tuple[nn.Module, Any, list[str]]] = {
        "GPT-2": (models.gpt2(), {"input_ids": x}, ["transformer.h.0", "transformer.h.1", "lm_head"]),
        "ResNet": (
            models.resnet(), {"pixel_values": torch.randn(4, 2, 8, 8).double()}, ["resnet.embedder", "classifier"]
        ),
    }  # fmt: skip
    for name, (model, batch, layers) in cases.items():
        expected = dense(model, batch, layers)
        moved = {key: value.to(machine.device) for key, value in batch.items()}
        for setting in ("exact", "auto"):
            graph, spent = machine.seconds(
                lambda m=model, b=moved, n=layers, e=setting: compute_interaction_graph(
                    m.to(machine.device), [b], n, rtol=RTOL, effort=e
                )
            )
            assert_exact(graph, *expected)
        model.to("cpu")
        yield {"what": f"oracle: {name}", "within": 1e-6, "seconds": spent}


def synchronizations(machine: Machine) -> Iterator[Row]:
    """How often the host waits for the device, for few products and for many."""
    if machine.device.type != "cuda":
        yield {"what": "host waits for the device", "note": "counted on a CUDA device only"}
        return
    for S, d in ((4, 16), (16, 64)):
        model, x = machine.to(_gpt2(2, d, S), torch.randint(64, (4, S)))
        layers = ["transformer.h.0:input", "transformer.h.0", "transformer.h.1"]
        for options in ({"effort": "exact"}, {"n_probes": 4, "n_pushed": 4}):
            work = partial(compute_interaction_graph, model, [x], layers, **options)
            work()
            with _counted_waits() as waits:
                work()
            settings = "exact" if "effort" in options else "sampled"
            yield {"what": f"host waits, {S} positions of width {d}, {settings}", "count": len(waits)}


@contextmanager
def _counted_waits() -> Iterator[list[Any]]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        waits: list[Any] = []
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += [w for w in caught if "synchroniz" in str(w.message)]


def predictions(machine: Machine) -> Iterator[Row]:
    """Predicted seconds and measured ones, at default settings."""
    k = 1 if machine.small else 4
    conv = [nn.Conv2d(3, 8 * k, 3, padding=1), nn.ReLU(), nn.Conv2d(8 * k, 8 * k, 3, padding=1), nn.ReLU()]
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64 * k, intermediate_size=128 * k, num_hidden_layers=3, num_attention_heads=4
        )
    )
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "perceptron": (nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)),
                       torch.randn(2048, 64)),
        "convolutions": (nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * k, 10)),
                         torch.randn(64, 3, 16, 16)),
        "GPT-2 shape": (_gpt2(4, 64 * k, 64), torch.randint(64, (32, 16 * k))),
        "Llama shape": (llama, torch.randint(256, (32, 16 * k))),
    }  # fmt: skip
    for name, (model, x) in cases.items():
        model, x = machine.to(model, x[:8] if machine.small else x)
        layers = propose_node_layers(model, x)
        estimate, estimating = machine.seconds(lambda m=model, b=x, n=layers: estimate_cost(m, b, n))
        (_, spent), peak = machine.peak(
            lambda m=model, b=x, n=layers: machine.seconds(lambda: compute_interaction_graph(m, [b], n))
        )
        row = {
            "what": f"plan: {name}", "predicted (s)": estimate.seconds, "seconds": spent,
            "predicted / measured": estimate.seconds / spent, "seconds of the estimate": estimating,
        }  # fmt: skip
        if peak is not None:
            held = torch.cuda.memory_allocated(machine.device)
            row |= {"predicted peak (GiB)": (estimate.peak_bytes - held) / 2**30, "peak (GiB)": peak}
        yield row


def _gpt2(n_layer: int, width: int, context: int, vocabulary: int = 64) -> nn.Module:
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=n_layer, n_head=max(2, width // 64),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def gpt2_small(machine: Machine) -> Iterator[Row]:
    """A snapshot of GPT-2 small's shape at all 13 node layers of its residual stream."""
    blocks, width, S, n = (3, 192, 128, 2) if machine.small else (12, 768, 1024, 8)
    model = _gpt2(blocks, width, S, 512 if machine.small else 50257)
    names = ["transformer.h.0:input", *(f"transformer.h.{k}" for k in range(blocks))]
    yield from _language_model(machine, "GPT-2 small's shape", model, names, torch.randint(500, (n, S)))


def smollm2(machine: Machine) -> Iterator[Row]:
    """A snapshot of SmolLM2-135M at four node layers, of 8 x 64 tokens as in its recipe."""
    tokens = torch.randint(1000, (8, 64) if not machine.small else (2, 32))
    if machine.weights is None:
        small = {"num_hidden_layers": 6, "vocab_size": 1024} if machine.small else {}
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**SMOLLM2 | small))
        what = "SmolLM2-135M's shape, made-up weights"
    else:
        from recipes.checkpoint import load_pretrained

        model, what = load_pretrained(str(machine.weights)), f"{machine.weights.name}, its own weights"
    path, blocks = find_blocks(model, what)
    names = [f"{path}.{i}" for i in quarters_of(len(blocks))]
    yield from _language_model(machine, what, model, names, tokens)


def _language_model(machine: Machine, what: str, model: nn.Module, names: list[str], tokens: Tensor) -> Iterator[Row]:
    model, tokens = machine.to(model, tokens)
    shape = f"{what}, {len(tokens)} x {tokens.shape[1]} tokens, {len(names)} node layers"
    work = lambda: compute_interaction_graph(model, tokens.split(1), names, memory_limit=16, **SETTINGS)  # noqa: E731
    (graph, spent), peak = machine.peak(lambda: machine.seconds(work))
    row = {"what": shape, "seconds": spent, "a sequence (s)": spent / len(tokens), "peak (GiB)": peak}
    errors = [float(length(error) / length(graph.edges[pair])) for pair, error in graph.edge_errors.items()]
    # Counting takes time itself, so that one sequence is counted, the checks of node layers included.
    operations = _operations_of_products(
        partial(compute_interaction_graph, model, [tokens[:1]], names, memory_limit=16, **SETTINGS)
    )
    row["TFLOP a sequence"] = operations / 1e12
    if len(tokens) >= 8:  # as many as groups of samples
        row["standard error of the edges"] = max(errors)
    row["share of the float32 rate"] = operations * len(tokens) / spent / machine.rates["float32"]
    yield row


def _operations_of_products(work: Callable[[], Any]) -> float:
    total = 0.0

    def add(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal total
        formula = FLOP_FORMULAS.get(operator.overloadpacket)
        total += 0 if formula is None else formula(*args, **kwargs, out_val=out)

    with operations_observed(add):
        work()
    return total


STEPS: list[tuple[Callable[[Machine], Iterator[Row]], float]] = [
    (rates, 30), (published, 90), (oracle, 60), (synchronizations, 40), (smollm2, 90), (predictions, 90),
    (gpt2_small, 150),
]  # fmt: skip


class OutOfTime(BaseException):
    """A step is not done in its time. No Exception, which the library would explain."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in a block after some seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown.

    Example:
        >>> print(table({"device": "CPU", "versions": "torch 2", "seconds": 1.0, "rows": [{"what": "x", "count": 2}]}))
        CPU; torch 2; 1 s in all.
        <BLANKLINE>
        | | |
        |---|---|
        | x | count **2** |
    """
    lines = [f"{found['device']}; {found['versions']}; {found['seconds']:.0f} s in all.", "", "| | |", "|---|---|"]
    for row in found["rows"]:
        cells = [f"{key} **{_short(value)}**" for key, value in row.items() if key != "what" and value is not None]
        lines.append(f"| {row['what']} | {'; '.join(cells)} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps and write ``on_device.json`` and ``on_device.md``; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default=str(torch.accelerator.current_accelerator() or "cpu"))
    parser.add_argument("--reference", type=Path, help="folder of published results")
    parser.add_argument("--weights", type=Path, help="folder of a pretrained language model")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the two files")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing more is begun")
    options = parser.parse_args(arguments)
    given = [p if p is not None and p.is_dir() else None for p in (options.reference, options.weights)]
    device = torch.device(options.device)
    machine = Machine(device, device.type == "cpu", *given)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    threads = f", {torch.get_num_threads()} threads" if machine.small else ""
    versions = (
        f"torch {torch.__version__}, Python {platform.python_version()}, lib_lightning {lib_lightning.__version__}"
    )
    started, rows, failed = time.perf_counter(), [], False
    options.out.mkdir(parents=True, exist_ok=True)
    for step, most in STEPS:
        remaining = 60 * options.minutes - (time.perf_counter() - started)
        try:
            if remaining < 5:
                raise OutOfTime("no time was left for it")
            with limited(min(most, remaining)):
                for row in step(machine):
                    rows.append(row)
                    print(row, flush=True)
        except (Exception, OutOfTime) as error:
            failed = True
            traceback.print_exc()
            rows.append({"what": step.__name__, "failed": f"{type(error).__name__}: {error}"[:200].replace("\n", " ")})
        seconds = time.perf_counter() - started
        found = {"device": name + threads, "versions": versions, "seconds": seconds, "rows": rows}
        (options.out / "on_device.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "on_device.md").write_text(table(found) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
