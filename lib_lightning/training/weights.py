"""Whether a model still has the weights that a snapshot was computed with: other callbacks may replace them."""

from __future__ import annotations

from torch import nn

from lib_lightning.model.weights_hash import weights_hash

# What ``info["weights"]`` of a snapshot says: they are those of the last optimizer step, or others that have been put
# in their place, during a validation or at the end of training.
TRAINED, VALIDATED, FINAL = "trained", "replaced for validation", "replaced after training"


class TrainedWeights:
    """Remembers the weights after the latest training step, to recognise those that are put in their place.

    Example:
        >>> trained, model = TrainedWeights(), nn.Linear(2, 3)
        >>> trained.note(10, model)
        >>> trained.status(10, weights_hash(model), is_last=False)
        'trained'
        >>> model.bias.data += 1
        >>> trained.status(10, weights_hash(model), is_last=True)
        'replaced after training'
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._hash = ""

    def note(self, step: int, model: nn.Module) -> None:
        """These are the weights after a number of steps."""
        self._step, self._hash = step, weights_hash(model)

    def note_if_unknown(self, step: int, model: nn.Module) -> None:
        """These are the weights after a number of steps, unless other ones have been noted."""
        if self._step != step:
            self.note(step, model)

    def are_replaced(self, step: int, model: nn.Module) -> bool:
        """Whether a model has other weights than after a step; False if those of that step are unknown."""
        return self._step == step and weights_hash(model) != self._hash

    def status(self, step: int, weights: str, is_last: bool) -> str:
        """Describe the weights of a snapshot.

        Args:
            step: Number of optimizer steps before it.
            weights: Hash of its weights.
            is_last: Whether training has ended.

        Returns:
            `TRAINED`, `VALIDATED` or `FINAL`.
        """
        # Unknown weights are those of a step that has just been made, unless training has ended.
        is_trained = weights == self._hash if self._step == step else not is_last
        return TRAINED if is_trained else FINAL if is_last else VALIDATED
