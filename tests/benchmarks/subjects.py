"""The models that benchmarks run, with their data, and each model as a chain of plain functions.

With published weights and data, or with random ones of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.modular_addition import AllPairs, ModularAdditionTransformer
from recipes.paper.networks import published_transformer
from tests.benchmarks.plain import Function

MODULUS = 113
ADDITION_LAYERS = ["embed", "mlp:input", "unembed:input", "output"]
PERCEPTRON_LAYERS = ["0:input", "2:input", "4:input", "output"]
PIXELS, IMAGES = 3072, 4660
VOCABULARY = 256


@dataclass(frozen=True)
class Subject:
    """A model, its data, and the functions between its node layers.

    Attributes:
        model: The model.
        data: All samples in one tensor.
        node_layers: Its node layers.
        first: Maps samples to the first node layer's activations ``(n, S, d)``.
        chain: Maps the activations of each node layer to those of the next.
        batch_size: Samples in a batch.
    """

    model: nn.Module
    data: Tensor
    node_layers: list[str]
    first: Function
    chain: list[Function]
    batch_size: int = 1000

    @property
    def batches(self) -> list[Tensor]:
        """The data in batches."""
        return list(self.data.split(self.batch_size))

    @torch.no_grad()
    def activations(self) -> list[Tensor]:
        """Activations ``(n, S, d)`` of every node layer."""
        a = [self.first(self.data)]
        for section in self.chain:
            a.append(section(a[-1]))
        return a


def perceptron(published: Path | None) -> Subject:
    """The CIFAR-10 perceptron, 3072-100-100-10 with ReLU, in float64."""
    model = nn.Sequential(
        nn.Linear(PIXELS, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    ).double()  # fmt: skip
    images = torch.rand(IMAGES, PIXELS, dtype=torch.float64)
    if published is not None:
        W = load_file(published / "cifar10_mlp_weights.safetensors")
        state = {f"{2 * k}.weight": W[f"layers.{k}.W"].mT for k in range(3)}
        model.load_state_dict(state | {f"{2 * k}.bias": W[f"layers.{k}.b"] for k in range(3)})
        with np.load(published / "cifar10_part.npz") as data:
            images = torch.from_numpy(data["x_train"]).double().flatten(1) / 255
    chain = [model[:2], model[2:4], model[4]]
    return Subject(model, images, PERCEPTRON_LAYERS, lambda x: x[:, None], chain)


def modular_addition(published: Path | None) -> Subject:
    """The paper's transformer for addition modulo 113, on its 3,830 training pairs, in float64."""
    model = ModularAdditionTransformer(MODULUS).double()
    if published is not None:
        model = published_transformer(published / "modular_addition_seed0_weights.safetensors")
    data = AllPairs(MODULUS, train_fraction=0.3)
    chain = [
        lambda a: a[:, -1:] + model.attention(a)[:, None],
        lambda a: a + model.mlp(a),
        model.unembed,
    ]
    return Subject(model, data.tokens[: data.n_train], ADDITION_LAYERS, model.embed, chain)


class LanguageModel(nn.Module):
    """A Hugging Face model that takes tokens and returns logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).logits


def language_model(sequences: int, tokens: int, n_layers: int = 8, width: int = 64, batch_size: int = 16) -> Subject:
    """GPT-Neo in the shape of TinyStories-1M with random weights: the residual stream around every block."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_layers=n_layers, num_heads=16,
        attention_types=[[["global", "local"], n_layers // 2]], max_position_embeddings=max(256, tokens),
        window_size=32, use_cache=False, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    inner = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in inner.parameters():  # the default initialisation is close to zero
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    transformer = inner.transformer

    def embed(x: Tensor) -> Tensor:
        return transformer.wte(x) + transformer.wpe(torch.arange(x.shape[1]))

    def section(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda a: block(a)[0]

    names = ["inner.transformer.h.0:input", *(f"inner.transformer.h.{k}" for k in range(n_layers))]
    data = torch.randint(0, VOCABULARY, (sequences, tokens))
    return Subject(LanguageModel(inner), data, names, embed, [section(h) for h in transformer.h], batch_size)


def labelled_images(n: int) -> tuple[Tensor, Tensor]:
    """Random images of CIFAR-10's shape in ten distinguishable classes, ``uint8``."""
    labels = torch.randint(0, 10, (n,))
    centres = torch.rand(10, PIXELS)
    noise = torch.rand(n, PIXELS)
    return (255 * (0.2 * F.embedding(labels, centres) + 0.8 * noise)).byte(), labels
