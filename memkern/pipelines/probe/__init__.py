"""A recording of what a UNet attends to."""

from .probe import probe
from .record import Probe

__all__ = ["Probe", "probe"]
