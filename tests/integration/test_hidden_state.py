"""Wherever a forward pass keeps state, a snapshot leaves it as it was, and training continues bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_lightning import compute_interaction_graph
from tests.integration.hidden_state import PLACES, Place, iterators, open_file, stateful
from tests.integration.state_check import StateCheck

LAYERS = ["second:input", "output"]
# What a model that cannot be copied may hold, and that cannot be restored either.
NOT_RESTORED = {iterators, open_file}


def trained(places: list[Place], watched: bool, refuses_copies: bool = False) -> list[Any]:
    """All state after three steps of training, with or without a snapshot in each."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what a model may use)
    model, read = stateful(places, refuses_copies)
    start = read(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = model(torch.randn(8, 3)).square().mean()
        if watched:  # between the forward and the backward pass of training
            before, state = StateCheck(model), read(model)
            compute_interaction_graph(model, [torch.ones(8, 3).cumsum(0).cumsum(1).sin()], LAYERS)
            assert read(model) == state
            before.assert_same()
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    moments = [t for entry in optimizer.state.values() for t in entry.values()]
    return [start, read(model), [t.tolist() for t in (*model.state_dict().values(), *moments)]]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_each_place(place: Place) -> None:
    assert trained([place], watched=True) == trained([place], watched=False)


@pytest.mark.parametrize("place", [p for p in PLACES if p not in NOT_RESTORED], ids=lambda place: place.__name__)
def test_each_place_in_a_model_that_cannot_be_copied(place: Place) -> None:
    assert trained([place], True, refuses_copies=True) == trained([place], False, refuses_copies=True)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(places=st.lists(st.sampled_from(PLACES), min_size=2, max_size=6, unique=True), refuses=st.booleans())
def test_any_combination(places: list[Place], refuses: bool) -> None:
    if refuses:
        places = [place for place in places if place not in NOT_RESTORED]
    assert trained(places, True, refuses) == trained(places, False, refuses)
