"""The version of the package, and of the libraries that are built with it."""

__version__ = "0.1.0"
