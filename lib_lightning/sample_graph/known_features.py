"""What is known of features beyond one sample, with the keys of circuit-tracer's files of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lib_lightning.algorithm.examples import FeatureExamples
from lib_lightning.algorithm.output_changes import OutputEffects
from lib_lightning.errors import LIBError
from lib_lightning.io.places import Places, position_in_input
from lib_lightning.io.rendering_file import read_renderings
from lib_lightning.io.run_layout import RunLayout

Renderings = Mapping[int, Mapping[str, Any]]

# Its viewer shows a list for each, under this heading.
_LISTS = {"largest": "Largest values", "smallest": "Smallest values", "spread": "Spread over the range"}


def find_renderings(source: Renderings | str | PathLike[str] | None, samples: str) -> Renderings:
    """How the samples among the examples of a graph look.

    Args:
        source: Renderings by number of the sample, the folder of a run, its file of renderings, or None for none.
        samples: Hash of the samples of the graph, ``info["samples"]``.

    Returns:
        Renderings by number of the sample.

    Raises:
        LIBError: If there is no such file, or it is one of other samples.
    """
    if source is None or isinstance(source, Mapping):
        return source or {}
    path = RunLayout(source).renderings_file if Path(source).is_dir() else Path(source)
    if not path.exists():
        raise LIBError(
            f"There is no file '{path}' that says how samples look. The folder of a run, such as logs/lib, has one."
        )
    found = read_renderings(path).get(samples)
    if not found:
        raise LIBError(f"'{path}' has none of the samples of this graph: it is the file of another run.")
    return found


@dataclass(frozen=True)
class KnownFeatures:
    """What is known of features beyond one sample.

    Attributes:
        examples: Examples of each node layer that has any.
        output_effects: Effects of the features of each node layer that has any.
        output_name: Name of an output.
        places: Where in the input the positions of each node layer are, ``info["places"]``.
        renderings: How samples look.
    """

    examples: Mapping[str, FeatureExamples]
    output_effects: Mapping[str, OutputEffects]
    output_name: Callable[[int], str]
    places: Mapping[str, Any]
    renderings: Renderings

    def of(self, layer: str, index: int) -> dict[str, Any]:
        """What is known of one feature.

        Args:
            layer: Its node layer.
            index: Its index.

        Returns:
            Values by circuit-tracer's keys.
        """
        known: dict[str, Any] = {}
        if layer in self.output_effects:
            found = self.output_effects[layer].outputs[index].tolist()
            k = len(found) // 2
            known["top_logits"] = [self.output_name(c) for c in found[:k] if c >= 0]
            known["bottom_logits"] = [self.output_name(c) for c in found[k:] if c >= 0]
        if layer in self.examples:
            counts, width = self.examples[layer].histogram[index], float(self.examples[layer].bin_width[index])
            share = counts.double().cumsum(0) / counts.sum().clamp(min=1)
            bins = torch.searchsorted(share, torch.arange(1, 100, device="cpu").double() / 100)
            known["histogram"] = counts.tolist()
            known["act_min"], known["act_max"] = -width * len(counts) / 2, width * len(counts) / 2
            known["quantile_values"] = ((bins + 1 - len(counts) / 2) * width).tolist()
            known["activation_frequency"] = 1.0
            known["examples_quantiles"] = self._lists(layer, index)
        return known

    def _lists(self, layer: str, index: int) -> list[dict[str, Any]]:
        """Lists of examples; of those samples that it is known how they look."""
        examples = self.examples[layer]
        by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _LISTS}
        columns = (examples.samples, examples.positions, examples.values, examples.context)
        rows = zip(examples.kinds, *(column[index].tolist() for column in columns), strict=True)
        for kind, sample, position, value, context in rows:
            rendering, known = self.renderings.get(sample), dict(enumerate(context, position - examples.before))
            if rendering is not None and rendering["kind"] == "tokens":
                by_kind[kind].append(self._of_tokens(layer, rendering["tokens"], position, value, known))
            elif rendering is not None:
                by_kind[kind].append(_as_example([(_in_words(rendering, sample, position), value)], 0))
        return [{"quantile_name": _LISTS[kind], "examples": found} for kind, found in by_kind.items() if found]

    def _of_tokens(
        self, layer: str, tokens: Sequence[object], position: int, value: float, context: Mapping[int, float]
    ) -> dict[str, Any]:
        """An example in a sequence of tokens, with the values at the positions around it."""
        plain, texts = self.places.get(layer), list(map(str, tokens))
        place = position_in_input(plain, position)["token"] if layer in self.places else position
        # A node layer with one value for each sample has no token of its own.
        if place is None or place >= len(texts) or not self.examples[layer].shape:
            return _as_example([("".join(texts), value)], 0)
        known = Places.from_plain(plain)
        if known is not None and len(known.grid) == 1 and known.stride[0] != 1:
            context = {}  # neighbouring positions are not those of neighbouring tokens
        values = {place + at - position: x for at, x in context.items() if not math.isnan(x)} | {place: value}
        first, end = (max(0, min(values)), min(len(texts), max(values) + 1)) if context else (0, len(texts))
        # Zero, the mean of the feature, has no colour in its viewer.
        return _as_example([(texts[p], values.get(p, 0.0)) for p in range(first, end)], place - first)


def _as_example(tokens: list[tuple[str, float]], place: int) -> dict[str, Any]:
    return {
        "tokens": [token for token, _ in tokens],
        "tokens_acts_list": [value for _, value in tokens],
        "train_token_ind": place,
        "is_repeated_datapoint": False,
    }


def _in_words(rendering: Mapping[str, Any], sample: int, position: int) -> str:
    """What is no sequence of tokens: circuit-tracer's viewer shows texts only."""
    if rendering["kind"] == "text":
        text = str(rendering["text"])
    elif rendering["kind"] == "row":
        text = ", ".join(f"{name}: {x}" for name, x in zip(rendering["columns"], rendering["values"], strict=True))
    else:
        text = f"sample {sample}, position {position}"
    return f"{text} ({rendering['label']})" if rendering.get("label") else text
