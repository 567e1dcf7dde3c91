"""The engine: which block is where, and how it gets there. No FUSE, no mmap, no system calls."""
