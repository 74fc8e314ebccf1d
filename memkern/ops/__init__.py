"""Operators: `torch.ops.memkern.<name>`, and the validating functions of the same names here.

`backend="torch"` runs the reference in the open; any other calls the registered operator, which the dispatcher
gives to the compiled library where that serves the tensors' device, and to the same reference where not.
"""

from .backends import BACKENDS
from .edit_embeds import edit_embeds
from .edit_kv import edit_kv
from .embed_tokens import embed_tokens

__all__ = ["BACKENDS", "edit_embeds", "edit_kv", "embed_tokens"]
