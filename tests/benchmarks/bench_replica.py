"""What a copy of a model costs: seconds and bytes of a session with a copy, as shares of a snapshot, and of restoring.

The models: an MLP, a CNN, the shapes of GPT-2 and Llama, and GPT-2 small with its 124 million weights.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib_lightning import compute_interaction_graph
from lib_lightning.model import preserve
from lib_lightning.model.preserve import preserve_model
from tests.benchmarks.clock import seconds


def mlp() -> tuple[nn.Module, Any, list[str]]:
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, torch.randn(512, 784), ["0", "2", "output"]


def cnn() -> tuple[nn.Module, Any, list[str]]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return model, torch.randn(256, 3, 16, 16), ["7", "output"]


def gpt2() -> tuple[nn.Module, Any, list[str]]:
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 500, (8, 16))}, ["transformer.h.2", "output"]


def llama() -> tuple[nn.Module, Any, list[str]]:
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 500, (8, 16))}, ["model.layers.2", "output"]


def gpt2_small() -> tuple[nn.Module, Any, list[str]]:
    batch = {"input_ids": torch.randint(0, 500, (4, 4))}
    return GPT2LMHeadModel(GPT2Config()), batch, ["transformer.h.11", "transformer.ln_f:input"]


@pytest.mark.parametrize("make", [mlp, cnn, gpt2, llama, gpt2_small])
def test_session(benchmark: Any, make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, batch, layers = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def session(max_bytes: int) -> int:
        start = _resident()
        with preserve_model(model, max_bytes):
            return _resident() - start

    n_bytes = session(2**40)
    copied, shared = seconds(lambda: session(2**40), 5), seconds(lambda: session(0), 5)
    graph = seconds(lambda: benchmark.pedantic(lambda: compute_interaction_graph(model, [batch], layers), rounds=1))
    preserve._NOT_COPIED[id(model)] = model  # from now on the model itself runs
    restored = seconds(lambda: session(2**40), 5)
    benchmark.extra_info.update(
        weights=sum(p.numel() for p in model.parameters()), copied_ms=1e3 * copied, shared_ms=1e3 * shared,
        restored_ms=1e3 * restored, copied_mib=n_bytes / 2**20, share_of_graph=copied / graph,
    )  # fmt: skip
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def _resident() -> int:
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
