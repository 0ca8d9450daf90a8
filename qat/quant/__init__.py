"""NVFP4: the arithmetic, the presets, and how training, calibration and export see quantized weights."""

BLOCK = 16
"""NVFP4's block size: so many neighbours along the last dimension share one scale."""
