"""Packages that an application needs beside this one, one environment for each group: some exclude each other."""

from __future__ import annotations

GROUPS = {
    "darts": ["darts", "pytorch-lightning", "tensorboardX"],
    "neuralforecast": ["neuralforecast"],
    "pytorch-forecasting": ["pytorch-forecasting"],
    "pytorch-tabular": ["pytorch-tabular", "requests"],
    "scvi-tools": ["scvi-tools"],
    "gluonts": ["gluonts[torch]"],
    "lightly": ["lightly"],
    "litgpt": ["litgpt"],
    "others": ["monai", "torch-geometric", "peft", "diffusers", "transformers", "tensordict"],
    "transformers": ["transformers"],
}
