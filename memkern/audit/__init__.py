"""`memkern audit`: a measure of a model's memorization, and of each policy's effect on it and on ordinary prompts."""

from .front import Candidate, Swept
from .methods import split
from .models import Model, load
from .prompts import Prompt, read_prompts
from .protocol import PROTOCOLS, Protocol
from .run import run
from .screen import Screened, screen
from .sweep import sweep

__all__ = [
    "PROTOCOLS",
    "Candidate",
    "Model",
    "Prompt",
    "Protocol",
    "Screened",
    "Swept",
    "load",
    "read_prompts",
    "run",
    "screen",
    "split",
    "sweep",
]
