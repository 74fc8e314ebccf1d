"""The code that runs on the GPU, in Triton's language. The modules above launch it."""
