"""Progress bars: steps as long as their operations, and the remaining time that follows from them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from tests.algorithm.test_cost import CNN, MLP


class Bar:
    """A bar that remembers where it has been, and when."""

    def __init__(self, total: float, **options: Any) -> None:
        self.n, self.total, self.places = 0.0, total, [(0.0, time.process_time())]
        bars.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.places.append((self.n, time.process_time()))

    def set_description(self, *_: Any, **__: Any) -> None:
        pass

    def update(self, n: float) -> None:
        self.n += n
        self.places.append((self.n, time.process_time()))


bars: list[Bar] = []
ATTENTION = nn.Sequential(
    nn.Linear(16, 32), *(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2))
)


@pytest.mark.parametrize(
    ("model", "shape", "layers", "options"),
    [
        (MLP, (2000, 20), ["input", "1", "3", "output"], {}),
        (CNN, (16, 3, 16, 16), ["1", "3", "output"], {"n_probes": 64}),
        (CNN, (16, 3, 16, 16), ["1", "3", "output"], {"n_probes": 64, "n_pushed": 4}),
        (ATTENTION, (32, 8, 16), ["0", "1", "2"], {}),
    ],
)
def test_a_bar_only_goes_forwards_and_the_remaining_time_is_about_right(
    model: nn.Module, shape: tuple[int, ...], layers: list[str], options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_lightning.api.tqdm", Bar)
    bars.clear()
    compute_interaction_graph(model, [torch.randn(shape)], layers, progress=True, effort="exact", **options)
    (bar,) = bars
    shares = [share for share, _ in bar.places]
    assert shares == sorted(shares)
    assert bar.n == pytest.approx(1.0)
    start, end = bar.places[0][1], bar.places[-1][1]
    if end - start < 1:  # the bar of a second is not read
        return
    for share, now in bar.places[:-1]:
        if 0.1 <= share <= 0.9:
            predicted = (now - start) * (1 - share) / share
            assert predicted < 3 * (end - now) + 0.5
            assert end - now < 3 * predicted + 0.5
