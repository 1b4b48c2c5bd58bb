"""Keys of the state that checkpoints hold, and those of version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Path of each entry in the state, and where version 0.1 kept it.
_PLACES_IN_0_1 = {
    ("node_layers",): ("proposed_layers",),
    ("scalars",): ("watcher", "numbers"),
    ("n_snapshots",): ("watcher", "snapshots"),
    ("n_drawn",): ("watcher", "drawn"),
    ("step",): ("graph_step",),
    ("ablation_step",): ("watcher", "ablated_step"),
    ("tracker",): ("watcher", "follower"),
    ("history", "steps"): ("watcher", "history", "steps"),
    ("history", "layers"): ("watcher", "history", "moments"),
    ("history", "totals"): ("watcher", "history", "numbers"),
    ("events",): ("watcher", "events"),
    ("layouts",): ("report", "films"),
    ("folders",): ("report", "folders"),
    ("schedule", "options"): ("schedule", "schedule"),
    ("schedule", "validations"): ("schedule", "validations"),
    ("schedule", "step"): ("schedule", "step"),
    ("schedule", "next_step"): ("schedule", "next_step"),
    ("schedule", "regular"): ("schedule", "regular"),
    ("schedule", "extra"): ("schedule", "extra"),
    ("schedule", "extra_interval"): ("schedule", "extra_gap"),
    ("schedule", "dense_from"): ("schedule", "dense", 0),
    ("schedule", "dense_until"): ("schedule", "dense", 1),
    ("time", "overhead"): ("budget", "overhead", "cost"),
    ("time", "training"): ("budget", "overhead", "training"),
    ("time", "last_cost"): ("budget", "overhead", "newest"),
    ("skipped", "total"): ("budget", "put_off", 0),
    ("skipped", "since_last"): ("budget", "put_off", 1),
    ("skipped", "last_step"): ("budget", "put_off", 2),
    ("samples", "written_to"): ("samples", "written_to"),
    ("samples", "complete"): ("samples", "complete"),
    ("samples", "seed"): ("samples", "seed"),
    ("samples", "settings"): ("samples", "settings"),
}


def current_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """State of `LIBCallback` with the keys of today, whichever version has written the checkpoint.

    Args:
        state: The state in the checkpoint.

    Returns:
        The same with present keys; the state itself if it has them already.

    Example:
        >>> current_state({"step": 3, "scalars": {}})
        {'step': 3, 'scalars': {}}
    """
    if "watcher" not in state:
        return state
    found: dict[str, Any] = {}
    for place, old_place in _PLACES_IN_0_1.items():
        value: Any = state
        for key in old_place:
            value = value[key]
        *outer, last = place
        target = found
        for key in outer:
            target = target.setdefault(key, {})
        target[last] = value
    found["node_layers"] = found["node_layers"] or []
    # Colours of modules, which are their numbers now, were kept with the layouts.
    modules = {prefix: layout["colors"] for prefix, layout in found["layouts"].items() if "colors" in layout}
    found["tracker"] = {**found["tracker"], "modules": modules}
    return found
