"""Triton kernels for one CUDA device, each the same function as torch code that runs everywhere else.

Nothing here is imported on a machine without CUDA: the callers choose by the device of the tensor. Every module can be
run on a CPU with `TRITON_INTERPRET=1`, which is how the arithmetic is tested without a GPU.
"""
