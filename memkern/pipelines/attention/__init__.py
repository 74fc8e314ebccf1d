"""One cross-attention layer and a context; no pipeline."""
