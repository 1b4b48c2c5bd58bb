"""What a batch says of its samples beside the model's inputs: their classes, and numbers that are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib_lightning.features.sample import locate_labels
from lib_lightning.model.batch import tensors_in
from lib_lightning.model.batch_layout import Path, parts_of
from lib_lightning.model.calls import entry


@dataclass
class TargetReader:
    """Reads classes and targets of the samples of one batch after the other.

    Attributes:
        class_names: Names of classes that are texts, by the number that each has got here.

    Example:
        >>> reader = TargetReader()
        >>> reader.add((torch.randn(3, 2), ["cat", "dog", "cat"], torch.tensor([0.5, 2.5, 1.0])), [], 3)
        >>> reader.classes, reader.targets
        (None, tensor([0.5000, 2.5000, 1.0000]))
    """

    class_names: Mapping[int, str] = field(default_factory=dict)
    _classes: list[Tensor] = field(default_factory=list)
    _targets: list[Tensor] = field(default_factory=list)
    _places: tuple[Path | None, Path | None] | None = None
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, batch: Any, arguments: Any, n: int) -> None:
        """Add a batch.

        Args:
            batch: The batch.
            arguments: What the model is called with on it.
            n: Number of its samples.
        """
        if self._places is None:
            self._places = locate_labels(batch, arguments, n), _find_targets(batch, arguments, n)
        classes, targets = self._places
        if classes is not None:
            self._classes.append(self._as_numbers(entry(batch, classes)))
        if targets is not None:
            self._targets.append(entry(batch, targets).detach().cpu().float().flatten())

    def _as_numbers(self, classes: Any) -> Tensor:
        if isinstance(classes, (list, tuple)) and any(isinstance(one, str) for one in classes):
            numbers = [self._numbers.setdefault(str(one), len(self._numbers)) for one in classes]
            self.class_names = {number: name for name, number in self._numbers.items()}
            return torch.tensor(numbers, device="cpu")
        found: Tensor = torch.as_tensor(classes, device="cpu").detach().cpu()
        return (found.flatten() if found.numel() == len(found) else found.argmax(1)).long()

    @property
    def classes(self) -> Tensor | None:
        """Classes of all samples, shape ``(n,)``, int64; None if there are none."""
        return torch.cat(self._classes) if self._classes else None

    @property
    def targets(self) -> Tensor | None:
        """Targets of all samples, shape ``(n,)``; None if there are none."""
        return torch.cat(self._targets) if self._targets else None


def _find_targets(batch: Any, arguments: Any, n: int) -> Path | None:
    """The entry of a batch with a number for each sample, other than zero and one, that is no input of the model."""
    inputs = {t.data_ptr() for t in tensors_in(arguments)}
    for path, t in parts_of(batch):
        is_number = isinstance(t, Tensor) and t.is_floating_point() and t.numel() == n and len(t) == n
        if path and is_number and t.data_ptr() not in inputs and not bool(((t == 0) | (t == 1)).all()):
            return path
    return None
