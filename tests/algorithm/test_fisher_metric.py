"""The Fisher metric of logits."""

from __future__ import annotations

import torch

from lib_lightning.algorithm.fisher_metric import FisherMetric
from tests import reference


def test_metric_and_replicates_are_means_over_logits() -> None:
    logits = 3 * torch.randn(12, 5).double()
    metric = FisherMetric(5, groups=3)
    for group, rows in enumerate(logits.split([5, 4, 3])):
        for part in rows.split(2):
            metric.update(part, group)
    torch.testing.assert_close(metric.M, reference.fisher_metric(logits), rtol=1e-12, atol=1e-12)
    assert metric.is_finite()
    assert metric.relative_error == 0
    directions = torch.randn(4, 5).double()
    for found, rest in zip(
        metric.replicates(directions), (logits[5:], logits[[*range(5), *range(9, 12)]]), strict=False
    ):
        M = reference.fisher_metric(rest)
        torch.testing.assert_close(found, (directions @ M @ directions.T).diagonal(), rtol=1e-12, atol=1e-12)


def test_factor_drops_the_step_common_to_all_logits() -> None:
    metric = FisherMetric(4)
    metric.update(torch.randn(50, 4), 0)
    B = metric.factor(1e-10)
    assert B.shape == (3, 4)
    torch.testing.assert_close(B.T @ B, metric.M, rtol=1e-12, atol=1e-12)
