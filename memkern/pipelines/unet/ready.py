"""A layer after its first step: its work for the same context and hidden states of the same shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..attention.choose import Prepared
from ..attention.layer import Layer
from ..attention.paths import compute_dtype
from .keeping import is_captured


@dataclass(frozen=True, slots=True)
class Ready:
    """The work of a layer from its second step on, as long as it is called as before.

    Attributes:
        prepared: the results from the context.
        layer: the layer.
        shape, dtype: of the hidden states, `[B, N, C]`.
        products: the dtype of their products.
        sample: height and width of the UNet's sample, by which edits may be chosen.
        sizes: the names of its resolution in scopes of edits.
    """

    prepared: Prepared
    layer: Layer
    shape: torch.Size
    dtype: torch.dtype
    products: torch.dtype
    sample: tuple[int, int] | None
    sizes: frozenset[str]

    def takes(self, x: torch.Tensor, sample: tuple[int, int] | None, *, by_value: bool) -> bool:
        """True if it may be used for hidden states x: nothing about them or about the weights is new.

        Args:
            sample: height and width of the UNet's sample.
            by_value: whether the weights' values are compared even where torch counts writes to them.
        """
        return (
            x.shape == self.shape
            and sample == self.sample
            and x.dtype is self.dtype
            and compute_dtype(x) is self.products
            and not torch.is_grad_enabled()
            and not is_captured(x)
            and self.prepared.valid(self.layer, by_value=by_value)
        )
