"""The two marks that whoever makes a batch and whoever reads it must agree on."""

AUDIO_TOKEN = "<|audio|>"
"""Stands for a clip in a text."""

IGNORE_INDEX = -100
"""Label of a position where nothing is supervised (PyTorch's default in cross_entropy)."""
