"""`memkern demo`: the effect of a patch, on the embedded model or on a user's model."""

from .embedded import Scene, load, memorized, ordinary, scenes
from .exhibit import exhibit
from .judge import correlation, judge
from .measure import Measured, Share, as_json, measure, table
from .run import PROMPTS, demonstrate, roles_table

__all__ = [
    "PROMPTS",
    "Measured",
    "Scene",
    "Share",
    "as_json",
    "correlation",
    "demonstrate",
    "exhibit",
    "judge",
    "load",
    "measure",
    "memorized",
    "ordinary",
    "roles_table",
    "scenes",
    "table",
]
