"""From embeddings to the UNet: what reaches it, and its cross-attention layers."""
