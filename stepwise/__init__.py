"""stepwise: token-level constrained alignment of language models on a single GPU."""

__version__ = "0.1.0"
