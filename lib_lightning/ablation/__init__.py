"""How much of a graph a model needs: its score with only some features, or only some edges, left in place.

The causal check of a basis: a graph is as sparse as the number of edges that the model gets by with. Fit the graph on
one split of the data, and score on another.
"""

from lib_lightning._deprecated import renamed_names
from lib_lightning.ablation.curves import EdgesRequiredResult, edge_ablation_curve, edges_required, node_ablation_curve
from lib_lightning.ablation.plan import AblationPlan
from lib_lightning.ablation.scores import accuracy, log_likelihood

__all__ = [
    "AblationPlan",
    "EdgesRequiredResult",
    "accuracy",
    "edge_ablation_curve",
    "edges_required",
    "log_likelihood",
    "node_ablation_curve",
]

__getattr__ = renamed_names(__name__)
