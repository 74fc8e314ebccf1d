"""`memkern bench`: the cost or gain of patching on a user's own pipeline and machine."""

from .measured import Run, Timed
from .results import Bench
from .run import bench

__all__ = ["Bench", "Run", "Timed", "bench"]
