"""What is on the cache media: the pool of slots and the catalog of files."""
