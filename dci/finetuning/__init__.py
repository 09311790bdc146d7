"""ICO (Sec. 3.2) and its baselines: learning a concept from a few images."""
