"""cachefsd against its rivals in one emulated machine with persistent memory. See ../README.md."""
