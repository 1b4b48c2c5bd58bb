"""Events of features and metrics: births, deaths, changes of importance, as records and as sentences."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from lib_lightning.errors import SettingError

Kind = Literal["born", "died", "split", "merged", "emerged", "faded", "rose", "fell"]
CHANGES: tuple[Kind, ...] = ("emerged", "faded", "rose", "fell")


@dataclass(frozen=True)
class Event:
    """An event of one feature or one metric.

    A feature is named by its id, node layer and lineage: the same in all snapshots, as in figures and the tab.
    ``graph.feature(event.subject)`` finds it in a snapshot, where it has another index in bases, edges and labels.

    Attributes:
        kind: ``"born"``, ``"died"``, ``"split"`` or ``"merged"``: a lineage begins or ends; ``"emerged"`` or
            ``"faded"``: a feature becomes important, or ceases to be; ``"rose"`` or ``"fell"``: the share of an
            important feature, or a metric, changes.
        step: Training step of the snapshot at which it was detected.
        layer: Node layer of the feature; None for a metric.
        lineage: Lineage of the feature; None for a metric.
        others: Lineages of the same layer that it has split from, or merged into.
        metric: Name of the metric; None for a feature.
        before: Before the change: the feature's share of its layer's importance, from 0 to 1, or the metric's value.
        after: The same when the change was detected.
        evidence: log10 of the evidence for a change, as `Change.evidence`.
        onset: Step of the last snapshot before the change, at which ``before`` was measured.
        label: Name of the feature; "" for none.
        abrupt: Whether the change is also one if the increments of curves may be autocorrelated, as those of smooth
            ones (see `EmergenceDetector`); None if this was not tested, as for births and events in older files.

    Raises:
        SettingError: If the kind is unknown, a number is not finite, or not exactly one of feature and metric is given.

    Example:
        >>> Event("emerged", 1240, "resid_post", 17, before=0.0002, after=0.015).text
        "feature resid_post/17 emerged at step 1,240: its share of the layer's importance rose from 0.02% to 1.5%"
        >>> Event("faded", 1300, "resid_post", 17, abrupt=True).text
        'feature resid_post/17 faded abruptly at step 1,300'
        >>> Event("split", 90, "resid_post", 17, others=(3,), label="k=5 a+b 93%").text
        'feature resid_post/17 (k=5 a+b 93%) split from resid_post/3 at step 90'
        >>> Event("fell", 800, metric="lib/effective_edges/total", before=1989.0, after=703.0).text
        'lib/effective_edges/total fell at step 800 from 1,989 to 703'
    """

    kind: Kind
    step: int
    layer: str | None = None
    lineage: int | None = None
    others: tuple[int, ...] = ()
    metric: str | None = None
    before: float | None = None
    after: float | None = None
    evidence: float | None = None
    onset: int | None = None
    label: str = ""
    abrupt: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SettingError(f"kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}.")
        if (self.layer is None) != (self.lineage is None) or (self.layer is None) == (self.metric is None):
            raise SettingError("An event has either a feature (layer and lineage) or a metric.")
        if self.metric is not None and self.kind not in ("rose", "fell"):
            raise SettingError(f"The kind of a metric's event must be 'rose' or 'fell'; got {self.kind!r}.")
        for name in ("before", "after", "evidence"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise SettingError(f"{name} must be finite or None; got {value}.")

    @property
    def subject(self) -> str:
        """The feature's id, such as ``"resid_post/17"``, or the metric's name."""
        return self.metric if self.metric is not None else f"{self.layer}/{self.lineage}"

    @property
    def text(self) -> str:
        """The event as a sentence."""
        since = "" if self.onset is None else f" since step {self.onset:,}"
        sentence = f"{self._predicate()}{' abruptly' if self.abrupt else ''} at step {self.step:,}"
        if self.before is None or self.after is None:
            return sentence
        if self.metric is not None:
            return f"{sentence} from {_number(self.before)} to {_number(self.after)}{since}"
        verb = "rose" if self.after > self.before else "fell"
        shares = f"from {_share(self.before)} to {_share(self.after)}{since}"
        return f"{sentence}: its share of the layer's importance {verb} {shares}"

    def _predicate(self) -> str:
        if self.metric is not None:
            return f"{self.metric} {self.kind}"
        name = f"feature {self.subject}" + (f" ({self.label})" if self.label else "")
        others = " and ".join(f"{self.layer}/{other}" for other in self.others)
        preposition = " into " if self.kind == "merged" else " from "
        return f"{name} {'was born' if self.kind == 'born' else self.kind}{preposition + others if others else ''}"

    def to_json(self) -> str:
        """Convert to one line of JSON, without empty attributes, and with the sentence as ``text``.

        ``abrupt`` is left out only if it was not tested: false is written.
        """
        written = {name: value for name, value in asdict(self).items() if value not in (None, (), "")}
        return json.dumps(written | {"text": self.text}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Event:
        """Read a line of `to_json`.

        Args:
            line: A JSON object. Keys that are not attributes of an event are ignored.

        Returns:
            The event, equal to the one written.

        Raises:
            SettingError: If the line is not JSON, or not an event.
        """
        read: Any = json.loads(line)
        try:
            known: dict[str, Any] = {f.name: read[f.name] for f in fields(cls) if f.name in read}
            return cls(**{**known, "others": tuple(known.get("others", ()))})
        except TypeError as error:
            raise SettingError(f"Not an event: {line!r}.") from error


def _share(share: float) -> str:
    # A share of exactly 0 is that of an absent feature.
    return "nothing" if share == 0 else f"{100 * share:.2g}%" if share < 0.995 else "100%"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.4g}"
