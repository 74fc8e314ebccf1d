"""From a prompt to embeddings: pads swapped, rows edited."""
