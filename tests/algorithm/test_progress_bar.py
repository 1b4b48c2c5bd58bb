"""Progress bars: steps as long as their operations, and the remaining time that follows from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib_lightning import compute_interaction_graph
from tests.algorithm.test_cost import EXAMPLES
from tests.operations_clock import OperationsClock


class Bar:
    """A bar that remembers where it has been, and when."""

    clock = OperationsClock()

    def __init__(self, total: float, **options: Any) -> None:
        self.n, self.total, self.places = 0.0, total, [(0.0, self.clock.perf_counter())]
        bars.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.places.append((self.n, self.clock.perf_counter()))

    def set_description(self, *_: Any, **__: Any) -> None:
        pass

    def update(self, n: float) -> None:
        self.n += n
        self.places.append((self.n, self.clock.perf_counter()))


bars: list[Bar] = []


def places_of_the_only_bar() -> list[tuple[float, float]]:
    """Where the only bar has been and when, after a check that it only went forwards, to its end."""
    (bar,) = bars
    shares = [share for share, _ in bar.places]
    assert shares == sorted(shares)
    assert bar.n == pytest.approx(1.0)
    return bar.places


@pytest.mark.combinations
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "integrated gradients"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_bar_only_goes_forwards_and_the_remaining_time_is_right_within_a_factor_of_two(
    name: str, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x, layers, settings = EXAMPLES[name]()
    monkeypatch.setattr("lib_lightning.api.tqdm", Bar)
    bars.clear()
    # In operations, as time depends on what else the machine does.
    with Bar.clock.running():
        compute_interaction_graph(model, [x] * batches, layers, progress=True, effort="exact", **settings)
    places = places_of_the_only_bar()
    start, end = places[0][1], places[-1][1]
    for share, now in places[:-1]:
        if 0.1 <= share < 1:
            remaining, shown = end - now, (now - start) * (1 - share) / share
            # The last hundredths are a matter of a moment.
            margin = 0.03 * (end - start)
            assert shown < 2 * remaining + margin, (share, now - start, end - start)
            assert remaining < 2 * shown + margin, (share, now - start, end - start)
