"""The networks whose bases are compared, with their text: a small language model, and SmolLM2-135M."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, reinitialized
from lib_lightning.ablation import EdgeAttack
from lib_lightning.dictionaries.topk_training import TopKSettings
from recipes.checkpoint import SMOLLM2
from recipes.language_model import Text
from recipes.paper.networks import followed, language_model
from recipes.pretrained_lm import QUARTERS, PretrainedLM, find_blocks

# Tokens for means, covariances and autoencoders.
TOKENS = 16384
# Names of the networks.
SMALL, RANDOM, LARGE = "Language model", "Language model with new weights", "SmolLM2-135M"
LARGE_RANDOM = "SmolLM2-135M with new weights"
# The section that is attacked.
ATTACKED = ("middle", "three_quarters")
# All sections of SmolLM2. Edges required in each of them take minutes.
LARGE_SECTIONS = list(itertools.pairwise(("start", *QUARTERS)))
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """A network, its text, and how much is computed on it.

    Attributes:
        name: Name of the network.
        seed: Its seed; 0 for a pretrained one.
        model: From tokens ``(n, S)`` to logits.
        node_layers: Where it is cut: after a quarter, a half, three quarters and all of its blocks.
        fit: Pieces of the training text, shape ``(n, S)``, for means, covariances and autoencoders. The first
            ``n_metric`` of them are for metrics and edges.
        scored: Other text, for all scores but those of single features.
        tested: Other text, for what single features do to the score; some of that for scores or names.
        named: Other text, for names.
        tokenizer: Name of the tokenizer; None for bytes.
        n_metric: Number of pieces for metrics and edges.
        n_probes: Random vectors per piece for a metric; None for the exact one.
        n_pushed: Features pushed per piece for the edges of a section; None for all.
        settings: Sizes, learning rate and seed of autoencoders.
        steps: Steps of their training.
        tolerance: Loss of mean log likelihood that is accepted, in nats a token.
        search: How the number of required features is found, as for `lib_lightning.ablation.edges_required`.
        causal: Features of each node layer whose effects are measured, spread evenly over the ranks; None for all.
        attacked: Number of scored pieces for edges required.
        batch_size: Pieces in a batch.
        edge_search: How the number of edges required is found, as for `lib_lightning.ablation.edges_required`.
        attack: A shorter attack than `recipes.bases_compared.measure.ATTACK`, with which also the edges that ablation
            alone requires are attacked once; None for that one.
    """

    name: str
    seed: int
    model: nn.Module
    node_layers: Sequence[NodeLayer]
    fit: Tensor
    scored: Tensor
    tested: Tensor
    named: Tensor
    tokenizer: str | None
    n_metric: int
    n_probes: int | None
    n_pushed: int | None
    settings: TopKSettings
    steps: int
    tolerance: float
    search: str
    causal: int | None
    attacked: int
    batch_size: int
    edge_search: Literal["bisection", "coarse"] = "bisection"
    attack: EdgeAttack | None = None

    @property
    def compared(self) -> Tensor:
        """Text for comparisons with principal components: some of that for names."""
        return self.named[: 4 * self.batch_size]

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Names of the node layers before and after each section."""
        return list(itertools.pairwise(layer.name for layer in self.node_layers))

    def batches(self, pieces: Tensor) -> list[Batch]:
        """Pieces of text, with the token after each token, in batches."""
        return [(part, followed(part)) for part in pieces.split(self.batch_size)]


class Logits(nn.Module):
    """A causal language model of Hugging Face as a function from tokens to logits.

    Args:
        pretrained: The recipe's module, with a loaded model.
    """

    def __init__(self, pretrained: PretrainedLM) -> None:
        super().__init__()
        self.lm, self.at = pretrained.lm, pretrained.at

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, S, vocabulary)`` of the token after each of ``(n, S)``."""
        logits: Tensor = self.lm(tokens, use_cache=False).logits
        return logits


def small(seed: int, folder: Path, quick: bool = False, fresh: bool = False) -> Subject:
    """The language model of ``recipes/paper``: four blocks of width 32 on the bytes of Python's documentation.

    Args:
        seed: Of weights and batches.
        folder: Folder of its weights.
        quick: Whether it is trained for a few steps, and measured on little text.
        fresh: Whether its weights are initialised again after the training, as a control.

    Returns:
        The network.
    """
    network = language_model(seed, folder, max_steps=20 if quick else 1500)
    text = Text(context=32, batch_size=32)
    text.setup("fit")
    taps = ("h.1.ln_1", "h.2.ln_1", "h.3.ln_1", "ln_f")
    layers = [NodeLayer([f"transformer.{tap}:input"], name=at) for tap, at in zip(taps, QUARTERS, strict=True)]
    train, test = shuffled(text.train), shuffled(text.test)
    model = reinitialized(network.model, seed) if fresh else network.model
    return Subject(
        RANDOM if fresh else SMALL, seed, model.eval(), layers,
        fit=train[: 64 if quick else TOKENS // 32], scored=test[: 8 if quick else 64],
        tested=test[: 8 if quick else 64], named=test[64 : 64 + (32 if quick else 512)], tokenizer=None,
        n_metric=8 if quick else 128, n_probes=2 if quick else 8, n_pushed=4 if quick else None,
        settings=TopKSettings(64, 4, seed=seed) if quick else TopKSettings(128, 8, seed=seed),
        steps=20 if quick else 4000,
        # In nats: the probability of the next byte decreases by 1%.
        tolerance=0.01, search="scan", causal=3 if quick else None, attacked=4 if quick else 32,
        batch_size=32,
    )  # fmt: skip


def smollm2(seed: int = 0, fresh: bool = False) -> Subject:
    """SmolLM2-135M-Instruct on Python's documentation, without the first position of each piece.

    Args:
        seed: Of autoencoders, and of new weights.
        fresh: Whether its weights are initialised again, as a control.

    Returns:
        The network.
    """
    pretrained, text = PretrainedLM(SMOLLM2), Text(tokenizer=SMOLLM2, context=64, batch_size=8)
    pretrained.configure_model()
    text.setup("fit")
    start = f"lm.{find_blocks(pretrained.lm, SMOLLM2)[0]}.0:input"
    train, test = shuffled(text.train), shuffled(text.test)
    model = Logits(reinitialized(pretrained, seed) if fresh else pretrained)
    return Subject(
        LARGE_RANDOM if fresh else LARGE, seed, model.eval(),
        [
            NodeLayer([tap], name=at, skip_positions=1)
            for at, tap in {"start": start, **{at: f"at.{at}" for at in QUARTERS}}.items()
        ],
        fit=train[: TOKENS // 64], scored=test[:12], tested=test[16:40], named=test[16:80], tokenizer=SMOLLM2,
        n_metric=24, n_probes=4, n_pushed=64, settings=TopKSettings(2304, 64, lr=1e-3, seed=seed), steps=400,
        # The probability of the next token decreases by a tenth.
        tolerance=0.1, search="bisection", causal=16, attacked=6, batch_size=12,
        # All dropped edges whose derivative says that they lower the score are put back.
        edge_search="coarse", attack=EdgeAttack("pgd", n_steps=1, n_starts=1, step_size=1.0),
    )  # fmt: skip


def shuffled(pieces: Tensor) -> Tensor:
    """Pieces of text in an order that is the same in every run."""
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
