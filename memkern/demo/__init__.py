"""`memkern demo`: what a patch does, on a small pipeline built here or on a model of the user's."""

from .run import POLICIES, PROMPTS, Demonstration, demonstrate
from .tiny import clip_tokenizer, tiny_pipeline, train_tokenizer

__all__ = [
    "POLICIES",
    "PROMPTS",
    "Demonstration",
    "clip_tokenizer",
    "demonstrate",
    "tiny_pipeline",
    "train_tokenizer",
]
