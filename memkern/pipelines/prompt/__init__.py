"""The way from a prompt to its embeddings: pads are swapped, rows are edited."""
