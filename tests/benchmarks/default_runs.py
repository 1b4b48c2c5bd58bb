"""Whole trainings with the callback at its defaults: ``python -m tests.benchmarks.default_runs [NAME ...]``.

One after the other, on one thread unless OMP_NUM_THREADS says otherwise; a NAME is the beginning of a model's. Prints
a table in Markdown: frames of the film, seconds of training, and seconds of all that the callback adds. On one thread
these are seconds of the processor, which depend little on other programs. ``--exact`` compares the last frame with
exact sums.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback, compute_interaction_graph
from tests.benchmarks.clock import now
from tests.benchmarks.estimates import LastState, Logits

TOKENS = 128


class Encoder(nn.Module):
    """A language model of `nn.TransformerEncoder`."""

    def __init__(self, width: int = 64, tokens: int = 64) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(TOKENS, width), nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n)
        embedded = self.embedding(tokens) + self.positions.weight[:n]
        logits: Tensor = self.head(self.blocks(embedded, mask, is_causal=True))
        return logits


def perceptron() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions(channels: int) -> nn.Module:
    """Three convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


def flattened() -> nn.Module:
    """Two convolutions, and a linear map of all that they find."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def gpt2(layers: int, width: int, tokens: int) -> nn.Module:
    """The shape of GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=TOKENS, n_positions=tokens, n_embd=width, n_layer=layers, n_head=4)
    return Logits(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    """The shape of Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    return Logits(LlamaForCausalLM(config))


@dataclass(frozen=True)
class Subject:
    """A training.

    Attributes:
        model: Makes the model.
        shape: Shape of a sample; of tokens if it has one number.
        samples: Number of samples.
        epochs: Number of epochs.
        batch_size: Samples in a batch.
        n_probes: Probes of the metric to compare with, where exact products would take hours.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    epochs: int
    batch_size: int = 32
    n_probes: int | None = None


SUBJECTS = {
    "MLP, 32-64-64-10, 40 epochs": Subject(perceptron, (32, 1), 2048, 40),
    "CNN, 8 channels, 16 x 16, 2 epochs": Subject(lambda: convolutions(8), (3, 16, 16), 256, 2),
    "CNN, 16 channels, 32 x 32, 2 epochs": Subject(lambda: convolutions(16), (3, 32, 32), 512, 2),
    "CNN, 16 and 32 channels, flattened to 512, 2 epochs": Subject(flattened, (3, 32, 32), 1000, 2, n_probes=64),
    "LSTM, 32 units, 20 steps, 10 epochs": Subject(LastState, (20, 16), 256, 10),
    "GPT-2 shape, 2 layers, width 64, 32 tokens, 5 epochs": Subject(lambda: gpt2(2, 64, 32), (32,), 32, 5),
    "GPT-2 shape, 4 layers, width 256, 128 tokens, 5 epochs": Subject(lambda: gpt2(4, 256, 128), (128,), 64, 5, 8, 64),
    "Llama shape, 3 layers, width 64, 32 tokens, 5 epochs": Subject(llama, (32,), 64, 5),
    "TransformerEncoder, 2 layers, width 64, 64 tokens, 3 epochs": Subject(Encoder, (64,), 726, 3),
}


class Training(pl.LightningModule):
    """Learns random labels, or the tokens themselves."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self.subject = subject.model(), subject
        x: Tensor
        if len(subject.shape) == 1:
            x = torch.randint(TOKENS, (subject.samples, *subject.shape))
            self.data = TensorDataset(x, x)
        else:
            shape = tuple(size for size in subject.shape if size > 1)
            x = torch.randn(subject.samples, *shape)
            labels = torch.randint(8, (subject.samples, *shape[:1]) if len(shape) == 2 else (subject.samples,))
            self.data = TensorDataset(x, labels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def _loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.subject.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.subject.batch_size)


def run(subject: Subject) -> tuple[LIBCallback, Training]:
    """Train with the callback at its defaults."""
    pl.seed_everything(0, verbose=False)
    model, callback = Training(subject), LIBCallback()
    callback.clock = now
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=subject.epochs, callbacks=[callback], default_root_dir=folder, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(model)
    return callback, model


def row(name: str, with_exact: bool) -> str:
    """A row of the table."""
    callback, model = run(SUBJECTS[name])
    spent, plan, graph = callback.meter.spent, callback.state.plan, callback.graph
    assert plan is not None
    assert graph is not None
    cells = [
        name, f"{callback.snapshots}", plan.effort.text, f"{spent.training:.3g}", f"{plan.seconds:.2g}",
        f"{spent.overhead:.3g}",
    ]  # fmt: skip
    if with_exact:
        cells.append(beside_exact(graph, model, plan.effort.num_samples))
    return f"| {' | '.join(cells)} |"


def beside_exact(graph: InteractionGraph, model: Training, num_samples: int) -> str:
    """Effective features, effective edges and largest share of a frame, and in brackets those of exact sums.

    Exact sums are of the same samples, and have a standard error, too: that of having so few.
    """
    samples = model.data.tensors[0][:num_samples]
    exact = compute_interaction_graph(
        model.eval(), [samples], graph.node_layers, n_probes=model.subject.n_probes, effort="exact",
        output_distribution="none",
    )  # fmt: skip
    rows = []
    for one in (graph, exact):
        one.measure()
        found = [one.info["metrics"][f"{name}/total"] for name in ("effective_features", "effective_edges")]
        errors = ["" if x["error"] is None else f" ± {x['error']:.2g}" for x in found]
        shares = [float(basis.importance[0] / basis.importance.sum()) for basis in one.bases.values()]
        rows.append([*(f"{x['value']:.4g}{e}" for x, e in zip(found, errors, strict=True)), f"{max(shares):.1%}"])
    return " | ".join(f"{own} ({other})" for own, other in zip(*rows, strict=True))


def table(names: Iterable[str], with_exact: bool = False) -> Iterable[str]:
    """The lines of the table, each as soon as it is known."""
    heads = ["training", "frames", "each has", "training, s", "a snapshot, predicted, s", "all snapshots, s"]
    if with_exact:
        heads += ["effective features (exact)", "effective edges (exact)", "largest share of importance (exact)"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name in names:
        yield row(name, with_exact)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Trainings with the callback at its defaults")
    parser.add_argument("names", nargs="*", help="beginnings of names of models")
    parser.add_argument("--exact", action="store_true", help="compare the last frame with an exact graph")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names = [n for n in SUBJECTS if not options.names or any(n.startswith(given) for given in options.names)]
    for line in table(names, options.exact):
        print(line, flush=True)


if __name__ == "__main__":
    main()
