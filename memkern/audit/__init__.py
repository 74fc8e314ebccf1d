"""`memkern audit`: how much a model memorizes, and what each policy does to it and to ordinary prompts."""

from .prompts import Prompt, read_prompts
from .run import run

__all__ = ["Prompt", "read_prompts", "run"]
