"""cachefsd: a write-back cache in persistent memory, mounted over a directory."""

import os

__version__ = "0.1.0"

# Of numpy we need no linear algebra, and the threads it starts for that spin for 80 ms of CPU on every start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
