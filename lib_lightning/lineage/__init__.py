"""Features over training: which ones are the same from snapshot to snapshot, and when they emerge."""

from lib_lightning._deprecated import renamed_names
from lib_lightning.lineage.emergence import EmergenceDetector
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.first_seen import FeatureHistory, retrace
from lib_lightning.lineage.matching import Match, match_features
from lib_lightning.lineage.reference import reference_features
from lib_lightning.lineage.tracker import FeatureTracker

__all__ = [
    "EmergenceDetector",
    "Event",
    "FeatureHistory",
    "FeatureTracker",
    "Match",
    "match_features",
    "reference_features",
    "retrace",
]

__getattr__ = renamed_names(__name__)
