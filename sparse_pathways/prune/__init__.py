"""Training-time control: plans, the methods of the papers, and the `Pruner` that carries them out."""

from sparse_pathways.prune import methods
from sparse_pathways.prune.event import PruneEvent
from sparse_pathways.prune.phases import GIVEN, Phase, begin_phase_, phase_keys, run_phases
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.pruner import Pruner
from sparse_pathways.prune.scores import Gradient, Learned, Magnitude, Movement

__all__ = [
    "GIVEN",
    "Gradient",
    "Learned",
    "Magnitude",
    "Movement",
    "Phase",
    "PruneEvent",
    "Pruner",
    "PruningPlan",
    "begin_phase_",
    "methods",
    "phase_keys",
    "run_phases",
]
