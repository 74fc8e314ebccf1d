"""The operators in Triton: for each operator a kernel and its launch.

These modules need Triton; `memkern.ops.backends` imports them on first use.
"""
