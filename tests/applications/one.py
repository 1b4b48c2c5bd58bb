"""Runs one application, whose name is the argument, and prints the result as the last line."""

from __future__ import annotations

import importlib
import json
import sys
import types
import warnings

import torch


def allow_torchvision_without_operators() -> None:
    """Let torchvision be imported beside a torch build that its compiled operators do not fit: none is called here."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    allow_torchvision_without_operators()
    from tests.applications.running import run

    print("\nRESULT " + json.dumps(run(sys.argv[1])))
