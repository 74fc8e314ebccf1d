"""The metrics of an audit on images: one class per metric behind one protocol, batched, on any device."""

from .choose import Weights, metrics
from .metric import Metric, Shown

__all__ = ["Metric", "Shown", "Weights", "metrics"]
