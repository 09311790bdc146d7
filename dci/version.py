"""The version of the package, written into every concept file."""

__version__ = "0.2.0"
