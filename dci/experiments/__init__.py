"""Grids of trainings and samplings: planned, run here or on a cluster, aggregated."""
