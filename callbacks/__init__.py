"""Lightning callbacks that other projects can use too: of elsa_pl they need `functional` and `links` only."""

from elsa_pl.callbacks.assignment import LatencyAwareAssignment
from elsa_pl.callbacks.clustering import BehaviorClustering
from elsa_pl.callbacks.communication import CommunicationMonitor
from elsa_pl.callbacks.links import (
    SSOP,
    LinkEncryption,
    LinkNoise,
    LinkProjection,
    LinkQuantization,
    SketchCompression,
)
from elsa_pl.callbacks.privacy import PrivacyAudit
from elsa_pl.callbacks.progress import RoundProgress
from elsa_pl.callbacks.reuse import LinkReuse
from elsa_pl.callbacks.splitting import ResourceAwareSplitting
from elsa_pl.callbacks.trust import TrustScoring

__all__ = [
    "SSOP",
    "BehaviorClustering",
    "CommunicationMonitor",
    "LatencyAwareAssignment",
    "LinkEncryption",
    "LinkNoise",
    "LinkProjection",
    "LinkQuantization",
    "LinkReuse",
    "PrivacyAudit",
    "ResourceAwareSplitting",
    "RoundProgress",
    "SketchCompression",
    "TrustScoring",
]
