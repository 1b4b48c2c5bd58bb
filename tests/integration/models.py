"""Tiny models of other libraries, randomly initialized, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.integration.oracle import randomize

VOCABULARY = 7


def tokens(n: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (n, length))


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=4, n_layer=2, n_head=2, n_inner=6, bos_token_id=0, eos_token_id=0
    )
    return randomize(GPT2LMHeadModel(config))


def gpt_neo() -> nn.Module:
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=4, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
        intermediate_size=6, max_position_embeddings=6, window_size=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomize(GPTNeoForCausalLM(config))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6,
        max_position_embeddings=6,
    )  # fmt: skip
    return randomize(BertForMaskedLM(config))


def resnet() -> nn.Module:
    config = ResNetConfig(
        num_channels=2, embedding_size=3, hidden_sizes=[3, 4], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return randomize(ResNetForImageClassification(config))


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, image_size=6, patch_size=3,
        num_channels=2, num_labels=3,
    )  # fmt: skip
    return randomize(ViTForImageClassification(config))
