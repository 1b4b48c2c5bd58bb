"""The networks of the table, each with its data, score and node layers, trained if their weights are missing."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lib_lightning import NodeLayer
from lib_lightning.ablation import accuracy, log_likelihood
from recipes.cifar10_mlp import Cifar10
from recipes.language_model import LanguageModel, Text
from recipes.mlp import MLP, Labelled
from recipes.modular_addition import AllPairs, ModularAdditionTransformer
from recipes.paper.measure import Network
from recipes.paper.train import FIND, MODULUS, SETTLE, TRAIN_FRACTION, PaperModularAddition, train

ADDITION = [
    NodeLayer(["embed"], name="resid_pre"),
    NodeLayer(["mlp:input"], name="resid_mid"),
    NodeLayer(["unembed:input"], name="resid_post"),
    "output",
]
# The same random part of the test pairs for every basis, because most of the time goes to computing one output feature
# after the other along its own edges. The 8,939 pairs of the test split are in random order.
ADDITION_SCORED = 2000


def modular_addition(
    seed: int,
    folder: Path,
    epochs: int = FIND + SETTLE,
    steps_per_epoch: int = 1000,
    fitted: int | None = None,
    scored: int = ADDITION_SCORED,
) -> Network:
    """The paper's transformer for addition modulo 113.

    Args:
        seed: Of split and weights.
        folder: Folder of the networks.
        epochs: As for `train`.
        steps_per_epoch: As for `train`.
        fitted: Number of training pairs for the bases; None for all 3,830.
        scored: Number of test pairs for the scores.

    Returns:
        The network.
    """
    checkpoint = torch.load(train(seed, folder, epochs, steps_per_epoch), map_location="cpu", weights_only=True)
    module = PaperModularAddition()
    module.load_state_dict(checkpoint["state_dict"])
    return _addition("Modular addition", seed, module.transformer, seed, fitted, scored)


def published(seed: int, reference: Path) -> Network:
    """A network of the paper's authors, measured as they did: all directions, all test pairs, by bisection.

    Args:
        seed: Index of the network, 0 or 1.
        reference: Folder with their weights.

    Returns:
        The network.
    """
    model = published_transformer(reference / f"modular_addition_seed{seed}_weights.safetensors")
    return _addition("Published", seed, model, split_seed=0, rtol=0.0, search="bisection")


def _addition(
    task: str, seed: int, model: ModularAdditionTransformer, split_seed: int, fitted: int | None = None,
    scored: int | None = None, rtol: float = 1e-6, **options: Any,
) -> Network:  # fmt: skip
    data = AllPairs(MODULUS, TRAIN_FRACTION, split_seed=split_seed)
    n, last = data.n_train, None if scored is None else data.n_train + scored
    return Network(
        task, seed, model.double(), ADDITION,
        fit=list(data.tokens[:n][:fitted].split(1000)),
        test=[(data.tokens[n:last], data.answers[n:last])],
        score=accuracy, tolerance=1e-3,
        options={"rtol": rtol}, ablation={"dtype": torch.float32}, **options,
    )  # fmt: skip


def published_transformer(path: Path) -> ModularAdditionTransformer:
    """The recipe's model with the authors' weights, which are stored for row vectors and separate heads.

    Args:
        path: The file of weights.

    Returns:
        The model, float64.
    """
    W = {name: tensor.double() for name, tensor in load_file(path).items()}
    model = ModularAdditionTransformer(MODULUS).double()
    block = {name.removeprefix("blocks.0."): tensor for name, tensor in W.items()}
    state: dict[str, Tensor] = {
        "embed.tokens.weight": W["embed.W_E"],
        "embed.positions": W["pos_embed.W_pos"],
        "attention.out.weight": block["attn.W_O"].flatten(0, 1).T,
        "attention.out.bias": block["attn.b_O"],
        "mlp.0.weight": block["mlp.W_in"].T,
        "mlp.0.bias": block["mlp.b_in"],
        "mlp.2.weight": block["mlp.W_out"].T,
        "mlp.2.bias": block["mlp.b_out"],
        "unembed.weight": W["unembed.W_U"].T,
        "unembed.bias": W["unembed.b_U"],
    }
    for ours, theirs in (("query", "Q"), ("key", "K"), ("value", "V")):
        state[f"attention.{ours}.weight"] = block[f"attn.W_{theirs}"].transpose(1, 2).flatten(0, 1)
        state[f"attention.{ours}.bias"] = block[f"attn.b_{theirs}"].flatten()
    model.load_state_dict(state)
    return model


def cifar10(seed: int, folder: Path, images: Path, epochs: int = 12) -> Network:
    """The paper's perceptron 3072-100-100-10, without its pixels.

    Among 3,072 pixels, or some 2,000 principal components of them, an edge ablation of the first section would take
    hours. A basis depends on later node layers only, so the other bases are the same as with the pixels.

    Args:
        seed: Of weights and batches.
        folder: Folder of the networks.
        images: The official folder or an ``.npz``, as for `Cifar10`.
        epochs: Epochs of training.

    Returns:
        The network.
    """
    data = Cifar10(str(images))
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    module = trained(MLP([3072, 100, 100, 10], lr=1e-3), data, folder / f"cifar-10_seed{seed}.pt", max_epochs=epochs)
    return _perceptron("CIFAR-10", seed, module.layers, data)


def published_perceptron(reference: Path) -> Network:
    """A perceptron 3072-100-100-10 for which the authors' program has results, without its pixels, as in `cifar10`.

    Args:
        reference: Folder with its weights and its part of CIFAR-10.

    Returns:
        The network.
    """
    W = load_file(reference / "cifar10_mlp_weights.safetensors")
    layers = MLP([3072, 100, 100, 10]).layers.double()
    weights = {f"{2 * k}.weight": W[f"layers.{k}.W"].mT for k in range(3)}
    layers.load_state_dict(weights | {f"{2 * k}.bias": W[f"layers.{k}.b"] for k in range(3)})
    data = Cifar10(str(reference / "cifar10_part.npz"))
    data.setup("fit")
    return _perceptron("CIFAR-10", 0, layers, data)


def _perceptron(task: str, seed: int, layers: nn.Module, data: Cifar10) -> Network:
    hidden = [NodeLayer([f"{2 * k}:input"], name=f"hidden{k}") for k in (1, 2)]
    return Network(
        task, seed, layers.double(), [*hidden, "output"], fit=_whole(data.train), test=_whole(data.test),
        # Half a standard error of the accuracy on 846 images. A tolerance of 0.001 would allow no further error.
        score=accuracy, tolerance=0.01,
    )  # fmt: skip


def _whole(split: Labelled) -> list[tuple[Tensor, Tensor]]:
    return [(split[:][0].double(), split.labels)] if len(split) else []


def language_model(seed: int, folder: Path, max_steps: int = 1500, fitted: int = 32, scored: int = 64) -> Network:
    """A language model on the bytes of Python's documentation: four blocks of width 32, pieces of 32 bytes.

    The ablations exclude the section to the 256 logits, which would take ten times as long as all others.

    Args:
        seed: Of weights and batches.
        folder: Folder of the networks.
        max_steps: Steps of training.
        fitted: Number of pieces for the bases.
        scored: Number of pieces for the scores.

    Returns:
        The network.
    """
    data = Text(context=32, batch_size=32)
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    module = LanguageModel(n_positions=32, n_layers=4, d_model=32, n_heads=4, d_mlp=128)
    trained(module, data, folder / f"language_model_seed{seed}.pt", max_steps=max_steps)
    assert module.model is not None
    generator = torch.Generator().manual_seed(0)
    fit, test = (
        split[torch.randperm(len(split), generator=generator)[:n]]
        for split, n in ((data.train, fitted), (data.test, scored))
    )
    taps = {"resid0": "h.0.ln_1", "resid2": "h.2.ln_1", "resid4": "ln_f"}
    return Network(
        "Language model", seed, module.model,
        [*(NodeLayer([f"transformer.{tap}:input"], name=name) for name, tap in taps.items()), "output"],
        fit=[fit], test=[(test, followed(test))],
        # In nats: the probability of the next byte decreases by 1%.
        score=log_likelihood, tolerance=0.01,
        ablation={"sections": list(itertools.pairwise(taps))},
    )  # fmt: skip


def followed(tokens: Tensor) -> Tensor:
    """The token after each of ``(n, S)``; -1 after the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1)


def trained(module: L.LightningModule, data: L.LightningDataModule, path: Path, **options: Any) -> Any:
    """Train a small network, or load its weights.

    Args:
        module: The untrained network, trained in place.
        data: Its data.
        path: File of its weights.
        options: Options of the trainer.

    Returns:
        The module.
    """
    if not path.exists():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n_steps).*")
            trainer = L.Trainer(
                accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
                enable_progress_bar=False, num_sanity_val_steps=0, limit_val_batches=0, **options,
            )  # fmt: skip
            trainer.fit(module, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(module.state_dict(), part)
        part.replace(path)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()
