"""Names of everything in a basis file: the keys of its tensors and of its header.

A tensor belongs to node layer ``i``, counted from 0 in forward order, or to the section between node layers ``i`` and
``i + 1``. Its key has ``{}`` in place of ``i``.
"""

from __future__ import annotations

from typing import Any

# Of each node layer. The names are those of the attributes of `Basis`; the last ones may be missing.
_OPTIONAL = ("importance_error", "degenerate", "output_importance", "output_importance_error")
BASIS_REQUIRED = {name: f"basis.{{}}.{name}" for name in ("mean", "to_features", "from_features", "importance")}
BASIS_OPTIONAL = {name: f"basis.{{}}.{name}" for name in _OPTIONAL}
BASIS = BASIS_REQUIRED | BASIS_OPTIONAL
# Of node layers whose features are latents of a dictionary: their numbers, and its weights, which are mostly left out.
LATENT_NUMBERS = "basis.{}.latents"
DICTIONARY_WEIGHTS = "dictionary.{}."
MODULES = "modules.{}"
REFERENCE_FEATURES = "reference_features.{}"
LABEL_SCORES = "label_scores.{}"
# Several tensors that belong together: all of them, or none. The names are those of the attributes of the class.
LINEAGES = {name: f"lineages.{{}}.{name}" for name in ("ids", "similarity", "parents")}
EXAMPLES = {
    name: f"examples.{{}}.{name}" for name in ("samples", "positions", "values", "context", "histogram", "bin_width")
}
OUTPUT_EFFECTS = {name: f"output_effects.{{}}.{name}" for name in ("outputs", "changes", "errors")}
EFFECTS = {name: f"effects.{{}}.{name}" for name in ("changes", "errors", "significant")}
# Of each section.
EDGES = "edges.{}"
EDGE_ERRORS = "edge_errors.{}"
ATTRIBUTIONS = "attributions.{}"
ATTRIBUTION_ERRORS = "attribution_errors.{}"

# The same, by attribute of `InteractionGraph`.
OF_LAYERS = {"modules": MODULES, "reference_features": REFERENCE_FEATURES, "label_scores": LABEL_SCORES}
OF_SECTIONS = {
    "edges": EDGES,
    "edge_errors": EDGE_ERRORS,
    "attributions": ATTRIBUTIONS,
    "attribution_errors": ATTRIBUTION_ERRORS,
}
RECORDS = {"lineages": LINEAGES, "examples": EXAMPLES, "output_effects": OUTPUT_EFFECTS, "effects": EFFECTS}

# Keys of the header.
FORMAT = "format"
FORMAT_VERSION = "format_version"
CONTENT_HASH = "content_hash"
LAYERS = "layers"
KINDS = "kinds"
LABELS = "labels"
# By node layer, the attributes of `FeatureExamples` that are no tensors.
EXAMPLE_LAYOUTS = "example_layouts"
EXAMPLE_LAYOUT = ("counts", "shape", "before")
INFO = "info"

# Keys of the header's info, which is `InteractionGraph.info`.
SETTINGS = "settings"
MODEL_CALL = "model_call"
NODE_LAYERS = "node_layers"
NUM_SAMPLES = "n_samples"
METRIC_ERRORS = "metric_errors"
NOTES = "notes"
VERSIONS = "versions"
# Number of optimizer steps before the snapshot, and where Lightning logs its scalars.
STEP = "step"
LOGGING_STEP = "logging_step"
EPOCH = "epoch"
WEIGHTS = "weights"
WEIGHTS_HASH = "weights_hash"
METRICS = "metrics"
REFERENCE_SAMPLES = "reference_samples"
# Whether modules have the numbers that they have in the other snapshots of the run.
MODULES_TRACKED = "modules_tracked"
EFFORT = "effort"
# By node layer, the dictionary whose latents are its features: class, hash of the weights, number of latents.
DICTIONARIES = "dictionaries"
# Hash of the samples that it was computed on: examples have their numbers.
SAMPLES = "samples"
# By node layer, where in the input its positions are shown: `lib_lightning.io.places.Places`.
PLACES = "places"
# Names of the model's outputs, such as classes, as a list; of very many, a dict by number of those that are mentioned.
OUTPUT_NAMES = "output_names"
# How the effects of features on a score were found: name of the score, level, number of samples.
CAUSAL = "causal"
# Number of samples with which effects on the output were measured.
EFFECT_SAMPLES = "effect_samples"
# How effects on the output were measured: "steps" of one standard deviation, or "derivatives".
EFFECTS_BY = "effects_by"
# Of a control: its kind, the seed of its weights, and the parameters that have trained values, permuted.
CONTROL = "control"
# What the model's output stands for, and why it is taken for that.
OUTPUT_DISTRIBUTION = "output_distribution"

# Names in files of version 0.1, and what they are now. Dots separate the parts of a tensor's key.
OLD_TENSOR_NAMES = {"probes": "reference_features", "unsure": "degenerate"}
OLD_INFO_NAMES = {"probe_samples": REFERENCE_SAMPLES}


def current_tensor_key(key: str) -> str:
    """Key of a tensor today, whichever version has written the file.

    Args:
        key: The key in the file.

    Returns:
        The present key.

    Example:
        >>> current_tensor_key("probes.0"), current_tensor_key("basis.0.mean")
        ('reference_features.0', 'basis.0.mean')
    """
    return ".".join(OLD_TENSOR_NAMES.get(part, part) for part in key.split("."))


def current_header(header: dict[str, Any]) -> dict[str, Any]:
    """Header with the keys of today, whichever version has written the file.

    Args:
        header: The header in the file.

    Returns:
        The same with present keys.
    """
    info = header.get(INFO)
    if not isinstance(info, dict):
        return header
    return {**header, INFO: {OLD_INFO_NAMES.get(key, key): value for key, value in info.items()}}
