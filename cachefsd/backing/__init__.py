"""The directory beneath: names by descriptors, files by handles, data by direct I/O."""
