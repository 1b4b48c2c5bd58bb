"""The examples of docs/interventions.md run, and its numbers are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lib_lightning.interventions import sign_flip_p_values
from lib_lightning.interventions.significance import samples_needed

PAGE = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text()


def test_examples_run() -> None:
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/interventions.md", "exec"), names)
    assert names["model"][0].weight.grad is not None
    assert not names["graph"].effects["1"].changes.isnan().any()
    assert list(names["distances"]) == ["1/0", "3/0"]


def test_numbers() -> None:
    assert f"{samples_needed(10, 0.05)} are needed for one of ten features to be" in PAGE
    assert f"{samples_needed(10_000, 0.05)} for one of ten thousand" in PAGE
    one = torch.ones(1, dtype=torch.float64)
    assert float(sign_flip_p_values(3.15 * one, one)) > 0.005 > float(sign_flip_p_values(3.2 * one, one))
