"""reprolib: structural pruning without a regularizer, as a paper you can run."""

__version__ = "0.2.0"
