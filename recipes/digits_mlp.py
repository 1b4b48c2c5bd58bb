"""Handwritten digits: the 1,797 images of 8 x 8 pixels that come with scikit-learn."""

from __future__ import annotations

import torch

from lib_lightning.errors import LIBError
from recipes.mlp import Labelled, LabelledData


class Digits(LabelledData):
    """Scikit-learn's digits, split at random into training and test images.

    Args:
        batch_size: Images in a training batch.
        test_fraction: Share of the images to test on.
        split_seed: Seed of the split.
    """

    def __init__(self, batch_size: int = 32, test_fraction: float = 0.2, split_seed: int = 0) -> None:
        super().__init__(batch_size)
        self.test_fraction, self.split_seed = test_fraction, split_seed

    def read(self) -> tuple[Labelled, Labelled]:
        """Training and test images.

        Raises:
            LIBError: If scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise LIBError(
                "The digits recipe takes its images from scikit-learn, which is not installed: pip install scikit-learn"
            ) from error
        digits = load_digits()
        images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        test, train = order.tensor_split([round(self.test_fraction * len(labels))])
        # Grey levels are integers from 0 to 16.
        return Labelled(images[train], labels[train], 16), Labelled(images[test], labels[test], 16)
