"""Matters of the machine, not of the model: memory, files, kernels, compilation."""
