"""Runs one application with a callback that has no settings, and reports in one JSON object how that went."""

from __future__ import annotations

import importlib
import logging
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lib_lightning import LIBCallback
from lib_lightning.errors import LIBError

# Name, group of packages, packages whose versions are reported, and the function.
Application = tuple[str, str, tuple[str, ...], Callable[[LIBCallback, Path], Any]]
APPLICATIONS: dict[str, Application] = {}
MODULES = ("forecasting", "tabular", "images", "language", "graphs", "cells")


def application(name: str, group: str, *packages: str) -> Callable[[Callable[[LIBCallback, Path], Any]], Any]:
    """Register a function that trains a model with a callback in a folder."""

    def register(function: Callable[[LIBCallback, Path], Any]) -> Callable[[LIBCallback, Path], Any]:
        APPLICATIONS[name] = (name, group, packages or (group,), function)
        return function

    return register


def load() -> dict[str, Application]:
    """All applications, none of whose packages is imported yet."""
    for module in MODULES:
        importlib.import_module(f"tests.applications.{module}")
    return APPLICATIONS


def trainer_options(folder: Path, callback: Any, **options: Any) -> dict[str, Any]:
    """Options of a quiet trainer for two short epochs, as applications take them."""
    return {
        "max_epochs": 2, "limit_train_batches": 4, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": str(folder), "callbacks": [callback], **options,
    }  # fmt: skip


class Messages(logging.Handler):
    """Keeps what the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())


def run(name: str) -> dict[str, Any]:
    """Run an application.

    Args:
        name: Its name.

    Returns:
        Whether it works, what was computed, and the reason if nothing was.
    """
    _, group, packages, function = load()[name]
    messages, callback = Messages(), LIBCallback()
    logging.getLogger("lib_lightning").addHandler(messages)
    torch.manual_seed(0)
    result: dict[str, Any] = {"name": name, "group": group}
    try:
        with tempfile.TemporaryDirectory() as folder:
            function(callback, Path(folder))
    except LIBError as error:
        result |= {"status": "refused", "reason": str(error)}
    except Exception as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "lib_lightning" in f.filename]
        status = "failed" if ours else "not run"
        result |= {"status": status, "reason": f"{type(error).__name__}: {error}"[:600]}
        traceback.print_exc()
    else:
        graph = callback.graph
        if graph is None:
            reason = next(iter(messages.warnings), "no snapshot was due")
            result |= {"status": "refused", "reason": reason}
        else:
            features = {layer: basis.n_features for layer, basis in graph.bases.items()}
            result |= {"status": "works", "snapshots": callback.snapshots, "features": features}
    result["warnings"] = messages.warnings
    result["versions"] = {package: version(package) for package in (*packages, "torch", "lightning")}
    return result
