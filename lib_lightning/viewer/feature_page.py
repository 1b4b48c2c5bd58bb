"""The page of one feature for Python: its numbers, as text in a terminal, and as in the tab in a notebook."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lib_lightning.errors import LIBError, quoted
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.viewer.json_text import array, dump, object_
from lib_lightning.viewer.run_view import RunView

# Examples of each end, interactions of each side and outputs in a terminal; letters on either side of a token.
_SHOWN, _AROUND = 3, 36
# Columns of a table row.
_COLUMNS = 5
_WIDTH = 110


@dataclass(frozen=True)
class FeaturePage:
    """What a run knows about a feature at one step. In a notebook, it is displayed as in the tab.

    Whatever the files do not contain is None, or empty.

    Attributes:
        step: Step of the snapshot.
        id: The feature's id, such as ``"resid_post/17"``.
        layer: Name of its node layer.
        index: Its position in the snapshot's bases, edges and labels.
        label: Its name; "" for none.
        label_score: How well the label predicts the feature on other samples: area under the ROC curve, 0.5 for chance.
        importance: Its importance.
        importance_error: Standard error of the importance.
        output_importance: What setting it to its mean at one position does to the model's predictions, in nats.
        output_importance_error: Standard error of that.
        histogram: Counts of its values, with ``start`` and ``width`` of the intervals.
        examples: Where it is largest, smallest, and some in between: dictionaries with ``kind`` (``"largest"``,
            ``"smallest"`` or ``"spread"``), ``sample``, ``position``, ``value``, ``context`` (values at the positions
            around it), ``context_start`` (the first of these positions) and ``rendering`` (how the sample looks).
        inputs: Strongest interactions with the node layer before: ``id``, ``label``, ``edge``, ``share`` of all
            strength on that side, ``attribution`` and standard errors.
        outputs: The same with the node layer after.
        raised: Outputs of the model that it raises most: ``output``, ``name``, ``change`` and ``error``.
        lowered: Those that it lowers most.
        effect: The latest measured change of a score with the feature held at its mean, or else the first later one:
            ``change``, ``error``, ``significant``, ``step`` and ``score``.
        final_since: Step since which the feature of the last snapshot is recognisable; None if it is not, or if the run
            has not ended. Features may change their form and keep their id.
        note: Your note; "" for none.
        history: Numbers over the run: ``steps``, ``importance``, ``nats``, ``effect`` and their errors.
    """

    step: int
    id: str
    layer: str
    index: int
    label: str
    label_score: float | None
    importance: float
    importance_error: float | None
    output_importance: float | None
    output_importance_error: float | None
    histogram: dict[str, Any] | None
    examples: list[dict[str, Any]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    raised: list[dict[str, Any]]
    lowered: list[dict[str, Any]]
    effect: dict[str, Any] | None
    final_since: int | None
    note: str
    history: dict[str, list[Any]]
    _page: str = field(repr=False, compare=False)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page as one HTML file, which a browser opens without server or network.

        Args:
            path: The file.

        Returns:
            Its path.
        """
        write_bytes(path, self._page.encode())
        return Path(path)

    def __repr__(self) -> str:
        return "\n".join(line for line in self._lines() if line)

    def _lines(self) -> list[str]:
        score = "" if self.label_score is None else f" (AUROC {self.label_score:.3g})"
        known = [step for step, value in zip(self.history["steps"], self.history["importance"], strict=True) if value]
        nats = (
            "" if self.output_importance is None else _with_error(self.output_importance, self.output_importance_error)
        )
        numbers = [
            f"importance {_with_error(self.importance, self.importance_error)}",
            f"effect on predictions {nats} nats to second order" if nats else "",
            f"present since step {known[0]:,}" if known and len(self.history["steps"]) > 1 else "",
            "" if self.final_since is None else f"in its final form since step {self.final_since:,}",
        ]
        columns = _telling_columns(self._of("largest"), self._of("smallest"))
        return [
            f"{self.id} at step {self.step:,}" + (f": {self.label}{score}" if self.label else ""),
            "  " + ", ".join(filter(None, numbers)),
            _effect(self.effect),
            *(_example(one, columns) for kind in ("largest", "smallest") for one in self._of(kind)[:_SHOWN]),
            _interactions("from", self.inputs),
            _interactions("to", self.outputs),
            _outputs("raises", self.raised),
            _outputs("lowers", self.lowered),
            f"  note: {self.note}" if self.note else "",
        ]

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [example for example in self.examples if example["kind"] == kind]

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self._page)}" sandbox="allow-scripts" '
            f'style="width: 100%; height: 760px; border: 0"></iframe><p>{html.escape(self._lines()[0])}</p>'
        )


def feature_of(run: RunView, feature_id: str, step: int | None) -> FeaturePage:
    """Read the page of a feature.

    Args:
        run: The run.
        feature_id: The feature's id, such as ``"resid_post/17"``.
        step: Step of the snapshot; None for the last one that has the feature.

    Returns:
        The page.

    Raises:
        LIBError: If there is no such feature, or no such snapshot of it.
    """
    from lib_lightning.viewer.html_export import feature_page

    layers = [layer["name"] for layer in json.loads(run.run())["layers"]]
    layer, _, number = str(feature_id).rpartition("/")
    if layer not in layers or not number.isdecimal():
        raise LIBError(
            f"A feature's id is its node layer and a number, such as '{layers[0]}/0'; got {feature_id!r}. "
            f"The node layers of run '{run.name}' are {quoted(layers)}."
        )
    name = f"{layer}/{int(number)}"
    history = run.feature_history(name)
    steps = [at for at, value in zip(history["steps"], history["importance"], strict=True) if value is not None]
    if not steps:
        raise LIBError(f"No snapshot of run '{run.name}' has a feature '{name}'.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise LIBError(
            f"Run '{run.name}' has no snapshot at step {step:,} with feature '{name}', which is in those at "
            f"{_range(steps)}."
        )
    place = layers.index(layer), int(number)
    text = run.feature(step, *place)
    page = json.loads(text)
    before = [at for at in steps if at < step]
    between = before[1:]
    others = dict(zip([*before[:1], *between[len(between) // 2 :][:1]], ("first seen", "half-way"), strict=False))
    content = object_(
        {
            "run": dump(run.name),
            "page": text,
            "others": array(
                object_({"title": dump(title), "step": dump(at), "page": run.feature(at, *place)})
                for at, title in others.items()
            ),
            "first": dump(steps[0]),
        }
    )
    looks = page["renderings"]
    return FeaturePage(
        step=page["step"],
        id=page["id"],
        layer=page["layer"],
        index=page["index"],
        label=page["label"],
        label_score=page["label_score"],
        importance=page["importance"],
        importance_error=page["importance_error"],
        output_importance=page["nats"],
        output_importance_error=page["nats_error"],
        histogram=page["histogram"],
        examples=[{**one, "rendering": looks.get(str(one["sample"]))} for one in page["examples"] or []],
        inputs=page["inputs"] or [],
        outputs=page["outputs"] or [],
        raised=page["raised"] or [],
        lowered=page["lowered"] or [],
        effect=page["effect"],
        final_since=page["final_since"],
        note=page["note"],
        history=page["history"],
        _page=feature_page(f"{name} of {run.name}", content),
    )


def _range(steps: Sequence[int]) -> str:
    return f"step {steps[0]:,}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]:,} to {steps[-1]:,}"


def _with_error(value: float, error: float | None) -> str:
    """A number with its standard error, rounded to two digits of the error."""
    if error is None or not error > 0:
        return f"{value:.3g}"
    digits = 1 - math.floor(math.log10(error))
    if 0 <= digits <= 6 and abs(value) < 1e6:
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    return f"{value:.3g} ± {error:.2g}"


def _effect(effect: dict[str, Any] | None) -> str:
    if effect is None:
        return ""
    verdict = "more than chance" if effect["significant"] else "could be chance"
    change = _with_error(effect["change"], effect["error"])
    score = (effect["score"] or "the score").replace("_", " ")
    return f"  held at its mean, {score} changes by {change} (step {effect['step']:,}, {verdict})"


def _telling_columns(largest: Sequence[dict[str, Any]], smallest: Sequence[dict[str, Any]]) -> list[int]:
    """Columns of table rows, those first that differ most between both ends, relative to their spread."""
    rows = [
        [
            [x if isinstance(x, (int, float)) else math.nan for x in one["rendering"]["values"]]
            for one in end
            if (one["rendering"] or {}).get("kind") == "row"
        ]
        for end in (largest, smallest)
    ]
    if not all(rows):
        return []
    try:
        high, low = (np.array(end, dtype=float) for end in rows)
        spread = np.concatenate([high, low]).std(axis=0)
        # Columns of texts are not compared.
        difference = np.nan_to_num(np.abs(high.mean(axis=0) - low.mean(axis=0)) / np.where(spread > 0, spread, np.inf))
    except ValueError:  # rows of different lengths
        return []
    return [int(c) for c in np.argsort(-difference, kind="stable")[:_COLUMNS]]


def _example(example: dict[str, Any], columns: Sequence[int]) -> str:
    return f"  {example['kind']:>8} {example['value']:>8.3g}  {_looks(example, columns)}"


def _looks(example: dict[str, Any], columns: Sequence[int]) -> str:
    rendering, at = example["rendering"] or {}, example.get("token", example["position"])
    kind = rendering.get("kind")
    if kind == "tokens":
        tokens = [str(token).replace("\n", "\u21b5") for token in rendering["tokens"]]
        before, after = ("", "".join(tokens)) if at is None else ("".join(tokens[:at]), "".join(tokens[at + 1 :]))
        text = before[-_AROUND:] + ("" if at is None else f"[{tokens[at]}]") + after[:_AROUND]
    elif kind == "row":
        names, values = rendering["columns"], rendering["values"]
        text = ", ".join(f"{names[c]}: {values[c]}" for c in columns or range(min(_COLUMNS, len(names))))
    elif kind == "text":
        text = str(rendering["text"])
    else:
        where = f", position {example['position']}" if example["position"] else ""
        text = f"sample {example['sample']}{where}"
    label = f"  ({rendering['label']})" if rendering.get("label") else ""
    return (text if len(text) <= _WIDTH else text[:_WIDTH] + "...") + label


def _interactions(side: str, interactions: Sequence[dict[str, Any]]) -> str:
    if not interactions:
        return ""
    signs = {None: "", True: " drives", False: " holds against"}
    parts = [
        f"{one['id']} {100 * one['share']:.0f}%"
        + signs[None if one["attribution"] is None else one["attribution"] >= 0]
        for one in interactions[:_SHOWN]
    ]
    return f"  strongest {side} {interactions[0]['layer']}: {', '.join(parts)}"


def _outputs(verb: str, outputs: Sequence[dict[str, Any]]) -> str:
    if not outputs:
        return ""
    parts = [
        f"{one['output'] if one['name'] is None else one['name']} {_with_error(one['change'], one['error'])}"
        for one in outputs[:_SHOWN]
    ]
    return f"  {verb} output {', '.join(parts)}"
