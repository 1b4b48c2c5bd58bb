"""Small dictionaries in the forms that packages have, and tiny language models to use them on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class SparseDictionary(nn.Module):
    """A sparse autoencoder with ReLU, JumpReLU (a threshold) or top-k, as in most papers."""

    def __init__(self, d: int, r: int, k: int | None = None, threshold: float | None = None, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.W_enc = nn.Parameter(torch.randn(d, r, generator=g) / d**0.5)
        self.b_enc = nn.Parameter(torch.randn(r, generator=g) / 10)
        self.W_dec = nn.Parameter(torch.randn(r, d, generator=g) / d**0.5)
        self.b_dec = nn.Parameter(torch.randn(d, generator=g) / 10)
        self.k, self.threshold = k, threshold

    def latents(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre * (pre > self.threshold)
        f = torch.relu(pre)
        if self.k is None:
            return f
        values, index = f.topk(self.k, dim=-1)
        return torch.zeros_like(f).scatter(-1, index, values)

    def encode(self, a: Tensor) -> Any:
        return self.latents(a)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


class Normalizing(SparseDictionary):
    """Normalises activations, keeps their mean and deviation for `decode`, and deletes them there, as SAELens does."""

    def encode(self, a: Tensor) -> Tensor:
        self.mean = a.mean(-1, keepdim=True)
        centered = a - self.mean
        self.std = centered.std(-1, keepdim=True)
        return self.latents(centered / (self.std + 1e-5))

    def decode(self, f: Tensor) -> Tensor:
        x = super().decode(f) * self.std + self.mean
        del self.mean, self.std
        return x


class Rescaling(SparseDictionary):
    """Gives activations a constant norm, and keeps the coefficient for `decode`."""

    def encode(self, a: Tensor) -> Tensor:
        self.x_norm_coeff = a.shape[-1] ** 0.5 / a.norm(dim=-1, keepdim=True)
        return self.latents(a * self.x_norm_coeff)

    def decode(self, f: Tensor) -> Tensor:
        return super().decode(f) / self.x_norm_coeff


class OfHeads(SparseDictionary):
    """Joins attention heads, and divides them again by the last shape that it has seen."""

    hook_z_reshaping_mode = True

    def encode(self, a: Tensor) -> Tensor:
        self.d_head = a.shape[-1]
        return self.latents(a.flatten(-2))

    def decode(self, f: Tensor) -> Tensor:
        return super().decode(f).unflatten(-1, (-1, self.d_head))


class OfGivenHeads(SparseDictionary):
    """Takes activations of so many heads only."""

    input_shape = (2, 8)

    def encode(self, a: Tensor) -> Tensor:
        assert a.shape[-2:] == self.input_shape
        return self.latents(a.flatten(-2))


class EncoderOutput(NamedTuple):
    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor


class Sparsified(SparseDictionary):
    """Returns values and indices of the active latents, and decodes these, as EleutherAI's sparsify does."""

    def encode(self, a: Tensor) -> EncoderOutput:
        pre = torch.relu((a - self.b_dec) @ self.W_enc + self.b_enc)
        return EncoderOutput(*pre.topk(self.k or 4, dim=-1), pre)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:  # type: ignore[override]
        rows = torch.nn.functional.embedding_bag(top_indices, self.W_dec, per_sample_weights=top_acts, mode="sum")
        return rows + self.b_dec


class PassingState(SparseDictionary):
    """Returns latents and what `decode` needs beside them."""

    def encode(self, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        size = a.norm(dim=-1, keepdim=True)
        return self.latents(a / size), {"size": size}

    def decode(self, f: Tensor, info: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().decode(f) * info["size"]


class ReturningMore(SparseDictionary):
    """Returns latents and something that `decode` does not take."""

    def encode(self, a: Tensor) -> tuple[Tensor, Tensor]:
        f = self.latents(a)
        return f, f.sum(-1)


class Saturating(SparseDictionary):
    """Neither encoder nor decoder has a derivative that is a row of its weights."""

    def latents(self, x: Tensor) -> Tensor:
        return torch.tanh(super().latents(x))

    def decode(self, f: Tensor) -> Tensor:
        return torch.tanh(super().decode(f))


class WithoutGradient(SparseDictionary):
    """Computes its latents without autograd."""

    @torch.no_grad()
    def encode(self, a: Tensor) -> Tensor:
        return self.latents(a)


class PlainObject:
    """No module, with tensors as attributes."""

    def __init__(self, d: int, r: int) -> None:
        self.of = SparseDictionary(d, r, seed=3).double()
        self.W_enc, self.W_dec = self.of.W_enc.detach(), self.of.W_dec.detach()
        self.b_enc, self.b_dec = self.of.b_enc.detach(), self.of.b_dec.detach()

    def encode(self, a: Tensor) -> Tensor:
        return torch.relu((a - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


def gpt2() -> tuple[nn.Module, list[str]]:
    """A GPT-2 of width 16, and three node layers of it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23,
        n_positions=8,
        n_embd=16,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        initializer_range=0.4,
    )
    return GPT2LMHeadModel(config).double().eval(), ["transformer.h.0", "transformer.h.1", "transformer.h.2"]


def llama() -> tuple[nn.Module, list[str]]:
    """A Llama of width 16, and three node layers of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, attn_implementation="sdpa", initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Norms, and the softmax of eager attention, compute in float32, whatever the type of the model.
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)
    model.model.norm = nn.RMSNorm(16, eps=1e-6)
    return model.double().eval(), ["model.layers.0", "model.layers.1", "model.layers.2"]


def tokens(n: int = 6, T: int = 5) -> Tensor:
    """Samples for both."""
    return torch.randint(0, 23, (n, T), generator=torch.Generator().manual_seed(2))
