"""Predicted and measured seconds and peak memory of graphs: ``python -m tests.benchmarks.estimates [NAME ...]``.

Each model in a process of its own, at default settings, with one thread unless OMP_NUM_THREADS says otherwise; estimate
and graph in turns, and of each the median. Prints a table in Markdown, with how long an estimate itself takes.
``--rounds 1`` measures once; a NAME is the beginning of a model's. ``--clock processor`` predicts and measures seconds
of the processor, which depend less on other programs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning import compute_interaction_graph, estimate_cost
from recipes.language_model import GPTNeo
from recipes.modular_addition import AllPairs, ModularAdditionTransformer
from tests.benchmarks.memory import peak

Subject = tuple[nn.Module, Tensor, list[str] | None]


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class OnPatches(nn.Module):
    """Blocks on patches of 4 x 4 pixels, and the mean over patches."""

    def __init__(self, width: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


class ViT(OnPatches):
    """Two blocks with attention."""

    def __init__(self, width: int = 48) -> None:
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True) for _ in range(2)]
        super().__init__(width, layers)


class UNet(nn.Module):
    """Once down and up, with a skip connection around it."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, 2, padding=1)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, 2)
        self.last = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.first(x))
        up = torch.relu(self.up(torch.relu(self.down(skip))))
        return self.last(torch.cat([skip, up], 1))


class LastState(nn.Module):
    """An LSTM over a sequence, and a linear map of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Logits(nn.Module):
    """A model of transformers, which returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def _gpt2() -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    layers = ["model.transformer.h.0", "model.transformer.h.1", "model.lm_head:input"]
    return Logits(GPT2LMHeadModel(config)), torch.randint(256, (64, 32)), layers


def _llama() -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    layers = ["model.model.layers.0", "model.model.layers.1", "model.lm_head:input"]
    return Logits(LlamaForCausalLM(config)), torch.randint(256, (64, 32)), layers


def _images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "MLP, 784-256-256-10": lambda: (
        nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
        torch.randn(2048, 784), ["input", "1", "3", "output"],
    ),
    "CNN, 8 channels, 16 x 16": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(2048, 10),
        ),
        _images(256, 16), ["1", "3", "output"],
    ),
    "ResNet, 3 blocks of 16 channels, 16 x 16": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), Residual(16), Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(16, 10),
        ),
        _images(128, 16), ["1", "2", "3", "output"],
    ),
    "ViT, 2 blocks of width 48, 16 patches": lambda: (
        ViT(), _images(256, 16), ["blocks.0:input", "blocks.1:input", "output"],
    ),
    "GPT-2, 2 blocks of width 64, 32 tokens": _gpt2,
    "Llama, 2 blocks of width 64, 32 tokens": _llama,
    "LSTM, 32 units, 16 steps": lambda: (LastState(), torch.randn(128, 16, 16), ["input", "head:input", "output"]),
    "U-Net, 8 and 16 channels, 16 x 16": lambda: (UNet(), _images(64, 16), ["input", "output"]),
    "language-model recipe": lambda: (
        GPTNeo(), torch.randint(256, (8, 64)), ["transformer.h.1", "transformer.h.4", "lm_head:input"],
    ),
    "modular addition, modulus 113": lambda: (
        ModularAdditionTransformer(113), AllPairs(113).tokens[:2048], None,
    ),
}  # fmt: skip


class Mixer(OnPatches):
    """Two blocks of an MLP-Mixer."""

    def __init__(self, width: int = 32, patches: int = 16) -> None:
        super().__init__(width, [MixerBlock(width, patches) for _ in range(2)])


class MixerBlock(nn.Module):
    """Mixes patches, then channels."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x).mT).mT
        return x + self.mlp(self.norms[1](x))


def _vit_of_transformers() -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_labels=10,
    )  # fmt: skip
    model = Logits(ViTForImageClassification(config))
    return model, _images(128, 16), ["model.vit.layers.0", "model.vit.layers.1", "output"]


def _mamba() -> Subject:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2, intermediate_size=64, use_cache=False
    )
    layers = ["model.backbone.layers.0", "model.backbone.layers.1", "model.lm_head:input"]
    return Logits(MambaForCausalLM(config)), torch.randint(128, (32, 16)), layers


# Models that nothing was tuned with.
SUBJECTS |= {
    "1-d convolutions, 16 channels, 64 steps": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 16, 5, padding=2), nn.GELU(), nn.Conv1d(16, 16, 5, padding=2), nn.GELU(),
            nn.Conv1d(16, 16, 5, 2, padding=2), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5),
        ),
        torch.randn(256, 4, 64), ["1", "3", "5", "output"],
    ),
    "ViT of transformers, 2 blocks of width 48": _vit_of_transformers,
    "MLP-Mixer, 2 blocks of width 32": lambda: (Mixer(), _images(256, 16), ["blocks.0", "blocks.1", "output"]),
    "Mamba, 2 blocks of width 32, 16 tokens": _mamba,
}  # fmt: skip


def measure(name: str, rounds: int, clock: str) -> dict[str, Any]:
    """Predict and measure one model, in turns."""
    if clock == "processor":  # the clock of the estimate
        time.perf_counter = time.process_time
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    compute_interaction_graph(small, [torch.randn(50, 8)], ["input", "1", "output"])  # loads libraries
    model, data, layers = SUBJECTS[name]()
    estimates, estimating, measured = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        estimates.append(estimate_cost(model, data, layers))
        estimating.append(time.perf_counter() - started)
        started = time.perf_counter()
        compute_interaction_graph(model, [data], layers)
        measured.append(time.perf_counter() - started)
        if len(measured) == 1:
            memory = [estimates[0].peak_bytes / 1e6, peak() * 2**20 / 1e6]
    median = statistics.median
    return {
        "plan": str(estimates[0].plan).split(" (")[0], "operations": estimates[0].plan.operations,
        "predicted": median(e.seconds for e in estimates), "measured": median(measured),
        "estimating": median(estimating), "memory": memory,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--one", action="store_true", help="print numbers of a single model")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.names[0], options.rounds, options.clock)))
        return
    print(
        "| model | plan | seconds predicted | measured | ratio | seconds of the estimate "
        "| MB at the peak predicted | measured | ratio |"
    )
    print("|" + "---|" * 9)
    for name in SUBJECTS:
        if options.names and not name.startswith(tuple(options.names)):
            continue
        settings = ["--one", f"--rounds={options.rounds}", f"--clock={options.clock}"]
        run = subprocess.run(
            [sys.executable, "-m", __spec__.name, *settings, name], check=False, capture_output=True, text=True
        )
        if run.returncode:
            print(f"| {name} | failed: {run.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        t, t_found, (m, m_found) = found["predicted"], found["measured"], found["memory"]
        print(
            f"| {name} | {found['plan']} | {t:.2g} | {t_found:.2g} | {t / t_found:.2f} "
            f"| {found['estimating']:.2g} | {m:,.0f} | {m_found:,.0f} | {m / m_found:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
