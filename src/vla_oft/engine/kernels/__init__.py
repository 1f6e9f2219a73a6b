"""Kernels of the engine in Triton, and what decides between them. Importing this package does not import triton."""
