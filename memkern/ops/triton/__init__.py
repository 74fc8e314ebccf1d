"""The operators in Triton: per stem a kernel, and what it is launched with.

Importing these modules needs Triton; `memkern.ops.backends` does it on first use.
"""
