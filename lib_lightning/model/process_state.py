"""State of the process that a snapshot uses: random states, and settings of torch that hold for all threads."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lib_lightning.model.precision import full_precision
from lib_lightning.model.torch_internals import disable_checkpointing, disable_parametrization_cache

# Held while models run: snapshots in several threads take turns, because random states and settings are common to all.
PROCESS_LOCK = threading.RLock()


def save_rng() -> Callable[[], None]:
    """Save the random states of torch (CPU and CUDA), NumPy and Python.

    Returns:
        A function that restores them.
    """
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy:
            numpy.random.set_state(numpy_state)

    return restore


def seed_all(seed: int) -> None:
    """Seed the random numbers of torch (CPU and CUDA), NumPy and Python.

    Args:
        seed: The seed.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed % 2**32)


def change_settings() -> Callable[[], None]:
    """Change the settings of torch that have no context manager: full precision, no checkpointing, no cached weights.

    Returns:
        A function that restores them.
    """
    # The fast path of nn.TransformerEncoder has no derivative.
    mha = torch.backends.mha
    fastpath = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    return in_turn(
        [
            full_precision(),
            lambda: mha.set_fastpath_enabled(fastpath),
            disable_checkpointing(),
            disable_parametrization_cache(),
        ]
    )


def in_turn(restores: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """One function that calls several."""

    def restore() -> None:
        for one in restores:
            one()

    return restore
