"""What is about machines, not about the model: memory, files, kernels, compilation."""
