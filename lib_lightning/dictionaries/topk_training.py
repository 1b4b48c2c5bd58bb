"""Trains a top-k sparse autoencoder on activations that come bit by bit, while the network that has them changes.

1. *Pool.* The latest activations are kept, a few thousand, and batches are drawn from them at random.
2. *Units.* Activations are divided by their root mean square about the mean, so that one learning rate fits any
   network. ``b_dec`` starts at their geometric median, and keeps its value when the unit changes.
3. *Loss.* ``L = |x - x_hat|^2 + 1/32 s |e - e_hat|^2``, summed over a batch and divided by its variation about the
   mean. ``e = x - x_hat`` is what is missing, taken as constant, and ``e_hat`` what the ``k_aux = d / 2`` most active
   of the dead latents make of it, whose gradient revives them; ``s = min(1, dead / k_aux)``. A latent is dead if it
   was not active for so many activations that a latent of average frequency would have been active 100 times.
4. *Decoder.* Its rows have norm 1: gradients have no part along them, and each step ends with a normalisation.

Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, sections 2 and A; ``s``, the
division by the variation, and the learning rate ``2e-4 sqrt(2^14 / r)`` as in EleutherAI's sparsify.

sparsify and SAELens are the maintained libraries for this, and have such a loss. Neither is a dependency: it would be
for `topk_loss` alone, at the price of accelerate, datasets and schedulefree, or transformer-lens, datasets and plotly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.dictionaries.topk_sae import TopKSAE, top_k
from lib_lightning.errors import SettingError
from lib_lightning.model.precision import to_float64

# Activations of the pool, and of a batch.
POOL, BATCH = 4096, 256
# How often each activation is in a batch, on average.
EPOCHS = 4
# Weight of the loss of dead latents.
ALPHA = 1 / 32
# Steps over which the learning rate rises.
WARM_UP = 100
# A latent is dead if it has missed so many times the interval at which a latent is active on average.
_DEAD = 100
_MEDIAN_ITERATIONS = 32
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class TopKSettings:
    """Sizes of an autoencoder, and how it is trained.

    Args:
        n_latents: Number of latents ``r``; None for four times as many as dimensions.
        k: Number of active latents; None for an eighth of the dimensions, from 1 to 32.
        lr: Learning rate; None for ``2e-4 sqrt(2^14 / r)``.
        seed: Seed of the initial weights and of the batches.
    """

    n_latents: int | None = None
    k: int | None = None
    lr: float | None = None
    seed: int = 0

    def for_width(self, d: int) -> tuple[int, int, float]:
        """Number of latents, of active ones, and the learning rate, for ``d`` dimensions.

        Raises:
            SettingError: If more latents are to be active than there are.

        Example:
            >>> TopKSettings().for_width(768)[:2], TopKSettings(k=2).for_width(4)[:2]
            ((3072, 32), (16, 2))
        """
        r = 4 * d if self.n_latents is None else int(self.n_latents)
        k = min(32, max(1, d // 8), r) if self.k is None else int(self.k)
        if k > r:
            raise SettingError(f"k={k} latents cannot be active among n_latents={r}.")
        return r, k, 2e-4 * math.sqrt(2**14 / r) if self.lr is None else self.lr


@dataclass(frozen=True)
class Reconstruction:
    """How well activations are reconstructed: sums, which add up.

    Attributes:
        count: Number of activations.
        error: Sum of squared errors.
        total: Sum of the activations, shape ``(d,)``.
        square: Sum of their squared norms.
        active: Number of active latents, summed over activations.
    """

    count: int
    error: float
    total: Tensor
    square: float
    active: float

    def __add__(self, other: Reconstruction) -> Reconstruction:
        return Reconstruction(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    @property
    def unexplained(self) -> float:
        """Fraction of the variance that is not reconstructed; NaN without any variance.

        Example:
            >>> Reconstruction(2, 0.5, torch.zeros(1), 2.0, 4).unexplained
            0.25
        """
        variation = self.square - float(self.total.square().sum()) / self.count
        return self.error / variation if variation > 0 else math.nan

    @property
    def l0(self) -> float:
        """Mean number of active latents."""
        return self.active / self.count


class TopKTraining:
    """The training of one autoencoder. It draws no random numbers but its own.

    Args:
        d: Width of the activations.
        settings: Sizes, learning rate and seed.
        device: Where to train.

    Attributes:
        n_seen: Number of activations so far.
        n_steps: Number of steps so far.
        since_active: For each latent the number of activations since it was last active, shape ``(r,)``.

    Example:
        >>> directions = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
        >>> training = TopKTraining(8, TopKSettings(n_latents=16, k=1))
        >>> for _ in range(20):
        ...     training.add(directions[torch.randint(16, (256,))])
        ...     training.train()
        >>> training.n_steps, training.sae.encode(directions).shape
        (80, torch.Size([16, 16]))
    """

    def __init__(self, d: int, settings: TopKSettings, device: torch.device | str = "cpu") -> None:
        self.r, self.k, self.lr = settings.for_width(d)
        self.d, self.device = d, torch.device(device)
        self._generator = torch.Generator().manual_seed(settings.seed)
        # With some of Lightning's precisions, the default type is another one.
        self._pool = torch.zeros(POOL, d, dtype=torch.float32, device=self.device)
        self.n_seen = self.n_steps = 0
        self._due = 0.0
        self._scale = 0.0
        self.since_active = torch.zeros(self.r, dtype=torch.int64, device=self.device)
        # As in Gao et al., the encoder starts as the transpose of the decoder.
        W = torch.randn(self.r, d, generator=self._generator, dtype=torch.float32, device="cpu")
        W_dec = (W / W.norm(dim=1, keepdim=True)).to(self.device)
        self._start([W_dec.T.clone(), W_dec.new_zeros(self.r), W_dec, W_dec.new_zeros(d)])

    def _start(self, values: list[Tensor]) -> None:
        """Begin to train these weights, in the unit of the activations."""
        self._parameters = {
            name: value.detach().clone().requires_grad_() for name, value in zip(_NAMES, values, strict=True)
        }
        self._adam = torch.optim.Adam(self._parameters.values(), self.lr)

    @property
    def is_ready(self) -> bool:
        """Whether it has begun to train."""
        return self._scale > 0

    @property
    def sae(self) -> TopKSAE:
        """The autoencoder as it is now, for activations as they are; later steps do not change it."""
        W_enc, b_enc, W_dec, b_dec = (self._parameters[name].detach() for name in _NAMES)
        s = self._scale
        return TopKSAE(W_enc, s * b_enc, W_dec, s * b_dec, self.k)

    @property
    def dead(self) -> Tensor:
        """Which latents are dead, shape ``(r,)``."""
        return self.since_active >= max(10 * BATCH, _DEAD * self.r / self.k)

    def add(self, rows: Tensor) -> None:
        """Add activations; where there are more than the pool holds, as many of them, chosen at random.

        Args:
            rows: Activations, shape ``(m, d)``. Rows that are not finite are left out.
        """
        rows = rows.detach().to(self.device, torch.float32)
        rows = rows[rows.isfinite().all(1)]
        if len(rows) > POOL:
            rows = rows[self._drawn(len(rows), POOL)]
        places = torch.arange(self.n_seen, self.n_seen + len(rows), device=self.device) % POOL
        self._pool[places] = rows
        self.n_seen += len(rows)
        self._due += EPOCHS * len(rows) / BATCH

    def _drawn(self, n: int, count: int) -> Tensor:
        """Different numbers below ``n``."""
        return torch.randperm(n, generator=self._generator, device="cpu")[:count].to(self.device)

    def train(self) -> None:
        """Train as many steps as the activations that were added are good for; none before there is a whole batch."""
        present = min(self.n_seen, POOL)
        if present < BATCH:
            return
        self._set_unit(self._pool[:present])
        while self._due >= 1 and self._scale > 0:
            self._step(self._pool[self._drawn(present, BATCH)] / self._scale)
            self._due -= 1

    def _set_unit(self, rows: Tensor) -> None:
        """Set the unit of the activations, and ``b_dec`` at the start; what ``b_dec`` means stays the same."""
        before, centred = self._scale, rows - rows.mean(0)
        self._scale = float(centred.square().mean().sqrt())
        if self._scale > 0:
            with torch.no_grad():
                b_dec = self._parameters["b_dec"]
                b_dec.copy_(b_dec * (before / self._scale) if before else geometric_median(rows) / self._scale)

    def _step(self, x: Tensor) -> None:
        loss, f = topk_loss(x, self._parameters, self.k, self.dead)
        self._adam.zero_grad()
        with torch.enable_grad():
            loss.backward()
        W_dec = self._parameters["W_dec"]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
            self.n_steps += 1
            for group in self._adam.param_groups:
                group["lr"] = self.lr * min(1.0, self.n_steps / WARM_UP)
            self._adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            active = (f > 0).any(0)
            self.since_active = torch.where(active, 0, self.since_active + len(x))

    @torch.no_grad()
    def measure(self, rows: Tensor) -> Reconstruction:
        """How well activations are reconstructed, best of others than it was trained on.

        Args:
            rows: Activations, shape ``(m, d)``.

        Returns:
            Sums over them.
        """
        rows = rows.detach().to(self.device, torch.float32)
        rows = rows[rows.isfinite().all(1)]
        sae = self.sae
        f = sae.encode(rows)
        error = to_float64(rows - sae.decode(f)).square().sum()
        exact = to_float64(rows)
        return Reconstruction(
            len(rows), float(error), exact.sum(0).cpu(), float(exact.square().sum()), float((f > 0).sum())
        )

    def weights(self) -> list[Tensor]:
        """The weights that are trained, in the unit of the activations."""
        return [self._parameters[name].detach() for name in _NAMES]

    def set_weights(self, values: list[Tensor]) -> None:
        """Replace these weights by those of another process, which has trained on the same activations."""
        with torch.no_grad():
            for name, value in zip(_NAMES, values, strict=True):
                self._parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors from which `load_state_dict` continues, with the same results."""
        state = self._adam.state_dict()["state"]
        return {
            "weights": [w.clone() for w in self.weights()],
            "moments": [{name: t.clone() for name, t in state[i].items()} for i in sorted(state)],
            "pool": self._pool[: min(self.n_seen, POOL)].clone(),
            "since_active": self.since_active.clone(),
            "generator": self._generator.get_state(),
            "seen": self.n_seen,
            "steps": self.n_steps,
            "due": self._due,
            "scale": self._scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of an autoencoder of the same sizes.

        Args:
            state: A result of `state_dict`.

        Raises:
            SettingError: If the sizes were others.
        """
        shape = tuple(state["weights"][2].shape)
        if shape != (self.r, self.d):
            raise SettingError(
                f"The checkpoint has an autoencoder of {shape[0]} latents for {shape[1]} dimensions, not of {self.r} "
                f"for {self.d}: give SAETrainer the n_latents that it had."
            )
        self._start([w.to(self.device) for w in state["weights"]])
        if state["moments"]:
            full = self._adam.state_dict()
            self._adam.load_state_dict({**full, "state": dict(enumerate(state["moments"]))})
        self._pool[: len(state["pool"])] = state["pool"].to(self.device)
        self.since_active = state["since_active"].to(self.device)
        self._generator.set_state(state["generator"].cpu())
        self.n_seen, self.n_steps, self._due, self._scale = (state[x] for x in ("seen", "steps", "due", "scale"))


def topk_loss(x: Tensor, weights: Mapping[str, Tensor], k: int, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one batch; see the module.

    Args:
        x: Activations in their unit, shape ``(m, d)``.
        weights: ``W_enc (d, r)``, ``b_enc (r,)``, ``W_dec (r, d)`` and ``b_dec (d,)``.
        k: Number of active latents.
        dead: Which latents are dead, shape ``(r,)``.

    Returns:
        The loss, and the latents, shape ``(m, r)``.
    """
    with torch.enable_grad():
        h = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        f = top_k(h, k)
        e = x - (f @ weights["W_dec"] + weights["b_dec"])
        variation = (x - x.mean(0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
        loss = e.square().sum() / variation
        n_dead = int(dead.sum())
        if n_dead:
            k_aux = max(1, x.shape[1] // 2)
            # Without the ReLU, so that a latent with negative inputs everywhere has a gradient, too.
            values, index = h[:, dead].topk(min(k_aux, n_dead), dim=1, sorted=False)
            e_hat = torch.zeros_like(h[:, dead]).scatter(1, index, values) @ weights["W_dec"][dead]
            share = min(1.0, n_dead / k_aux)
            loss = loss + ALPHA * share * (e.detach() - e_hat).square().sum() / variation
    return loss, f


def geometric_median(rows: Tensor) -> Tensor:
    """The point with the smallest sum of distances to some points, by Weiszfeld's iteration.

    Args:
        rows: The points, shape ``(m, d)``.

    Returns:
        The point, shape ``(d,)``.

    Example:
        >>> geometric_median(torch.tensor([[0.0], [0.0], [0.0], [9.0]])).round(decimals=4)
        tensor([0.])
    """
    x = rows.mean(0)
    for _ in range(_MEDIAN_ITERATIONS):
        weight = 1 / (rows - x).norm(dim=1).clamp_min(1e-6 * float(rows.abs().max().clamp_min(1e-30)))
        x = (weight[:, None] * rows).sum(0) / weight.sum()
    return x
