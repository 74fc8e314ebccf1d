"""What a UNet attends to, recorded."""

from .probe import probe
from .record import Probe

__all__ = ["Probe", "probe"]
