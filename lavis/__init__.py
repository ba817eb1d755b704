"""A LAVIS-style framework that gives a frozen language model eyes by training one linear layer."""

__version__ = "0.1.0"
