"""Progress reports and their listeners."""

from __future__ import annotations

import pytest

from lib_lightning.algorithm.progress import on_phase, phase_done


def test_every_listener_of_nested_contexts_is_called() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with on_phase(outer.append):
        phase_done("a")
        with on_phase(inner.append):
            phase_done("b")
        phase_done("c")
    phase_done("d")
    assert (outer, inner) == (["a", "b", "c"], ["b"])


def test_listener_is_removed_after_an_error() -> None:
    heard: list[str] = []

    def fail() -> None:
        with on_phase(heard.append):
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    phase_done("a")
    assert heard == []
