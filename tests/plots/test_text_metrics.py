"""Names of node layers in figures: all in one size and cut alike, as long as that is possible."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lightning.plots.text_metrics import fit_names, text_width

LLAMA = ["model.embed_tokens", "model.layers.0.post_attention_layernorm:input", "model.layers.0", "output"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["input", "0", "2", "output"], ["input", "0", "2", "output"]),
        (["0.1", "0.3", "output"], ["0.1", "0.3", "output"]),
        (["transformer.h.0", "transformer.h.1"], ["transformer.h.0", "transformer.h.1"]),
        (
            ["student_network.model.embed", "student_network.model.layers.0", "output"],
            ["…model.embed", "…model.layers.0", "output"],
        ),
        (
            ["transformer.encoder.layers.1", "transformer.encoder|transformer.decoder.layers.0"],
            ["…encoder.layers.1", "…encoder|\n…decoder.layers.0"],
        ),
        (LLAMA, ["…embed_tokens", "…layers.0.\npost_attention_\nlayernorm:input", "…layers.0", "output"]),
    ],
)
def test_names_are_cut_alike(names: list[str], expected: list[str]) -> None:
    texts, size = fit_names(tuple(names), 120, 13, 7, lines=3)
    assert list(texts) == expected
    assert size > 8


WORDS = st.sampled_from(["model", "layers", "0", "11", "post_attention_layernorm", "mlp", "h", "a_rather_long_name"])
PATHS = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
TAPS = st.tuples(PATHS, st.sampled_from(["", ":input", "#1"])).map("".join)
NAMES = st.lists(TAPS, min_size=1, max_size=2).map("|".join)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4), width=st.sampled_from([60, 120]), lines=st.integers(1, 3),
    beginning=st.sampled_from(["", "net.", "net.student_network."]),
)  # fmt: skip
def test_names_fit_in_one_size(names: list[str], width: int, lines: int, beginning: str) -> None:
    names = ["|".join(beginning + tap for tap in name.split("|")) for name in names]
    texts, size = fit_names(tuple(names), width, 13, 7, lines)
    assert 7 <= size <= 13
    for name, text in zip(names, texts, strict=True):
        parts = text.split("\n")
        assert len(parts) <= lines
        # Only beginnings are left out.
        assert all(piece in name for part in parts for piece in part.split("…"))
        assert name.endswith(parts[-1].rpartition("…")[2])
        assert all(text_width(part, size, "bold") <= width or len(part) <= 5 for part in parts)
