"""One feature of a snapshot as JSON: its examples, histogram, strongest interactions and effects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib_lightning.io import basis_format as keys
from lib_lightning.io.basis_file import read_parts
from lib_lightning.io.places import Places, position_in_input
from lib_lightning.viewer.json_text import array, dump, integers, number, numbers, object_
from lib_lightning.viewer.run_discovery import FileStamp

# Maximum number of interactions on each side of a feature.
MAX_INTERACTIONS = 8
_KINDS = ("largest", "smallest", "spread")
# What is read of the feature's own node layer, and of those beside it.
_OWN = {
    "importance": keys.BASIS["importance"],
    "importance_error": keys.BASIS["importance_error"],
    "nats": keys.BASIS["output_importance"],
    "nats_error": keys.BASIS["output_importance_error"],
    "degenerate": keys.BASIS["degenerate"],
    "label_score": keys.LABEL_SCORES,
    "ids": keys.LINEAGES["ids"],
    **{f"example_{name}": key for name, key in keys.EXAMPLES.items()},
    **{f"output_{name}": key for name, key in keys.OUTPUT_EFFECTS.items()},
}
_NEIGHBOUR = {"importance": keys.BASIS["importance"], "ids": keys.LINEAGES["ids"]}
_SECTION = {
    "edge": keys.EDGES,
    "edge_error": keys.EDGE_ERRORS,
    "attribution": keys.ATTRIBUTIONS,
    "attribution_error": keys.ATTRIBUTION_ERRORS,
}
# What is read of every snapshot, for curves over the run.
_CURVES = {name: _OWN[name] for name in ("ids", "importance", "importance_error", "nats", "nats_error")} | {
    f"effect_{name}": key for name, key in keys.EFFECTS.items()
}


@dataclass(frozen=True)
class SnapshotFeature:
    """What a snapshot says about one feature.

    Attributes:
        id: The feature's id, such as ``"resid_post/17"``.
        samples: Numbers of the samples among its examples.
        of: Hash of the samples that have these numbers; "" if unknown.
        entries: JSON by key.
    """

    id: str
    samples: tuple[int, ...]
    of: str
    entries: dict[str, str]

    def size(self) -> int:
        """Approximate size in bytes."""
        return sum(map(len, self.entries.values())) + 8 * len(self.samples) + 1000


class SnapshotFeatures:
    """The features of one snapshot.

    Args:
        file: Basis file of the snapshot.
        step: Step of the snapshot.
        layer: Read only what belongs to the features of this node layer, by its index; None for all.

    Raises:
        UNREADABLE: If the file is missing, incomplete, or not an interaction graph.
    """

    def __init__(self, file: FileStamp, step: int, layer: int | None = None) -> None:
        near = None if layer is None else (layer - 1, layer, layer + 1)
        wanted = {
            *_keys(_OWN, None if layer is None else (layer,)),
            *_keys(_NEIGHBOUR, near),
            *_keys(_SECTION, near if near is None else near[:2]),
        }
        self._tensors, self._header = read_parts(file.path, lambda key: key in wanted or _anywhere(key) in wanted)
        self._step = step
        self.layers = [str(name) for name in self._header[keys.LAYERS]]

    def numbers(self, layer: int) -> list[int]:
        """The number in the id of each feature of a node layer: its lineage, or else its index."""
        ids = self._of(layer, "ids")
        return list(range(len(self._tensors[_OWN["importance"].format(layer)]))) if ids is None else ids.tolist()

    def most_important(self, layer: int, limit: int) -> list[int]:
        """Numbers of the most important features of a node layer."""
        order = np.argsort(-self._tensors[_OWN["importance"].format(layer)], kind="stable")[:limit]
        own = self.numbers(layer)
        return [own[i] for i in order]

    def page(self, layer: int, which: int) -> SnapshotFeature | None:
        """Describe a feature.

        Args:
            layer: Index of its node layer.
            which: The number in its id.

        Returns:
            The page; None if there is no such feature in this snapshot.
        """
        if not 0 <= layer < len(self.layers) or which not in (own := self.numbers(layer)):
            return None
        i = own.index(which)
        samples, examples = self._examples(layer, i)
        of = str(self._header[keys.INFO].get(keys.SAMPLES, ""))
        raised, lowered = self._outputs(layer, i)
        histogram, width = self._row(layer, "example_histogram", i), self._row(layer, "example_bin_width", i)
        is_degenerate = self._row(layer, "degenerate", i)
        entries = {
            "step": dump(self._step),
            "layer": dump(self.layers[layer]),
            "id": dump(f"{self.layers[layer]}/{which}"),
            "index": dump(i),
            "label": dump(self._label(layer, i)),
            **{
                name: number(self._row(layer, name, i))
                for name in ("label_score", "importance", "importance_error", "nats", "nats_error")
            },
            "degenerate": dump(bool(is_degenerate)),
            "histogram": "null" if histogram is None else _histogram(histogram, float(width)),
            "shape": dump(self._header.get(keys.EXAMPLE_LAYOUTS, {}).get(self.layers[layer], {}).get("shape")),
            "samples": dump(of),
            "examples": examples,
            "inputs": self._interactions(layer, i, "inputs"),
            "outputs": self._interactions(layer, i, "outputs"),
            "raised": raised,
            "lowered": lowered,
            "effects_by": dump(self._header[keys.INFO].get(keys.EFFECTS_BY)),
            "effects_on": dump(_effects_on(self._header[keys.INFO])),
        }
        return SnapshotFeature(f"{self.layers[layer]}/{which}", samples, of, entries)

    def _of(self, layer: int, name: str) -> np.ndarray | None:
        return self._tensors.get(_OWN[name].format(layer))

    def _row(self, layer: int, name: str, i: int) -> Any:
        """The row of a feature in a tensor, None if the file does not have the tensor."""
        values = self._of(layer, name)
        return None if values is None else values[i]

    def _label(self, layer: int, i: int) -> str:
        names = self._header.get(keys.LABELS, {}).get(self.layers[layer]) or []
        return str(names[i]) if i < len(names) else ""

    def _examples(self, layer: int, i: int) -> tuple[tuple[int, ...], str]:
        """Numbers of the samples, and JSON of the examples; null if there are none in the file."""
        samples = self._row(layer, "example_samples", i)
        if samples is None:
            return (), "null"
        layout = self._header[keys.EXAMPLE_LAYOUTS][self.layers[layer]]
        kinds = [kind for kind, count in zip(_KINDS, layout["counts"], strict=True) for _ in range(count)]
        positions, values = self._row(layer, "example_positions", i), self._row(layer, "example_values", i)
        context = self._row(layer, "example_context", i)
        places = self._header[keys.INFO].get(keys.PLACES)
        found = [
            object_(
                {
                    "kind": dump(kinds[k]),
                    "sample": dump(int(samples[k])),
                    "position": dump(int(positions[k])),
                    "value": number(float(values[k])),
                    **_context(context[k], int(positions[k]) - layout["before"]),
                    **_place(places, self.layers[layer], int(positions[k])),
                }
            )
            for k in range(len(samples))
            if samples[k] >= 0
        ]
        return tuple(sorted({int(sample) for sample in samples if sample >= 0})), array(found)

    def _interactions(self, layer: int, i: int, side: str) -> str:
        """JSON of the strongest interactions with the node layer before or after; null if there is no such layer."""
        other, section = (layer - 1, layer - 1) if side == "inputs" else (layer + 1, layer)
        if not 0 <= other < len(self.layers):
            return "null"
        of_section = {name: self._tensors.get(key.format(section)) for name, key in _SECTION.items()}
        rows = {
            name: None if E is None else np.asarray(E[i] if side == "inputs" else E[:, i], dtype=float)
            for name, E in of_section.items()
        }
        edges = rows["edge"]
        if edges is None:
            return "null"
        strengths = np.where(np.isfinite(edges), edges, 0.0)
        order = [j for j in np.argsort(-strengths, kind="stable")[:MAX_INTERACTIONS].tolist() if strengths[j] > 0]
        total, own = float(strengths.sum()), self.numbers(other)
        return array(
            object_(
                {
                    "layer": dump(self.layers[other]),
                    "id": dump(f"{self.layers[other]}/{own[j]}"),
                    "label": dump(self._label(other, j)),
                    "share": number(strengths[j] / total),
                    **{name: "null" if row is None else number(row[j]) for name, row in rows.items()},
                }
            )
            for j in order
        )

    def _outputs(self, layer: int, i: int) -> tuple[str, str]:
        """JSON of the outputs that are raised and lowered most; null if that is unknown."""
        outputs, changes, errors = (self._row(layer, f"output_{name}", i) for name in keys.OUTPUT_EFFECTS)
        if outputs is None:
            return "null", "null"
        names = self._header[keys.INFO].get(keys.OUTPUT_NAMES)
        half = len(outputs) // 2
        sides = [
            [k for k in places if outputs[k] >= 0 and np.isfinite(changes[k])]
            for places in (range(half), range(half, len(outputs)))
        ]
        raised, lowered = (
            array(
                object_(
                    {
                        "output": dump(int(outputs[k])),
                        "name": dump(_name(names, int(outputs[k]))),
                        "change": number(float(changes[k])),
                        "error": number(float(errors[k])),
                    }
                )
                for k in side
            )
            for side in sides
        )
        return raised, lowered


def _effects_on(info: Mapping[str, Any]) -> str:
    """What changes of outputs are changes of."""
    found = info.get(keys.OUTPUT_DISTRIBUTION)
    kind = found.get("kind") if isinstance(found, dict) else None
    return {"categorical": "the log-probability", "bernoulli": "the logit"}.get(str(kind), "the output")


def _keys(places: Mapping[str, str], of: Sequence[int] | None) -> Iterator[str]:
    for key in places.values():
        yield from [key] if of is None else [key.format(i) for i in of if i >= 0]


def _anywhere(key: str) -> str:
    return re.sub(r"\.\d+", ".{}", key, count=1)


def _histogram(counts: np.ndarray, width: float) -> str:
    return object_(
        {"start": number(-0.5 * width * len(counts)), "width": number(width), "counts": integers(counts)}
    )  # fmt: skip


def _context(values: np.ndarray, start: int) -> dict[str, str]:
    """Values around an example, without the missing ones at both ends, and the position of the first."""
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return {"context": "null", "context_start": "null"}
    first, end = int(known[0]), int(known[-1]) + 1
    return {"context": numbers(values[first:end].astype(float), digits=3), "context_start": dump(start + first)}


def _place(places: Any, layer: str, position: int) -> dict[str, str]:
    """Where in the input a position is shown; nothing in a file that does not know."""
    if not isinstance(places, dict):
        return {}
    known = Places.from_plain(places.get(layer))
    found = {name: dump(where) for name, where in position_in_input(places.get(layer), position).items()}
    # Neighbouring positions are not those of neighbouring tokens.
    is_strided = known is not None and len(known.grid) == 1 and known.stride[0] != 1
    return found | (dict.fromkeys(("context", "context_start"), "null") if is_strided else {})


def _name(names: Any, output: int) -> str | None:
    """Name of an output: an entry of a list, or of an object by number."""
    if isinstance(names, dict):
        names = names.get(str(output))
        return None if names is None else str(names)
    return str(names[output]) if isinstance(names, list) and output < len(names) else None


@dataclass(frozen=True)
class Curves:
    """The numbers of all features in one snapshot, for curves over the run.

    Attributes:
        layers: For each node layer, by name, arrays of shape ``(r,)``.
        score: Name of the score that effects are changes of; None if unknown.
    """

    layers: dict[str, dict[str, np.ndarray]]
    score: str | None

    def size(self) -> int:
        """Approximate size in bytes."""
        return 1000 + sum(200 + values.nbytes for arrays in self.layers.values() for values in arrays.values())


def read_curves(file: FileStamp) -> Curves:
    """Read the numbers of all features in a snapshot.

    Args:
        file: Basis file of the snapshot.

    Returns:
        The numbers.

    Raises:
        UNREADABLE: If the file is missing, incomplete, or not an interaction graph.
    """
    wanted = set(_CURVES.values())
    tensors, header = read_parts(file.path, lambda key: _anywhere(key) in wanted)
    causal = header[keys.INFO].get(keys.CAUSAL)
    return Curves(
        {
            str(name): {curve: tensors[key.format(i)] for curve, key in _CURVES.items() if key.format(i) in tensors}
            for i, name in enumerate(header[keys.LAYERS])
        },
        causal.get("score") if isinstance(causal, dict) else None,
    )


def feature_history(curves: Mapping[int, Curves], layer: str, which: int) -> dict[str, list[Any]]:
    """Numbers of one feature over the run.

    Args:
        curves: Numbers of all features, by step.
        layer: Name of the node layer.
        which: The number in the feature's id.

    Returns:
        ``steps``, and of each ``importance``, ``importance_error``, ``nats``, ``nats_error``, ``effect``,
        ``effect_error``, ``effect_significant`` and ``score``; None where unknown.
    """
    found = {step: _numbers_of(of_step.layers.get(layer, {}), which) for step, of_step in curves.items()}
    names = {
        **{name: name for name in ("importance", "importance_error", "nats", "nats_error")},
        "effect": "effect_changes",
        "effect_error": "effect_errors",
        "effect_significant": "effect_significant",
    }
    history: dict[str, list[Any]] = {"steps": list(found)}
    history |= {name: [of_step.get(key) for of_step in found.values()] for name, key in names.items()}
    return {**history, "score": [of_step.score for of_step in curves.values()]}


def _numbers_of(arrays: Mapping[str, np.ndarray], which: int) -> dict[str, float | None]:
    if "importance" not in arrays:
        return {}
    (places,) = np.nonzero(arrays["ids"] == which) if "ids" in arrays else ([which],)
    if not len(places) or places[0] >= len(arrays["importance"]):
        return {}
    values = {name: float(of_all[places[0]]) for name, of_all in arrays.items() if name != "ids"}
    return {name: float(f"{value:.5g}") if np.isfinite(value) else None for name, value in values.items()}


def latest_effect(history: Mapping[str, Sequence[Any]], step: int) -> dict[str, Any] | None:
    """The newest effect of a feature on a score at or before a step; before the first one, that one.

    Args:
        history: Of `feature_history`.
        step: The step.

    Returns:
        ``change``, ``error``, ``significant``, ``step`` and ``score``; None if the feature has not been tried.
    """
    known = [k for k in range(len(history["steps"])) if history["effect"][k] is not None]
    if not known:
        return None
    k = max((k for k in known if history["steps"][k] <= step), default=known[0])
    return {
        "change": history["effect"][k],
        "error": history["effect_error"][k],
        "significant": bool(history["effect_significant"][k]),
        "step": history["steps"][k],
        "score": history["score"][k],
    }
