"""What is around the file system: configuration, the daemon, and how to talk to it."""
