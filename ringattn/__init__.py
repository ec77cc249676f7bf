"""Sequence-parallel attention: exact attention over a sequence that is cut across GPUs."""

__version__ = "0.1.0"
