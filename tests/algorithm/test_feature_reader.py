"""Features batch by batch, encoded or read from a cache."""

from __future__ import annotations

import pytest
import torch

from lib_lightning.algorithm.basis import pca_basis
from lib_lightning.algorithm.feature_reader import FeatureReader
from lib_lightning.algorithm.linalg import Cutoff


@pytest.mark.parametrize("masked", [False, True])
def test_cached_features_are_those_that_would_be_encoded(masked: bool) -> None:
    a = torch.randn(10, 3, 4).double()
    mask = torch.rand(10, 3) > 0.4 if masked else None
    rows = a.flatten(0, 1) if mask is None else a[mask]
    basis = pca_basis("layer", rows.mean(0), rows.T.cov(correction=0), Cutoff(0.0, 4, torch.float64))
    encoded, cached = FeatureReader(basis), FeatureReader(basis, basis.encode(rows))
    for samples in (slice(0, 4), slice(4, 5), slice(5, 10)):
        batch_mask = None if mask is None else mask[samples]
        expected = encoded.next(a[samples], batch_mask)
        torch.testing.assert_close(cached.next(a[samples], batch_mask), expected, rtol=1e-12, atol=1e-12)
        if batch_mask is not None:
            assert not expected[~batch_mask].any()
