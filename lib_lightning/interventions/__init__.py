"""Interventions: features of a model set to other values as it runs, and what each feature alone does to a score."""

from lib_lightning.interventions.edit import MEAN, edit_features, scale
from lib_lightning.interventions.effects import Effect, feature_effects, keep_effects
from lib_lightning.interventions.names import find_feature
from lib_lightning.interventions.output_effects import output_effects
from lib_lightning.interventions.plan import CausalPlan
from lib_lightning.interventions.significance import benjamini_hochberg, sign_flip_p_values

__all__ = [
    "MEAN",
    "CausalPlan",
    "Effect",
    "benjamini_hochberg",
    "edit_features",
    "feature_effects",
    "find_feature",
    "keep_effects",
    "output_effects",
    "scale",
    "sign_flip_p_values",
]
