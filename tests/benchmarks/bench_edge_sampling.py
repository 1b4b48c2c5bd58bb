"""Edges from a random choice of features: their error against the number of products, for three trained models.

Beside it, what the same number of products gives if features are chosen uniformly, or all features are pushed forward
for fewer samples. Errors are Frobenius norms relative to the exact edges, medians over repetitions; neither they nor
the numbers of products depend on the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.build import build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.jacobian.section import Section
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from tests.benchmarks.subjects import modular_addition

SHARES = (16, 8, 4, 2)
REPETITIONS = 5


def trained(model: nn.Module, batch_of: Callable[[torch.Generator], tuple[Tensor, Tensor]], steps: int) -> nn.Module:
    """Train a classifier of the last axis for a moment."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        x, y = batch_of(generator)
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class Logits(nn.Module):
    """A Hugging Face model that returns logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).logits


def gpt2(published: Path | None) -> tuple[nn.Module, Tensor, list[str]]:
    """GPT-2 with 3 blocks of width 64, on 96 pieces of 32 letters of the README."""
    from transformers import GPT2Config, GPT2LMHeadModel

    text = torch.tensor([min(byte, 127) for byte in _TEXT])
    pieces = text.unfold(0, 33, 1)
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)

    def batch_of(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = pieces[torch.randint(len(pieces), (32,), generator=generator)]
        return chosen[:, :-1], chosen[:, 1:]

    model = trained(Logits(GPT2LMHeadModel(config)), batch_of, 200)
    return model, pieces[:: len(pieces) // 96, :-1][:96], [f"inner.transformer.h.{k}" for k in range(3)]


def cnn(published: Path | None) -> tuple[nn.Module, Tensor, list[str]]:
    """Three convolutions of 16 channels on 96 images of CIFAR-10 in 16 x 16 pixels; made-up ones if it is not there."""
    if published is None:
        images, labels = torch.rand(2000, 3, 32, 32), torch.randint(10, (2000,))
    else:
        with np.load(published / "cifar10_part.npz") as data:
            images = torch.from_numpy(data["x_train"]).float().view(-1, 3, 32, 32) / 255
            labels = torch.from_numpy(data["y_train"]).long()
    images = nn.functional.avg_pool2d(images, 2)
    layers = [
        module for c in (3, 16, 16) for module in (nn.Conv2d(c, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))

    def batch_of(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (64,), generator=generator)
        return images[chosen], labels[chosen]

    return trained(model, batch_of, 150), images[:96], ["2", "5", "8"]


def addition(published: Path | None) -> tuple[nn.Module, Tensor, list[str]]:
    """The paper's transformer for addition modulo 113, its attention, on 256 pairs."""
    subject = modular_addition(published)
    return subject.model.float(), subject.data[:: len(subject.data) // 256][:256], ["embed", "mlp:input"]


MODELS = {"GPT-2 shape": gpt2, "convolutions": cnn, "modular addition": addition}


def edges_of(
    before: Basis, after: Basis, parts: Sequence[Section], n_pushed: int | None, seed: int, uniform: bool = False
) -> Edges:
    """Edges from forward mode."""
    # Equal importances are equal probabilities.
    if uniform:
        before = replace(before, importance=torch.ones_like(before.importance))
    edges = Edges(before, after, n_pushed=n_pushed, generator=torch.Generator().manual_seed(seed))
    for section in parts:
        edges.count(section)
        features = before.encode(section.a), after.encode(section.a_out)
        (edges.update_forward if n_pushed is None else edges.update_sampled)(section, *features)
    return edges


@pytest.mark.parametrize(
    "name,published",  # noqa: PT006 (as in the other benchmarks)
    [("GPT-2 shape", "made-up"), ("convolutions", "published"), ("modular addition", "published")],
    indirect=["published"],
)
def test_error_against_products(benchmark: Any, name: str, published: Path | None) -> None:
    torch.manual_seed(0)
    model, data, names = MODELS[name](published)
    instrumented = InstrumentedModel(model, as_node_layers(names))
    with model_session(instrumented):
        _compare(benchmark, name, instrumented, data)


def _compare(benchmark: Any, name: str, instrumented: InstrumentedModel, data: Tensor) -> None:
    batches = list(data.split(32))
    built = benchmark.pedantic(
        lambda: build_graph(instrumented, batches, LIBConfig(n_probes=8), MemoryPlan(keep_graphs=True)),
        rounds=1, iterations=1,
    )  # fmt: skip
    i = len(instrumented.layers) - 2
    before, after = built.bases[i], built.bases[i + 1]
    parts = [list(sections(instrumented, b, [basis.mean for basis in built.bases], 0, 4096))[i] for b in batches]
    E = edges_of(before, after, parts, None, 0).E

    def median(found: Callable[[int], Tensor]) -> float:
        return round(statistics.median(float((found(s) - E).norm() / E.norm()) for s in range(REPETITIONS)), 4)

    def fewer_samples(share: int, seed: int) -> Tensor:
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: len(data) // share]
        part = list(sections(instrumented, data[chosen], [basis.mean for basis in built.bases], 0, 4096))[i]
        return edges_of(before, after, [part], None, 0).E

    r = before.n_features
    benchmark.extra_info["features"] = r
    for share in SHARES:
        if r // share == 0:
            continue
        benchmark.extra_info[f"{r // share} products"] = " / ".join(
            f"{median(found):.2%}"
            for found in (
                lambda s: edges_of(before, after, parts, r // share, s).E,  # noqa: B023
                lambda s: edges_of(before, after, parts, r // share, s, uniform=True).E,  # noqa: B023
                lambda s: fewer_samples(share, s),  # noqa: B023
            )
        )
    eighth = median(lambda s: edges_of(before, after, parts, r // 8, s).E)
    assert eighth < 0.03 or name != "GPT-2 shape"


_TEXT = Path(__file__).resolve().parents[2].joinpath("README.md").read_bytes()
