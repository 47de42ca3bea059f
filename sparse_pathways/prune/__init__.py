"""Training-time control: plans, the methods of the papers, and the `Pruner` that carries them out."""

from sparse_pathways.prune import methods
from sparse_pathways.prune.plan import PruningPlan
from sparse_pathways.prune.pruner import PruneEvent, Pruner
from sparse_pathways.prune.scores import Gradient, Magnitude

__all__ = ["Gradient", "Magnitude", "PruneEvent", "Pruner", "PruningPlan", "methods"]
