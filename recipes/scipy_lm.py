"""A training that knows nothing of lib-lightning: Hugging Face's Trainer teaches a small GPT-2 SciPy's documentation.

    python -m recipes.scipy_lm --folder runs/formation/training

The text consists of the docstrings of SciPy as it is installed: 4.9 million characters of English, formulas and
examples (BSD licence), of which one in twenty is not trained on. Tokens are those of a byte-level BPE of 512, which is
trained first. The folder then has ``checkpoint-N`` at steps that grow by factors of 1.5, with losses in
``trainer_state.json``; the tokenizer; and the tokens, in ``text``. Killed and started again, it goes on after its
latest checkpoint.

108 s of one CPU core. Tried: two blocks of width 128 on 128 tokens take four times as long.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing is downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

PACKAGE = "scipy"
# Shorter docstrings are notes to programmers.
SHORTEST = 200
HELD_OUT = 20
END = "<|endoftext|>"
CONTEXT, VOCABULARY = 64, 512
STEPS, BATCH, LEARNING_RATE = 3000, 16, 3e-3
# Pieces of text that the loss is measured on.
EVALUATED = 256
PER_DECADE, FIRST = 6, 10


def documents(package: str = PACKAGE) -> Iterator[str]:
    """The docstrings of an installed package, file by file, without those of its tests.

    Args:
        package: Its name.

    Yields:
        Each docstring of a module, a class or a function that has at least 200 characters.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"The text is the documentation of {package}, which is not installed: pip install {package}")
    root = Path(found.origin).parent
    for path in sorted(root.rglob("*.py")):
        if "tests" in path.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST:
                    yield text


def train_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some texts.

    Args:
        texts: The texts.
        vocabulary: Number of its tokens, 257 at least.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END)


def pieces(texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Texts behind one another, cut into pieces of equal length.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.

    Returns:
        Tokens, shape ``(n, 64)``, int64.
    """
    ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def saved_steps(steps: int) -> list[int]:
    """Steps at which a checkpoint is saved: log-spaced from 10 on, and the last one.

    Args:
        steps: Number of steps of the training.

    Example:
        >>> saved_steps(100)
        [10, 15, 22, 32, 46, 68, 100]
    """
    spaced = (round(FIRST * 10 ** (k / PER_DECADE)) for k in range(100))
    return sorted({step for step in spaced if step < steps} | {steps})


class SaveAt(TrainerCallback):
    """Saves a checkpoint at some steps, and measures and prints the loss on other text there.

    Args:
        steps: The steps.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Called by the Trainer after each step."""
        control.should_save = control.should_evaluate = state.global_step in self.steps
        return control

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer when it has measured the loss."""
        loss = kwargs["metrics"]["eval_loss"]
        done = f"step {state.global_step:,} of {state.max_steps:,}"
        sys.stdout.write(f"training: {done}, loss on other text {loss:.2f}\n")
        sys.stdout.flush()


def main(args: Sequence[str] | None = None) -> None:
    """Train."""
    parser = argparse.ArgumentParser(prog="python -m recipes.scipy_lm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write checkpoints, tokenizer and text")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="use so many docstrings only")
    parsed = parser.parse_args(args)
    train(parsed.folder, parsed.steps, parsed.documents)


def train(folder: Path, steps: int = STEPS, count: int | None = None) -> None:
    """Train the model, or go on.

    Args:
        folder: Where to write.
        steps: Number of optimizer steps.
        count: Number of docstrings; None for all.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = list(islice(documents(), count))
    tokenizer = train_tokenizer([text for i, text in enumerate(texts) if i % HELD_OUT])
    tokenizer.save_pretrained(folder)
    training = pieces([text for i, text in enumerate(texts) if i % HELD_OUT], tokenizer)
    other = pieces(texts[::HELD_OUT], tokenizer)
    (folder / "text").mkdir(exist_ok=True)
    torch.save(training, folder / "text" / "training.pt")
    torch.save(other, folder / "text" / "held_out.pt")
    set_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, bos_token_id=end,
        eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    latest = latest_checkpoint(folder)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64,
        learning_rate=LEARNING_RATE, warmup_steps=min(50, steps // 2), weight_decay=0.1, adam_beta2=0.95,
        save_strategy="no", eval_on_start=latest is None, logging_strategy="no", report_to="none", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        GPT2LMHeadModel(config), arguments, default_data_collator, _examples(training), _examples(other[:EVALUATED]),
        callbacks=[SaveAt(saved_steps(steps))],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if latest is None:
        trainer.save_model(str(folder / "checkpoint-0"))
    trainer.train(resume_from_checkpoint=latest)


def latest_checkpoint(folder: Path) -> str | None:
    """The checkpoint to go on after, which is complete; None if there is none."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.partition("-")[2]))) if found else None


def _examples(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": piece, "labels": piece} for piece in tokens]


if __name__ == "__main__":
    main(sys.argv[1:])
