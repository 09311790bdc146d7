"""A Stable-Diffusion-compatible latent diffusion package in plain torch."""
