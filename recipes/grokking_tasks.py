"""Three tasks that networks memorise long before they generalise, and what is part of their solutions.

*Addition* modulo 59 is learned by the quick start's transformer, of one layer. *Subtraction* modulo 31 and *parity* are
learned by perceptrons. The bits of parity are -1 or 1, and the answer is whether the product of the first three is 1;
the others are noise, by which training samples can be told apart and so be memorised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lib_lightning import NodeLayer
from lib_lightning.labels import FourierLabels, Labeller
from recipes.mlp import MLP
from recipes.modular_addition import AllPairs, ModularAddition, Repeated

Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learned, and by which network.

    Attributes:
        module: The network.
        data: Its data, for the trainer: an epoch is the whole training.
        train: Inputs and answers of all training samples.
        test: The same of the test samples.
        layers: The node layers, the last one being the output.
        labeller: Labels features that are part of the solution.
        steps: Number of steps of training.
        first: Step from which on there are snapshots at regular ratios.
    """

    module: L.LightningModule
    data: L.LightningDataModule
    train: Samples
    test: Samples
    layers: Sequence[NodeLayer | str]
    labeller: Labeller
    steps: int
    first: int

    @property
    def samples(self) -> dict[str, Samples]:
        """Training and test samples, by name."""
        return {"train": self.train, "test": self.test}

    @property
    def before_output(self) -> str:
        """Name of the last node layer before the output, whose features are looked at."""
        layer = self.layers[-2]
        return layer.name if isinstance(layer, NodeLayer) else layer


class FullBatch(L.LightningDataModule):
    """Training samples as one batch, in an epoch of many steps.

    Args:
        samples: Inputs and answers.
        steps: Number of steps.
    """

    def __init__(self, samples: Samples, steps: int) -> None:
        super().__init__()
        self.samples, self.steps = samples, steps

    def train_dataloader(self) -> DataLoader[Any]:
        """The batch, again and again."""
        return DataLoader(Repeated(self.samples, self.steps), batch_size=None)


class Perceptron(MLP):
    """A perceptron trained by AdamW, with the strong weight decay without which it does not generalise.

    Args:
        sizes: Width of the input, of each hidden layer, and number of classes.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: Momentum parameters.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        lr: float = 1e-3,
        weight_decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(sizes, lr)
        self.save_hyperparameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        options = self.hparams
        return torch.optim.AdamW(
            self.parameters(), options.lr, betas=options.betas, weight_decay=options.weight_decay
        )  # fmt: skip


@dataclass(frozen=True)
class GroupLabels:
    """Labels features most of whose variance is between groups of samples, those that a solution tells apart.

    Args:
        name: What the groups are called.
        group: Function from inputs to the number of the group of each sample, from 0.
        threshold: Smallest fraction of the variance for a label.

    Example:
        >>> bits = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
        >>> GroupLabels("first bit", lambda x: (x[:, 0] > 0).long())(bits[:, None], bits)
        ['first bit 100%', '']
    """

    name: str
    group: Callable[[Tensor], Tensor]
    threshold: float = 0.5

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Label the features of one node layer, as a `Labeller`."""
        values = features.flatten(1).double()
        values = values - values.mean(0)
        groups = F.one_hot(self.group(inputs)).double()
        means = groups.T @ values / groups.sum(0).clamp(min=1)[:, None]
        explained = (groups @ means).square().mean(0) / values.square().mean(0).clamp(min=1e-300)
        return [f"{self.name} {x:.0%}" if x >= self.threshold else "" for x in explained.tolist()]


def addition(seed: int, modulus: int = 59, steps: int = 3000) -> Task:
    """Modular addition by the quick start's transformer.

    Args:
        seed: Seed of the split.
        modulus: The modulus ``p``.
        steps: Number of steps.

    Returns:
        The task.
    """
    data = AllPairs(modulus, steps_per_epoch=steps, split_seed=seed)
    train, test = slice(None, data.n_train), slice(data.n_train, None)
    layers = [
        NodeLayer(["transformer.mlp:input"], name="resid_mid"),
        NodeLayer(["transformer.unembed:input"], name="resid_post"),
        "output",
    ]
    return Task(
        ModularAddition(modulus), data, (data.tokens[train], data.answers[train]),
        (data.tokens[test], data.answers[test]), layers, FourierLabels(modulus), steps, first=min(50, steps),
    )  # fmt: skip


def subtraction(seed: int, modulus: int = 31, steps: int = 3000) -> Task:
    """Modular subtraction by a perceptron with one hidden layer, from one-hot numbers.

    Args:
        seed: Seed of the split.
        modulus: The modulus ``p``.
        steps: Number of steps.

    Returns:
        The task.

    Note:
        To this network, addition, subtraction, and the multiplication of numbers other than zero are the same task but
        for the order of its inputs.
    """
    pairs = AllPairs(modulus, train_fraction=0.7, split_seed=seed)
    numbers = pairs.tokens[:, :2]
    inputs = F.one_hot(numbers, modulus).flatten(1).float()
    answers = (numbers[:, 0] - numbers[:, 1]) % modulus

    def difference(inputs: Tensor) -> Tensor:
        a, b = inputs.unflatten(1, (2, modulus)).argmax(2).unbind(1)
        return (a - b) % modulus

    module = Perceptron((2 * modulus, 128, modulus), lr=3e-3, betas=(0.9, 0.98))
    layers = ["input", NodeLayer(["layers.2:input"], name="hidden"), "output"]
    train, test = ((inputs[s], answers[s]) for s in (slice(None, pairs.n_train), slice(pairs.n_train, None)))
    return Task(
        module, FullBatch(train, steps), train, test, layers, GroupLabels("difference", difference), steps,
        first=min(25, steps),
    )  # fmt: skip


def parity(seed: int, num_bits: int = 20, num_train: int = 400, steps: int = 4000) -> Task:
    """The parity of three of many bits, by a perceptron with two hidden layers.

    Args:
        seed: Seed of the samples.
        num_bits: Number of bits.
        num_train: Number of training samples.
        steps: Number of steps.

    Returns:
        The task.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = 2.0 * torch.randint(0, 2, (num_train + 1000, num_bits), generator=generator) - 1
    answers = (bits[:, :3].prod(1) > 0).long()

    def relevant(inputs: Tensor) -> Tensor:
        return (inputs[:, :3] > 0).long() @ torch.tensor([4, 2, 1])

    # Before the last linear layer there are no more features than logits.
    layers = ["input", NodeLayer(["layers.2:input"], name="hidden"), "output"]
    train, test = ((bits[s], answers[s]) for s in (slice(None, num_train), slice(num_train, None)))
    return Task(
        Perceptron((num_bits, 128, 32, 2)), FullBatch(train, steps), train, test, layers,
        GroupLabels("relevant bits", relevant), steps, first=min(25, steps),
    )  # fmt: skip


TASKS: dict[str, Callable[[int], Task]] = {"addition": addition, "subtraction": subtraction, "parity": parity}
