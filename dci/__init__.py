"""Personalised image generation by ICO and DCI (Jin et al., ECCV 2024)."""

__version__ = "0.1.0"
