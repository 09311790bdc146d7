"""Concepts in other programs' files, out and in: one small module for each format."""
