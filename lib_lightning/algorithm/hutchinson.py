"""Random sign vectors for Hutchinson's estimator, with less variance than independent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.model.safe_points import safe_point

# Numbers that are drawn between two points at which Ctrl-C is obeyed: some 0.1 s.
_NUMBERS = 2**24


class OrthogonalSigns:
    """Vectors ``z`` of random signs, in sets of mutually orthogonal ones.

    Each vector has ``E[z z^T] = 1``, so that Hutchinson's estimator is unbiased. Over a full set of ``m`` orthogonal
    vectors ``sum z z^T / m`` is exactly ``1``, so that the part of the estimate that is common to all samples has no
    sampling error once a set is complete.

    Args:
        generator: Source of randomness, on the CPU.

    Note:
        The vectors are rows of Sylvester's Hadamard matrix with random signs and a random order of its columns, which
        are drawn again for each set.

    Example:
        >>> signs = OrthogonalSigns(torch.Generator().manual_seed(0)).draw(4, 4).float()
        >>> signs @ signs.T
        tensor([[4., 0., 0., 0.],
                [0., 4., 0., 0.],
                [0., 0., 4., 0.],
                [0., 0., 0., 4.]])
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._size, self._bits, self._used = -1, 0, 0
        self._columns = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._flips = torch.zeros(0, dtype=torch.int8, device="cpu")
        self._high = self._low = torch.zeros(0, 0, dtype=torch.int8, device="cpu")

    def draw(self, count: int, size: int) -> Tensor:
        """Draw the next vectors.

        Args:
            count: Number of vectors.
            size: Their length; a new length begins a new set.

        Returns:
            Entries 1 and -1, shape ``(count, size)``, int8, on the CPU.
        """
        signs = torch.empty(count, size, dtype=torch.int8, device="cpu")
        drawn = 0
        while drawn < count:
            if self._size != size or self._used == 2**self._bits:
                self._begin(size)
            safe_point()
            stop = min(self._used + min(count - drawn, max(1, _NUMBERS // max(1, size))), 2**self._bits)
            self._fill(signs[drawn : drawn + stop - self._used])
            drawn += stop - self._used
            self._used = stop
        return signs

    def _begin(self, size: int) -> None:
        bits = max(1, size - 1).bit_length()
        if bits != self._bits:
            self._high, self._low = _hadamard(bits - bits // 2), _hadamard(bits // 2)
        self._size, self._bits, self._used = size, bits, 0
        self._columns = torch.randperm(2**self._bits, generator=self.generator, device="cpu")[:size]
        self._flips = (1 - 2 * torch.randint(0, 2, (size,), generator=self.generator, device="cpu")).to(torch.int8)

    def _fill(self, signs: Tensor) -> None:
        """Write the next vectors of the set."""
        # Sylvester's matrix of size 2^bits is the Kronecker product of two smaller ones, whose columns are chosen
        # once for many rows.
        low = self._bits // 2
        high_rows, low_rows = self._high, self._low
        start, stop = self._used, self._used + len(signs)
        first = start >> low
        high = high_rows[first : (stop - 1 >> low) + 1][:, self._columns >> low] * self._flips
        rows = torch.arange(start, stop, device="cpu")
        if len(rows) < len(low_rows):
            low_rows, index = low_rows[rows % len(low_rows)], rows - start
        else:
            index = rows % len(low_rows)
        torch.mul(high[(rows >> low) - first], low_rows[:, self._columns % 2**low][index], out=signs)


def _hadamard(bits: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for _ in range(bits):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H
