"""The way from embeddings to the UNet: the rows that reach it, and its cross-attention layers."""
