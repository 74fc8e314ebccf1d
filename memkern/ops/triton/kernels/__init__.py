"""What runs on the GPU, in Triton's language. The modules above say what it is launched with."""
