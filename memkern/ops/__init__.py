"""Operators: `torch.ops.memkern.<name>`, and the validating functions of the same names here.

`backend="auto"` calls the registered operator, which takes the first implementation that serves the tensors'
device; "cpp", "cuda" and "triton" name one, and "torch" runs the reference as plain torch.
"""

from . import single  # noqa: F401  # before anything is registered
from .absorbed_attention import absorbed_attention
from .attention_mass import attention_mass
from .backends import BACKENDS
from .biased_attention import biased_attention
from .edit_embeds import edit_embeds
from .edit_kv import edit_kv
from .embed_tokens import embed_tokens

__all__ = [
    "BACKENDS",
    "absorbed_attention",
    "attention_mass",
    "biased_attention",
    "edit_embeds",
    "edit_kv",
    "embed_tokens",
]
