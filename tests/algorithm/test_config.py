"""Validation of the configuration."""

from __future__ import annotations

import pytest

from lib_lightning.algorithm.config import LIBConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"basis": "umap"},
            "basis must be one of 'lib', 'pca', 'neuron', 'random', 'ica', 'dictionary', 'varimax'; got 'umap'",
        ),
        ({"final_basis": "lib"}, "final_basis must be one of"),
        ({"final_metric": "euclid"}, "final_metric must be one of 'fisher'; got 'euclid'"),
        (
            {"final_metric": "fisher", "final_basis": "pca"},
            "final_metric='fisher' determines the basis of the last node layer. Remove final_basis='pca'",
        ),
        ({"rtol": 1.0}, "rtol must be at least 0 and less than 1"),
        ({"n_probes": 0}, "n_probes must be at least 1"),
        ({"integration_steps": -1}, "integration_steps must not be negative"),
    ],
)
def test_invalid_configuration_is_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LIBConfig(**options)
