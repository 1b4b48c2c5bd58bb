"""A small language model in the shape of TinyStories-1M (GPT-Neo), trained on any text; or a checkpoint of that kind.

The model is written out here and needs nothing but PyTorch. Its modules have the names and the arithmetic of Hugging
Face's GPT-Neo, so the same node layers fit both, and GPT-2 as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lib_lightning.errors import LIBError
from recipes.checkpoint import load_pretrained, load_tokenizer

BYTES = 256


class SelfAttention(nn.Module):
    """Causal self-attention as in GPT-Neo: scores are not scaled, and only the output has a bias.

    Args:
        d_model: Width of the residual stream.
        n_heads: Attention heads.
        window: Number of positions that a token attends to, including its own; None for all before it.
    """

    def __init__(self, d_model: int, n_heads: int, window: int | None) -> None:
        super().__init__()
        self.n_heads, self.window = n_heads, window
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(n, S, d_model)`` to an update of it."""
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        position = torch.arange(x.shape[1], device=x.device)
        distance = position[:, None] - position
        seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Wraps the attention, as Hugging Face's GPT-Neo does, for the same module paths."""

    def __init__(self, d_model: int, n_heads: int, window: int | None) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, n_heads, window)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(n, S, d_model)`` to an update of it."""
        return self.attention(x)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d_model, d_mlp), nn.Linear(d_mlp, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(n, S, d_model)`` to an update of it."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and each adding to the residual stream."""

    def __init__(self, d_model: int, n_heads: int, d_mlp: int, window: int | None) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_heads, window)
        self.mlp = FeedForward(d_model, d_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``(n, S, d_model)`` to the one after the block."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Token and position embedding, blocks with alternating global and local attention, and a final layer norm."""

    def __init__(
        self, vocabulary: int, n_positions: int, n_layers: int, d_model: int, n_heads: int, d_mlp: int, window: int
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d_model), nn.Embedding(n_positions, d_model)
        self.h = nn.ModuleList(
            Block(d_model, n_heads, d_mlp, window if layer % 2 else None) for layer in range(n_layers)
        )
        self.ln_f = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """The residual stream ``(n, S, d_model)`` after the last norm, of tokens ``(n, S)``."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPTNeo(nn.Module):
    """The transformer and its unembedding, tied to the embedding.

    Args:
        vocabulary: Number of tokens.
        n_positions: Longest context.
        n_layers: Blocks; the second, fourth, ... have local attention.
        d_model: Width of the residual stream.
        n_heads: Attention heads.
        d_mlp: Width of the feed-forward layers.
        window: Number of positions that local attention covers.
    """

    def __init__(
        self,
        vocabulary: int = BYTES,
        n_positions: int = 64,
        n_layers: int = 8,
        d_model: int = 64,
        n_heads: int = 16,
        d_mlp: int = 256,
        window: int = 256,
    ) -> None:
        super().__init__()
        self.transformer = Transformer(vocabulary, n_positions, n_layers, d_model, n_heads, d_mlp, window)
        self.lm_head = nn.Linear(d_model, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, S, vocabulary)`` of the token after each of ``(n, S)``."""
        return self.lm_head(self.transformer(tokens))


class LanguageModel(L.LightningModule):
    """Trains a language model to predict the next token, with AdamW.

    Args:
        pretrained: A checkpoint to start from instead of a new model: its name at Hugging Face or its folder. Any
            causal language model works; the recipe's node layers fit GPT-Neo (TinyStories) and GPT-2. The checkpoint
            determines the shape, and the next six arguments are ignored.
        n_positions: Longest context.
        n_layers: Blocks; the second, fourth, ... have local attention.
        d_model: Width of the residual stream.
        n_heads: Attention heads.
        d_mlp: Width of the feed-forward layers.
        window: Number of positions that local attention covers.
        lr: Learning rate after warm-up; it falls linearly to 0 at the end of training.
        weight_decay: Decoupled weight decay.
        warmup_steps: Steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        n_positions: int = 64,
        n_layers: int = 8,
        d_model: int = 64,
        n_heads: int = 16,
        d_mlp: int = 256,
        window: int = 256,
        lr: float = 5e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: nn.Module | None = None
        if pretrained is None:
            self.model = GPTNeo(BYTES, n_positions, n_layers, d_model, n_heads, d_mlp, window)

    def configure_model(self) -> None:
        """Load the checkpoint, if any. Not at construction, so that the command line prints an error in one line.

        Raises:
            LIBError: If it cannot be loaded, or is too small for the text's tokens or context.
        """
        if self.model is None:
            self.model = load_pretrained(self.hparams.pretrained)
        text = getattr(self._trainer, "datamodule", None)
        if isinstance(text, Text):
            name = self.hparams.pretrained or "The model"
            tokens, positions = (self.model.get_submodule(f"transformer.{e}").num_embeddings for e in ("wte", "wpe"))
            text.check_fits(name, tokens, positions)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, S, vocabulary)`` of the token after each of ``(n, S)``."""
        assert self.model is not None, "a pretrained model is loaded in configure_model"
        output = self.model(tokens)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of the next token, in nats."""
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The same on text not trained on."""
        self.log("loss/test", self._loss(batch), prog_bar=True, batch_size=len(batch))

    def _loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a linear warm-up and a linear decay."""
        optimizer = torch.optim.AdamW(
            self.parameters(), self.hparams.lr, betas=(0.9, 0.95), weight_decay=self.hparams.weight_decay
        )
        warmup, total = self.hparams.warmup_steps, self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - step / total))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Text(L.LightningDataModule):
    """A text file in pieces of equal length, as bytes or tokens of a checkpoint; the last pieces are the test split.

    Args:
        path: The file. By default the documentation that Python's own ``help()`` shows (``pydoc_data.topics`` of the
            standard library, about 450 kilobytes of English, which varies a little from version to version).
        tokenizer: A checkpoint whose tokenizer to use: its name at Hugging Face or its folder. By default, and where
            the checkpoint has none, the tokens are the bytes of the text.
        context: Tokens in a piece.
        batch_size: Pieces in a batch.
        test_fraction: Share of the text, at its end, to test on.
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        context: int = 64,
        batch_size: int = 16,
        test_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        self.path, self.tokenizer = path, tokenizer
        self.context, self.batch_size, self.test_fraction = context, batch_size, test_fraction
        self.vocabulary = BYTES

    def setup(self, stage: str) -> None:
        """Read the text and split it.

        Raises:
            LIBError: If there is no text, or it is too short.
        """
        text = read_text(self.path)
        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        if tokenizer is None:
            tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        else:
            tokens = torch.tensor(
                tokenizer(text.decode(errors="replace"), verbose=False)["input_ids"], dtype=torch.long
            )
            self.vocabulary = max(len(tokenizer), int(tokens.max()) + 1 if len(tokens) else 0)
        pieces = tokens[: len(tokens) // self.context * self.context].view(-1, self.context)
        n_test = round(self.test_fraction * len(pieces))
        if min(n_test, len(pieces) - n_test) < self.batch_size:
            raise LIBError(
                f"The text is too short: its {len(tokens)} tokens are {len(pieces)} pieces of {self.context}, and both "
                f"training ({len(pieces) - n_test}) and testing ({n_test}) need a batch of {self.batch_size} at least. "
                "Pass --data.path with a longer text, or a smaller --data.context or --data.batch_size."
            )
        self.train, self.test = pieces[:-n_test], pieces[-n_test:]

    def check_fits(self, name: str, tokens: int, positions: int | None) -> None:
        """Raise an error if a model is too small for the text.

        Args:
            name: Name of the model.
            tokens: Number of tokens that it knows.
            positions: Its longest context; None if there is no limit.

        Raises:
            LIBError: If it knows too few tokens or positions.
        """
        if tokens < self.vocabulary:
            raise LIBError(
                f"{name} knows {tokens} tokens, and the text has {self.vocabulary}: pass --data.tokenizer with the "
                "tokenizer that the checkpoint was trained with."
            )
        if positions is not None and positions < self.context:
            raise LIBError(
                f"{name} has {positions} positions, and the text comes in pieces of {self.context}: pass "
                f"--data.context with {positions} or less."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Training pieces, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Test pieces."""
        return DataLoader(self.test, self.batch_size)


def read_text(path: str | None) -> bytes:
    """Read the bytes of a text file, or of Python's documentation.

    Args:
        path: The file; None for the documentation.

    Raises:
        LIBError: If it cannot be read.
    """
    if path is not None:
        try:
            return Path(path).expanduser().read_bytes()
        except OSError as error:
            raise LIBError(f"--data.path {path} cannot be read ({error.strerror}). Pass a text file.") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LIBError(
            "The default text, Python's documentation (pydoc_data.topics), is not part of this Python: pass "
            "--data.path with a text file."
        ) from error
    return "\n".join(topics[name] for name in sorted(topics)).encode()
