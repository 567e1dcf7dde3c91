"""cachefsd: a write-back cache in persistent memory, mounted over a directory."""

__version__ = "0.1.0"
