"""Ablations: the score of a model with only some features of a node layer, or some edges of a section.

This is the causal test of a basis: the fewer edges the model needs for its score, the sparser the graph. Compute the
graph on one split of the data, and the score on another.
"""

from lib_lightning._deprecated import renamed_names
from lib_lightning.ablation.attacks import EdgeAttack
from lib_lightning.ablation.curves import (
    AttackResult,
    EdgesRequiredResult,
    attack_edges,
    edge_ablation_curve,
    edges_required,
    node_ablation_curve,
)
from lib_lightning.ablation.plan import AblationPlan
from lib_lightning.ablation.scores import accuracy, log_likelihood

__all__ = [
    "AblationPlan",
    "AttackResult",
    "EdgeAttack",
    "EdgesRequiredResult",
    "accuracy",
    "attack_edges",
    "edge_ablation_curve",
    "edges_required",
    "log_likelihood",
    "node_ablation_curve",
]

__getattr__ = renamed_names(__name__)
